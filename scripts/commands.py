"""`hf-qep` commands that a script stands for: printed as a person would type them, then run one after the other."""

from __future__ import annotations

import shlex
import subprocess
import sys

import typer


def carry_out(commands: list[list[str]], only_print: bool = False) -> None:
    """Print the commands and run them in turn; the first that fails ends the script with its exit code."""
    for words in commands:
        # Printed only, they are the result; else they are remarks beside the results of the commands.
        typer.echo("hf-qep " + shlex.join(words), err=not only_print)
        if only_print:
            continue
        done = subprocess.run([sys.executable, "-c", "from hf_qep.cli import main; main()", *words])
        if done.returncode:
            raise typer.Exit(done.returncode)
