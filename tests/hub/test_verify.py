"""`hf-qep verify`: a good checkpoint agrees; each kind of tampering is found, from a folder and from the Hub."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from hf_qep.cli.eval import read_held_out
from hf_qep.engine.headers import MANIFEST, SINGLE_FILE
from hf_qep.errors import CheckpointError
from hf_qep.hub.allowed import LOADER
from hf_qep.hub.preflight import RECORD, SAMPLES
from hf_qep.hub.remeasure import SampleOptions, load_checkpoint
from hf_qep.hub.verify import verify
from tests.cli.test_commands import refusal, run
from tests.hub.checkpoints import edit_json, make_shards, reseal
from tests.hub.pushing import REPO, add_base, client, content, push

DIFFERS = 3


def flip(path, at=-1):
    """Change one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def negate_signs(folder):
    """Other weights in a file of the same form, with every checksum made to fit."""
    path = folder / SINGLE_FILE
    tensors = load_file(path)
    name = next(n for n in tensors if "down_proj" in n and n.endswith(".weight"))
    tensors[name] = ~tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    reseal(folder)


def card_of(folder, value):
    """A card that gives `value` as the perplexity."""
    metric = f"{{type: perplexity, name: perplexity, value: {value}}}"
    dataset, task = "{name: tales, type: tales}", "{type: text-generation}"
    index = f"model-index:\n- name: x\n  results:\n  - task: {task}\n    dataset: {dataset}\n    metrics: [{metric}]\n"
    card = folder / "README.md"
    card.write_text(card.read_text().replace("quantized_by", f"{index}quantized_by"))


def edit_record(folder, *keys, factor=0.5):
    """Change one number of the record."""

    def change(record):
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] *= factor

    edit_json(folder / RECORD, change)


def better(folder):
    """A perplexity that is better in every place where it can be read."""
    for number in ("nll", "bits_per_byte"):
        edit_record(folder, "text", "subject", number, "value", factor=0.9)
    edit_json(
        folder / RECORD,
        lambda r: r["text"]["subject"]["perplexity"].update(
            value=2.718281828459045 ** r["text"]["subject"]["nll"]["value"]
        ),
    )


