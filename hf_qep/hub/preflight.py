"""Everything about a folder that is checked before a byte of it leaves this machine.

Problems block a push, warnings do not; all are collected, so that one run names all of them. An unsafe problem is a
secret, a link, code or a file that is not on the list.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_qep.engine.headers import CODE_KEYS, INDEX_FILE, MANIFEST, SINGLE_FILE, read_header, read_headers, read_json
from hf_qep.errors import QepError, UnsafeContentError
from hf_qep.files import canonical_json, sha256
from hf_qep.hub import secrets
from hf_qep.hub.allowed import (
    DISTILLATION,
    HOLD_TOKENS,
    LOADER,
    MADE_LATER,
    REQUIRED,
    REQUIRED_OF_STUDENT,
    STUDENT_CODE,
    is_student,
    kind_of,
    list_files,
)
from hf_qep.hub.gguf_files import gguf_problems
from hf_qep.hub.listed import listed_problems
from hf_qep.hub.student_folder import AGAIN, CARD_COMMAND, read_student, student_problems
from hf_qep.progress import SILENT, Progress

RECORD, SAMPLES = "hf_qep_eval.json", "hf_qep_samples.json"

_ACTIVE_PICTURE = (
    rb"(?i)<\s*(\w+:)?(script|foreignobject|iframe|embed|object|handler)\b|\son\w+\s*=|javascript\s*:|<!entity"
)
"""What makes a drawing run code, or read other files, when it is opened by itself."""


@dataclass(frozen=True)
class LocalFile:
    """One file to publish. path: relative name."""

    path: str
    size: int
    sha256: str

    @property
    def is_weights(self) -> bool:
        """Whether the file holds tensors."""
        return kind_of(self.path) == "weights"


@dataclass(frozen=True)
class Origin:
    """A model that this one was made from, as its own files name it. where: the file that does."""

    where: str
    name: str | None
    revision: str | None
    licence: str | None

    @classmethod
    def of(cls, where: str, name: Any, revision: Any, licence: Any) -> Origin:
        """From json values; what is no text is unknown."""
        return cls(where, *(value if isinstance(value, str) and value else None for value in (name, revision, licence)))


@dataclass
class FolderReport:
    """What was found in a folder. unsafe: problems that could hurt somebody, a part of `problems`.

    origins: the original, or the first weights of a student and then its teacher if that is another model.
    """

    folder: Path
    files: list[LocalFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unsafe: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    card: str = ""
    is_student: bool = False

    @property
    def card_command(self) -> str:
        """What writes the card."""
        return CARD_COMMAND if self.is_student else "hf-qep card"

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.size for file in self.files if file.is_weights)

    def refuse(self, *sentences: str) -> None:
        """Note unsafe problems."""
        self.unsafe += sentences
        self.problems += sentences


def check_folder(folder: Path, *, tokens: tuple[str, ...] = (), progress: Progress = SILENT) -> FolderReport:
    """Files, headers, checksums, config, secrets, record and card of `folder`; nothing is raised for what is wrong.

    tokens: values that must not stand in a file, besides those that look like secrets.
    """
    report = FolderReport(folder)
    if not folder.is_dir():
        report.problems.append(f"{folder.name!r} is not a folder; give the folder that hf-qep quantize wrote")
        return report
    if folder.is_symlink():
        report.refuse(f"{folder.name!r} is a link; give the folder itself")
    names, stray = list_files(folder)
    report.refuse(*stray)
    report.is_student = is_student(names)
    required = REQUIRED_OF_STUDENT if report.is_student else REQUIRED
    report.problems += [f"{n!r} is missing; {_remedy(n, report)}" for n in required if n not in names]
    if report.unsafe:
        # A name that is not known, or a link, may be anything: nothing is opened before the list is clean.
        return report
    tokens = secrets.own_tokens(*tokens)
    with progress.bar("check files", len(names), "file") as bar:
        for name in names:
            path = folder / name
            report.files.append(LocalFile(name, path.stat().st_size, sha256(path)))
            report.refuse(*secrets.scan(path, name, tokens=tokens, places=kind_of(name) not in HOLD_TOKENS))
            bar.advance(detail=name)
    records = (_check_student,) if report.is_student else (_check_manifest, _check_record, _check_gguf)
    for check in (_check_card, _check_weights, _check_config, _check_pictures, *records):
        try:
            check(report)
        except QepError as error:
            report.problems.append(str(error))
        except RecursionError:
            report.problems.append(f"a json file is nested too deeply to be one of a checkpoint; {_again(report)}")
    return report


def refuse_problems(problems: list[str], unsafe: list[str], otherwise: type[QepError]) -> None:
    """Raise for problems, all in one sentence: UnsafeContentError if one is unsafe, else `otherwise`."""
    if not problems:
        return
    first, *others = problems
    kind = UnsafeContentError if unsafe else otherwise
    raise kind(first + "".join(f". Also: {other}" for other in others))


def git_oid(data: bytes) -> str:
    """Name git gives to the content of a file; the Hub reports it for files that are not large."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def config_problems(
    folder: Path, loader: bytes | None, *, student: bool = False, student_code: bytes | None = None
) -> list[str]:
    """Keys of configs that would run code, a loader that is not ours, a checkpoint that is not of this package.

    loader: content of the loader file, None if there is none. student: whether it is a float student. student_code:
    content of its code where that is not in `folder`.
    """
    config = read_json(folder / "config.json")
    method = config.get("quantization_config")
    problems = []
    floats = student and not method
    if not floats and (not isinstance(method, dict) or method.get("quant_method") != "qep"):
        return ["'config.json' is not that of a checkpoint of hf_qep; make one with: hf-qep quantize"]
    path = folder / STUDENT_CODE
    code = path.read_bytes() if path.is_file() else student_code
    if code is not None and code != own_student_code():
        problems.append(f"{STUDENT_CODE!r} is not the file that hf_qep writes; code is never published, remove it")
    if floats and loader is not None:
        problems.append(f"{LOADER!r} belongs to packed weights, and these are not; remove it")
    elif loader is not None:
        problems += _loader_problems(config, loader)
    elif code is not None:
        problems += _student_problems(config)
    ours = loader is not None or code is not None
    for path in sorted(folder.glob("*.json")):
        if kind_of(path.name) in ("config", "tokenizer"):
            main = path.name == "config.json"
            problems += [
                f"{path.name!r} has {where!r}, which makes a reader run code of the repository; remove it"
                for where in _code_keys(config if main else read_json(path))
                if not (main and ours and where == "auto_map")
            ]
    return problems


