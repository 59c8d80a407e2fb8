"""`hf-qep eval`: a quantised checkpoint against its float original, written to `hf_qep_eval.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_qep.cli import output
from hf_qep.cli.placement import DeviceOption, DtypeOption, to_device, to_dtype
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from hf_qep.evaluation.estimates import Estimate
    from hf_qep.evaluation.pair import EvalOptions
    from hf_qep.evaluation.record import EvalRecord
    from hf_qep.evaluation.retention import Interval
    from hf_qep.evaluation.samples import Samples

HELD_OUT = Path(__file__).resolve().parent.parent / "demo_text" / "held_out.txt"

ON_DEMAND_NOTE = (
    "The original does not fit into the free memory and is read block by block, once per batch and once per token of "
    "--samples."
)

TextOption = Annotated[
    str | None,
    typer.Option(help="Held-out text: file, file:column or Hub data set. Left out: three short tales, English."),
]
TasksOption = Annotated[
    str | None,
    typer.Option(help="Comma-separated: NAME=FILE (parquet, jsonl, txt), NAME of --tasks-dir, or one of lm_eval."),
]
TasksDirOption = Annotated[
    Path | None, typer.Option(help="Folder of task files; all of them are run unless --tasks names some.")
]
LimitOption = Annotated[int | None, typer.Option(help="Items per task, drawn by --seed. Left out: all.")]
WindowOption = Annotated[int | None, typer.Option(help="Tokens per window. Left out: up to 2048.")]
StrideOption = Annotated[int | None, typer.Option(help="New tokens per window. Left out: half the window.")]
BosOption = Annotated[str, typer.Option(help="Where BOS stands: auto, window, document or none.")]
MaxTokensOption = Annotated[int | None, typer.Option(help="Score no more of the text than this.")]
SamplesOption = Annotated[
    int, typer.Option(help="Prompts that both models continue, for the model card; 0: none.", min=0, max=64)
]


def eval_command(
    model_dir: Annotated[str, typer.Argument(help="Folder or Hub id of the quantised checkpoint.")],
    baseline: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the float model. Left out: what the manifest names.")
    ] = None,
    text: TextOption = None,
    tasks: TasksOption = None,
    tasks_dir: TasksDirOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Record file. Left out: hf_qep_eval.json in the checkpoint.")
    ] = None,
    limit: LimitOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    bos: BosOption = "auto",
    max_tokens: MaxTokensOption = None,
    batch_size: Annotated[int, typer.Option(help="Windows or prompts per forward pass.")] = 4,
    num_fewshot: Annotated[int, typer.Option(help="Solved examples per question, for tasks of lm_eval.")] = 0,
    speed: Annotated[bool, typer.Option("--speed", help="Also time both models and take their peak memory.")] = False,
    samples: SamplesOption = 4,
    seed: Annotated[int, typer.Option(help="Seed of the items that --limit draws.")] = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Measure what quantisation cost: perplexity, KL, agreement, tasks, bits, memory and speed."""
    job = Job(model_dir, baseline, device, dtype, quiet or as_json, whole=speed)
    job.check()
    from hf_qep.evaluation.pair import EvalOptions
    from hf_qep.evaluation.speed import SpeedOptions

    options = EvalOptions(
        window=window,
        stride=stride,
        bos=bos,
        max_tokens=max_tokens,
        batch_size=batch_size,
        limit=limit,
        num_fewshot=num_fewshot,
        seed=seed,
        speed=SpeedOptions() if speed else None,
    )
    held_out, source = read_held_out(text)
    pair = load_pair(job)
    record = pair.evaluate(held_out, source, choose_tasks(tasks, tasks_dir, limit, seed), options)
    # The record is safe before the samples are tried: they are the smaller part.
    files = [record.write(out or Path(model_dir))] if out or Path(model_dir).is_dir() else []
    if files and (recorded := pair.samples(held_out, record, samples)):
        files.append(recorded.write(files[0].parent))
    if as_json:
        output.print_json(record.to_dict())
        return
    show(record)
    if files and not quiet:
        output.note(f"Record: {', '.join(map(str, files))}")