TAMPERING = {
    "a weight byte": (lambda f: flip(f / SINGLE_FILE), "changed after it was made"),
    "other weights, sealed": (negate_signs, "perplexity on"),
    "a truncated weight file": (lambda f: (f / SINGLE_FILE).write_bytes(b"x" * 99), "claims a header"),
    "the config": (lambda f: edit_json(f / "config.json", lambda c: c.update(rope_theta=1)), "'config.json' has"),
    "the config, sealed": (
        lambda f: (edit_json(f / "config.json", lambda c: c.update(rms_norm_eps=10.0)), reseal(f)),
        "perplexity on",
    ),
    "code in the config, sealed": (
        lambda f: (edit_json(f / "config.json", lambda c: c.update(_attn_implementation_internal="a/b")), reseal(f)),
        "makes a reader run code",
    ),
    "the tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "'tokenizer.json' has"),
    "a missing file": (lambda f: (f / "tokenizer_config.json").unlink(), "'tokenizer_config.json' is missing"),
    "no weights": (lambda f: (f / SINGLE_FILE).unlink(), "neither 'model.safetensors'"),
    "no config": (lambda f: (f / "config.json").unlink(), "'config.json' is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), f"'{MANIFEST}' is missing"),
    "no card": (lambda f: (f / "README.md").unlink(), "'README.md' is missing"),
    "an extra file": (lambda f: (f / "notes.txt").write_text("x"), "'notes.txt'"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "'adapter_config.json'"),
    "a file of a checkpoint that is not listed": (lambda f: (f / "vocab.json").write_text("{}"), "is not listed"),
    "foreign code": (lambda f: (f / "evil.py").write_text("x"), "'evil.py'"),
    "the loader": (lambda f: (f / LOADER).write_text("import os\n"), f"'{LOADER}' is not the file"),
    "the loader, sealed": (
        lambda f: ((f / LOADER).write_text("import os\n"), reseal(f)),
        f"'{LOADER}' is not the file that hf_qep writes",
    ),
    "a record of other weights": (
        lambda f: edit_json(f / RECORD, lambda r: r["subject"].update(sha256={SINGLE_FILE: "0" * 64})),
        "measured on other weights",
    ),
    "samples of other weights": (
        lambda f: edit_json(f / SAMPLES, lambda r: r["subject"].update(sha256={SINGLE_FILE: "0" * 64})),
        "comes from other weights",
    ),
    "an edited perplexity": (lambda f: edit_record(f, "text", "subject", "perplexity", "value"), "contradicts itself"),
    "all perplexities edited alike": (better, "perplexity on"),
    "edited bits": (lambda f: edit_record(f, "bits", "linear"), "bits per weight, quantised linears"),
    "edited bits of the model": (lambda f: edit_record(f, "bits", "model"), "bits per weight, whole model"),
    "edited bits of the file": (lambda f: edit_record(f, "bits", "file"), "bits per weight, files"),
    "a record that is none": (lambda f: (f / RECORD).write_text("{}"), "no evaluation record"),
    "an edited number of the card": (lambda f: card_of(f, 1.23), "the card gives 'perplexity' as 1.23"),
}
ONLY_FOLDERS = {"a link": (lambda f: link_out(f), "'generation_config.json' is a link")}


def link_out(folder):
    """A good file in another place."""
    outside = folder.parent / "elsewhere.json"
    shutil.move(folder / "generation_config.json", outside)
    (folder / "generation_config.json").symlink_to(outside)


def check(target, *words):
    """(exit code, report) of `verify --json`."""
    result = run("verify", target, *words, "--json")
    assert result.exit_code in (0, DIFFERS), (result.output, result.exception)
    return result.exit_code, json.loads(result.stdout)


# --- from a folder


def test_a_good_folder_agrees_in_everything_that_was_checked(finished, float_checkpoint):
    code, report = check(finished, "--baseline", float_checkpoint)
    assert code == 0
    assert report["ok"] is True
    assert report["differs"] == []
    assert report["not_checked"] == []
    assert report["commit"] is None
    names = " ".join(m["name"] for m in report["measured"])
    for part in ("bits per weight, quantised linears", "perplexity on all", "KL to the original", "same first choice"):
        assert part in names
    assert all(m["agrees"] for m in report["measured"])


def test_shards_and_checkpoints_without_loader_agree_too(checkpoint):
    (checkpoint / LOADER).unlink()
    edit_json(checkpoint / "config.json", lambda c: c.pop("auto_map"))
    assert check(make_shards(checkpoint))[1]["differs"] == []


def test_a_part_of_the_tokens_is_measured_within_standard_errors(finished):
    code, report = check(finished, "--sample-tokens", 200)
    assert code == 0
    (part,) = [m for m in report["measured"] if "the first 200 of" in m["name"]]
    assert part["allowed"] > 0


def test_what_is_not_checked_is_said(finished):
    _, report = check(finished, "--sample-tokens", 0)
    assert report["not_checked"] == ["perplexity was not measured again, as asked"]
    _, report = check(finished)
    assert any("KL to the original was not measured again" in line for line in report["not_checked"])


def test_another_text_than_the_recorded_one_is_noticed(finished, tmp_path):
    (tmp_path / "other.txt").write_text("Größere Wörter, ältere Flüsse. " * 200)
    _, report = check(finished, "--text", tmp_path / "other.txt")
    assert any("the text at hand is not the one that was recorded" in line for line in report["not_checked"])
    assert verify(str(finished)).unchecked[0].endswith("is not at hand; give it with --text")


@pytest.mark.parametrize("what", [*TAMPERING, *ONLY_FOLDERS])
def test_tampering_with_a_folder_is_found(checkpoint, what):
    change, message = (TAMPERING | ONLY_FOLDERS)[what]
    change(checkpoint)
    code, report = check(checkpoint)
    assert code == DIFFERS
    assert report["ok"] is False
    assert any(message in sentence for sentence in report["differs"]), report["differs"]


def test_an_edited_kl_is_found_with_the_original_at_hand(checkpoint, float_checkpoint):
    edit_record(checkpoint, "text", "kl", "value")
    assert check(checkpoint)[0] == 0
    code, report = check(checkpoint, "--baseline", float_checkpoint)
    assert code == DIFFERS
    assert any("KL to the original" in sentence for sentence in report["differs"])


def test_tables_for_people_end_with_the_verdict(checkpoint):
    result = run("verify", checkpoint)
    assert result.exit_code == 0
    assert "everything that was checked agrees; 1 not checked" in result.stdout
    flip(checkpoint / SINGLE_FILE)
    result = run("verify", checkpoint, "--quiet")
    assert result.exit_code == DIFFERS
    assert "3 differences; 1 not checked" in result.stdout


@pytest.mark.parametrize("words", [["--sample-tokens", -1], ["--device", "nowhere"]])
def test_options_out_of_range_are_refused(finished, words):
    assert str(words[1]) in refusal(run("verify", finished, *words))


# --- what files that lie can do


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers = 1000000, but the files hold"),
        ({"hidden_size": -64}, "hidden_size = -64"),
        ({"vocab_size": 2**30}, r"describes \d+ weights, but the files have \d+ bytes"),
        ({"model_type": "nothing"}, "refuses it"),
        ({"architectures": ["os"], "model_type": "nothing"}, "refuses it"),
    ],
)
def test_a_config_that_lies_is_refused_before_memory_is_taken(checkpoint, change, message):
    edit_json(checkpoint / "config.json", lambda config: config.update(change))
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint, "float32", "cpu")
    assert verify(str(checkpoint)).differs != []


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", MANIFEST, RECORD])
@pytest.mark.parametrize("text", ["", "[]", "{}", "{" * 3000, "\xff"])
def test_a_file_of_nonsense_is_a_difference_and_no_crash(checkpoint, name, text):
    (checkpoint / name).write_text(text, encoding="latin-1")
    if name not in (MANIFEST, RECORD):
        reseal(checkpoint)
    assert verify(str(checkpoint), find_text=lambda source: read_held_out(None)[0]).differs != []


