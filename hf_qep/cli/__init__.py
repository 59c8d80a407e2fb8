"""The command `hf-qep`: a table of sub-commands, each imported when it is called or its help is shown.

Exit codes: 0 done; 1 a defect of this program (with a traceback); 2 wrong usage, or a request that cannot be met (one
sentence on standard error, or {"error": {"type", "message"}} on standard output with --json); 3 `verify` found that a
checkpoint is not what it says; 130 interrupted.
HF_QEP_DEBUG=1 shows the traceback of the errors that end in exit code 2 too.
"""

from __future__ import annotations

import importlib
import os
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hf_qep.cli import output
from hf_qep.heaps import limit_heaps
from hf_qep.progress import Progress

COMMANDS = {
    "quantize": "hf_qep.cli.quantize:quantize_command",
    "plan": "hf_qep.cli.plan:plan_command",
    "inspect": "hf_qep.cli.inspect:inspect_command",
    "eval": "hf_qep.cli.eval:eval_command",
    "compare": "hf_qep.cli.compare:compare_command",
    "demo": "hf_qep.cli.demo:demo_command",
    "distill": "hf_qep.cli.distill:app",
    "export": "hf_qep.cli.export:app",
    "serve": "hf_qep.cli.serve:serve_command",
    "card": "hf_qep.cli.card:card_command",
    "push": "hf_qep.cli.push:push_command",
    "verify": "hf_qep.cli.verify:verify_command",
    "space": "hf_qep.cli.space:app",
    "env": "hf_qep.cli.env:env_command",
    "register": "hf_qep.cli.register:register_command",
    "unregister": "hf_qep.cli.register:unregister_command",
}
"""What the user types -> where it is: a function, or a typer app with sub-commands of its own. These modules import
nothing heavy at their top."""


class GuardedCommand(TyperCommand):
    """A command whose expected errors end in one sentence and exit code 2, and that is silent when asked."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command's function under the rules for errors, warnings and progress of all commands."""
        as_json, quiet = self._is_set(ctx, "--json"), self._is_set(ctx, "--quiet")
        if not (Progress(quiet or as_json).visible and output.speaks()):
            # Read by the hub client, transformers and datasets when they are imported, which no command has done yet.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        with output.errors_as_exit_code(as_json and output.speaks()), output.warnings_as_notes():
            return super().invoke(ctx)

    def _is_set(self, ctx: typer.Context, option: str) -> bool:
        return any(ctx.params.get(p.name) for p in self.params if option in p.opts)


class LazyGroup(TyperGroup):
    """The sub-commands of COMMANDS, imported one by one."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:
        """The command behind a name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name].partition(":")
        target = getattr(importlib.import_module(module), function)
        if isinstance(target, typer.Typer):
            return typer.main.get_command(target)
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(cmd_name, cls=GuardedCommand)(target)
        return typer.main.get_command(single)


def all_commands() -> dict[str, Any]:
    """Every command that does something, by the words that the user types ("push", "space init")."""
    group, found = typer.main.get_command(app), {}
    for name in COMMANDS:
        command = group.get_command(None, name)
        below = getattr(command, "commands", None)
        found |= {f"{name} {sub}": inner for sub, inner in below.items()} if below else {name: command}
    return found


app = typer.Typer(name="hf-qep", cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        from hf_qep import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """About one bit per weight for Hugging Face models."""


def main() -> None:
    """Entry point of the console script."""
    limit_heaps()
    app()