@dataclass(frozen=True)
class Job:
    """Which models to measure and where."""

    subject: str
    """folder or Hub id of the quantised checkpoint"""
    baseline: str | None
    """folder or Hub id of the float model; None: what the manifest names"""
    device: str
    dtype: str
    quiet: bool
    whole: bool = False
    """have the float model in memory even if it hardly fits, because it will be timed"""

    def check(self) -> None:
        """Refuse an unknown device or dtype before anything is loaded. Raises ConfigError."""
        to_device(self.device)
        to_dtype(self.dtype)


@dataclass(frozen=True)
class Pair:
    """Both models, loaded."""

    job: Job
    float_model: Any
    quantized_model: Any
    tokenizer: Any
    folder: Path
    baseline_name: str
    baseline_folder: Path

    def evaluate(self, texts: list[str], source: str, tasks: list[Any], options: EvalOptions) -> EvalRecord:
        """Measure them. Raises QepError."""
        from hf_qep.evaluation.environment import command_line
        from hf_qep.evaluation.pair import evaluate_pair

        return evaluate_pair(
            self.float_model,
            self.quantized_model,
            self.tokenizer,
            texts,
            tasks=tasks,
            options=options,
            source=source,
            subject_name=self.job.subject,
            baseline_name=self.baseline_name,
            subject_folder=self.folder,
            baseline_folder=self.baseline_folder,
            command=command_line(),
            progress=Progress(self.job.quiet),
        )

    def samples(self, texts: list[str], record: EvalRecord, count: int) -> Samples | None:
        """What both write after `count` prompts; None if they write nothing."""
        from hf_qep.evaluation.samples import record_samples

        models = (self.float_model, self.quantized_model)
        return record_samples(*models, self.tokenizer, texts, record, count=count, progress=Progress(self.job.quiet))


def load_pair(job: Job) -> Pair:
    """Load the checkpoint and its float original. Raises QepError."""
    from hf_qep.engine.fitting import load_to_run
    from hf_qep.engine.source import load_quantized, resolve_model

    folder = resolve_model(job.subject)
    name, revision = (job.baseline, None) if job.baseline else manifest_baseline(folder)
    baseline_folder = resolve_baseline(name, revision, given=job.baseline is not None)
    place, stored_as = to_device(job.device), to_dtype(job.dtype)
    loaded = load_to_run(baseline_folder, stored_as or "auto", place, whole=job.whole)
    if loaded.on_demand and not job.quiet:
        output.note(ON_DEMAND_NOTE)
    quantized = load_quantized(folder, type(loaded.model), stored_as).to(place)
    return Pair(job, loaded.model, quantized, loaded.processor, folder, name, baseline_folder)


def manifest_baseline(folder: Path) -> tuple[str, str | None]:
    """`base_model` and `revision` of the checkpoint's manifest. Raises ConfigError if there is none."""
    from hf_qep.engine.source import original_of

    if found := original_of(folder):
        return found
    raise ConfigError(f"{folder.name!r} does not say which model it was made from; give it with --baseline MODEL")


def resolve_baseline(name: str, revision: str | None, *, given: bool) -> Path:
    """Folder of the float model, at the commit it was quantised from.

    The manifest knows names, not folders; if a name cannot be had, the error says what to do.
    """
    from hf_qep.engine.source import resolve_model

    try:
        return resolve_model(name, revision)
    except CheckpointError as error:
        if given:
            raise
        raise CheckpointError(
            f"the manifest names {name!r} as the float model, and it cannot be had ({error}); give its folder or Hub "
            "id with --baseline"
        ) from error


