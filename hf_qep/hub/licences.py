"""May a 1-bit copy or a student of a model be published under the licence of its original, and on what terms.

Quantised weights are an adaptation of the original, and so are those of a student, so its licence decides. The names
are those that the Hub knows. This is a rule of caution of a tool, no legal advice: what is not known is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_OPEN = (
    "apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear isc zlib unlicense wtfpl cc0-1.0 pddl ncsa ms-pl "
    "cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 afl-3.0 artistic-2.0 bsl-1.0 ecl-2.0 epl-1.0 "
    "epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr gfdl mpl-2.0 "
    "osl-3.0 odbl odc-by ofl-1.1 postgresql lppl-1.3c cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 "
    "openmdw-1.0"
)
"""Adaptations may be published, if notices (and for copyleft the licence itself) are kept; the card keeps both."""
_TERMS = (
    "openrail openrail++ bigscience-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m creativeml-openrail-m "
    "llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma grok2-community c-uda apple-ascl"
)
"""Adaptations may be published on terms of their own: a name, a notice, rules of use to pass on."""
_RESEARCH = "apple-amlr intel-research h-research fair-noncommercial-research-license deepfloyd-if-license"
"""Research or other NonCommercial use only."""


@dataclass(frozen=True)
class LicenceDecision:
    """What a licence allows. reason: one sentence for a person."""

    licence: str
    publish_public: bool
    """may be shown to everybody, if what the next two ask for is done"""
    needs_acknowledgement: bool
    """the publisher must have read it and say so"""
    gate: bool
    """readers must agree to it first"""
    reason: str


def decide(licence: str | None) -> LicenceDecision:
    """Decide about a licence as a card names it; None: the original names none."""
    name = (licence or "").strip().lower()
    if not name:
        return LicenceDecision("none", False, False, False, "no licence is known, so nobody may copy the original")
    if name in _OPEN.split():
        return LicenceDecision(name, True, False, False, f"the licence {name} allows adaptations to be published")
    if re.fullmatch(r"cc-by(-nc)?-nd-\d\.\d", name):
        return LicenceDecision(
            name,
            False,
            False,
            False,
            f"the licence {name} allows no adaptations to be shared, and weights made from it are one",
        )
    if re.fullmatch(r"cc-by-nc(-sa)?-\d\.\d", name) or name in _RESEARCH.split():
        return LicenceDecision(name, True, True, True, f"the licence {name} allows NonCommercial use only")
    if name in _TERMS.split():
        return LicenceDecision(name, True, True, False, f"the licence {name} sets terms for adaptations")
    if name == "other":
        return LicenceDecision(
            name, True, True, False, "the licence is none of the usual ones, and only its text says what is allowed"
        )
    return LicenceDecision(name, False, False, False, f"the licence {name!r} is not known, so nothing can be concluded")
