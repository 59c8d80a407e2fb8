"""What fits into given memory, and, where it does not, which changes would make it fit, each planned by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hf_qep.config import AUTO, QepConfig
from hf_qep.engine.planning.decoding import longest_context
from hf_qep.engine.planning.job import JobPlan, Planner, Request
from hf_qep.errors import ArchitectureError, BitsError, ConfigError

FEWEST_ROWS = 8
"""Calibration rows below which none are suggested."""
FEWEST_BITS = 0.8
"""Per weight of the linears; no model is known to serve with less."""
SMALL_CHUNK = 64
"""Tokens of a prompt at a time, which slows reading it down."""
MEGABYTE = 10**6
SHOWN = 3
"""Suggestions for one verdict."""


@dataclass(frozen=True)
class Limits:
    """Bytes that there are; None: not asked for."""

    gpu: int | None = None
    ram: int | None = None
    disk: int | None = None


@dataclass(frozen=True)
class Suggestion:
    """Changes of a request, and the bytes that it needs then."""

    changes: dict[str, Any]
    needs: int

    @property
    def options(self) -> str:
        """As they are typed."""
        return " ".join(_typed(name, value) for name, value in self.changes.items())


@dataclass(frozen=True)
class Verdict:
    """Whether one thing fits into one place. suggestions: what would make it fit; empty if it does or nothing does."""

    what: str
    place: str
    needs: int
    limit: int
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.needs <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        found = asdict(self) | {"fits": self.fits}
        return found | {"suggestions": [asdict(s) | {"options": s.options} for s in self.suggestions]}


Need = Callable[[JobPlan], int]
"""What a plan needs of one place for one thing."""


def verdicts(planner: Planner, request: Request, limits: Limits) -> list[Verdict]:
    """For everything that is asked for: quantising, decoding with each context, disk.

    Raises what `Planner.plan` raises for the request itself.
    """
    plan, found = planner.plan(request), []
    for what, place, need, candidates in _questions(plan, limits):
        limit = getattr(limits, place)
        if limit is None:
            continue
        verdict = Verdict(what, place, need(plan), limit)
        if not verdict.fits:
            offered = candidates(planner, request, plan, need, limit)
            verdict = Verdict(what, place, verdict.needs, limit, _fitting(planner, request, offered, need, limit))
        found.append(verdict)
    return found


def _questions(plan: JobPlan, limits: Limits) -> Iterator[tuple[str, str, Need, Callable[..., list[dict[str, Any]]]]]:
    """(what, place, need, candidates for changes)."""
    yield "quantising on the GPU", "gpu", lambda p: p.on_gpu.vram.bytes, _for_quantising
    if limits.gpu is not None:
        yield "quantising on the GPU", "ram", lambda p: p.on_gpu.ram.bytes, _for_quantising
    yield "quantising on the processor", "ram", lambda p: p.on_cpu.ram.bytes, _for_quantising
    yield "quantising", "disk", lambda p: p.on_cpu.disk.bytes, _for_quantising
    for index, decoding in enumerate(plan.decoding):
        what = "running" if decoding.context is None else f"decoding, {decoding.context} tokens of context"
        yield what, "gpu", lambda p, i=index: _at(p, i).bytes, _for_decoding
        yield what, "ram", lambda p, i=index: _at(p, i).bytes + p.process, _for_decoding


def _at(plan: JobPlan, index: int) -> Any:
    """The decoding in question, or the only one that a change leaves."""
    return plan.decoding[min(index, len(plan.decoding) - 1)]


def _for_quantising(planner: Planner, request: Request, plan: JobPlan, need: Need, limit: int) -> list[dict[str, Any]]:
    """Changes that lower memory while quantising, the ones that cost least first."""
    recipe, found = QepConfig(**request.recipe), []
    if not plan.on_cpu.streaming:
        found.append(_blockwise(recipe))
    lean = planner.plan(request.changed(found[0])) if found else plan
    if used := lean.on_cpu.ram.parts.get("activations", 0):
        found.append({"stream_room": _whole_megabytes(max(0, used - max(0, need(lean) - limit)))})
    if recipe.batch_size > 1:
        found.append({"batch_size": 1})
    rows = recipe.num_samples
    while rows > FEWEST_ROWS:
        rows = max(FEWEST_ROWS, rows // 2)
        found.append({"num_samples": rows})
    return [*found, *_smaller_tables(recipe)]


def _blockwise(recipe: QepConfig) -> dict[str, Any]:
    """The least change with which weights are read block by block."""
    changes: dict[str, Any] = {name: 0 for name in ("distill_epochs", "tune_epochs") if getattr(recipe, name)}
    if recipe.method in (AUTO, "factored"):
        changes |= {"method": "sign", "bits": 1.0} | _dropped(recipe, "max_memory")
    return changes


def _for_decoding(planner: Planner, request: Request, plan: JobPlan, need: Need, limit: int) -> list[dict[str, Any]]:
    """Changes that lower memory while decoding: smaller tables, a shorter context, fewer bits."""
    recipe = QepConfig(**request.recipe)
    found = _smaller_tables(recipe)
    if plan.sketch.cache:
        most = max(decoding.context for decoding in plan.decoding)
        spare = need(plan) - next(d.bytes for d in plan.decoding if need(plan) - d.bytes in (0, plan.process))
        context = longest_context(plan.sketch, plan.output, limit - spare, most, request.chunk)
        if context:
            found.append({"contexts": (context,)})
    if request.chunk > SMALL_CHUNK:
        found.append({"chunk": SMALL_CHUNK})
    files = plan.output.file_bytes - (need(plan) - limit)
    linears = plan.output.linears - (need(plan) - limit)
    if 8 * linears >= FEWEST_BITS * plan.output.linear_weights:
        found.append({"method": AUTO, "max_memory": _whole_megabytes(files)} | _dropped(recipe, "group_size"))
    return found


def _dropped(recipe: QepConfig, option: str) -> dict[str, None]:
    """A change that leaves an option out, if it is given."""
    return {} if getattr(recipe, option) is None else {option: None}


def _smaller_tables(recipe: QepConfig) -> list[dict[str, Any]]:
    found = []
    for bits in (8, 4):
        tables = {name: bits for name in ("embedding_bits", "head_bits") if (getattr(recipe, name) or 16) > bits}
        # One is enough where they are tied, or where it does; a model without a head has no other.
        found += [{name: bits} for name in tables]
        if len(tables) > 1:
            found.append(tables)
    return found


def _fitting(
    planner: Planner, request: Request, offered: list[dict[str, Any]], need: Need, limit: int
) -> tuple[Suggestion, ...]:
    """Single changes that fit, one of a kind; if there is none, as many of them together as it takes."""
    found: dict[frozenset[str], Suggestion] = {}
    for changes in offered:
        needs = _need(planner, request.changed(changes), need)
        if needs is not None and needs <= limit:
            kind = frozenset(changes) - {"head_bits"} or frozenset({"embedding_bits"})
            found.setdefault(kind, Suggestion(changes, needs))
    if found:
        return tuple(found.values())[:SHOWN]
    together: dict[str, Any] = {}
    best = need(planner.plan(request))
    for changes in offered:
        needs = _need(planner, request.changed(together | changes), need)
        if needs is None or needs >= best:
            continue
        together, best = together | changes, needs
        if needs <= limit:
            return (Suggestion(together, needs),)
    return ()


def _need(planner: Planner, request: Request, need: Need) -> int | None:
    """None for what cannot be had."""
    try:
        return need(planner.plan(request))
    except (ArchitectureError, BitsError, ConfigError):
        return None


def _whole_megabytes(size: int) -> int:
    return size - size % MEGABYTE if size >= MEGABYTE else size


def _typed(name: str, value: Any) -> str:
    option = "--context" if name == "contexts" else f"--{name.replace('_', '-')}"
    if value is None:
        return f"(no {option})"
    if name in ("max_memory", "stream_room"):
        value = f"{value // MEGABYTE}MB" if value and value % MEGABYTE == 0 else f"{value}B"
    return f"{option} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
