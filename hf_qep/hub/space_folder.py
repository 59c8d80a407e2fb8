"""The folder of a Space: what `space init` writes and what of a folder may be deployed."""

from __future__ import annotations

import json
import re
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_qep.errors import SpaceError
from hf_qep.files import bundled, listed_models, write_aside

SETTINGS_FILE = "settings.json"
MAX_SHORT_DESCRIPTION = 60
OWN_PACKAGE = "hf_qep"
_LEFT_OUT = ("cli", "hub", "bundled", "demo_model", "demo_text")
"""Rooms of this package that a Space does not need."""
ZERO_GPU_TORCH = "torch>=2.8,<2.12"
"""What lends accelerators by the second brings a torch of its own, and refuses others."""
_CODE = (".py", ".c", ".cpp", ".cc", ".h", ".cu", ".cuh")
_ALLOWED = re.compile(
    r"README\.md|requirements\.txt|packages\.txt|settings\.json|LICENSE|style\.css|[a-z_]+\.py"
    rf"|{OWN_PACKAGE}(/[a-z_0-9]+)*/[a-z_0-9]+\.(py|c|cpp|cc|h|cu|cuh)",
    re.ASCII,
)
REQUIRED = ("README.md", "app.py", "requirements.txt", SETTINGS_FILE)


@dataclass(frozen=True)
class SpaceSettings:
    """What a Space compares; each field becomes the variable of its name in capitals. Empty: left to the app."""

    model_id: str = ""
    model_revision: str = ""
    base_id: str = ""
    base_revision: str = ""
    original: str = ""
    specialists: str = ""
    """Hub ids, with a revision after @, or folders, divided by commas"""

    def to_variables(self) -> dict[str, str]:
        """Name -> value of what is set."""
        return {name.upper(): value for name, value in vars(self).items() if value}


@dataclass(frozen=True)
class SpaceReadme:
    """What is changed in the README of the Space. requirement: line of requirements.txt that brings hf_qep; None: its
    source is copied into the Space."""

    title: str | None = None
    hardware: str | None = None
    requirement: str | None = None


def write_space(
    folder: Path, settings: SpaceSettings, readme: SpaceReadme | None = None, *, overwrite: bool = False
) -> list[str]:
    """Write the files of a Space to `folder` in one step; returns their names.

    Raises SpaceError for a name that is neither a Hub id nor a folder, OutputExistsError if the folder is not empty.
    """
    readme = readme or SpaceReadme()
    offered = [name for name, _ in listed_models(settings.specialists)]
    for name in (settings.model_id, settings.base_id, *offered):
        _check_model(name)
    source = bundled("spaces") / "compare"
    with write_aside(folder, overwrite=overwrite) as aside:
        for file in sorted(source.iterdir()):
            if file.is_file() and _ALLOWED.fullmatch(file.name):
                shutil.copyfile(file, aside / file.name)
        stored = json.dumps(settings.to_variables(), indent=2, ensure_ascii=False)
        (aside / SETTINGS_FILE).write_text(stored + "\n", encoding="utf-8")
        (aside / "README.md").write_text(_card(source / "README.md", settings, readme), encoding="utf-8")
        if (readme.hardware or "").startswith("zero"):
            _let_torch_be_theirs(aside / "requirements.txt")
        _bring_package(aside, readme.requirement)
        names = space_files(aside).names
    return names