def test_code_of_the_checkpoint_is_not_run(checkpoint, tmp_path):
    marker = tmp_path / "ran"
    trap = f"open({str(marker)!r}, 'w')\n"
    (checkpoint / LOADER).write_text(trap)
    (checkpoint / "evil.py").write_text(trap)
    assert verify(str(reseal(checkpoint))).differs != []
    assert not marker.exists()


def test_files_beside_the_model_keep_it_from_being_loaded(checkpoint):
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    report = verify(str(checkpoint))
    assert report.measured == []
    assert any("before they are loaded" in line for line in report.unchecked)


def test_what_the_client_of_the_hub_leaves_in_a_folder_is_passed_over(checkpoint):
    (checkpoint / ".gitattributes").write_text("x")
    (checkpoint / ".cache" / "huggingface").mkdir(parents=True)
    (checkpoint / ".cache" / "huggingface" / "x.lock").write_text("")
    assert verify(str(checkpoint)).differs == []


# --- from the Hub


@pytest.fixture
def published(loopback_hub, finished):
    """A Hub with the finished checkpoint on it."""
    add_base(loopback_hub)
    push(loopback_hub, finished)
    loopback_hub.log.clear()
    return loopback_hub


def test_a_good_repository_agrees_at_the_commit_that_is_named(published):
    code, report = check(REPO)
    assert code == 0, report["differs"]
    assert report["commit"] == published.repo(REPO).commit("main").id
    assert "what was downloaded is what the Hub lists" in report["agrees"]
    assert any("perplexity on all" in m["name"] for m in report["measured"])
    assert published.leaks == []


def test_code_is_compared_by_its_name_and_never_downloaded(published):
    assert check(REPO)[0] == 0
    assert not any(LOADER in path for _, path, _ in published.log)


@pytest.mark.parametrize("what", list(TAMPERING))
def test_tampering_on_the_hub_is_found(loopback_hub, checkpoint, what):
    change, message = TAMPERING[what]
    change(checkpoint)
    loopback_hub.add_repo(REPO, files=content(checkpoint))
    code, report = check(REPO, "--revision", "main")
    assert code == DIFFERS
    short = {"'notes.txt'": "'notes.txt' does not belong", "'evil.py'": "'evil.py' does not belong"}
    assert any(short.get(message, message) in sentence for sentence in report["differs"]), report["differs"]


def test_a_download_that_was_changed_in_the_cache_is_noticed(published, tmp_path):
    assert check(REPO)[0] == 0
    (blob,) = [p for p in (published.home / "hf").rglob("config.json") if p.is_symlink()]
    blob.resolve().write_text(blob.read_text() + " ")
    code, report = check(REPO)
    assert code == DIFFERS
    assert any("'config.json' has" in sentence for sentence in report["differs"])


def test_a_folder_of_the_cache_can_be_checked_like_any_other(published, hub_api):
    folder = hub_api.snapshot_download(REPO)
    assert check(folder)[1]["differs"] == []


def test_an_older_commit_can_be_checked_while_main_is_bad(published, checkpoint):
    good = published.repo(REPO).commit("main").id
    flip(checkpoint / SINGLE_FILE)
    repo = published.repo(REPO)
    tree = dict(repo.commit("main").tree)
    tree |= {SINGLE_FILE: published.state.put(repo, SINGLE_FILE, (checkpoint / SINGLE_FILE).read_bytes(), tree)}
    repo.add_commit("main", "bad", tree, good, "bob")
    assert check(REPO)[0] == DIFFERS
    assert check(REPO, "--revision", good)[0] == 0


@pytest.mark.parametrize(("target", "words"), [("alice/nothing", []), (REPO, ["--revision", "nope"])])
def test_what_is_not_there_is_refused(published, target, words):
    assert f"{target!r} is neither a folder nor a repository" in refusal(run("verify", target, *words))


def test_a_repository_that_others_may_not_see_is_not_there(published, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", published.other_token)
    assert "neither a folder nor a repository on the Hub that this token may see" in refusal(run("verify", REPO))


def test_each_request_of_a_check_may_fail_once(published):
    from tests.hub.pushing import Nth
    from tests.loopback_hub.faults import Faults

    options = {"remote": client(published), "sample": SampleOptions(tokens=0)}
    verify(REPO, **options)
    count = len(published.log)
    assert count > 10
    for kind in ("reset", "status", "truncate"):
        for number in range(count):
            shutil.rmtree(published.home / "hf" / "hub")
            published.faults = Nth(number, kind)
            report = verify(REPO, **options)
            assert report.differs == [], (kind, published.log[-count:][number])
            published.faults = Faults()
