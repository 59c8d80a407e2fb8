"""What a push would do, decided before anything is changed: target, files, who may see them, what forbids it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qep.engine.headers import MANIFEST
from hf_qep.errors import CardError, QepError
from hf_qep.hub import secrets
from hf_qep.hub.allowed import DISTILLATION, kind_of
from hf_qep.hub.base import BaseFacts, read_metadata
from hf_qep.hub.preflight import FolderReport, LocalFile, Origin, check_disk, check_folder, git_oid
from hf_qep.hub.remote import Account, Gate, HubRefusal, Remote, RemoteFile, RepoState
from hf_qep.progress import SILENT, Progress

if TYPE_CHECKING:
    from hf_qep.hub.licences import LicenceDecision

GATES = ("auto", "manual", "none")
SPARE_DISK = 64 << 20
"""Bytes the client may write for itself, besides a hundredth of the weights (chunks of the upload)."""
HAND_MADE = (
    "'README.md' was written or changed by hand: only the numbers in its metadata are compared with the record, "
    "those in its text are not"
)
MAX_PULL_REQUESTS = 10
"""How many of the newest pull requests are looked at before another one is opened."""


@dataclass(frozen=True)
class PushOptions:
    """What the user asked for."""

    public: bool = False
    gated: str | None = None
    """one of GATES; None: as the licence and the original demand"""
    accept_license: bool = False
    revision: str = "main"
    create_pr: bool = False
    commit_message: str | None = None
    overwrite: bool = False
    """replace a repository that holds another model"""


@dataclass
class PushPlan:
    """A push that was checked. `problems` forbid it, `warnings` do not; `unsafe` is a part of `problems`."""

    folder: Path
    repo_id: str
    endpoint: str
    options: PushOptions
    message: str
    files: list[LocalFile] = field(default_factory=list)
    actions: dict[str, str] = field(default_factory=dict)
    """name -> "add", "replace", "keep" (the Hub has it) or "delete" (a file of an older push); empty if the Hub could
    not be asked"""
    kept: list[str] = field(default_factory=list)
    """files on the Hub that are none of ours and stay"""
    state: RepoState | None = None
    gate: Gate = None
    licence: str | None = None
    decision: str = ""
    problems: list[str] = field(default_factory=list)
    unsafe: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def visibility(self) -> str:
        """Who will see it: "public" or "private"; a pull request is as visible as its repository."""
        return "public" if self.shown_to_all else "private"

    @property
    def shown_to_all(self) -> bool:
        """Whether everybody will be able to see what is pushed."""
        return self.options.public or (self.state is not None and not self.state.private)

    @property
    def sends(self) -> list[LocalFile]:
        """Files the Hub does not have at this revision."""
        return [file for file in self.files if self.actions.get(file.path) != "keep"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "endpoint": self.endpoint,
            "repo_id": self.repo_id,
            "repo_exists": self.state is not None,
            "visibility": self.visibility,
            "revision": self.options.revision,
            "create_pr": self.options.create_pr,
            "commit_message": self.message,
            "gate": self.gate or "none",
            "licence": self.licence,
            "licence_decision": self.decision,
            "files": [
                {"path": f.path, "size": f.size, "sha256": f.sha256, "action": self.actions.get(f.path)}
                for f in self.files
            ],
            "delete": sorted(name for name, action in self.actions.items() if action == "delete"),
            "left_alone": self.kept,
            "problems": self.problems,
            "warnings": self.warnings,
        }


def plan_push(
    folder: str | Path,
    repo_id: str,
    options: PushOptions | None = None,
    *,
    remote: Remote | None = None,
    progress: Progress = SILENT,
) -> PushPlan:
    """Check folder, account, repository, licence and card; nothing on the Hub is changed and nothing is raised for
    what is wrong: it stands in `problems`."""
    from hf_qep.hub.cards.card import is_generated

    folder, options = Path(folder), options or PushOptions()
    remote = remote or Remote()
    report = check_folder(folder, tokens=remote.tokens, progress=progress)
    plan = PushPlan(folder, repo_id, remote.endpoint, options, "", report.files)
    plan.problems, plan.unsafe, plan.warnings = report.problems, report.unsafe, report.warnings
    if report.card and not report.is_student and not is_generated(report.card):
        plan.warnings.append(HAND_MADE)
    weights = "weights" if report.is_student else "packed weights"
    plan.message = options.commit_message or f"Upload {folder.resolve().name}: {weights}, card and record"
    _check_words(plan, remote)
    _check_disk(plan, report)
    bases: list[BaseFacts] = []
    try:
        if not _is_name(plan):
            return plan
        _check_account(plan, remote)
        plan.state = remote.repo(plan.repo_id, options.revision)
        _check_target(plan)
        _check_snippet(plan, report)
        _compare(plan, remote, DISTILLATION if report.is_student else MANIFEST)
        bases = _base_facts(plan, report, remote)
        if report.card and (complaint := remote.validate_card(report.card)):
            plan.problems.append(f"the Hub refuses the card: {complaint}; run: {report.card_command}")
    except HubRefusal as error:
        plan.problems.append(str(error))
    _decide(plan, report, bases)
    return plan


def differences(files: list[LocalFile], folder: Path, there: dict[str, RemoteFile]) -> dict[str, str]:
    """Name -> what the Hub lacks or has otherwise, for each file that is not the same there."""
    found = {}
    for file in files:
        other = there.get(file.path)
        if other is None:
            found[file.path] = "is missing"
        elif other.size != file.size:
            found[file.path] = f"has {other.size} bytes instead of {file.size}"
        elif other.sha256 is not None and other.sha256 != file.sha256:
            found[file.path] = f"has sha256 {other.sha256} instead of {file.sha256}"
        elif other.sha256 is None and other.oid != git_oid((folder / file.path).read_bytes()):
            found[file.path] = "has other content of the same size"
    return found


def stale_files(files: list[LocalFile], there: dict[str, RemoteFile]) -> list[str]:
    """Files on the Hub that an older push left: a reader could take them for a part of this one."""
    ours = {file.path for file in files}
    return sorted(name for name in there if name not in ours and kind_of(name) not in (None, "licence"))


def _check_words(plan: PushPlan, remote: Remote) -> None:
    """Names and options that can never work, and secrets in what becomes public besides the files."""
    options = plan.options
    if options.gated not in (None, *GATES):
        plan.problems.append(f"--gated {options.gated!r} is not known; use auto, manual or none")
    if not re.fullmatch(r"[A-Za-z0-9][\w./-]*", options.revision) or ".." in options.revision:
        plan.problems.append(f"--revision {options.revision!r} is no name of a branch")
    elif re.fullmatch(r"[0-9a-f]{40}", options.revision):
        plan.problems.append("--revision is a commit; give the name of a branch")
    if options.create_pr and options.revision != "main":
        plan.problems.append("--create-pr opens a pull request against main; leave out --revision")
    if options.create_pr and (options.public or options.gated):
        plan.problems.append("--create-pr leaves the settings of the repository alone; leave out --public and --gated")
    found = secrets.scan_text(plan.message, "the commit message", tokens=remote.tokens)
    plan.problems += found
    plan.unsafe += found


def _is_name(plan: PushPlan) -> bool:
    """Whether the Hub could have a repository of this name; if not, it need not be asked."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(plan.repo_id)
    except HFValidationError:
        plan.problems.append(
            f"{plan.repo_id!r} is no name for a repository; give OWNER/NAME of letters, digits, '-', '_' and '.', at "
            "most 96 characters each"
        )
        return False
    return True


