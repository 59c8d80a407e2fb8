"""`hf-qep export`: a packed checkpoint in the file format of another program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_qep.cli import GuardedCommand, output
from hf_qep.cli.verify import DIFFERS
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from hf_qep.export.gguf_file import ExportReport

app = typer.Typer(
    name="export",
    help="Write a 1-bit checkpoint for other programs: gguf for llama.cpp, on phones, laptops and servers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
TYPES = {"Q1_0": "signs", "Q4_0": "whole numbers", "Q8_0": "whole numbers"}
ModelArgument = Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint that hf-qep made.")]
PreOption = Annotated[
    str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, where it is not recognised.")
]


@app.command("gguf", cls=GuardedCommand)
def gguf_command(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="New file, such as model-Q1_0.gguf.")],
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Accept layers whose column scales llama.cpp cannot hold.")
    ] = False,
    pre: PreOption = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub checkpoint.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Write a checkpoint as a GGUF file for llama.cpp, read it back and compare every weight.

    Lossless for what was quantised with --export gguf. What llama.cpp cannot hold is refused with a reason.
    """
    from hf_qep.engine.source import resolve_model
    from hf_qep.export.gguf_file import export_gguf

    folder = Path(resolve_model(model, revision))
    progress = Progress(quiet or as_json)
    report = export_gguf(folder, out, approximate=approximate, pre=pre, overwrite=overwrite, progress=progress)
    if as_json:
        output.print_json(report.to_dict())
    elif not quiet:
        _show(report)


@app.command("check", cls=GuardedCommand)
def check_command(
    file: Annotated[Path, typer.Argument(help="GGUF file.")],
    model: ModelArgument,
    pre: PreOption = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub checkpoint.")] = None,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Hold a GGUF file against the checkpoint it was made from; exit code 3 and a list if something differs."""
    from hf_qep.engine.source import resolve_model
    from hf_qep.export.gguf_file import check_gguf

    folder = Path(resolve_model(model, revision))
    found = check_gguf(file, folder, pre=pre, progress=Progress(quiet or as_json))
    if as_json:
        output.print_json({"file": str(file), "tensors": found.tensors, "differs": found.differs})
    else:
        for line in found.differs:
            output.say(f"DIFFERS: {line}")
        if not quiet and not found.differs:
            output.say(f"{file.name}: {found.tensors} tensors and all facts are those of {model}")
    if found.differs:
        raise typer.Exit(DIFFERS)


def _show(report: ExportReport) -> None:
    facts = {
        "architecture": report.architecture,
        "file": output.human_bytes(report.file_bytes),
        "bits per weight, quantised linears": report.bits_linear,
        "bits per weight, whole model": report.bits_model,
        "weights": "those of the checkpoint, compared one by one" if not report.lost else "approximate, see below",
    }
    output.print_facts(report.file, facts)
    rows = [[k, TYPES.get(k, "float"), p["tensors"], p["weights"], p["bytes"]] for k, p in report.parts.items()]
    output.print_table("tensors", ["type", "holds", "tensors", "weights", "bytes"], rows)
    if report.lost:
        rows = [[name, lost] for name, lost in report.lost.items()]
        output.print_table("lost with the column scales", ["layer", "relative squared error"], rows)
    for note in report.notes:
        output.say(f"note: {note}")
    output.say(f"llama-cli -m {report.file} -p 'Once upon a time'")
