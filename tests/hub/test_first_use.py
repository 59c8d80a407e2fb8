"""What somebody does who uses it for the first time: the page of the README line by line, and the usual mistakes."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_qep.cli.eval import read_held_out
from hf_qep.engine.headers import MANIFEST
from hf_qep.errors import CardError, PublishError
from hf_qep.evaluation.perplexity import text_digest
from hf_qep.evaluation.record import EvalRecord
from hf_qep.hub.cards.card import render_card, sealed
from hf_qep.hub.cards.facts import CardOptions, gather
from hf_qep.hub.preflight import RECORD
from hf_qep.hub.push_plan import HAND_MADE
from hf_qep.hub.verify import verify
from tests.cli.test_commands import run
from tests.hub.checkpoints import BASE, TEXT, edit_json
from tests.hub.pushing import REPO, add_base, content, plan, push
from tests.loopback_hub.faults import Faults

README = Path(__file__).resolve().parents[2] / "README.md"
OPTIONS = CardOptions(repo_id=REPO, base_model=BASE)
NOT_HERE = ("hf auth login", "pip install", "python scripts/", "hf-qep space run")
"""Lines of the README that need a person, an index of packages or a browser, or have tests of their own."""


def commands_of(title: str) -> list[str]:
    """The command lines of a section of the README."""
    whole = README.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2]
    section = re.split(r"^## ", whole, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for body in re.findall(r"```bash\n(.*?)```", section, re.DOTALL) for line in body.splitlines()]
    return [line for line in lines if line and not line.startswith(NOT_HERE)]


def test_the_readme_line_by_line(loopback_hub, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """With a tiny model under the name of the README's, nothing else is changed."""
    tiny_model("llama").save_pretrained(tmp_path / "float")
    tiny_tokenizer.save_pretrained(tmp_path / "float")
    card = {"license": "apache-2.0", "language": ["en"]}
    loopback_hub.add_repo("Qwen/Qwen3-0.6B", files=content(tmp_path / "float"), card=card)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("hf_qep.hub.space.POLL_S", 0.01)
    monkeypatch.chdir(tmp_path)
    Path("held-out.txt").write_text(TEXT)
    Path("calibration.txt").write_text(TEXT)
    small = ("--num-samples", 4, "--seq-len", 16, "--dataset", "calibration.txt")
    done = run("quantize", "Qwen/Qwen3-0.6B", "--out", "qwen3-0.6b-1bit", *small)
    assert done.exit_code == 0, (done.output, done.exception)
    lines = commands_of("Publish it") + commands_of("Try it in a browser")
    assert [shlex.split(line)[1] for line in lines[:5]] == ["eval", "card", "push", "push", "verify"]
    said = ""
    for line in lines:
        done = run(*shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.output, done.exception)
        said += done.stdout
    assert "everything that was checked agrees" in said
    assert re.search(r"perplexity on all \d+ tokens|nats per token on the first", said), "verify has measured nothing"
    assert loopback_hub.files("alice/qwen3-0.6b-1bit") == content(Path("qwen3-0.6b-1bit"))
    space = loopback_hub.repo("alice/qwen3-1bit-or-original", "space")
    assert space.private
    assert space.variables["BASE_ID"] == "Qwen/Qwen3-0.6B"


# --- the held-out text is known by its digest


def test_the_record_holds_the_digest_of_its_text(finished):
    digest = EvalRecord.read(finished).text.text_sha256
    assert digest == text_digest(read_held_out(None)[0])
    assert f"sha256 `{digest}`" in render_card(gather(finished, OPTIONS))
    assert text_digest(["a", "b"]) != text_digest(["ab"])
    assert text_digest(["\ud83d"])  # half of a surrogate pair


def test_a_text_of_the_same_length_is_not_taken_for_the_recorded_one(finished):
    texts = read_held_out(None)[0]
    swapped = [text.translate(str.maketrans("ae", "ea")) for text in texts]
    report = verify(str(finished), find_text=lambda name: swapped)
    assert report.differs == []
    assert any("is not the one that was recorded" in line and "sha256" in line for line in report.unchecked)


def test_a_tokenizer_that_reads_the_recorded_text_otherwise_is_a_difference(checkpoint):
    def shorter(record):
        record["text"]["documents"] += 1

    edit_json(checkpoint / RECORD, shorter)
    report = verify(str(checkpoint), find_text=lambda name: read_held_out(None)[0])
    assert any("other tokens of the recorded text" in line for line in report.differs)


def test_records_without_a_digest_are_still_read_and_measured_again(checkpoint):
    def older(record):
        del record["text"]["text_sha256"]
        record["schema_version"] = 1

    edit_json(checkpoint / RECORD, older)
    assert EvalRecord.read(checkpoint).text.text_sha256 is None
    report = verify(str(checkpoint), find_text=lambda name: read_held_out(None)[0])
    assert report.differs == []
    assert any("perplexity on all" in measured.name for measured in report.measured)
    assert "sha256 `None`" not in render_card(gather(checkpoint, OPTIONS))