def _check_disk(plan: PushPlan, report: FolderReport) -> None:
    from huggingface_hub import constants

    problem = check_disk(Path(constants.HF_HOME), SPARE_DISK + report.weight_bytes // 100)
    if problem:
        plan.problems.append(problem)


def _check_account(plan: PushPlan, remote: Remote) -> None:
    """Whose token it is, and whether it may write; a name without an owner gets the account's."""
    if not remote.tokens:
        raise HubRefusal("you are not logged in; run: hf auth login, or set HF_TOKEN", 401)
    account: Account = remote.account()
    if "/" not in plan.repo_id:
        plan.repo_id = f"{account.name}/{plan.repo_id}"
    if plan.options.create_pr:
        return  # a pull request needs no right to write
    owner = plan.repo_id.partition("/")[0]
    if owner not in account.namespaces:
        known = ", ".join(account.namespaces)
        plan.problems.append(f"{account.name!r} may not write to {owner!r}, only to: {known}")
    elif account.can_write(plan.repo_id) is False:
        plan.problems.append(f"the token may not write to {plan.repo_id}; use one with write access: hf auth login")
    elif account.can_write(plan.repo_id) is None:
        plan.warnings.append("the Hub does not say what the token may do; the push itself will show it")


def _check_target(plan: PushPlan) -> None:
    """What the state of the repository forbids."""
    options, state = plan.options, plan.state
    if state is None and options.create_pr:
        plan.problems.append(f"{plan.repo_id} does not exist, so there is nothing to open a pull request against")
    if state is not None and state.id != plan.repo_id:
        plan.problems.append(f"{plan.repo_id} is called {state.id} on the Hub; push to that name")
    if state is not None and not state.private and not options.public and not options.create_pr:
        plan.problems.append(
            f"{plan.repo_id} is public, so everybody would see this push; pass --public, or make it private first"
        )


def _check_snippet(plan: PushPlan, report: FolderReport) -> None:
    """The card must tell readers to load this repository, not a folder of whoever made it."""
    named = re.findall(r"\.from_pretrained\(\s*[\"']([^\"'\n]+)", report.card)
    if named and plan.repo_id not in named:
        sentence = f"the card tells readers to load {named[0]!r}, not {plan.repo_id!r}; run: "
        if report.is_student:
            command = report.card_command.replace("OWNER/NAME", plan.repo_id)
            plan.problems.append(sentence + command)
        else:
            plan.warnings.append(f"{sentence}hf-qep card --repo-id {plan.repo_id}")


def _compare(plan: PushPlan, remote: Remote, mark: str) -> None:
    """What is to be added, replaced, kept and deleted at the revision. mark: file of every push of this kind."""
    state, revision = plan.state, plan.options.revision
    if not plan.files:
        return
    # A branch that is not there yet will start as main.
    at = None if state is None else state.head or "main"
    there = remote.files(plan.repo_id, at) if at else {}
    different = differences(plan.files, plan.folder, there)
    for file in plan.files:
        action = "keep" if file.path not in different else "replace" if file.path in there else "add"
        plan.actions[file.path] = action
    stale = stale_files(plan.files, there)
    plan.actions |= dict.fromkeys(stale, "delete")
    plan.kept = sorted(set(there) - set(plan.actions))
    weights = [name for name in there if re.search(r"\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)$", name)]
    if weights and mark not in there and not plan.options.overwrite:
        other = {MANIFEST: "a quantised model", DISTILLATION: "a float student"}
        held = next((what for name, what in other.items() if name in there), "a model that hf_qep did not push")
        plan.problems.append(
            f"{plan.repo_id} holds {held} ({weights[0]!r}, revision {revision}); choose another name, or pass "
            "--overwrite to replace it"
        )
    code = [name for name in plan.kept if name.endswith(".py")]
    foreign = [name for name in plan.kept if name in weights]
    plan.warnings += [f"{name!r} on the Hub is code that this push leaves there" for name in code]
    plan.warnings += [f"{name!r} on the Hub holds other weights that this push leaves there" for name in foreign]


def _base_facts(plan: PushPlan, report: FolderReport, remote: Remote) -> list[BaseFacts]:
    """Facts of the originals on the Hub. A name that cannot be found there forbids to show the copy to everybody: the
    link would lead nowhere, and licence and gate would be what the card says."""
    named = _card_base(report.card)
    origins = {o.name: o for o in report.origins if o.name and "/" in o.name}
    if named and origins and not set(named) & set(origins):
        first = next(iter(origins.values()))
        plan.problems.append(
            f"the card names the original {named[0]!r}, {first.where} {first.name!r}; run: {report.card_command}"
        )
    # The card names one original; a student has a second one where its teacher is not what it began as.
    ids = [x for x in dict.fromkeys([*named[:1], *origins]) if x.count("/") == 1]
    if not ids:
        if report.files:  # else nothing was read, and the reason stands in the problems
            plan.warnings.append(
                f"no original is named by its Hub id, so the Hub will show none; name it with: {report.card_command}"
            )
        return []
    found = [_look_up(plan, name, origins[name].revision if name in origins else None, remote) for name in ids]
    return [facts for facts in found if facts is not None]


def _look_up(plan: PushPlan, name: str, revision: str | None, remote: Remote) -> BaseFacts | None:
    """Facts of one original, None if it cannot be looked up, which is noted."""
    try:
        return remote.call(f"look at the original {name}", lambda: BaseFacts.from_hub(remote.api, name, revision))
    except QepError as error:
        sentence = f"the original {name} could not be looked up ({error}); its name, licence and gate are unchecked"
        (plan.problems if plan.shown_to_all else plan.warnings).append(sentence)
        return None


def _decide(plan: PushPlan, report: FolderReport, bases: list[BaseFacts]) -> None:
    """Licence and gate. Of several licences that are named, each must allow it; each original must have one."""
    from hf_qep.hub.licences import decide

    card = _card_licence(report.card)
    plan.licence = card
    licences: list[str | None] = []
    for number, origin in enumerate(report.origins or [Origin("", None, None, None)]):
        base = next((b for b in bases if b.id == origin.name), bases[0] if bases and not number else None)
        named = {"card": None if number else card, origin.where: origin.licence, "original": base and base.licence}
        found = {where.removeprefix("the "): licence for where, licence in named.items() if licence}
        plan.licence = plan.licence or next(iter(found.values()), None)
        licences += found.values() or [None]
        if len(set(found.values())) > 1:
            said = ", ".join(f"{where} {licence!r}" for where, licence in found.items())
            sentence = f"the licences differ: {said}; run: {report.card_command}"
            (plan.problems if plan.shown_to_all else plan.warnings).append(sentence)
    decisions: list[LicenceDecision] = [decide(licence) for licence in dict.fromkeys(licences)]
    strict = [d for d in decisions if not d.publish_public or d.needs_acknowledgement] or decisions
    plan.decision = "; ".join(dict.fromkeys(d.reason for d in strict))
    demanded = any(d.gate for d in decisions)
    plan.gate = _gate(plan, bases, demanded)
    if not plan.shown_to_all:
        return
    if not all(d.publish_public or d.needs_acknowledgement for d in decisions):
        plan.problems.append(f"this may not be published: {plan.decision}")
    if any(d.needs_acknowledgement for d in decisions) and not plan.options.accept_license:
        plan.problems.append(f"{plan.decision}; read the licence and pass --accept-license")
    if demanded and plan.gate is None:
        plan.problems.append(f"{plan.decision}; it must stand behind a gate, pass --gated auto or --gated manual")
    if plan.options.create_pr and plan.state is not None and plan.gate != plan.state.gated:
        plan.problems.append("a pull request cannot set the gate that this model needs; push to a repository of yours")


def _gate(plan: PushPlan, bases: list[BaseFacts], demanded: bool) -> Gate:
    """The user's word; else what is set already; else what the original has; else what the licence demands."""
    word = plan.options.gated
    if word in ("auto", "manual"):
        return "auto" if word == "auto" else "manual"
    if word == "none":
        return None
    if plan.state is not None and plan.state.gated:
        return plan.state.gated
    if not plan.shown_to_all:
        return None  # who may see a private repository is settled
    inherited = {base.gated for base in bases if base.gated}
    if inherited:
        return "manual" if "manual" in inherited else "auto"
    return "auto" if demanded else None


def _metadata(card: str) -> dict[str, Any]:
    """YAML of a card; empty if it has none that can be read, which the lint of the card reports."""
    try:
        return read_metadata(card)
    except CardError:
        return {}


def _card_licence(card: str) -> str | None:
    licence = _metadata(card).get("license")
    return None if licence is None else str(licence)  # YAML also knows dates and lists


def _card_base(card: str) -> list[str]:
    base = _metadata(card).get("base_model")
    return [base] if isinstance(base, str) else [str(x) for x in base] if isinstance(base, list) else []
