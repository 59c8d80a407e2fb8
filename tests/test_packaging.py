"""pyproject.toml and constraints.txt agree with each other and with the package."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
SOURCES = sorted((ROOT / "hf_qep").rglob("*.py"))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {_plain(n): v for n, _, v in (line.partition("==") for line in lines if line and line[0] != "#")}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_has_a_pin_inside_its_range():
    wanted = [Requirement(r) for r in (*PROJECT["project"]["dependencies"], *sum(EXTRAS.values(), []))]
    known = pins()
    wrong = [str(r) for r in wanted if _plain(r.name) not in known or not r.specifier.contains(known[_plain(r.name)])]
    assert not wrong, f"constraints.txt has no pin that satisfies {wrong}"


def test_extras_named_by_the_code_exist_and_bring_the_package():
    brings = {"sklearn": "scikit-learn", "PIL": "pillow"}
    for path in SOURCES:
        for extra, module in re.findall(r'require\("(\w+)", "([\w.]+)"\)', path.read_text(encoding="utf-8")):
            top = module.partition(".")[0]
            names = {_plain(Requirement(r).name) for r in EXTRAS.get(extra, [])}
            assert _plain(brings.get(top, top)) in names, f"{path.name}: the extra `{extra}` does not bring `{top}`"


def test_the_console_script_points_at_a_function():
    module, _, function = PROJECT["project"]["scripts"]["hf-qep"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_data_file_of_the_package_is_listed_as_package_data():
    folders = {pattern.partition("/")[0] for pattern in PROJECT["tool"]["setuptools"]["package-data"]["hf_qep"]}
    data = {p.relative_to(ROOT / "hf_qep").parts[0] for p in (ROOT / "hf_qep").rglob("*") if p.is_file()}
    code = {p.relative_to(ROOT / "hf_qep").parts[0] for p in (ROOT / "hf_qep").rglob("*.py*")}
    assert data - code <= folders
