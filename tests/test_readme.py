"""Every command, option, name and link in README.md and ARCHITECTURE.md exists."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from hf_qep.cli import all_commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "ARCHITECTURE.md"]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Bodies of the fenced code blocks in one language."""
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def command_lines() -> list[list[str]]:
    lines = [line for body in blocks("README.md", "bash") for line in body.splitlines() if line.startswith("hf-qep ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_command_lines_of_the_readme_are_accepted(words):
    known = all_commands()
    name = next((" ".join(words[:n]) for n in (1, 2) if " ".join(words[:n]) in known), None)
    assert name is not None, f"no command {words[0]!r}; there are {list(known)}"
    wanted = [w for w in words[len(name.split()) :] if w != "--help"]
    # Parsing alone: a wrong option, a missing argument or a value of the wrong type raises.
    known[name].make_context(name, wanted, resilient_parsing=False)


def test_options_named_in_the_readme_exist():
    params = [p for command in all_commands().values() for p in command.params]
    known = {o for p in params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    named = set(re.findall(r"`(--[a-z-]+)", text_of("README.md")))
    assert named - known == set()


def test_python_blocks_compile_and_import_names_that_exist():
    import hf_qep

    for body in blocks("README.md", "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module == "hf_qep":
                assert all(hasattr(hf_qep, alias.name) for alias in node.names)


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE))
    named = {w for body in blocks("README.md", "bash") for w in re.findall(r"^make ([a-z]+)", body, re.MULTILINE)}
    assert named, "the readme names no make target"
    assert named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_a_page_exist(page):
    text = text_of(page)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", text) + re.findall(r"`((?:[a-z_]+/)+)`", text)
    spoken_of = ("", "hf_qep", "hf_qep/kernels", "hf_qep/hub", "hf_qep/hub/cards", "spaces/compare")
    spoken_of += ("hf_qep/search", "hf_qep/distill", "hf_qep/students", "hf_qep/engine/planning")
    missing = [n for n in links + named if not any((ROOT / base / n).exists() for base in spoken_of)]
    assert not missing