def choose_tasks(tasks: str | None, folder: Path | None, limit: int | None, seed: int) -> list[Any]:
    """Tasks of `--tasks` and `--tasks-dir`."""
    from hf_qep.evaluation.tasks import find_tasks

    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--tasks-dir {str(folder)!r} is not a folder")
    return find_tasks([t.strip() for t in (tasks or "").split(",") if t.strip()], folder, limit=limit, seed=seed)


def read_held_out(text: str | None) -> tuple[list[str], str]:
    """The evaluation texts and what the record calls them."""
    from hf_qep.engine.calibration import read_texts
    from hf_qep.public_names import public_name

    return read_texts(text or str(HELD_OUT)), public_name(text or HELD_OUT.name)


def show(record: EvalRecord) -> None:
    """The record as tables."""
    output.print_table(
        f"{record.subject.name} against {record.baseline.name}", ["", "float", "quantised"], _rows(record)
    )
    if record.tasks:
        columns = ["task", "score", "chance", "float", "quantised", "n", "kept [95 %]", "kept above chance [95 %]"]
        output.print_table("Tasks", columns, _task_rows(record))
    notes = [*record.notes, *(f"{t.name}: {t.note}" for t in record.tasks if t.note)]
    notes += [f"{t.name} {m.name}: {m.retention.note}" for t in record.tasks for m in t.metrics if m.retention.note]
    for sentence in notes:
        output.say(f"* {sentence}")


def _rows(record: EvalRecord) -> list[tuple[str, str | None, str | None]]:
    bits, cost, text = record.bits, record.cost, record.text
    rows: list[tuple[str, Any, Any]] = [
        ("bits per weight, quantised linears", None, bits.linear),
        ("bits per weight, whole model", None, bits.model),
    ]
    if text is not None:
        rows += [
            (f"perplexity, {text.kl.n} tokens", text.baseline.perplexity, text.subject.perplexity),
            ("bits per byte", text.baseline.bits_per_byte, text.subject.bits_per_byte),
            ("KL to float, nats per token", None, text.kl),
            ("same first choice as float", None, text.top1_agreement),
        ]
    if record.embeddings is not None:
        rows += [
            (f"1 - cosine, {record.embeddings.sentences} sentences", None, record.embeddings.cosine_distance),
            ("neighbours kept", None, record.embeddings.neighbour_overlap),
        ]
    if cost is not None:
        rows.append(("weights in memory", *(output.human_bytes(c.weight_bytes) for c in (cost.baseline, cost.subject))))
    if cost is not None and cost.subject.speed is not None and cost.baseline.speed is not None:
        rows.append(("decode, tokens/s", cost.baseline.speed.decode, cost.subject.speed.decode))
        rows.append(("prefill, tokens/s", cost.baseline.speed.prefill, cost.subject.speed.prefill))
    return [(name, shown(theirs), shown(ours)) for name, theirs, ours in rows]


def _task_rows(record: EvalRecord) -> list[list[Any]]:
    rows = []
    for task in record.tasks:
        for metric in task.metrics:
            kept = metric.retention
            ends = [with_interval(kept.raw), with_interval(kept.corrected)]
            rows.append(
                [
                    task.prompt,
                    metric.name,
                    task.chance,
                    shown(metric.baseline),
                    shown(metric.subject),
                    task.items,
                    *ends,
                ]
            )
    return rows


def shown(value: Estimate | float | str | None) -> str:
    """A measurement with its standard error, as text."""
    if value is None or isinstance(value, (str, float, int)):
        return output.cell_text(value)
    if value.stderr is None:
        return output.cell_text(value.value)
    return f"{value.value:.4g} ± {value.stderr:.2g}"


def with_interval(part: Interval | None) -> str:
    """A retention with its 95 % interval, as text."""
    if part is None:
        return output.cell_text(None)
    if part.low is None or part.high is None:
        return f"{part.value:.3g} [unbounded]"
    return f"{part.value:.3g} [{part.low:.3g}, {part.high:.3g}]"
