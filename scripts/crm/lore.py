"""What every sales team knows: fields of deals, what can stand in them, and which way it usually points.

The numbers are common sense in logits, not taken from any table: a champion helps, a long silence does not. Worlds
(`worlds.py`) bend them, so that they are a fair first guess in a world and never its rule.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """A column of a table. values: what can stand in it and its usual effect; a number from 0 to 99 if there are none.
    slope: effect of the highest against the lowest number."""

    name: str
    values: dict[str, float] | None = None
    slope: float = 0.0


YES_NO = ("yes", "no")


def _flag(name: str, effect: float) -> Field:
    return Field(name, {"yes": effect / 2, "no": -effect / 2})


def _kinds(name: str, **values: float) -> Field:
    return Field(name, {value.replace("_", " "): effect for value, effect in values.items()})


FIELDS: tuple[Field, ...] = (
    Field("age", slope=0.0),
    Field("company size", slope=0.3),
    Field("annual revenue", slope=0.5),
    Field("budget", slope=1.2),
    Field("deal value", slope=-0.7),
    Field("discount", slope=0.8),
    Field("balance", slope=0.7),
    Field("days open", slope=-1.2),
    Field("days since last contact", slope=-1.0),
    Field("day of month", slope=0.0),
    Field("contacts this campaign", slope=-0.9),
    Field("earlier contacts", slope=0.6),
    Field("meetings held", slope=1.3),
    Field("emails opened", slope=1.0),
    Field("site visits", slope=0.8),
    Field("support tickets", slope=-0.6),
    Field("satisfaction score", slope=1.3),
    Field("years as customer", slope=0.7),
    Field("seats", slope=0.2),
    Field("competitors", slope=-1.0),
    Field("response time", slope=-1.1),
    Field("lead score", slope=1.5),
    _flag("champion", 1.4),
    _flag("decision maker met", 1.5),
    _flag("budget confirmed", 1.5),
    _flag("trial", 1.2),
    _flag("demo given", 0.9),
    _flag("proposal sent", 0.8),
    _flag("legal review", 0.6),
    _flag("existing customer", 1.0),
    _flag("housing loan", -0.5),
    _flag("personal loan", -0.5),
    _flag("credit in default", -1.0),
    _flag("newsletter", 0.4),
    _flag("price objection", -1.2),
    _flag("security questions", -0.2),
    _kinds("previous outcome", success=1.4, failure=-0.7, unknown=-0.1, other=0.0),
    _kinds("contact", cellular=0.2, telephone=0.0, unknown=-0.6, email=0.1, in_person=0.6),
    _kinds("lead source", referral=0.9, website=0.2, cold_call=-0.8, fair=0.1, partner=0.6, advert=-0.3),
    _kinds("stage", new=-0.8, qualified=-0.1, proposal=0.4, negotiation=0.9),
    _kinds("urgency", low=-0.9, medium=0.0, high=1.0),
    _kinds("region", north=0.0, south=0.0, east=0.0, west=0.0),
    _kinds("product", basic=0.2, standard=0.1, premium=-0.2, custom=-0.3),
    _kinds(
        "industry", retail=0.0, banking=-0.1, health=0.1, software=0.3, transport=0.0, energy=-0.1, public_sector=-0.4
    ),
    _kinds(
        "job",
        management=0.2,
        technician=0.0,
        blue_collar=-0.4,
        admin=0.1,
        services=-0.2,
        retired=0.4,
        student=0.5,
        self_employed=0.0,
        unemployed=0.0,
        entrepreneur=-0.1,
        housemaid=-0.2,
        unknown=0.0,
    ),
    _kinds("marital status", married=-0.1, single=0.2, divorced=0.0),
    _kinds("education", primary=-0.3, secondary=0.0, tertiary=0.3, unknown=0.0),
    _kinds(
        "month",
        jan=0.0,
        feb=0.1,
        mar=0.3,
        apr=0.1,
        may=-0.1,
        jun=0.1,
        jul=-0.2,
        aug=-0.2,
        sep=0.3,
        oct=0.2,
        nov=0.0,
        dec=0.3,
    ),
    _kinds("weekday", monday=-0.1, tuesday=0.1, wednesday=0.1, thursday=0.1, friday=-0.1),
    _kinds("sales agent", anna=0.1, boris=0.0, chen=0.1, dana=0.0, emil=-0.1, farah=0.0),
    _kinds("payment terms", monthly=0.1, yearly=0.2, prepaid=-0.2, financed=0.0),
)

CODES = ("a", "b", "c", "d", "e", "f")
OPAQUE = tuple(Field(f"code {letter}", dict.fromkeys(CODES, 0.0)) for letter in "uvwxyz")
"""Fields that say nothing by themselves: what they mean can only be seen in examples."""


@dataclass(frozen=True)
class Remark:
    """Something a note can say, in several wordings, and its usual effect."""

    effect: float
    wordings: tuple[str, ...]


REMARKS: tuple[Remark, ...] = (
    Remark(1.2, ("they asked for a contract", "wants the contract this week", "ready to sign soon")),
    Remark(0.9, ("their director joined the call", "the decision maker was on the call", "spoke with the director")),
    Remark(0.8, ("asked for a quote", "wants a price for more seats", "requested an offer")),
    Remark(0.7, ("liked the demo", "the demo went well", "was pleased with the demo")),
    Remark(0.6, ("a friend recommended us", "came to us by a referral", "knows us from a partner")),
    Remark(0.5, ("has a clear need", "the problem is urgent for them", "needs a solution this quarter")),
    Remark(0.2, ("asked about support", "had questions on training", "wanted to know the service hours")),
    Remark(0.0, ("call was short", "only a short talk", "talked for a few minutes")),
    Remark(0.0, ("will be away next week", "is on holiday", "travels until friday")),
    Remark(-0.2, ("wants to think about it", "needs more time", "asked us to call later")),
    Remark(-0.6, ("found it too expensive", "said the price is too high", "has no budget left")),
    Remark(-0.7, ("also looks at a competitor", "compares us with another vendor", "has a trial elsewhere")),
    Remark(-0.9, ("did not answer our calls", "no reply for weeks", "stopped answering emails")),
    Remark(-1.1, ("the project was frozen", "all spending is stopped", "the project is on hold")),
    Remark(-1.2, ("asked us not to call again", "is not interested", "wants to be left alone")),
)

QUESTIONS = (
    "will this deal be won",
    "will the customer buy",
    "will the contact say yes",
    "will the offer be accepted",
    "will the client sign",
)
"""What is asked; the answer is yes or no."""