def test_a_baseline_on_another_text_of_the_same_name_is_refused(checkpoint, finished, tmp_path):
    other = json.loads((finished / RECORD).read_text())
    other["text"]["text_sha256"] = "0" * 64
    other["subject"]["sha256"] = {"model.safetensors": "1" * 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(CardError, match="another text of the same name"):
        gather(checkpoint, CardOptions(repo_id=REPO, base_model=BASE, baseline_records=(tmp_path / "other.json",)))


# --- cards


def test_a_card_changed_by_hand_is_pointed_out(loopback_hub, checkpoint):
    add_base(loopback_hub)
    assert plan(loopback_hub, checkpoint).warnings == []
    card = checkpoint / "README.md"
    card.write_text(card.read_text().replace("in one bit", "in half a bit"))
    assert plan(loopback_hub, checkpoint).warnings == [HAND_MADE]
    push(loopback_hub, checkpoint)
    assert HAND_MADE in verify(str(checkpoint)).unchecked


def test_a_card_that_names_a_folder_is_pointed_out(loopback_hub, checkpoint):
    add_base(loopback_hub)
    card = checkpoint / "README.md"
    card.write_text(render_card(gather(checkpoint, CardOptions(base_model=BASE))))
    (said,) = plan(loopback_hub, checkpoint).warnings
    assert f"to load '{checkpoint.name}'" in said and f"--repo-id {REPO}" in said
    card.write_text(render_card(gather(checkpoint, OPTIONS)))
    assert plan(loopback_hub, checkpoint).warnings == []


def test_a_noncommercial_licence_asks_readers_even_if_the_original_did_not(checkpoint, tmp_path):
    def data_of(card):
        (tmp_path / "base.md").write_text(card)
        facts = gather(checkpoint, CardOptions(repo_id=REPO, base_model=BASE, base_card=tmp_path / "base.md"))
        return ModelCard(render_card(facts)).data.to_dict()

    asked = data_of("---\nlicense: cc-by-nc-4.0\n---\n# x\n")
    assert list(asked["extra_gated_fields"].values()) == ["checkbox"]
    assert "cc-by-nc-4.0" in asked["extra_gated_prompt"]
    own = data_of("---\nlicense: cc-by-nc-4.0\nextra_gated_prompt: our words\n---\n# x\n")
    assert (own["extra_gated_prompt"], own.get("extra_gated_fields")) == ("our words", None)
    assert "extra_gated_prompt" not in data_of("---\nlicense: mit\n---\n# x\n")


def test_a_card_does_not_call_two_bits_one(checkpoint):
    assert "packed to about one bit each" in render_card(gather(checkpoint, OPTIONS))
    edit_json(checkpoint / MANIFEST, lambda manifest: manifest["recipe"].update(method="factored", bits=2.0))
    card = render_card(gather(checkpoint, OPTIONS))
    assert "one bit each" not in card and "1-bit" not in ModelCard(card).data.tags
    linear = EvalRecord.read(checkpoint).bits.linear
    assert re.search(rf"packed to {linear:.3g}\d* bits each", card)


# --- mistakes


def test_a_stray_file_is_the_only_complaint(loopback_hub, checkpoint, caplog):
    (checkpoint / "notes.py").write_text("")
    found = plan(loopback_hub, checkpoint)
    assert len(found.problems) == 1 and found.warnings == []
    assert caplog.text == "", "the Hub's client speaks of a card that was not read"


def test_a_name_that_cannot_be_is_one_complaint_and_no_request(loopback_hub, checkpoint):
    found = plan(loopback_hub, checkpoint, "alice/../x")
    assert len(found.problems) == 1 and "give OWNER/NAME" in found.problems[0]
    assert loopback_hub.log == []
    done = run("verify", "/nowhere/at/all")
    assert done.exit_code == 2 and "neither a folder nor a name on the Hub" in done.output


def test_verify_names_the_whole_commit_which_is_what_from_pretrained_takes(loopback_hub, checkpoint):
    add_base(loopback_hub)
    commit = push(loopback_hub, checkpoint).commit
    assert commit in run("verify", REPO).stdout


PROCESS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from hf_qep.cli import main; main()"
"""Where tests run in the background, their children would ignore Ctrl+C."""


def test_ctrl_c_during_a_push_exits_130_and_says_how_to_go_on(loopback_hub, finished):
    add_base(loopback_hub)
    loopback_hub.fail("POST", "/commit/", times=1_000)  # the push waits before it tries again
    words = [sys.executable, "-c", PROCESS, "push", str(finished), REPO]
    process = subprocess.Popen(words, env=loopback_hub.environment(), stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if line.startswith("Pushing"):
                break
        while process.poll() is None and not any("/commit/" in path for _, path, _ in loopback_hub.log):
            pass
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "run the same command again" in said and "Traceback" not in said
    assert loopback_hub.files(REPO) == {}
    loopback_hub.faults = Faults()
    push(loopback_hub, finished)
    assert loopback_hub.files(REPO) == content(finished)


def test_a_licence_of_a_strange_kind_is_a_problem_and_no_crash(loopback_hub, checkpoint):
    card = checkpoint / "README.md"
    card.write_text(sealed(card.read_text().partition("<!--")[0].replace("license: apache-2.0", "license: 2020-01-01")))
    with pytest.raises(PublishError, match="`license` is"):
        push(loopback_hub, checkpoint)
