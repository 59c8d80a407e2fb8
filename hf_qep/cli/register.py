"""`hf-qep register` and `hf-qep unregister`: make `hf qep ...` and programs of others work, and undo it."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_qep.cli import output


def register_command(
    force: Annotated[bool, typer.Option("--force", help="Replace another extension named qep.")] = False,
    python: Annotated[
        bool,
        typer.Option(
            "--python",
            help="Also let other programs of this Python environment load qep checkpoints: `transformers serve`.",
        ),
    ] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Make `hf qep ...` run this installation: writes an extension of the hf command line."""
    from hf_qep.hub.extension import register
    from hf_qep.startup import add_startup

    done = register(force=force)
    files = [str(file) for file in (*done.files, *([add_startup()] if python else []))]
    if as_json:
        output.print_json({"command": done.command, "folder": str(done.folder), "files": files})
        return
    for file in files:
        output.say(f"wrote {file}")
    if not quiet:
        output.note("Try it: hf qep --help. Undo it: hf-qep unregister")


def unregister_command(quiet: output.QuietOption = False, as_json: output.JsonOption = False) -> None:
    """Remove what register wrote."""
    from hf_qep.errors import CheckpointError
    from hf_qep.hub.extension import unregister
    from hf_qep.startup import remove_startup

    startup = remove_startup()
    try:
        removed = [unregister()]
    except CheckpointError:
        if startup is None:
            raise
        removed = []
    if as_json:
        folder = {"removed": str(removed[0])} if removed else {}
        output.print_json(folder | ({"startup": str(startup)} if startup else {}))
    elif not quiet:
        for path in [*removed, *([startup] if startup else [])]:
            output.say(f"removed {path}")
