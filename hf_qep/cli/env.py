"""`hf-qep env`: what to put into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from hf_qep.cli import output


def env_command(quiet: output.QuietOption = False, as_json: output.JsonOption = False) -> None:
    """Versions, platform, kernels, cache, optional packages; whether a token is there, never its value."""
    found = collect()
    if as_json:
        output.print_json(found)
        return
    output.print_facts("Environment", _rows(found))
    if not quiet:
        output.note("Install what is missing of an extra with: pip install 'hf-qep[NAME]'")


def collect() -> dict[str, Any]:
    """Facts about this installation and machine: no network, no secret, no name of a user."""
    import torch
    from huggingface_hub import constants, get_token

    from hf_qep.engine.manifest import versions

    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernels": kernels(),
        "extras": extras(),
        "token": bool(get_token()),
        "endpoint": re.sub(r"//[^/@]*@", "//", constants.ENDPOINT),
        "offline": constants.is_offline_mode(),
        "cache": _anonymous(Path(constants.HF_HUB_CACHE)),
    }


def kernels() -> dict[str, str | None]:
    """What computes the products with packed weights on the processor, and on which instruction set."""
    from hf_qep.kernels import native

    found = native.kernels()
    return {"backend": found.backend, "instruction_set": found.isa, "why": found.why}


def extras() -> dict[str, dict[str, str | None]]:
    """Extra -> package -> installed version, None if it is missing; as the metadata of this package lists them."""
    found: dict[str, dict[str, str | None]] = {}
    for line in importlib.metadata.requires("hf-qep") or []:
        package = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)[\"']", line)
        if package and extra:
            found.setdefault(extra[1], {})[package[0]] = _version(package[0])
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _anonymous(path: Path) -> str:
    """`path` with ~ for the home folder, and no name of a user, whose home may lie elsewhere."""
    home = Path.home()
    if path.is_relative_to(home):
        return f"~/{path.relative_to(home).as_posix()}"
    users = {home.name, *(os.environ.get(name) for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER"))}
    parts = list(path.parts)
    for index, part in enumerate(parts):
        if part in users or (index and parts[index - 1] in ("home", "Users", "users")):
            parts[index] = "[user]"
    return Path(*parts).as_posix()


def _rows(found: dict[str, Any]) -> dict[str, Any]:
    rows = dict(found["versions"])
    rows |= {key: found[key] for key in ("platform", "cores", "threads")}
    rows["accelerators"] = ", ".join(found["accelerators"]) or "none"
    chosen = found["kernels"]
    rows["kernels"] = " ".join(filter(None, (chosen["backend"], chosen["instruction_set"], chosen["why"])))
    for extra, packages in found["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        rows[f"extra {extra}"] = f"missing: {', '.join(missing)}" if missing else "complete"
    rows["token"] = "yes" if found["token"] else "no"
    rows |= {"endpoint": found["endpoint"], "offline": "yes" if found["offline"] else "no", "cache": found["cache"]}
    return rows
