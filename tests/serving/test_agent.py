"""The agent's demonstration from end to end, and what it says where something is missing."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest

from hf_qep.cli.demo import DEMO_MODEL
from hf_qep.errors import ConfigError
from hf_qep.evaluation.record import EvalRecord
from hf_qep.evaluation.tool_calls import call_task
from tests.script_modules import SCRIPTS, imported

with imported("demo_agent", "agent.server", "agent.specialist", "agent.requests") as found:
    DEMO = found.demo_agent
    SERVER, SPECIALIST, REQUESTS = (sys.modules[f"agent.{name}"] for name in ("server", "specialist", "requests"))

FOLDER = SCRIPTS / "agent" / "packed"
ROWS = DEMO_MODEL.parent / "demo_text" / "tool_calls.jsonl"


def test_question_server_tool_result_and_answer(capsys):
    pytest.importorskip("smolagents")
    pytest.importorskip("openai")
    tasks = ["What is the weather in Oslo?", "How many kilometres are 26 miles?"]
    assert DEMO.main(["ask", *tasks, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    (weather, miles) = outcome["tasks"]
    arguments = {"city": "Oslo"}
    result = REQUESTS.answer_to("get_weather", arguments)
    assert [(c["name"], c["arguments"]) for c in weather["calls"]] == [("get_weather", arguments)]
    assert result in weather["calls"][0]["result"]
    assert (weather["answer"], weather["error"]) == (result, None)
    assert miles["calls"][0]["arguments"] == {"value": 26, "source": "miles", "target": "kilometres"}
    assert miles["answer"] == "41.8 kilometres"
    assert outcome["record"]["n"] >= 100


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "smolagents", None)
    assert DEMO.main(["ask"]) == 2
    assert "hf-qep[agent]" in capsys.readouterr().err


def test_a_folder_without_a_model_is_told(tmp_path, capsys):
    pytest.importorskip("smolagents")
    pytest.importorskip("openai")
    assert DEMO.main(["ask", "--model", str(tmp_path), "--json"]) == 2
    assert "no model lies in" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_the_server_ends_with_the_block_whatever_ends_it(monkeypatch, ends):
    code = (
        "import http.server, sys\n"
        "class Well(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Well).serve_forever()"
    )
    started = []

    def popen(command, **options):
        port = command[command.index("--port") + 1]
        started.append(real([sys.executable, "-c", code, port], **options))
        return started[0]

    real = SERVER.subprocess.Popen
    monkeypatch.setattr(SERVER, "subprocess", types.SimpleNamespace(**{**vars(SERVER.subprocess), "Popen": popen}))
    with pytest.raises(ends), SERVER.served(FOLDER):
        raise ends
    assert started[0].poll() is not None


def test_a_server_that_does_not_come_up_says_its_last_words(tmp_path, monkeypatch):
    real = SERVER.subprocess.Popen

    def popen(command, **options):
        return real([sys.executable, "-c", "print('no such model'); raise SystemExit(2)"], **options)

    monkeypatch.setattr(SERVER, "subprocess", types.SimpleNamespace(**{**vars(SERVER.subprocess), "Popen": popen}))
    with pytest.raises(ConfigError, match="last words: no such model"), SERVER.served(tmp_path):
        pass


def test_the_bundled_requests_are_those_that_the_script_writes(tmp_path):
    assert DEMO.main(["rows", "--out", str(tmp_path / "rows.jsonl"), "--quiet"]) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == ROWS.read_bytes()
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    assert len(call_task("tool_calls", rows, len(rows)).items) == len(rows)


def test_held_out_phrasings_are_never_trained_on():
    assert REQUESTS.HELD_OUT.keys() == REQUESTS.TRAINED.keys()
    for name, phrasings in REQUESTS.HELD_OUT.items():
        assert not set(phrasings) & set(REQUESTS.TRAINED[name])


def test_the_bundled_record_is_that_of_the_bundled_weights():
    record = EvalRecord.read(FOLDER)
    manifest = json.loads((FOLDER / "hf_qep_manifest.json").read_text())
    assert record.subject.sha256["model.safetensors"] == manifest["files"]["model.safetensors"]["sha256"]
    (task,) = record.tasks
    assert task.form == "tool_calls" and task.metrics[0].name == "exact_match"


def test_making_a_specialist_leaves_both_models_and_the_record(tmp_path, capsys, monkeypatch):
    small = SPECIALIST.Preset(rows=8, epochs=1, packed_rows=12, packed_epochs=0, judged=2)
    monkeypatch.setitem(SPECIALIST.PRESETS, "quick", small)
    monkeypatch.setitem(sys.modules, "agent.specialist", SPECIALIST)
    out = tmp_path / "made"
    assert DEMO.main(["make", "--out", str(out), "--preset", "quick", "--json"]) == 0
    assert {"exact_match", "tool_name", "parsed"} <= json.loads(capsys.readouterr().out).keys()
    assert EvalRecord.read(out / "packed").tasks[0].items == 2
    assert (out / "packed" / "chat_template.jinja").read_text() == SPECIALIST.TEMPLATE
    assert DEMO.main(["make", "--out", str(out), "--quiet"]) == 2
    assert os.listdir(out)
