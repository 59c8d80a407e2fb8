"""What an error of the Hub client means for a user, and whether it may pass by itself."""

from __future__ import annotations

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_qep.errors import CheckpointError, DiskSpaceError, QepError
from hf_qep.files import is_disk_full

AGAIN = "then give the command again, with --resume if a block was done"


def explained(
    error: Exception, what: str | None, repo: str, revision: str | None, again: str = "then try again"
) -> QepError:
    """What to tell a user of an error of the Hub client. what: it was about, None for the model. again: after that."""
    cause = _cause(error)
    where = f"{what} of {repo!r}" if what else repr(repo)
    cannot = f"cannot download {where} from the Hub"
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if is_disk_full(cause):
        return DiskSpaceError(
            f"{cannot}: no space is left on the disk of its cache; free some, or keep only the shards in use with "
            f"--drop-shards, {again}"
        )
    if isinstance(cause, RevisionNotFoundError):
        said = f"it has no revision {revision!r}; give a branch, tag or commit that it has"
    elif isinstance(cause, GatedRepoError):
        said = f"the model is gated; accept its terms on its page, log in with `hf auth login`, {again}"
    elif isinstance(cause, RepositoryNotFoundError):
        said = (
            "there is no such model, or it is private, or your login has ended; check the name and `hf auth whoami`, "
            f"{again}, or give a local folder"
        )
    elif isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
        said = f"the revision {revision!r} has no such file; choose another one, or give a local folder"
    elif status in (401, 403):
        said = f"it refuses access ({status}); check yours with `hf auth whoami`, {again}"
    elif isinstance(cause, OfflineModeIsEnabled | LocalEntryNotFoundError):
        said = (
            "it is not in the cache, and there is no connection or HF_HUB_OFFLINE is set; connect, "
            f"{again}, or give a local folder"
        )
    else:
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        said = f"{reason}; check the name, your access and the connection, {again}, or give a local folder"
    return CheckpointError(f"{cannot}: {said}")


def may_pass(error: Exception) -> bool:
    """Whether to try again: not where the Hub has refused, nor where this machine has."""
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
    if isinstance(cause, OfflineModeIsEnabled | EntryNotFoundError):
        return False
    if is_disk_full(cause):
        return False
    return not isinstance(cause, OSError) or cause.errno is None or isinstance(cause, ConnectionError)


def _cause(error: Exception) -> BaseException:
    """The client says that a file is not in the cache where it was asked for and could not be had."""
    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None else error
