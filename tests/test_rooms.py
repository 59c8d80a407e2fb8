"""The house itself: who may import whom, what stays light, how big things may get, what must not be in the files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_qep"
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
MAX_LINES, MAX_FUNCTION_LINES = 400, 60
HEAVY = ("torch", "transformers")
OPTIONAL = ("datasets", "lm_eval", "gradio", "peft", "sklearn", "evaluate", "pyarrow", "optuna", "scipy", "gguf")
OPTIONAL += ("triton", "gemlite", "matplotlib", "PIL", "vllm")
OPTIONAL += ("openai", "fastapi", "uvicorn", "smolagents")

GROUND = {"errors", "extras", "registry", "progress", "files", "bitorder", "heaps", "public_names"}
FORMATS = GROUND | {"formats", "kernels"}
MODEL = FORMATS | {"config", "conversion", "modules", "accounting"}
METHODS = FORMATS | {"algorithms", "methods"}
ENGINE = MODEL | METHODS | {"architectures", "distill", "engine"}
MAY_IMPORT = {
    **{room: GROUND for room in GROUND},
    "algorithms": GROUND | {"algorithms"},
    "kernels": GROUND | {"kernels"},
    "formats": FORMATS,
    "methods": METHODS,
    "config": FORMATS,
    "modules": FORMATS | {"config"},
    "accounting": MODEL,
    "conversion": MODEL,
    "architectures": MODEL | {"architectures"},
    "distill": MODEL | {"algorithms", "architectures", "distill"},
    "students": MODEL | {"algorithms", "architectures", "students"},
    "search": MODEL | {"algorithms", "architectures", "students", "distill", "search"},
    "engine": ENGINE,
    "evaluation": MODEL | {"architectures", "evaluation"},
    "export": GROUND | {"export", "reader"},
    "on_the_fly": ENGINE | {"on_the_fly"},
    "adapters": MODEL | {"adapters"},
    "quantizer": ENGINE | {"on_the_fly", "quantizer"},
    "registration": MODEL | {"adapters", "quantizer", "registration"},
    "hub": MODEL | {"architectures", "evaluation", "export", "hub"},
    "serving": GROUND | {"serving"},
    "startup": GROUND | {"startup"},
    "remote_code": GROUND | {"remote_code"},
    "vllm_plugin": MODEL | {"vllm_plugin"},
    "reader": set(),
}
"""Room -> rooms it may import; the diagram of ARCHITECTURE.md. A room that is not listed may import any (cli)."""
ANYTHING = {"__init__", "__main__", "cli"}
DOORS = {("evaluation", "hf_qep.engine.calibration"), ("evaluation", "hf_qep.engine.text_sources")}
DOORS |= {("hub", f"hf_qep.engine.{name}") for name in ("headers", "manifest", "source")}
DOORS |= {("export", "hf_qep.engine.headers"), ("export", "hf_qep.architectures.feeds")}
DOORS |= {(room, "hf_qep.remote_code.add_remote_code") for room in ("engine", "hub")}
DOORS |= {("registration", "hf_qep.students.modeling_student")}
"""Single modules that a room may import although they lie elsewhere: text is read in one way only, the writer adds the
loader files before it takes the checksums, and the classes of students register themselves."""


def room_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else "__init__"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of everything of this package that a file imports, at its top or inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "hf_qep" or (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            found += [(node.lineno, f"{node.module}.{a.name}" if whole else node.module) for a in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "hf_qep"]


def top_level_imports(path: Path) -> set[str]:
    """First parts of the names that a file imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    room = room_of(module_name(path))
    if room in ANYTHING:
        return
    assert room in MAY_IMPORT, f"{path.name}: the room `{room}` is new; give it a row in MAY_IMPORT"
    wrong = [
        f"line {line}: {name}"
        for line, name in imported_modules(path)
        if room_of(name) not in MAY_IMPORT[room] and (room, name) not in DOORS and name.count(".")
    ]
    assert not wrong, f"{path.relative_to(ROOT)} imports from above: {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_packages_are_imported_where_they_are_used(path):
    heavy = top_level_imports(path) & set(OPTIONAL)
    assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} at its top; use hf_qep.extras.require where it is used"


def modules_loaded_by(code: str) -> set[str]:
    """Names in sys.modules after running `code` in a fresh interpreter."""
    script = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


HELP = "from hf_qep.cli import app\ntry: app({args!r})\nexcept SystemExit: pass"


@pytest.mark.parametrize(
    "code",
    ["import hf_qep", HELP.format(args=["--help"]), HELP.format(args=["quantize", "--help"])],
    ids=["import hf_qep", "hf-qep --help", "hf-qep quantize --help"],
)
def test_importing_the_package_and_showing_help_load_nothing_heavy(code):
    loaded = modules_loaded_by(code)
    assert not loaded & {*HEAVY, *OPTIONAL}


def test_importing_everything_loads_no_optional_package():
    # The trainer stands on transformers' own, which loads peft and datasets; it is imported where training begins.
    apart = {"hf_qep.distill.trainer"}
    modules = [name for p in SOURCES if "remote_code" not in p.parts and (name := module_name(p)) not in apart]
    loaded = modules_loaded_by(f"import importlib\nfor m in {modules!r}: importlib.import_module(m)")
    # transformers itself looks into scipy, scikit-learn and Pillow when they are installed, and torch into triton.
    assert not loaded & (set(OPTIONAL) - {"scipy", "sklearn", "triton", "PIL"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, f"split up: {long}"


def undocumented(node: ast.AST, prefix: str = "") -> list[str]:
    """Public classes and functions below `node` that have no docstring; dunder methods speak for themselves."""
    missing = []
    for child in getattr(node, "body", []):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        if ast.get_docstring(child) is None:
            missing.append(prefix + child.name)
        if isinstance(child, ast.ClassDef):
            missing += undocumented(child, f"{child.name}.")
    return missing


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_everything_public_is_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body, "the file has no docstring"
    assert not undocumented(tree)


def tracked_text_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: no list of tracked files")
    kinds = {".py", ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ".cfg", ""}
    files = [ROOT / name for name in listed.stdout.split("\0") if name and Path(name).suffix in kinds]
    return [f for f in files if f.is_file()]


FORBIDDEN = {
    "an absolute path of somebody's machine": r"(?<![\w.])/(?:home|root|Users|work|mnt|opt)/\w",
    "a package index or mirror": r"--(?:extra-)?index-url|--find-links|download\.pytorch\.org|\bpypi\.org",
    "a credential": r"\bhf_[A-Za-z0-9]{30,}",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_tracked_files_hold_nothing_of_one_machine(what):
    own = Path(__file__).resolve()
    hits = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in tracked_text_files()
        if file != own and "hf_qep/demo_model" not in file.as_posix()
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if re.search(FORBIDDEN[what], line)
    ]
    assert not hits, f"{what} in {hits}"
