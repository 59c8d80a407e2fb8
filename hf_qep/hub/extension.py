"""`hf qep ...`: this installation as an extension of the `hf` command line.

`hf` finds extensions in a folder of the user's home: `hf-<name>/manifest.json` and an executable. The manifest is
written here by hand, so it names an owner that cannot exist on the code host that `hf extensions update` would ask, and
the answer "nothing newer" is stored with a date far ahead, so that `hf` asks nobody.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hf_qep.errors import CheckpointError, OutputExistsError
from hf_qep.files import write_aside

OWNER = "(local)"
"""No account can have this name."""
DESCRIPTION = "About one bit per weight for Hugging Face models."
LATEST = ".latest_commit"
"""Where `hf` remembers which commit is the newest, and since when it knows."""
_NEVER = datetime(2100, 1, 1, tzinfo=UTC).timestamp()


@dataclass(frozen=True)
class Registration:
    """What was written. command: what can be typed now. files: what lies in `folder`."""

    folder: Path
    files: tuple[Path, ...]
    command: str = "hf qep"


def extension_folder() -> Path:
    """Where `hf` looks for this extension."""
    return Path("~/.local/share/hf/extensions/hf-qep").expanduser()


def register(*, force: bool = False) -> Registration:
    """Make `hf qep` run this installation. Raises OutputExistsError if another extension has the name.

    force: replace that one. Registering again is harmless.
    """
    folder = extension_folder()
    if folder.exists() and not is_ours(folder) and not force:
        raise OutputExistsError(
            f"another extension is installed in {_shown(folder)!r}; remove it with: hf extensions remove qep, or pass "
            "--force to replace it"
        )
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    name = "hf-qep.cmd" if os.name == "nt" else "hf-qep"
    with write_aside(folder, overwrite=True) as aside:
        (aside / name).write_text(_script(), encoding="utf-8")
        (aside / name).chmod(0o755)
        (aside / "manifest.json").write_text(_manifest(folder / name), encoding="utf-8")
        (aside / LATEST).write_text("", encoding="utf-8")
        os.utime(aside / LATEST, (_NEVER, _NEVER))
    return Registration(folder, tuple(folder / file for file in (name, "manifest.json", LATEST)))


def unregister() -> Path:
    """Remove what `register` wrote and return its folder. Raises CheckpointError if it is not there or not ours."""
    folder = extension_folder()
    if not folder.exists():
        raise CheckpointError("`hf qep` is not registered; nothing to remove")
    if not is_ours(folder):
        raise CheckpointError(
            f"the extension in {_shown(folder)!r} was not made by hf-qep register; remove it with: "
            "hf extensions remove qep"
        )
    shutil.rmtree(folder)
    return folder


def is_ours(folder: Path) -> bool:
    """Whether `register` wrote what is in `folder`."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not folder.is_symlink() and isinstance(manifest, dict) and manifest.get("owner") == OWNER


def _manifest(script: Path) -> str:
    values = {
        "owner": OWNER,
        "repo": "hf-qep",
        "repo_id": f"{OWNER}/hf-qep",
        "short_name": "qep",
        "executable_path": str(script),
        "type": "binary",
        "installed_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "description": DESCRIPTION,
        "commit_sha": None,
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _script() -> str:
    """Runs the console script's function with the interpreter of this installation; arguments and exit code pass.

    -P: without it, Python would import from the folder the user stands in, which may be a downloaded model's.
    """
    code = "import sys; sys.argv[0] = 'hf-qep'; from hf_qep.cli import main; main()"
    if os.name == "nt":
        return f'@"{sys.executable}" -P -c "{code}" %*\n'
    return f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -c {shlex.quote(code)} "$@"\n'


def _shown(folder: Path) -> str:
    return str(folder).replace(str(Path.home()), "~", 1)
