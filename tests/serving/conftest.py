"""A server in this process, pinned to the specialist that calls tools, and one without a chat template."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.script_modules import SCRIPTS

SPECIALIST = SCRIPTS / "agent" / "packed"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Served:
    """A running server. model: what it is pinned to, None if to nothing. manager: of transformers, with the model."""

    port: int
    model: str | None
    manager: Any

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, self.port, timeout=60)

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and parsed answer of one request; a text is sent as it is."""
        connection = self.connection()
        sent = body if isinstance(body, str | None) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, sent, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, to its end."""
        connection = self.connection()
        connection.request("POST", path, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def _serve(model: str | None, **options: Any) -> Iterator[Served]:
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    from hf_qep.serving import put_right

    put_right()
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    serve = Serve(
        force_model=model, device="cpu", host=HOST, port=port, non_blocking=True, log_level="error", **options
    )
    served = Served(port, model, serve._model_manager)
    for _ in range(600):
        try:
            assert served.ask("/health")[0] == 200
            break
        except OSError:
            time.sleep(0.05)
    yield served
    serve.kill_server()


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """Pinned to the specialist."""
    yield from _serve(str(SPECIALIST))


@pytest.fixture(scope="session")
def base_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Pinned to the same weights without a chat template."""
    folder = shutil.copytree(SPECIALIST, tmp_path_factory.mktemp("base") / "model")
    (Path(folder) / "chat_template.jinja").unlink()
    yield from _serve(str(folder))


@pytest.fixture(scope="session")
def open_server() -> Iterator[Served]:
    """Pinned to nothing: it loads what a request names."""
    yield from _serve(None)


@pytest.fixture(scope="session")
def batching_server() -> Iterator[Served]:
    """Pinned to the specialist, with requests batched as they come."""
    yield from _serve(str(SPECIALIST), continuous_batching=True, cb_num_blocks=16, cb_max_batch_tokens=256)
