"""`hf-qep distill`: from a teacher and rows of one task to a small specialist, step by step in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_qep.cli import GuardedCommand, output
from hf_qep.cli.distill_show import note_bits, search_json, show_analysis, show_search, show_start, show_student
from hf_qep.cli.placement import DeviceOption, to_device
from hf_qep.errors import ConfigError
from hf_qep.files import check_output
from hf_qep.progress import Progress

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
PROMPT_HELP = (
    "UTF-8 text file that a language model reads, as it is, before every row where it is asked or measured; "
    "the student never reads it."
)
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
    objects: Annotated[str, typer.Option(help="Column with the objects on it: bbox and category.")] = "objects",
    classes: Annotated[list[str] | None, typer.Option(help="Name of a class, in order; may be repeated.")] = None,
    answer: Annotated[list[str] | None, typer.Option(help=ANSWERS_HELP + " May be repeated.")] = None,
    teacher_prompt: Annotated[Path | None, typer.Option(help=PROMPT_HELP)] = None,
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
    from hf_qep.cli.distill_job import Job, located, read_prompt

    job = Job(
        located(teacher), task, located(data), revision, test and located(test), template, text, label, image, objects,
        tuple(classes or ()) or None, tuple(answer or ()) or None, max_length, limit, held_out, seed, device,
        None if teacher_prompt is None else read_prompt(teacher_prompt),
    )  # fmt: skip
    result = analyze(job, out, batch_size, additions, overwrite, Progress(quiet or as_json))
    if as_json:
        output.print_json(result)
        return
    show_analysis(result)
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
    proxy_steps: Annotated[int, typer.Option(help="Steps of the longest of three short distillations.")] = 180,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget the searches of the folder.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Search for the best student under limits, or go on with a search that was stopped."""
    from hf_qep.cli.distill_opened import open_job
    from hf_qep.cli.distill_search import Wishes, search

    wishes = Wishes(
        limits={"latency_ms": latency_ms, "memory_mb": memory_mb, "parameters": parameters},
        workload={"batch": batch, "sequence": sequence, "context": context, "threads": threads},
        space={"hidden_sizes": hidden_size, "ffn": ffn_step, "min_layers": min_layers, "max_added": max_added,
               "homogeneous": homogeneous, "bits": (None, *(bits or ()))},
        options={"trials": trials, "sampler": sampler, "seed": seed},
        proxy={"batch_size": batch_size, "seed": seed}, proxy_steps=proxy_steps,
        climbers=climbers, trim_vocabulary=trim_vocabulary, storage=storage, again=overwrite,
    )  # fmt: skip
    with output.said_when_interrupted("stopped; the same command goes on with the search"):
        result, teacher_cost = search(open_job(work), wishes, Progress(quiet or as_json))
    if as_json:
        output.print_json(search_json(result, teacher_cost))
        return
    show_search(result, teacher_cost)
    if not quiet:
        output.note(f"More in {work / 'search' / 'report.md'}. Next: hf-qep distill train {work} --out STUDENT")


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
    from hf_qep.cli.distill_opened import open_job
    from hf_qep.cli.distill_student import begin, save

    opened = open_job(work)
    start = begin(opened, opened.chosen(pick, spec), heal=heal)
    save(opened, start, out, overwrite=overwrite)
    result = {
        "out": str(out),
        "key": start.key(),
        "class": type(start.student).__name__,
        "parameters": start.student.num_parameters(),
        "bits": start.bits,
        "changes": start.changes(opened.shape),
    }
    if as_json:
        output.print_json(result)
        return
    show_start(result)
    if not quiet:
        note_bits(start.bits, out)
        output.note(f"It has learned nothing yet: hf-qep distill train {work} --student {out} --out STUDENT")


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
    calibrate: Annotated[
        bool | None,
        typer.Option(
            help="Fit temperature and bias of the teacher to held-out labels. Left out: if all classes occur."
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 3.0,
    learning_rate: Annotated[float | None, typer.Option(help="Highest rate. Left out: by the width.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per step and process.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    lora_rank: Annotated[int, typer.Option(help="Train adapters of this rank instead of all weights. 0: none.")] = 0,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also teach the student from the labels alone, for the report.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was stopped, if any.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Teach a student, score it beside its teacher on rows that neither decided anything by, and save it."""
    check_output(out, overwrite=overwrite)
    from hf_qep.cli.distill_opened import open_job
    from hf_qep.cli.distill_train import Teaching, train

    loss = {"alpha": alpha, "divergence": divergence, "temperature": temperature, "hidden": hidden,
            "relation": relation, "label_correction": label_correction}  # fmt: skip
    schedule = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "accumulate": accumulate,
                "seed": seed}  # fmt: skip
    teaching = Teaching(loss, schedule, calibrate, lora_rank, baselines, resume)
    opened = open_job(work)
    chosen = None if student is not None else opened.chosen(pick, spec)
    with output.said_when_interrupted("stopped; with --resume the same command goes on from the last epoch"):
        facts = train(opened, chosen, student, teaching, out, overwrite=overwrite, progress=Progress(quiet or as_json))
    if as_json:
        output.print_json({"out": str(out)} | facts)
        return
    show_student(facts)
    if not quiet:
        note_bits(facts["bits"], out)
        output.note(f"Card for the Hub: hf-qep distill report {out} --card --repo-id OWNER/NAME")


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
    from hf_qep.cli.distill_report import is_student, read_facts, read_search

    if not is_student(folder):
        if card:
            raise ConfigError(f"{str(folder)!r} holds no student that was trained; a card is written of one")
        found = read_search(folder)
        if as_json:
            output.print_json(search_json(*found))
        else:
            show_search(*found)
        return
    facts = read_facts(folder)
    if card:
        from hf_qep.hub.cards.distilled import write_student_card

        write_student_card(folder, repo_id=repo_id, specialised_for=specialised_for, overwrite=overwrite)
    if as_json:
        output.print_json({"out": str(folder)} | facts)
        return
    show_student(facts)
    if card and not quiet:
        output.note(f"wrote {folder / 'README.md'}")
