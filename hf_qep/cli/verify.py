"""`hf-qep verify`: is a published checkpoint what it says it is?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_qep.cli import output
from hf_qep.cli.eval import HELD_OUT, read_held_out
from hf_qep.cli.placement import DeviceOption, to_device
from hf_qep.errors import ConfigError
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from hf_qep.hub.verify import VerifyReport

DIFFERS = 3
"""Exit code of a checkpoint that was checked and is not what it says."""


def verify_command(
    target: Annotated[str, typer.Argument(help="Folder, or Hub id OWNER/NAME.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Left out: main.")] = None,
    sample_tokens: Annotated[
        int, typer.Option(help="Measure the perplexity of so many recorded tokens again; 0: of none.")
    ] = 8192,
    text: Annotated[
        str | None, typer.Option(help="The recorded text. Left out: the tales of this package, if they were used.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the original, to measure KL again too.")
    ] = None,
    device: DeviceOption = "cpu",
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Recompute checksums, load, measure a sample again; exit code 3 and a list if something differs.

    Scores of a student are not measured again: the rows of its task are not a part of it.
    """
    if sample_tokens < 0:
        raise ConfigError(f"--sample-tokens {sample_tokens} is negative; use 0 to measure nothing again")
    to_device(device)
    from hf_qep.engine.source import resolve_model
    from hf_qep.hub.remeasure import SampleOptions
    from hf_qep.hub.verify import verify

    def find_text(recorded: str | None) -> Sequence[str] | None:
        """The user's text; else the bundled one if its name was recorded (its bytes are compared later)."""
        if text is not None:
            return read_held_out(text)[0]
        return read_held_out(None)[0] if recorded == HELD_OUT.name else None

    sample = SampleOptions(
        tokens=sample_tokens,
        baseline=Path(resolve_model(baseline)) if baseline else None,
        device=device,
        progress=Progress(quiet or as_json),
    )
    report = verify(target, revision=revision, find_text=find_text, sample=sample)
    if as_json:
        output.print_json(report.to_dict())
    else:
        show(report, quiet)
    if report.differs:
        raise typer.Exit(DIFFERS)


def show(report: VerifyReport, quiet: bool) -> None:
    """The report, differences last."""
    if not quiet:
        rows = [("ok", line) for line in report.agrees] + [("not checked", line) for line in report.unchecked]
        rows += [("DIFFERS", line) for line in report.differs]
        at = f" at {report.commit}" if report.commit else ""
        output.print_table(f"{report.target}{at}", ["", ""], rows)
    elif report.differs:
        for line in report.differs:
            output.say(line)
    verdict = f"{len(report.differs)} differences" if report.differs else "everything that was checked agrees"
    output.say(f"{verdict}; {len(report.unchecked)} not checked")
