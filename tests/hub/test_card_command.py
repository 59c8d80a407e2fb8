"""`hf-qep card`, and other methods beside the one of the card."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_qep.errors import CardError
from hf_qep.hub.cards.card import is_generated, render_card, write_card
from hf_qep.hub.cards.facts import CardOptions, gather
from hf_qep.hub.preflight import check_folder
from hf_qep.hub.publish import PushOptions, execute, plan_push
from hf_qep.hub.remote import Remote
from tests.cli.test_commands import run
from tests.hub.card_checkpoints import RECORD, edit, enrich, task, unexplained_numbers

NAMES = ("--repo-id", "alice/tiny-llama-1bit", "--base-model", "acme/tiny-llama")


@pytest.fixture
def bare(checkpoint) -> Path:
    """A measured checkpoint without a card."""
    (checkpoint / "README.md").unlink()
    return checkpoint


def test_the_card_is_written_and_the_folder_is_ready_to_be_pushed(bare):
    pytest.importorskip("matplotlib")
    done = run("card", bare, *NAMES)
    assert done.exit_code == 0, (done.output, done.exception)
    assert is_generated((bare / "README.md").read_text())
    report = check_folder(bare)
    assert report.problems == [] and {"README.md", "images/bits_per_layer.png"} <= {f.path for f in report.files}
    assert "images/bits_per_layer.png" in done.stdout and "acme/tiny-llama (not verified)" in done.stdout


def test_json_says_what_was_made_and_what_is_uncertain(bare):
    done = run("card", bare, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert Path(answer["card"]) == bare / "README.md" and answer["base_model"] is None
    assert any("--base-model" in note for note in answer["notes"]) and any("--repo-id" in n for n in answer["notes"])


def test_a_card_made_by_hand_is_kept_unless_told(checkpoint):
    before = (checkpoint / "README.md").read_text() + "by hand\n"
    (checkpoint / "README.md").write_text(before)
    done = run("card", checkpoint, *NAMES)
    assert done.exit_code == 2 and "pass --overwrite" in done.output
    assert (checkpoint / "README.md").read_text() == before
    assert run("card", checkpoint, *NAMES, "--overwrite").exit_code == 0
    assert run("card", checkpoint, *NAMES).exit_code == 0, "a card of ours is replaced without being asked"


def test_nothing_is_written_without_a_measurement(bare):
    (bare / RECORD).unlink()
    done = run("card", bare, *NAMES, "--json")
    assert done.exit_code == 2 and json.loads(done.stdout)["error"]["type"] == "CardError"
    assert not (bare / "README.md").exists() and not (bare / "images").exists()


def test_folders_that_are_none(tmp_path):
    assert "no checkpoint" in run("card", tmp_path).output
    assert run("card", tmp_path / "nowhere").exit_code == 2


def test_the_hub_is_asked_about_the_original(bare, loopback_hub):
    card = b"---\nlicense: mit\nlanguage: de\nextra_gated_prompt: please\n---\n# x\n"
    loopback_hub.add_repo("acme/tiny-llama", files={"README.md": card}, gated="auto")
    script = "from hf_qep.cli import main; main()"
    words = [sys.executable, "-c", script, "card", str(bare), *NAMES, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=loopback_hub.environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["base_model_verified"] and (answer["licence"], answer["gate"]) == ("mit", "auto")
    data = ModelCard((bare / "README.md").read_text()).data
    assert (data.license, data.language, data.extra_gated_prompt) == ("mit", ["de"], "please")
    words[words.index("acme/tiny-llama")] = "acme/wrong-name"
    done = subprocess.run(words, capture_output=True, text=True, env=loopback_hub.environment(), timeout=120)
    assert done.returncode == 2 and "shows no model 'acme/wrong-name'" in done.stdout


@pytest.fixture
def other(bare, tmp_path) -> Path:
    """The record of another method, measured in the same way."""
    enrich(bare)
    path = tmp_path / "gptq.json"
    shutil.copy(bare / RECORD, path)

    def change(record):
        record["subject"].update(name="tiny-llama-gptq", sha256={"model.safetensors": "9" * 64})
        record["text"]["subject"]["perplexity"]["value"] = 987.6
        record["tasks"] = [task("reading", 0.812, 0.444, 0.25)]

    edit(path.parent, path.name, change)
    return path


def cells(card: str, label: str) -> list[str]:
    row = next(line for line in card.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_another_method_stands_beside_this_one(bare, other):
    done = run("card", bare, *NAMES, "--baseline-record", other)
    assert done.exit_code == 0, done.output
    card = (bare / "README.md").read_text()
    assert cells(card, "measurement")[2:5] == ["original", "tiny-llama-gptq", "this model"]
    assert cells(card, "perplexity")[3].startswith("987.6")
    assert cells(card, "reading")[3] == "44.4 ± 2.5" and cells(card, "guessing")[3] == "not measured"
    facts = gather(bare, CardOptions("alice/tiny-llama-1bit", baseline_records=(other,)))
    assert unexplained_numbers(render_card(facts), facts, bare) == []
    index = ModelCard(card).data.eval_results
    assert 987.6 not in {entry.metric_value for entry in index} and len(index) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["baseline"].update(sha256={"model.safetensors": "1" * 64}), "another original"),
        (lambda r: r["text"].update(source="other.txt"), "another source"),
        (lambda r: r["text"].update(window=32), "another window"),
        (lambda r: r["text"].update(stride=7), "another stride"),
        (lambda r: r["text"].update(bos="none"), "another bos"),
        (lambda r: r["text"]["baseline"]["perplexity"].update(n=7), "another original's perplexity"),
        (lambda r: r["text"]["baseline"]["perplexity"].update(value=3.0), "another original's perplexity"),
        (lambda r: r["tasks"][0].update(items=7), "another items"),
        (lambda r: r["tasks"][0].update(num_fewshot=5), "another num_fewshot"),
        (lambda r: r["tasks"][0]["metrics"][0]["baseline"].update(value=0.5), "another original's acc"),
        (lambda r: r.update(text=None, tasks=[]), "no score"),
    ],
)
def test_records_that_were_measured_otherwise_are_refused(bare, other, change, message):
    edit(other.parent, other.name, change)
    done = run("card", bare, *NAMES, "--baseline-record", other)
    assert done.exit_code == 2 and message in done.output
    assert not (bare / "README.md").exists()


def test_the_cards_own_record_is_no_baseline(bare):
    with pytest.raises(CardError, match="same weights"):
        gather(bare, CardOptions(baseline_records=(bare / RECORD,)))


def test_what_is_no_record_is_refused(bare, tmp_path):
    for text in ("{", "[]", '{"schema": "other"}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CardError, match="x.json"):
            gather(bare, CardOptions(baseline_records=(tmp_path / "x.json",)))


def test_rows_of_a_comparison_stand_beside_this_one(bare, float_checkpoint, tmp_path):
    river = tmp_path / "river.txt"
    river.write_text("He walked down to the river in the morning and sat upon a stone. " * 8)
    words = ("--methods", "rtn,onebit", "--propagation", "0", "--dataset", river, "--num-samples", 4, "--seq-len", 16)
    done = run("compare", float_checkpoint, *words, "--max-tokens", 300, "--window", 64, "--dtype", "float32", "--json")
    assert done.exit_code == 0, done.output
    path = tmp_path / "compare.json"
    path.write_text(done.stdout)
    card = render_card(gather(bare, CardOptions("alice/x", baseline_records=(path,))))
    assert cells(card, "measurement")[3:5] == ["rtn, without QEP", "onebit, without QEP"]
    assert all(re.match(r"\d", cell) for cell in cells(card, "perplexity")[2:6])
    edit(tmp_path, "compare.json", lambda c: c["rows"][1]["float_perplexity"].update(value=1.0))
    with pytest.raises(CardError, match="another original's perplexity"):
        gather(bare, CardOptions(baseline_records=(path,)))


def test_help_says_where_the_numbers_come_from():
    shown = " ".join(run("card", "--help").output.split())
    assert "hf_qep_eval.json" in shown and "--base-card" in shown and "--overwrite" in shown


def test_a_folder_with_its_card_is_published_with_the_gate_of_the_original(bare, loopback_hub, hub_api):
    card = b"---\nlicense: cc-by-nc-4.0\nextra_gated_prompt: please\n---\n# x\n"
    loopback_hub.add_repo("acme/tiny-llama", files={"README.md": card}, gated="manual")
    remote = Remote(hub_api)
    options = CardOptions("alice/tiny-llama-1bit", base_model="acme/tiny-llama")
    write_card(bare, gather(bare, options, remote=remote))
    refused = plan_push(bare, options.repo_id, PushOptions(public=True), remote=remote)
    assert any("--accept-license" in problem for problem in refused.problems) and len(refused.problems) == 1
    plan = plan_push(bare, options.repo_id, PushOptions(public=True, accept_license=True), remote=remote)
    assert plan.problems == [] and plan.warnings == []
    result = execute(plan, remote=remote)
    assert (result.visibility, result.gate) == ("public", "manual")
    data = hub_api.model_info(options.repo_id).card_data
    assert (data.base_model, data.base_model_relation) == ("acme/tiny-llama", "quantized")