def check_disk(folder: Path, needed: int) -> str | None:
    """A problem if the disk of `folder` (which need not exist yet) has less than `needed` bytes free."""
    existing = folder.expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return None
    return f"the Hub client needs {needed / 1e6:.0f} MB of disk for its cache, and {free / 1e6:.0f} MB are free"


def record_problems(folder: Path, digests: dict[str, str]) -> list[str]:
    """What is wrong with record, recorded samples and the numbers in the card. digests: sha256 by name, recomputed."""
    from hf_qep.evaluation.record import EvalRecord
    from hf_qep.evaluation.samples import Samples
    from hf_qep.hub import claims

    weights = {name: digest for name, digest in digests.items() if kind_of(name) == "weights"}
    problems = []
    if SAMPLES in digests:
        try:
            if Samples.read(folder / SAMPLES).subject.sha256 != weights:
                problems.append(f"{SAMPLES!r} comes from other weights than these; run: hf-qep eval, then: hf-qep card")
        except QepError as error:
            problems.append(str(error))
    try:
        record = EvalRecord.read(folder / RECORD)
    except QepError as error:
        return [*problems, str(error)]
    if record.subject.sha256 != weights:
        problems.append(f"{RECORD!r} was measured on other weights than these; run: hf-qep eval, then: hf-qep card")
        return problems
    problems += claims.record_contradictions(record, sum((folder / name).stat().st_size for name in weights))
    if "README.md" in digests:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        problems += claims.card_contradictions(card, record)
    for name in digests:
        if kind_of(name) == "result":
            problems += claims.result_contradictions(folder / name, record)
    return problems


def own_student_code() -> bytes:
    """The code that students carry, as this package writes it."""
    return (Path(__file__).parents[1] / "students" / STUDENT_CODE).read_bytes()


def _remedy(name: str, report: FolderReport) -> str:
    if name != "README.md":
        return _again(report)
    return f"run: {report.card_command}" if report.is_student else "run: hf-qep eval, then: hf-qep card"


def _again(report: FolderReport) -> str:
    return AGAIN if report.is_student else "run: hf-qep quantize"


def _check_weights(report: FolderReport) -> None:
    """Headers and index through the reader for untrusted files; every shard must be used, and no other way to load."""
    read_headers(report.folder)
    shards = {file.path for file in report.files if file.is_weights}
    index = report.folder / INDEX_FILE
    if index.is_file() and SINGLE_FILE in shards:
        report.problems.append(f"both {SINGLE_FILE!r} and {INDEX_FILE!r} are there; keep the one that belongs")
    elif index.is_file():
        report.problems += _index_problems(report.folder, shards, read_json(index)["weight_map"])
    elif shards != {SINGLE_FILE}:
        report.problems.append(f"shards beside {SINGLE_FILE!r} belong to nothing: {sorted(shards - {SINGLE_FILE})}")


def _index_problems(folder: Path, shards: set[str], weight_map: dict[str, str]) -> list[str]:
    """Shards and tensors that the index does not know; transformers would load the latter all the same."""
    unused = sorted(shards - set(weight_map.values()))
    problems = [f"{INDEX_FILE!r} does not use {name!r}; remove it" for name in unused]
    for shard in sorted(shards.difference(unused)):
        hidden = sorted(name for name in read_header(folder / shard) if weight_map.get(name) != shard)
        problems += [f"{shard!r} holds {name!r}, which {INDEX_FILE!r} does not place there" for name in hidden[:5]]
    return problems


