"""Check a checkpoint, on the Hub or in a folder, against what it says of itself: bytes, loading, measurements.

What cannot be checked is said, never passed over. Nothing of the checkpoint is run: Python files are compared by their
digests and not downloaded, and the model is loaded by transformers' own classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_qep.engine.headers import MANIFEST, read_headers, read_json
from hf_qep.errors import CheckpointError, QepError
from hf_qep.files import sha256
from hf_qep.hub.allowed import (
    DISTILLATION,
    LOADER,
    REQUIRED,
    REQUIRED_OF_STUDENT,
    STUDENT_CODE,
    is_student,
    kind_of,
    list_files,
)
from hf_qep.hub.cards.card import is_generated
from hf_qep.hub.gguf_files import gguf_problems
from hf_qep.hub.preflight import (
    RECORD,
    LocalFile,
    config_problems,
    git_oid,
    loader_for,
    manifest_problems,
    own_student_code,
    record_problems,
)
from hf_qep.hub.push_plan import HAND_MADE, differences
from hf_qep.hub.remeasure import FindText, Measured, SampleOptions, remeasure
from hf_qep.hub.remote import Remote, RemoteFile
from hf_qep.hub.student_folder import file_problems, lists_files, read_student
from hf_qep.hub.verify_student import check_card, check_student

_IGNORED = (".gitattributes", ".cache/huggingface/")
"""What the Hub makes itself, and its client beside a download."""


@dataclass
class VerifyReport:
    """What was compared. differs is empty if everything that could be checked agrees."""

    target: str
    commit: str | None = None
    agrees: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "target": self.target,
            "commit": self.commit,
            "ok": not self.differs,
            "agrees": self.agrees,
            "differs": self.differs,
            "not_checked": self.unchecked,
            "measured": [m.to_dict() for m in self.measured],
        }

    def note(self, what: str, problems: list[str]) -> None:
        """File the outcome of one check."""
        self.differs += problems
        if not problems:
            self.agrees.append(what)


@dataclass
class _Subject:
    """Where the files are and which there are. code: content of each Python file, which may not be in `folder`."""

    folder: Path
    names: list[str]
    code: dict[str, bytes] = field(default_factory=dict)
    safe: bool = True
    """whether `folder` holds no link and no file that a reader might take for a part of the model"""


def verify(
    target: str,
    *,
    revision: str | None = None,
    find_text: FindText | None = None,
    sample: SampleOptions | None = None,
    remote: Remote | None = None,
) -> VerifyReport:
    """Check a folder or a repository.

    find_text: called with the name of the recorded text, returns its documents, or None if it cannot be had.
    Raises CheckpointError if there is nothing to check.
    """
    report = VerifyReport(target)
    if Path(target).is_dir():
        subject = _from_folder(Path(target), report)
    else:
        subject = _from_hub(target, revision, remote or Remote(), report)
    student = is_student(subject.names)
    required = REQUIRED_OF_STUDENT if student else REQUIRED
    report.note("all required files are there", [f"{n!r} is missing" for n in required if n not in subject.names])
    right = _check_files(subject, report)
    path = subject.folder / "README.md"
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if student and card and DISTILLATION in subject.names:
        check_card(card, subject.folder, report, remote_code=STUDENT_CODE in subject.names)
    elif card and not is_generated(card):
        report.unchecked.append(HAND_MADE)
    if not (right and subject.safe):
        report.unchecked.append("loading and measuring: the files must be right before they are loaded")
    elif student:
        check_student(subject.folder, report)
    elif RECORD not in subject.names:
        report.unchecked.append(f"measurements: there is no {RECORD!r}")
    else:
        try:
            remeasure(subject.folder, report, find_text or (lambda name: None), sample or SampleOptions())
        except (QepError, RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            # Whatever files that fit their checksums and lie all the same make a model or tokenizer raise.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            report.differs.append(f"it does not load or run: {reason}")
    return report


def _from_folder(folder: Path, report: VerifyReport) -> _Subject:
    names, stray = list_files(folder, links_to=_blobs(folder), ignored=_IGNORED)
    report.note("no file but those of a checkpoint", stray)
    code = {name: (folder / name).read_bytes() for name in (LOADER, STUDENT_CODE) if name in names}
    return _Subject(folder, names, code, not stray)


def _blobs(folder: Path) -> Path | None:
    """Where the links of a folder of the Hub cache lead; None for any other folder."""
    root = folder.resolve()
    return root.parent.parent / "blobs" if root.parent.name == "snapshots" else None


def _from_hub(target: str, revision: str | None, remote: Remote, report: VerifyReport) -> _Subject:
    """Download everything that is no code and compare it with what the Hub lists."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(target)
    except HFValidationError:
        raise CheckpointError(f"{target!r} is neither a folder nor a name on the Hub; check it") from None
    state = remote.repo(target, revision)
    if state is None or state.head is None:
        where = f", revision {revision!r}" if state else " that this token may see"
        raise CheckpointError(f"{target!r} is neither a folder nor a repository on the Hub{where}")
    report.commit = state.head
    there = remote.files(target, state.head)
    names = [name for name in sorted(there) if kind_of(name) is not None]
    stray = sorted(set(there) - set(names) - set(_IGNORED))
    report.note("no file but those of a checkpoint", [f"{name!r} does not belong to a checkpoint" for name in stray])
    wanted = [name for name in names if name not in (LOADER, STUDENT_CODE)]
    folder = Path(
        remote.call(
            f"download {target}",
            lambda: remote.api.snapshot_download(target, revision=state.head, allow_patterns=wanted),
        )
    )
    files = [LocalFile(n, (folder / n).stat().st_size, sha256(folder / n)) for n in wanted if (folder / n).is_file()]
    wrong = differences(files, folder, there)
    lost = sorted(set(wanted) - {file.path for file in files})
    report.note(
        "what was downloaded is what the Hub lists",
        [f"{name!r} {what}" for name, what in wrong.items()] + [f"{name!r} could not be downloaded" for name in lost],
    )
    # The cache may hold more of this commit than was asked for now; a reader would see that too.
    _, stray = list_files(folder, links_to=_blobs(folder), ignored=_IGNORED)
    return _Subject(folder, names, _code_by_digest(folder, there), not stray)


