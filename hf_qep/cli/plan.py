"""`hf-qep plan`: what quantising a model will take and give, and whether it fits, before any weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_qep.cli import output
from hf_qep.cli.quantize import (
    BITS_HELP,
    DISTILL_HELP,
    EFFORT_HELP,
    EXPORT_HELP,
    LOOKAHEAD_HELP,
    MEMORY_HELP,
    METHOD_HELP,
    ROOM_HELP,
    SIGNS_HELP,
    TABLE_HELP,
    TUNE_HELP,
)
from hf_qep.files import parse_size

if TYPE_CHECKING:
    from hf_qep.engine.planning.job import JobPlan, Planner, Request
    from hf_qep.engine.planning.limits import Limits, Verdict
    from hf_qep.engine.planning.origin import Origin

MODEL_HELP = "Hub id, folder, or config.json of the float model; its configuration and file headers alone are read."
GPU_HELP = "Memory of a GPU, such as 24GB: does it fit?"
RAM_HELP = "Memory of the machine, such as 64GB: does it fit?"
DISK_HELP = "Free disk, such as 500GB: does it fit?"
CONTEXT_HELP = "Tokens of context while decoding; may be repeated. Left out: several, up to what the model takes."
CHUNK_HELP = "Tokens of a prompt that are read at a time while decoding."
RECIPE = (
    "bits", "method", "max_memory", "group_size", "effort", "num_samples", "seq_len", "batch_size", "propagation",
    "residual", "tune_epochs", "tune_lookahead", "distill_epochs", "distill_signs", "embedding_bits", "head_bits",
    "export",
)  # fmt: skip
"""Options that are fields of QepConfig."""


def plan_command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub model.")] = None,
    gpu: Annotated[str | None, typer.Option(help=GPU_HELP)] = None,
    ram: Annotated[str | None, typer.Option(help=RAM_HELP)] = None,
    disk: Annotated[str | None, typer.Option(help=DISK_HELP)] = None,
    context: Annotated[list[int] | None, typer.Option(min=1, help=CONTEXT_HELP)] = None,
    chunk: Annotated[int, typer.Option(min=1, help=CHUNK_HELP)] = 512,
    stream_room: Annotated[str | None, typer.Option(help=ROOM_HELP)] = None,
    bits: Annotated[float, typer.Option(help=BITS_HELP)] = 1.0,
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "sign",
    max_memory: Annotated[str | None, typer.Option(help=MEMORY_HELP)] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale. Left out: the row.")] = None,
    effort: Annotated[str, typer.Option(help=EFFORT_HELP)] = "balanced",
    num_samples: Annotated[int | None, typer.Option(help="Calibration rows.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    propagation: Annotated[float, typer.Option(help="Strength of error propagation (QEP), 0 to 1.")] = 1.0,
    residual: Annotated[bool, typer.Option(help="Correct the error that the residual stream carries too.")] = True,
    tune_epochs: Annotated[int | None, typer.Option(help=TUNE_HELP)] = None,
    tune_lookahead: Annotated[int | None, typer.Option(help=LOOKAHEAD_HELP)] = None,
    distill_epochs: Annotated[int | None, typer.Option(help=DISTILL_HELP)] = None,
    distill_signs: Annotated[bool | None, typer.Option(help=SIGNS_HELP)] = None,
    embedding_bits: Annotated[int | None, typer.Option(help=TABLE_HELP.format("word embeddings"))] = None,
    head_bits: Annotated[int | None, typer.Option(help=TABLE_HELP.format("output head"))] = None,
    export: Annotated[str | None, typer.Option(help=EXPORT_HELP)] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Module that stays float; may be repeated.")] = None,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Show what quantising a model will take and give, and whether it fits."""
    recipe = {name: value for name, value in locals().items() if name in RECIPE} | {"skip_modules": skip}
    room = None if stream_room is None else parse_size(stream_room, zero=True)
    sizes = {
        name: None if size is None else parse_size(size) for name, size in (("gpu", gpu), ("ram", ram), ("disk", disk))
    }
    request = {"contexts": tuple(context or ()), "chunk": chunk, "stream_room": room}
    origin, planner, request = _begin(model, revision, recipe, request, sizes["ram"])
    from hf_qep.engine.planning.limits import Limits, verdicts

    limits = Limits(**sizes)
    plan, found = planner.plan(request), verdicts(planner, request, limits)
    if as_json:
        output.print_json(_json(model, origin, plan, limits, found))
    else:
        _show(model, origin, plan, found, quiet)


