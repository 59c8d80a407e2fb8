"""The page as programs meet it: gradio_client against a server, and app.py as a Space starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import texts

from hf_qep.hub.space_folder import SpaceSettings, write_space
from tests.space.conftest import LONG, generations, served, wait_until

gradio_client = pytest.importorskip("gradio_client", reason="needs gradio: pip install -e '.[space]'")


@pytest.fixture(scope="module")
def client(live_models):
    """Against a page with a queue for one."""
    settings = replace(live_models.settings, queue_size=1, max_chars=400)
    usual, live_models.settings = live_models.settings, settings
    try:
        with served(live_models) as url:
            yield gradio_client.Client(url, verbose=False)
    finally:
        live_models.settings = usual


def error_of(job) -> str:
    with pytest.raises(Exception) as caught:
        job.result(timeout=60)
    return str(caught.value)


def test_the_interface_has_one_public_endpoint_and_streams_both_lanes(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert list(named) == ["/compare"]
    job = client.submit("The river", max_new_tokens=200, api_name="/compare")
    last = job.result(timeout=60)
    assert set(last) == {"original", "one_bit", "differences"}
    for lane in (last["original"], last["one_bit"]):
        assert (lane["status"], lane["tokens"]) == ("done", 200)
        assert lane["tokens_per_second"] > 0
    assert last["one_bit"]["weight_bytes"] < last["original"]["weight_bytes"]
    updates = job.outputs()
    assert len({len(update["original"]["text"]) for update in updates}) > 2, "not streamed"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": "  "}, texts.EMPTY_PROMPT),
        ({"prompt": "x", "max_new_tokens": 10**7}, "from 1 to"),
        ({"prompt": "x", "temperature": 99.0}, "temperature"),
        ({"prompt": "x", "seed": -1}, "seed"),
    ],
)
def test_a_request_that_cannot_be_run_is_a_sentence(client, values, said):
    assert said in error_of(client.submit(**values, api_name="/compare"))


def test_a_prompt_that_is_too_long_is_cut_and_says_so(client):
    lane = client.predict("long " * 200, max_new_tokens=4, api_name="/compare")["one_bit"]
    assert texts.TRIMMED_CHARS.format(limit=400) in lane["notes"]
    assert texts.TRIMMED_TOKENS.format(kept=60, all=400) in lane["notes"]


@pytest.mark.parametrize("on_a_space", [True, False])
def test_only_a_space_can_be_duplicated(live_models, monkeypatch, on_a_space):
    from page import build
    from stops import Stops

    # Gradio takes the folder spaces/ of this repository for the package of that name, which a Space has.
    monkeypatch.setattr("gradio.block_function.spaces", None)
    monkeypatch.setenv("SYSTEM", "spaces" if on_a_space else "")
    monkeypatch.setenv("SPACE_ID", "alice/compare")
    config = build(live_models, Stops(), lambda request, ticket: iter(())).get_config_file()
    assert ("duplicate" in {part["props"].get("elem_id") for part in config["components"]}) is on_a_space
    opens = [str(step["js"]) for step in config["dependencies"] if "duplicate=true" in str(step["js"])]
    assert len(opens) == on_a_space and all("spaces/alice/compare?" in address for address in opens)


def test_a_cancelled_call_ends_generate(client, forwards):
    job = client.submit("The river", max_new_tokens=LONG, api_name="/compare")
    assert wait_until(lambda: bool(generations()) and bool(job.outputs()))
    job.cancel()
    assert wait_until(lambda: not generations()), "generate goes on although nobody reads it"
    assert len(forwards) < LONG, "it ended by itself"


def test_a_full_queue_refuses_with_a_sentence(client):
    first = client.submit("The river", max_new_tokens=LONG, api_name="/compare")
    assert wait_until(lambda: bool(generations()))
    second = client.submit("waits", max_new_tokens=4, api_name="/compare")
    assert wait_until(lambda: second.status().code.name == "IN_QUEUE")
    assert "queue is full" in error_of(client.submit("too many", max_new_tokens=4, api_name="/compare")).lower()
    first.cancel()
    assert second.result(timeout=60)["one_bit"]["status"] == "done", "the place was not given on"


def test_files_of_the_machine_cannot_be_read_through_the_page(client, pair):
    import httpx

    for name in (pair[1] / "config.json", Path(__file__), Path(os.sep, "etc", "passwd")):
        answer = httpx.get(f"{client.src.rstrip('/')}/gradio_api/file={name}", trust_env=False)
        assert answer.status_code in (403, 404)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


LENDER = """
def GPU(duration):
    def lend(function):
        def run(request, ticket):
            print("lent for", duration(request, ticket), flush=True)
            yield from function(request, ticket)
        return run
    return lend
"""
"""What ZeroGPU's package does as far as the page is concerned."""


def test_the_folder_of_a_space_starts_with_its_own_copy_of_the_package(pair, tmp_path):
    folder = tmp_path / "space"
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "spaces.py").write_text(LENDER)
    write_space(folder, SpaceSettings(model_id=str(pair[1]), base_id=str(pair[0])))
    port = free_port()
    own = {"GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "DEVICE": "cpu"}
    own["PYTHONPATH"] = str(tmp_path / "zero")
    script = "import runpy, hf_qep; print(hf_qep.__file__, flush=True); runpy.run_path('app.py', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(str(folder)), "the installed package was used"
        assert any("Running on local URL" in line for line in process.stdout), "the page did not start"
        found = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
        last = found.predict("The river", max_new_tokens=8, api_name="/compare")
        assert [last[lane]["status"] for lane in ("original", "one_bit")] == ["done", "done"]
        process.send_signal(signal.SIGTERM)
        assert "lent for 22" in process.stdout.read(), "ZeroGPU was not asked for the time that 8 tokens need"
    finally:
        process.kill()
        process.wait(timeout=30)


def test_a_wrong_variable_ends_app_py_with_one_sentence():
    app = Path(sys.modules["texts"].__file__).parent / "app.py"
    environment = {**os.environ, "MAX_NEW_TOKENS": "many", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, str(app)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Error: MAX_NEW_TOKENS='many' must be a whole number" in done.stderr
    assert "Traceback" not in done.stderr


def test_space_run_serves_until_it_is_ended_and_leaves_no_page_behind(pair):
    port = free_port()
    words = ["space", "run", str(pair[1]), "--base", str(pair[0]), "--port", str(port), "--original", "off"]
    command = [sys.executable, "-c", "from hf_qep.cli import main; main()", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stderr is not None
        assert any("Running on local URL" in line for line in process.stderr)
        last = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False).predict(
            "The river", max_new_tokens=4, api_name="/compare"
        )
        assert (last["original"]["status"], last["one_bit"]["status"]) == ("off", "done")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        with socket.socket() as probe, pytest.raises(OSError):
            probe.connect(("127.0.0.1", port))
    finally:
        process.kill()
