"""`hf-qep distill`: from a teacher and rows of one task to a small specialist, step by step in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_qep.cli import GuardedCommand, output
from hf_qep.cli.placement import DeviceOption, to_device
from hf_qep.errors import ConfigError
from hf_qep.files import check_output
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from hf_qep.search.results import SearchResult

app = typer.Typer(
    name="distill",
    help="Make a small specialist of a large model: analyze, search, materialize, train, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TASKS = "causal-lm, text-classification, image-classification, image-embedding or object-detection"
DATA_HELP = (
    "Rows of the task: a jsonl, csv or parquet file, a folder of images by class, or a data set id:config:split."
)
ANSWERS_HELP = "Completions that are the classes of a language model, as they follow the prompt: ' yes' ' no'."
WorkArgument = Annotated[Path, typer.Argument(help="Folder that `distill analyze` has made.")]
PickOption = Annotated[
    str, typer.Option(help="balanced, fast, accurate, or the first digits of a student's key in the report.")
]
SpecOption = Annotated[Path | None, typer.Option(help="File with a specification, instead of one that was found.")]


@app.command("analyze", cls=GuardedCommand)
def analyze_command(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder of the teacher.")],
    task: Annotated[str, typer.Option(help=f"{TASKS}.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for everything about this student.")],
    test: Annotated[str | None, typer.Option(help="Rows to report on. Left out: a share of the data.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a teacher on the Hub.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Prompt or text with {column} in the place of columns of a row.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column with the text. Left out: prompt, or text.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the answer. Left out: completion, or label.")] = None,
    image: Annotated[str, typer.Option(help="Column with the image.")] = "image",
    classes: Annotated[list[str] | None, typer.Option(help="Name of a class, in order; may be repeated.")] = None,
    answer: Annotated[list[str] | None, typer.Option(help=ANSWERS_HELP + " May be repeated.")] = None,
    max_length: Annotated[int, typer.Option(help="Most tokens per row.")] = 512,
    limit: Annotated[int | None, typer.Option(help="Most rows, drawn at random.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of rows to judge by, and again to report on.")] = 0.15,
    batch_size: Annotated[int, typer.Option(help="Rows per pass.")] = 8,
    additions: Annotated[bool, typer.Option(help="Also say where another layer would help most.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of splits and draws.")] = 0,
    device: DeviceOption = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Look at what each layer and unit of the teacher does for the task, in one pass over its rows."""
    check_output(out, overwrite=overwrite)
    to_device(device)
    from hf_qep.cli.distill_analyze import analyze
    from hf_qep.cli.distill_job import Job

    job = Job(
        teacher, task, data, revision, test, template, text, label, image,
        tuple(classes or ()) or None, tuple(answer or ()) or None, max_length, limit, held_out, seed, device,
    )  # fmt: skip
    result = analyze(job, out, batch_size, additions, overwrite, Progress(quiet or as_json))
    if as_json:
        output.print_json(result)
        return
    output.print_facts(str(out), result["teacher"])
    columns = ["layer", "influence, answers", "influence, all", "attention adds", "mlp adds"]
    output.print_table("Layers of the teacher", columns, [list(row.values()) for row in result["layers"]])
    if result["additions"]:
        output.print_table(
            "Another layer", ["before layer", "copy of", "gain"], [list(row.values()) for row in result["additions"]]
        )
    if not quiet:
        output.note(f"Next: hf-qep distill search {out} --latency-ms ... (or --memory-mb, --parameters)")


