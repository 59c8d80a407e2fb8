"""Calls of `hf-qep distill` that several files of tests make."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cli.test_commands import refusal, run

CAUSAL = ("--task", "causal-lm", "--answer", "yes", "--answer", "no")
SEARCH = ("--trials", 6, "--sequence", 16, "--proxy-steps", 2, "--climbers", 3, "--threads", 1, "--ffn-step", 48)


@dataclass
class Work:
    """The folder of a distillation, and what commands printed about it."""

    folder: Path
    analysis: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)


def distil(*words: object) -> dict[str, Any]:
    """The value that a command prints with --json; nothing else is printed."""
    result = run("distill", *words, "--json")
    assert result.exit_code == 0, (words, result.output, result.exception)
    return json.loads(result.stdout)


def refused(*words: object) -> str:
    """The sentence that a command is refused with."""
    said = refusal(run("distill", *words))
    assert "Traceback" not in said
    return said