def _check_model(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not name or Path(name).is_dir():
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SpaceError(f"{name!r} is neither a folder nor a name on the Hub; give OWNER/NAME") from error


def _card(template: Path, settings: SpaceSettings, readme: SpaceReadme) -> str:
    from huggingface_hub import SpaceCard

    card = SpaceCard(template.read_text(encoding="utf-8"))
    offered = [name for name, _ in listed_models(settings.specialists)]
    ids = [name for name in (settings.model_id, settings.base_id, *offered) if "/" in name and not Path(name).is_dir()]
    if ids:
        card.data.models = ids
    if readme.title:
        card.data.title = readme.title
    if readme.hardware:
        card.data.suggested_hardware = None if readme.hardware.startswith("zero") else readme.hardware
    return str(card)


def _let_torch_be_theirs(requirements: Path) -> None:
    lines = requirements.read_text(encoding="utf-8").splitlines()
    kept = [ZERO_GPU_TORCH if line.startswith("torch==") else line for line in lines]
    requirements.write_text("\n".join(kept) + "\n", encoding="utf-8")


def _bring_package(folder: Path, requirement: str | None) -> None:
    if requirement:
        if not re.fullmatch(r"[\w.@:/\[\]=<>!~,;+ -]+", requirement):
            raise SpaceError(f"{requirement!r} is no line for requirements.txt; give one such as 'hf-qep==0.1.0'")
        with (folder / "requirements.txt").open("a", encoding="utf-8") as file:
            file.write(f"{requirement}\n")
        return
    package = Path(__file__).resolve().parents[1]
    for file in sorted(package.rglob("*")):
        parts = file.relative_to(package).parts
        if file.suffix in _CODE and file.is_file() and parts[0] not in _LEFT_OUT and "__pycache__" not in parts:
            target = folder / OWN_PACKAGE / Path(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


@dataclass
class SpaceFiles:
    """names: files that may be deployed. problems: what forbids the rest; unsafe: the links among them."""

    names: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unsafe: list[str] = field(default_factory=list)


def space_files(folder: Path) -> SpaceFiles:
    """Files of a Space by a list of allowed names; what Python and Gradio leave behind is passed over."""
    found = SpaceFiles()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        mode = path.lstat().st_mode
        if {"__pycache__", ".gradio", ".git"} & set(Path(name).parts) or name == ".gitattributes":
            continue
        if stat.S_ISLNK(mode):
            found.unsafe.append(f"{name!r} is a link; replace it by a copy of the file")
            found.problems.append(found.unsafe[-1])
        elif stat.S_ISDIR(mode):
            continue
        elif not stat.S_ISREG(mode):
            found.problems.append(f"{name!r} is no regular file; remove it")
        elif not _ALLOWED.fullmatch(name):
            found.problems.append(f"{name!r} is not on the list of files of a Space; move it away")
        else:
            found.names.append(name)
    found.problems += [f"{name!r} is missing; make the folder with: hf-qep space init" for name in _missing(found)]
    return found


def _missing(found: SpaceFiles) -> list[str]:
    return [name for name in REQUIRED if name not in found.names]


def may_replace(name: str) -> bool:
    """Whether a file on the Hub is of the kind that a deployment owns, and may delete."""
    return bool(_ALLOWED.fullmatch(name))


def read_variables(folder: Path) -> dict[str, str]:
    """Variables of `settings.json`. Raises SpaceError."""
    try:
        stored: Any = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpaceError(f"{SETTINGS_FILE} of {folder.name!r} cannot be read: {error}") from error
    if not isinstance(stored, dict) or not all(isinstance(value, str | int) for value in stored.values()):
        raise SpaceError(f"{SETTINGS_FILE} of {folder.name!r} must be an object of texts and numbers")
    return {str(name): str(value) for name, value in stored.items() if str(value)}


def readme_problems(text: str) -> list[str]:
    """What the Hub would refuse in the README of a Space, or what would not run."""
    from huggingface_hub import SpaceCard

    try:
        data = SpaceCard(text).data.to_dict()
    except Exception as error:  # YAML and the client have many kinds
        return [f"'README.md' has no readable front matter: {' '.join(str(error).split())[:200]}"]
    problems = []
    if data.get("sdk") != "gradio" or not re.fullmatch(r"\d+\.\d+\.\d+", str(data.get("sdk_version"))):
        problems.append("'README.md' must say `sdk: gradio` and a whole `sdk_version` such as 6.31.0")
    if len(str(data.get("short_description") or "")) > MAX_SHORT_DESCRIPTION:
        problems.append(f"'README.md' has a `short_description` longer than {MAX_SHORT_DESCRIPTION} characters")
    return problems
