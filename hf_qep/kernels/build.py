"""Compile the processor kernels in `csrc` with a plain C++ compiler: no ninja, no CUDA, no library beside the standard.

Two shared objects, either of which is enough: the library itself, which is called through ctypes, and the library with
a thin torch operator over the stable ABI (torch >= 2.10), which needs torch's headers to build and costs less per call.
Their names carry a digest of the sources, so a changed source never runs an old build.

The installation runs this file by itself (`setup.py`), so it imports nothing but the standard library.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
OPERATOR = "torch_op.cpp"
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread"]
OPERATOR_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-w"]
"""Built for torch 2.10 and later; the warnings are those of torch's headers."""


class BuildError(RuntimeError):
    """The compiler is missing or refused the sources; the message holds what it said."""


def compiler() -> str | None:
    """The C++ compiler: $CXX, or g++, c++ or clang++ on the path; None if there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def library_name() -> str:
    """File name of the plain library."""
    return f"libhfqep-{digest()}.so"


def operator_name() -> str:
    """File name of the library with the torch operator."""
    return f"libhfqep-torch-{digest()}.so"


def digest() -> str:
    """Of all sources, the recipe and the architecture."""
    found = hashlib.sha256(f"{platform.machine()} {FLAGS} {OPERATOR_FLAGS}".encode())
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in (".cpp", ".h", ".json"):
            found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]


def build_library(folder: Path) -> Path:
    """Compile the plain library into `folder` unless it is there. Raises BuildError."""
    return _build(folder / library_name(), None)


def build_operator(folder: Path, torch_folder: Path) -> Path:
    """Compile the library with the torch operator into `folder` unless it is there. Raises BuildError.

    torch_folder: the installed package `torch`, 2.10 or later.
    """
    return _build(folder / operator_name(), torch_folder)


def _build(target: Path, torch_folder: Path | None) -> Path:
    if target.is_file():
        return target
    found = compiler()
    if found is None:
        raise BuildError("no C++ compiler: install g++ or set CXX")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            made = _link(found, _objects(found, Path(work), torch_folder), Path(work) / target.name, torch_folder)
            os.replace(made, target)  # two builds at a time both end with a whole file
    except OSError as error:
        raise BuildError(f"cannot build in {target.parent}: {error}") from error
    return target


def _objects(cxx: str, work: Path, torch_folder: Path | None) -> list[Path]:
    units = json.loads((SOURCES / "units.json").read_text(encoding="utf-8"))
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    defines = units.get("defines", {}).get(machine, [])
    jobs = [(source, [*FLAGS, *defines, *flags]) for kind in ("any", machine) for source, flags in units.get(kind, [])]
    if torch_folder is not None:
        include = torch_folder / "include"
        headers = [f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}"]
        jobs.insert(0, (OPERATOR, [*FLAGS, *OPERATOR_FLAGS, *headers]))

    def compile_one(job: tuple[str, list[str]]) -> Path:
        source, flags = job
        made = work / f"{Path(source).stem}.o"
        _run([cxx, *flags, "-c", str(SOURCES / source), "-o", str(made)])
        return made

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


def _link(cxx: str, objects: list[Path], target: Path, torch_folder: Path | None) -> Path:
    # torch loads its libraries privately, so the operator must name the one whose symbols it uses.
    torch = [] if torch_folder is None else [f"-L{torch_folder / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu"]
    _run([cxx, "-shared", "-pthread", *map(str, objects), *torch, "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join(done.stderr.splitlines()[:20])
        raise BuildError(f"{Path(command[0]).name} failed on {Path(command[-3]).name}:\n{said}")