def _begin(
    model: str, revision: str | None, recipe: dict[str, Any], request: dict[str, Any], ram: int | None
) -> tuple[Origin, Planner, Request]:
    """ram: of the machine that the job will run on; None: this one, as it is now."""
    from hf_qep.config import QepConfig
    from hf_qep.engine.on_demand import free_memory
    from hf_qep.engine.planning.costs import load_costs
    from hf_qep.engine.planning.job import Planner, Request
    from hf_qep.engine.planning.origin import find_origin
    from hf_qep.evaluation.memory import working_bytes

    QepConfig(**recipe)  # refused before anything is downloaded
    origin = find_origin(model, revision)
    process = working_bytes()
    free = free_memory() if ram is None else max(0, ram - process)
    planner = Planner(origin.config, origin.dtype, load_costs(), process=process, free=free)
    return origin, planner, Request(recipe, **request)


def _json(model: str, origin: Origin, plan: JobPlan, limits: Limits, found: list[Verdict]) -> dict[str, Any]:
    limited = {"gpu": limits.gpu, "ram": limits.ram, "disk": limits.disk}
    facts = {"model": model, "dtype_from": origin.said, **plan.to_dict(), "limits": limited}
    return facts | {"verdicts": [verdict.to_dict() for verdict in found]}


def _show(model: str, origin: Origin, plan: JobPlan, found: list[Verdict], quiet: bool) -> None:
    _show_output(model, origin, plan)
    _show_memory(plan)
    _show_seconds(plan)
    rows = [
        [_context(d.context), *map(output.human_bytes, (d.weights, d.cache, d.activations, d.bytes))]
        for d in plan.decoding
    ]
    output.print_table("loaded and decoding one row", ["context", "weights", "cache", "activations", "together"], rows)
    if found:
        rows = [
            [
                v.what,
                v.place.upper() if v.place != "disk" else v.place,
                *map(output.human_bytes, (v.needs, v.limit)),
                "yes" if v.fits else "no",
                _advice(v),
            ]
            for v in found
        ]
        output.print_table("what fits", ["", "place", "needs", "has", "fits", "would fit with"], rows)
    if not quiet:
        output.note("Memory of a GPU is that of tensors; its driver and libraries take some more.")


def _show_output(model: str, origin: Origin, plan: JobPlan) -> None:
    out = plan.output
    facts = {
        "weights": f"{plan.sketch.parameters:,}",
        "float files": f"{output.human_bytes(out.float_bytes)}, {str(origin.dtype).removeprefix('torch.')} by "
        f"{origin.said}",
        "output, quantised linears": output.human_bytes(out.linears),
        "output, embedding": output.human_bytes(out.embedding),
        "output, head": output.human_bytes(out.head) if out.head else "tied, or none",
        "output, norms and the rest": output.human_bytes(out.rest),
        "output, headers": output.human_bytes(out.headers),
        "output, weight files": f"{output.human_bytes(out.file_bytes)}{'' if out.exact else ' at most'}",
        "saved": f"{100 * out.saving:.1f} %",
        "bits per weight, quantised linears": out.bits_linear,
        "bits per weight, embeddings and head": out.bits_tables,
        "bits per weight, whole model": out.bits_model,
    }
    output.print_facts(model, facts)


def _show_memory(plan: JobPlan) -> None:
    rows = []
    for name, memory in (
        ("on the processor", plan.on_cpu),
        ("on a GPU", plan.on_gpu),
        ("all weights at once", plan.whole),
    ):
        sizes = [memory.ram.bytes, memory.vram.bytes if memory.vram else None, memory.disk.bytes]
        rows.append([name, *("-" if size is None else output.human_bytes(size) for size in sizes), memory.why])
    output.print_table("most that quantising takes", ["", "RAM", "VRAM", "disk", "why"], rows)
    peak = plan.on_cpu.ram
    rows = [[part, output.human_bytes(size)] for part, size in peak.parts.items()]
    output.print_table(f"RAM on the processor, at its peak: {peak.moment}", ["", ""], rows)


def _show_seconds(plan: JobPlan) -> None:
    rows = [[name, _duration(seconds)] for name, seconds in plan.seconds.phases.items()]
    rows.append(["together", _duration(plan.seconds.total)])
    output.print_table(f"time on the processor: {plan.seconds.basis}", ["", ""], rows)


def _context(tokens: int | None) -> str:
    return "-" if tokens is None else f"{tokens:,}"


def _advice(verdict: Verdict) -> str:
    if verdict.fits:
        return "-"
    said = [f"{s.options} ({output.human_bytes(s.needs)})" for s in verdict.suggestions]
    return "; or ".join(said) if said else "nothing that is offered here"


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is read best."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