def _code_by_digest(folder: Path, there: dict[str, RemoteFile]) -> dict[str, bytes]:
    """Our own Python files if those on the Hub have their digests; other bytes, which will be refused, if not."""
    own = {STUDENT_CODE: own_student_code()}
    try:
        own[LOADER] = loader_for(read_json(folder / "config.json"))[0] if LOADER in there else b""
    except QepError:
        own[LOADER] = b""  # the config is reported by its own check
    return {n: text if there[n].oid == git_oid(text) else b"" for n, text in own.items() if n in there}


def _check_files(subject: _Subject, report: VerifyReport) -> bool:
    """Headers, checksums, configs and the record's weights; whether it is safe and useful to load the model."""
    found = {
        name: (sha256(subject.folder / name), (subject.folder / name).stat().st_size)
        for name in subject.names
        if (subject.folder / name).is_file()
    }
    found |= {name: (hashlib.sha256(text).hexdigest(), len(text)) for name, text in subject.code.items()}
    before = len(report.differs)
    loader, student_code = subject.code.get(LOADER), subject.code.get(STUDENT_CODE)
    student = is_student(subject.names)
    checks: dict[str, Callable[[], list[str]]] = {
        "headers and index of the weights": lambda: [] if read_headers(subject.folder) else ["there are no weights"],
        f"checksums of {MANIFEST}": lambda: manifest_problems(read_json(subject.folder / MANIFEST), found),
        "no config leads to code": lambda: config_problems(
            subject.folder, loader, student=student, student_code=student_code
        ),
    }
    if student:
        del checks[f"checksums of {MANIFEST}"]
        checks |= _student_checks(subject, report, found)
    if RECORD in subject.names:
        digests = {name: digest for name, (digest, _) in found.items()}
        checks["record, samples and results of the card"] = lambda: record_problems(subject.folder, digests)
    if any(kind_of(name) == "gguf" for name in subject.names):
        checks["GGUF files hold the weights of the checkpoint"] = lambda: gguf_problems(subject.folder, subject.names)
    for what, check in checks.items():
        try:
            report.note(what, check())
        except QepError as error:
            report.differs.append(str(error))
        except RecursionError:
            report.differs.append(f"{what}: a json file is nested too deeply to be one of a checkpoint")
    return len(report.differs) == before


def _student_checks(
    subject: _Subject, report: VerifyReport, found: dict[str, tuple[str, int]]
) -> dict[str, Callable[[], list[str]]]:
    """The check of digests that distillation.json has; without them that is noted."""
    if DISTILLATION not in subject.names:
        return {}
    try:
        facts = read_student(subject.folder)
    except QepError as error:
        reason = str(error)
        return {DISTILLATION: lambda: [reason]}
    if not lists_files(facts):
        report.unchecked.append(f"checksums: {DISTILLATION!r} has none")
        return {}
    return {f"checksums of {DISTILLATION}": lambda: file_problems(facts, found)}
