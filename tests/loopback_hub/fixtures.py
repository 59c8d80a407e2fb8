"""Fixtures: a running loopback Hub, and a client of this process that talks to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.loopback_hub.server import LoopbackHub


@pytest.fixture
def loopback_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub of this test alone; this process talks to it, and to no other, until the end."""
    hub = LoopbackHub(tmp_path_factory.mktemp("hub")).start()
    try:
        with talking_to(hub):
            yield hub
    finally:
        hub.stop()
    assert not hub.crashes, "\n".join(hub.crashes)
    assert not hub.leaks, "a token was sent to the storage host"


@pytest.fixture
def hub_api(loopback_hub: LoopbackHub) -> Any:
    """Client of alice, who may write to `alice/...` and `acme/...`."""
    return loopback_hub.api()


@contextmanager
def talking_to(hub: LoopbackHub) -> Iterator[None]:
    """Let huggingface_hub and transformers of this process use a Hub.

    Its settings are constants, read from the environment at import; the tests import it offline. They are looked up
    where they are used, so they can be changed and put back. The session is closed at both ends, because it keeps
    connections and looked at the proxy variables when it was made.
    """
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http, close_session
    from transformers.utils import hub as transformers_hub

    with pytest.MonkeyPatch.context() as patch:
        for name, value in _constants(hub.endpoint, hub.home / "hf").items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", hub.endpoint)  # of the functions that need no client
        patch.setattr(transformers_hub, "_hf_api", None, raising=False)  # made at first use and kept
        for module in (_http, file_download):
            patch.setattr(module, "time", _NoWaiting())
        patch.setenv("HF_TOKEN", hub.token)
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1,localhost")
        close_session()
        try:
            yield
        finally:
            close_session()


def _constants(endpoint: str, home: Path) -> dict[str, Any]:
    """Settings of huggingface_hub for a Hub and a folder for its caches."""
    return {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
    }


class _NoWaiting:
    """The time module for the client's retries, without the waiting."""

    sleep: Callable[[float], None] = staticmethod(lambda seconds: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)
