"""What tests of refusals have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError


@contextmanager
def refused(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> Iterator[pytest.ExceptionInfo[HfHubHTTPError]]:
    """The client raises this error, because the Hub answered with this status."""
    with pytest.raises(kind) as error:
        yield error
    assert error.value.response.status_code == status


def add(path: str, data: bytes = b"x") -> CommitOperationAdd:
    """Operation that adds a small file."""
    return CommitOperationAdd(path, data)
