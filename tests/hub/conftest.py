"""Fixtures of this room: the loopback Hub, and a finished checkpoint to publish."""

import warnings
from collections.abc import Iterator

import pytest

from tests.hub.checkpoints import checkpoint, finished, float_checkpoint, relicensed
from tests.loopback_hub.fixtures import hub_api, loopback_hub

__all__ = ["checkpoint", "finished", "float_checkpoint", "hub_api", "loopback_hub", "relicensed"]


@pytest.fixture(autouse=True)
def no_deprecations_of_the_client() -> Iterator[None]:
    """huggingface_hub sends files in a way that its http library is about to drop; one warning per request."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Use 'content=<...>'")
        yield
