"""`hf-qep register` and `hf-qep unregister`: make `hf qep ...` work, and undo it."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_qep.cli import output


def register_command(
    force: Annotated[bool, typer.Option("--force", help="Replace another extension named qep.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Make `hf qep ...` run this installation: writes an extension of the hf command line."""
    from hf_qep.hub.extension import register

    done = register(force=force)
    if as_json:
        output.print_json({"command": done.command, "folder": str(done.folder), "files": [str(f) for f in done.files]})
        return
    for file in done.files:
        output.say(f"wrote {file}")
    if not quiet:
        output.note("Try it: hf qep --help. Undo it: hf-qep unregister")


def unregister_command(quiet: output.QuietOption = False, as_json: output.JsonOption = False) -> None:
    """Remove what register wrote."""
    from hf_qep.hub.extension import unregister

    folder = unregister()
    if as_json:
        output.print_json({"removed": str(folder)})
    elif not quiet:
        output.say(f"removed {folder}")