def _check_manifest(report: FolderReport) -> None:
    """Recomputed checksums against those that were written with the files."""
    manifest = read_json(report.folder / MANIFEST)
    named = [manifest.get(key) for key in ("base_model", "revision", "licence")]
    report.origins.append(Origin.of("the manifest", *named))
    report.problems += manifest_problems(manifest, {file.path: (file.sha256, file.size) for file in report.files})


def _check_student(report: FolderReport) -> None:
    """What a training has found against the files, and against the card."""
    from hf_qep.hub.cards.distilled import student_values

    values = student_values(read_student(report.folder), report.folder.name)
    for model in (values["start"], values["teacher"]):
        origin = Origin.of(repr(DISTILLATION), model["name"], model["revision"], model["licence"])
        if origin.name not in [other.name for other in report.origins]:
            report.origins.append(origin)
    files = {file.path: (file.sha256, file.size) for file in report.files}
    report.problems += student_problems(report.folder, files, report.card or None)


def manifest_problems(manifest: dict[str, Any], found: dict[str, tuple[str, int]]) -> list[str]:
    """Differences between `files` of a manifest and the (sha256, size) found, by name."""
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        return [f"{MANIFEST!r} lists no files; run: hf-qep quantize"]
    options = {"later": lambda name: kind_of(name) in MADE_LATER, "since": "it was made", "whole": "checkpoint"}
    return listed_problems(MANIFEST, listed, found, **options)


def _check_config(report: FolderReport) -> None:
    loader = report.folder / LOADER
    content = loader.read_bytes() if loader.is_file() else None
    report.refuse(*config_problems(report.folder, content, student=report.is_student))
    if content is None and not report.is_student and (report.folder / STUDENT_CODE).is_file():
        report.warnings.append(
            f"readers without hf_qep are told of shapes that do not fit, not of the package that they need; {LOADER!r} "
            "names it, quantise again with: hf-qep quantize --remote-code"
        )


def _check_pictures(report: FolderReport) -> None:
    for file in report.files:
        if file.path.endswith(".svg") and re.search(_ACTIVE_PICTURE, (report.folder / file.path).read_bytes()):
            report.refuse(f"{file.path!r} is a drawing that can run code; code is never published, use png")


def _check_record(report: FolderReport) -> None:
    report.problems += record_problems(report.folder, {file.path: file.sha256 for file in report.files})


def _check_gguf(report: FolderReport) -> None:
    report.problems += gguf_problems(report.folder, [file.path for file in report.files])


def _check_card(report: FolderReport) -> None:
    from hf_qep.hub.cards.card import card_problems

    path = report.folder / "README.md"
    if path.is_file():
        report.card = path.read_text(encoding="utf-8", errors="replace")
        report.problems += [f"the card: {said}" for said in card_problems(report.card, report.card_command)]


def _code_keys(value: Any) -> list[str]:
    """Dotted names of the keys in a json value that lead to code: the known ones, internal ones, kernels of the Hub."""
    found: list[str] = []
    # Not recursive: how deep it is nested is up to whoever wrote the file.
    stack: list[tuple[str, Any, bool]] = [("", value, False)]
    while stack:
        where, item, kernel = stack.pop()
        if isinstance(item, dict):
            for key, inner in item.items():
                name = f"{where}.{key}" if where else key
                if (key in CODE_KEYS and inner) or (key.startswith("_") and key.endswith("_internal")):
                    found.append(name)
                stack.append((name, inner, kernel or "implementation" in key))
        elif isinstance(item, list):
            stack += [(where, inner, kernel) for inner in item]
        elif kernel and isinstance(item, str) and "/" in item:
            found.append(where)
    return sorted(set(found))


def _loader_problems(config: dict[str, Any], loader: bytes) -> list[str]:
    """The loader file must be what this package would write for this config, and no other code may be named."""
    own, auto_map = loader_for(config)
    if loader != own:
        return [f"{LOADER!r} is not the file that hf_qep writes; code is never published, remove it"]
    if canonical_json(config.get("auto_map")) != canonical_json(auto_map):
        return ["'auto_map' of 'config.json' is not what hf_qep writes; remove it and the loader file"]
    return []


def _student_problems(config: dict[str, Any]) -> list[str]:
    """`auto_map` may name nothing but the classes of a student."""
    named = config.get("auto_map")
    values = named.values() if isinstance(named, dict) else [named]
    if not all(isinstance(v, str) and re.fullmatch(r"modeling_student\.Student\w+", v, re.ASCII) for v in values):
        return ["'auto_map' of 'config.json' names more than the classes of a student; save the student again"]
    return []


def loader_for(config: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """The loader file of this package for a config, and the `auto_map` that goes with it."""
    from hf_qep.remote_code import add_remote_code

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(canonical_json(config | {"auto_map": {}}), encoding="utf-8")
        written = add_remote_code(folder).read_bytes()
        return written, read_json(folder / "config.json")["auto_map"]