@app.command("search", cls=GuardedCommand)
def search_command(
    work: WorkArgument,
    latency_ms: Annotated[float | None, typer.Option(help="Most milliseconds of a step.")] = None,
    memory_mb: Annotated[float | None, typer.Option(help="Most memory of a step, in MB of 10^6 bytes.")] = None,
    parameters: Annotated[float | None, typer.Option(help="Most parameters.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens of each row that a step computes.")] = 128,
    context: Annotated[
        int, typer.Option(help="Tokens in the cache before them; with --sequence 1 a step decodes.")
    ] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads of the processor. Left out: torch's choice.")] = None,
    trials: Annotated[int, typer.Option(help="Students that are considered, by all processes together.")] = 64,
    proxy_steps: Annotated[int, typer.Option(help="Steps of a short distillation.")] = 30,
    climbers: Annotated[int, typer.Option(help="Most students that are distilled shortly.")] = 27,
    hidden_size: Annotated[list[int] | None, typer.Option(help="Allowed width; may be repeated.")] = None,
    ffn_step: Annotated[int | None, typer.Option(help="Step between widths of the MLP. Left out: a quarter.")] = None,
    min_layers: Annotated[int, typer.Option(help="Fewest layers.")] = 1,
    max_added: Annotated[int, typer.Option(help="Most layers that are added.")] = 0,
    bits: Annotated[
        list[float] | None, typer.Option(help="Bits per weight that blocks may also have; may be repeated.")
    ] = None,
    trim_vocabulary: Annotated[
        bool, typer.Option("--trim-vocabulary", help="Let students keep only the tokens of the task.")
    ] = False,
    homogeneous: Annotated[
        bool, typer.Option("--homogeneous", help="Only students that a stock class of transformers can load.")
    ] = False,
    sampler: Annotated[str, typer.Option(help="nsga2 or tpe.")] = "nsga2",
    storage: Annotated[
        str | None, typer.Option(help="Storage of Optuna that several processes share. Left out: a file in the folder.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Search for the best student under limits, or go on with a search that was stopped."""
    from hf_qep.cli.distill_job import open_job
    from hf_qep.cli.distill_search import Wishes, search

    wishes = Wishes(
        limits={"latency_ms": latency_ms, "memory_mb": memory_mb, "parameters": parameters},
        workload={"batch": batch, "sequence": sequence, "context": context, "threads": threads},
        space={"hidden_sizes": hidden_size, "ffn": ffn_step, "min_layers": min_layers, "max_added": max_added,
               "homogeneous": homogeneous, "bits": (None, *(bits or ()))},
        options={"trials": trials, "sampler": sampler, "seed": seed},
        proxy={"steps": proxy_steps, "batch_size": batch_size, "seed": seed},
        climbers=climbers, trim_vocabulary=trim_vocabulary, storage=storage,
    )  # fmt: skip
    result, teacher_cost = search(open_job(work), wishes, Progress(quiet or as_json))
    if as_json:
        output.print_json(result.to_dict() | {"teacher": teacher_cost.to_dict()})
        return
    _show_search(result, teacher_cost)
    if not quiet:
        output.note(f"More in {work / 'search' / 'report.md'}. Next: hf-qep distill train {work} --out STUDENT")


def _show_search(result: SearchResult, teacher: Any) -> None:
    picks = {rule: result.pick(rule).choice.key() for rule in ("balanced", "fast", "accurate")}
    rows: list[list[Any]] = []
    for found in result.front():
        key, cost = found.choice.key(), found.cost
        names = ", ".join(rule for rule, picked in picks.items() if picked == key)
        layers = " + ".join(str(len(stack)) for _, stack in found.choice.spec.stacks())
        bits = "float" if found.choice.bits is None else f"{found.choice.bits:g}"
        rows.append(
            [key[:8], layers, bits, result.value(found), cost.latency_ms, cost.memory_mb, int(cost.parameters), names]
        )
    rows.append(["teacher", "", "float", 0.0, teacher.latency_ms, teacher.memory_mb, int(teacher.parameters), ""])
    columns = ["student", "layers", "bits", "distance", "ms", "MB", "parameters", "pick"]
    output.print_table("Students on the Pareto front", columns, rows)


@app.command("materialize", cls=GuardedCommand)
def materialize_command(
    work: WorkArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the student.")],
    pick: PickOption = "accurate",
    spec: SpecOption = None,
    heal: Annotated[bool, typer.Option(help="Fit what was cut to the teacher, in closed form.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Write a student as it is before it learns: cut from the teacher and healed."""
    check_output(out, overwrite=overwrite)
    from hf_qep.cli.distill_job import open_job
    from hf_qep.cli.distill_student import Start, begin, save

    opened = open_job(work)
    start: Start = begin(opened, opened.chosen(pick, spec), heal=heal)
    save(opened, start, out, overwrite=overwrite)
    result = {"out": str(out), "key": start.spec.key(), "class": type(start.student).__name__}
    result |= {"parameters": start.student.num_parameters(), "changes": start.changes(opened.shape)}
    if as_json:
        output.print_json(result)
        return
    changes = {name: _change_text(change) for name, change in result.pop("changes").items()}
    output.print_facts(str(out), result | changes)
    if not quiet:
        output.note(f"It has learned nothing yet: hf-qep distill train {work} --student {out} --out STUDENT")


def _change_text(change: Any) -> str:
    return " -> ".join(map(str, change)) if isinstance(change, list) else str(change)


@app.command("train", cls=GuardedCommand)
def train_command(
    work: WorkArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the student.")],
    pick: PickOption = "accurate",
    spec: SpecOption = None,
    student: Annotated[
        str | None, typer.Option(help="Folder or Hub id to start from instead: any model of the task, 1-bit ones too.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Share of the labels in the loss, 0 to 1.")] = None,
    divergence: Annotated[str, typer.Option(help="Distance to the teacher: forward-kl, reverse-kl, jsd, ...")] = (
        "forward-kl"
    ),
    temperature: Annotated[float, typer.Option(help="Temperature of both sides.")] = 1.0,
    hidden: Annotated[float, typer.Option(help="Weight of the hidden states.")] = 0.0,
    relation: Annotated[float | None, typer.Option(help="Weight of the relations between rows or tokens.")] = None,
    label_correction: Annotated[bool, typer.Option(help="Correct the teacher where the label is known.")] = True,
    calibrate: Annotated[bool, typer.Option(help="Fit temperature and bias of the teacher to held-out labels.")] = True,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 3.0,
    learning_rate: Annotated[float | None, typer.Option(help="Highest rate. Left out: by the width.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per step and process.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    lora_rank: Annotated[int, typer.Option(help="Train adapters of this rank instead of all weights. 0: none.")] = 0,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also teach the student from the labels alone, for the report.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was stopped.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Teach a student, score it beside its teacher on rows that neither decided anything by, and save it."""
    check_output(out, overwrite=overwrite)
    if lora_rank < 0:
        raise ConfigError(f"the rank of adapters must be at least 0, not {lora_rank}")
    from hf_qep.cli.distill_job import open_job
    from hf_qep.cli.distill_train import Teaching, train

    loss = {"alpha": alpha, "divergence": divergence, "temperature": temperature, "hidden": hidden,
            "relation": relation, "label_correction": label_correction}  # fmt: skip
    schedule = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "accumulate": accumulate,
                "seed": seed}  # fmt: skip
    teaching = Teaching(loss, schedule, calibrate, lora_rank, baselines, resume)
    opened = open_job(work)
    chosen = None if student is not None else opened.chosen(pick, spec)
    facts = train(opened, chosen, student, teaching, out, overwrite=overwrite, progress=Progress(quiet or as_json))
    show_student(facts, out, quiet=quiet, as_json=as_json)


@app.command("report", cls=GuardedCommand)
def report_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a student that `distill train` has made, or of its work.")],
    card: Annotated[bool, typer.Option("--card", help="Write the model card, README.md, into the folder.")] = False,
    repo_id: Annotated[str | None, typer.Option(help="OWNER/NAME that the student will have on the Hub.")] = None,
    specialised_for: Annotated[str | None, typer.Option(help="What it was taught, in a few words.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a card that was changed by hand.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Show what a search or a training has found; write the student's card."""
    from hf_qep.cli.distill_report import is_student, read_facts, read_search, write_student_card

    if not is_student(folder):
        if card:
            raise ConfigError(f"{str(folder)!r} holds no student that was trained; a card is written of one")
        result, teacher = read_search(folder)
        if as_json:
            output.print_json(result.to_dict() | {"teacher": teacher.to_dict()})
        else:
            _show_search(result, teacher)
        return
    facts = read_facts(folder)
    if card:
        path = write_student_card(folder, facts, repo_id, specialised_for, overwrite=overwrite)
        if not quiet and not as_json:
            output.note(f"wrote {path}")
    show_student(facts, folder, quiet=quiet, as_json=as_json)


def show_student(facts: dict[str, Any], out: Path, *, quiet: bool, as_json: bool) -> None:
    """Print what `distill train` has found."""
    if as_json:
        output.print_json({"out": str(out)} | facts)
        return
    names = {"nll": "loss", "accuracy": "accuracy", "auc": "AUC"}
    rows = [
        [who, *(found["score"].get(name) for name in names), found["latency_ms"], found["parameters"]]
        for who, found in facts["models"].items()
    ]
    title = f"{facts['task']}: {facts['rows']['test']} rows that nothing was chosen by"
    output.print_table(title, ["model", *names.values(), "ms", "parameters"], rows)
    if facts["changes"]:
        output.print_facts("What was done to the teacher", {k: _change_text(v) for k, v in facts["changes"].items()})
    if not quiet:
        output.note(f"Card for the Hub: hf-qep distill report {out} --card --repo-id OWNER/NAME")
