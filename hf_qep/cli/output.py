"""What commands print: results on standard output (a table, or one JSON value), everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_qep.errors import QepError

REFUSED = 2
"""Exit code of a request that cannot be met; the same as for wrong usage."""

PIPE_WIDTH = 160
"""Columns of a table that does not go to a terminal."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no hints; results and errors only.")]


def speaks() -> bool:
    """Whether results are to be expected from this process: it is alone, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def print_json(value: Any) -> None:
    """One JSON value on standard output; numbers that are not finite become null, which every reader accepts."""
    typer.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output; cells that are not text are numbers and stand to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=any(columns))
    for index, column in enumerate(columns):
        numeric = any(index < len(row) and not isinstance(row[index], str) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell_text(cell)) for cell in row))
    _console(stderr=False).print(table)


def print_facts(title: str, facts: dict[str, Any]) -> None:
    """A table of names and values."""
    print_table(title, ["", ""], [(name, cell_text(value)) for name, value in facts.items()])


def cell_text(value: Any) -> str:
    """Text of one cell: "-" for what was not measured, four significant digits for fractions."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def human_bytes(count: int) -> str:
    """Decimal units, as file sizes on the Hub are shown."""
    if count < 1000:
        return f"{count} B"
    size, units = float(count), iter(["kB", "MB", "GB", "TB"])
    unit = ""
    while size >= 1000 and (following := next(units, None)):
        size, unit = size / 1000, following
    return f"{size:.1f} {unit}"


def say(text: str) -> None:
    """Plain text on standard output."""
    typer.echo(text)


def note(text: str) -> None:
    """What is being done, on standard error, dimmed."""
    _console(stderr=True).print(Text(text, style="dim"), soft_wrap=True)


def show_dry_run(plan: Any, show: Callable[[Any], None], as_json: bool) -> None:
    """What a plan would do, by `show` or as JSON, with its warnings and problems; problems end in exit code 2.

    plan: has `to_dict`, `warnings` and `problems`.
    """
    if as_json:
        print_json({"dry_run": True, **plan.to_dict()})
    else:
        show(plan)
        for sentence in plan.warnings:
            say(f"* Warning: {sentence}")
        for sentence in plan.problems:
            say(f"* Refused: {sentence}")
    if plan.problems:
        raise typer.Exit(REFUSED)


@contextmanager
def errors_as_exit_code(as_json: bool) -> Iterator[None]:
    """Turn a QepError, or an OSError of the system or the Hub, into a message and exit code 2.

    With HF_QEP_DEBUG=1 the error passes through with its traceback.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe went away; the command line library ends quietly
        raise
    except (QepError, OSError) as error:
        if os.environ.get("HF_QEP_DEBUG") == "1":
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": message}})
        else:
            _console(stderr=True).print(Text(f"Error: {message}", style="bold red"), soft_wrap=True)
        raise typer.Exit(REFUSED) from error


@contextmanager
def said_when_interrupted(sentence: str) -> Iterator[None]:
    """Tell what Ctrl+C leaves behind, on standard error; the exit code stays 130."""
    try:
        yield
    except KeyboardInterrupt:
        note(sentence)
        raise


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Show a warning as its sentence, without the line of code it comes from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place, **kwargs: note(f"Warning: {message}")
        yield


def _console(*, stderr: bool) -> Console:
    # Made on each use: tests and pipes replace the streams. A pipe has no width of its own to wrap names at.
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value
