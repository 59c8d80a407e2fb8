"""What a deployment would do, decided before anything is changed on the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_qep.errors import SpaceError
from hf_qep.files import listed_models, sha256
from hf_qep.hub import secrets
from hf_qep.hub.preflight import LocalFile
from hf_qep.hub.push_plan import differences
from hf_qep.hub.remote import HubRefusal, Remote, RemoteFile
from hf_qep.hub.space_folder import may_replace, read_variables, readme_problems, space_files

DEFAULT_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class DeployOptions:
    """What the user asked for. public: None leaves it as it is; a new Space is private. secrets: name -> value."""

    hardware: str | None = None
    public: bool | None = None
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    wait: bool = True
    timeout_s: float = DEFAULT_TIMEOUT_S


@dataclass(frozen=True)
class SpaceState:
    """A Space on the Hub. secrets: names only, the Hub tells no values."""

    head: str
    private: bool
    hardware: str | None
    variables: dict[str, str]
    secrets: tuple[str, ...]
    files: dict[str, RemoteFile]


@dataclass
class DeployPlan:
    """A deployment that was checked. `problems` forbid it, `warnings` do not; `unsafe` is a part of `problems`."""

    folder: Path
    repo_id: str
    endpoint: str
    options: DeployOptions
    files: list[LocalFile] = field(default_factory=list)
    state: SpaceState | None = None
    variables: dict[str, str] = field(default_factory=dict)
    """all that shall be set"""
    problems: list[str] = field(default_factory=list)
    unsafe: list[str] = field(default_factory=list)
    """secrets and links, a part of `problems`"""
    warnings: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Page of the Space."""
        return f"{self.endpoint}/spaces/{self.repo_id}"

    @property
    def public(self) -> bool:
        """Whether everybody will see it."""
        return self.options.public if self.options.public is not None else bool(self.state and not self.state.private)

    @property
    def new_variables(self) -> dict[str, str]:
        """Variables that the Hub has not, or has otherwise."""
        there = self.state.variables if self.state else {}
        return {name: value for name, value in self.variables.items() if there.get(name) != value}

    @property
    def sends(self) -> list[str]:
        """Names of the files that the Hub has not, or has otherwise."""
        return sorted(differences(self.files, self.folder, self.state.files if self.state else {}))

    @property
    def deletes(self) -> list[str]:
        """Files of an older deployment that are no longer part of the Space."""
        ours = {file.path for file in self.files}
        there = self.state.files if self.state else {}
        return sorted(name for name in there if name not in ours and may_replace(name))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; of secrets the names only."""
        return {
            "endpoint": self.endpoint,
            "repo_id": self.repo_id,
            "repo_exists": self.state is not None,
            "visibility": "public" if self.public else "private",
            "hardware": self.options.hardware,
            "variables": self.variables,
            "new_variables": sorted(self.new_variables),
            "secrets": sorted(self.options.secrets),
            "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in self.files],
            "send": self.sends,
            "delete": self.deletes,
            "problems": self.problems,
            "warnings": self.warnings,
        }


def plan_deploy(
    folder: Path, repo_id: str, options: DeployOptions | None = None, *, remote: Remote | None = None
) -> DeployPlan:
    """Check the folder, the account, the Space and the models; nothing on the Hub is changed.

    Raises SpaceError if `folder` is no folder, HubRefusal if the Hub cannot be asked.
    """
    remote, options = remote or Remote(), options or DeployOptions()
    if not folder.is_dir():
        raise SpaceError(f"{str(folder)!r} is no folder; make one with: hf-qep space init {folder}")
    plan = DeployPlan(folder, repo_id, remote.endpoint, options)
    _check_folder(plan, remote)
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo_id, re.ASCII):
        plan.problems.append(f"{repo_id!r} is no name for a Space; give OWNER/NAME")
    if plan.problems:
        return plan
    plan.variables = read_variables(folder)
    account = remote.account()
    plan.repo_id = repo_id if "/" in repo_id else f"{account.name}/{repo_id}"
    if account.can_write(plan.repo_id) is False:
        plan.problems.append(f"the token of {account.name} may not write; log in with another one: hf auth login")
        return plan
    plan.state = space_state(remote, plan.repo_id)
    _check_models(plan, remote)
    _check_secrets(plan, remote)
    return plan


def _check_folder(plan: DeployPlan, remote: Remote) -> None:
    found = space_files(plan.folder)
    plan.problems += found.problems
    plan.unsafe += found.unsafe
    for name in found.names:
        path = plan.folder / name
        # The source of this package names folders of systems where it reads them; it is published as it is.
        hits = secrets.scan(path, name, tokens=remote.tokens, places=not name.startswith("hf_qep/"))
        plan.problems += hits
        plan.unsafe += hits
        plan.files.append(LocalFile(name, path.stat().st_size, sha256(path)))
    if "README.md" in found.names:
        plan.problems += readme_problems((plan.folder / "README.md").read_text(encoding="utf-8", errors="replace"))


def _check_models(plan: DeployPlan, remote: Remote) -> None:
    """All models must be on the Hub; the commit that is there now is what the Space will show."""
    if not plan.variables.get("MODEL_ID"):
        plan.problems.append("settings.json sets no MODEL_ID; make the folder with: hf-qep space init DIR --model ID")
    for name, revision in (("MODEL_ID", "MODEL_REVISION"), ("BASE_ID", "BASE_REVISION")):
        model = plan.variables.get(name)
        if model and (head := _head(plan, remote, model, plan.variables.get(revision), name, revision)):
            plan.variables[revision] = head
    offered = listed_models(plan.variables.get("SPECIALISTS", ""))
    heads = [_head(plan, remote, model, revision, "SPECIALISTS", "SPECIALISTS") for model, revision in offered]
    if offered:
        pins = zip(offered, heads, strict=True)
        entries = [(model, head or revision) for (model, revision), head in pins]
        plan.variables["SPECIALISTS"] = ",".join(f"{model}@{pin}" if pin else model for model, pin in entries)


def _head(plan: DeployPlan, remote: Remote, model: str, wanted: str | None, name: str, revision: str) -> str | None:
    """The commit of a model; None where there is none to be had, with the reason in the plan. name, revision: variables
    that hold the two."""
    if Path(model).is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII):
        plan.problems.append(f"{name} is a folder of this machine, which a Space cannot read; push it and name it")
        return None
    try:
        state = remote.repo(model, wanted)
    except HubRefusal as error:
        plan.warnings.append(f"{model} could not be looked at ({error}); the Space may not find it")
        return None
    if state is None:
        plan.problems.append(f"{model} is not on the Hub for this token; push it first: hf-qep push")
        return None
    if state.head is None:
        plan.problems.append(f"{model} has no revision {wanted!r}; correct {revision}")
        return None
    with_token = "HF_TOKEN" in plan.options.secrets or bool(plan.state and "HF_TOKEN" in plan.state.secrets)
    if (state.private or state.gated) and not with_token:
        kind = "private" if state.private else "gated"
        plan.warnings.append(f"{model} is {kind}: the Space needs a token, add --secret-from-env HF_TOKEN=NAME")
    if (state.private or state.gated) and plan.public and with_token:
        plan.warnings.append(f"{model} is not open to all, but everybody can use it through this public Space")
    return state.head


def _check_secrets(plan: DeployPlan, remote: Remote) -> None:
    for name in plan.options.secrets:
        if not name.isidentifier():
            plan.problems.append(f"{name!r} is no name for a secret; use letters, digits and underscores")
        if name in plan.variables:
            plan.problems.append(f"{name!r} is a variable in settings.json and a secret; choose one of them")
    if set(plan.options.secrets.values()) & set(remote.tokens):
        plan.warnings.append("the secret is the token you are logged in with; a token that can only read is safer")


def space_state(remote: Remote, repo_id: str) -> SpaceState | None:
    """The Space as it is, None if there is none that this token may see. Raises HubRefusal."""
    from huggingface_hub.errors import RepositoryNotFoundError

    api = remote.api

    def ask() -> Any:
        try:
            return api.space_info(repo_id)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                raise
            return None

    info = remote.call(f"look at the Space {repo_id}", ask)
    if info is None:
        return None
    files = remote.files(repo_id, str(info.sha), repo_type="space")
    variables = remote.call(f"read the variables of {repo_id}", lambda: api.get_space_variables(repo_id))
    known = remote.call(f"list the secrets of {repo_id}", lambda: api.get_space_secrets(repo_id))
    runtime = remote.call(f"ask what {repo_id} runs on", lambda: api.get_space_runtime(repo_id))
    return SpaceState(
        str(info.sha),
        bool(info.private),
        runtime.requested_hardware,
        {name: variable.value for name, variable in variables.items()},
        tuple(known),
        files,
    )
