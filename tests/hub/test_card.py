"""Cards: true to the record, complete, readable by the Hub."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_qep.errors import CardError, ExtraMissingError, OutputExistsError
from hf_qep.hub.cards import card as card_module
from hf_qep.hub.cards.card import card_problems, is_generated, render_card, render_student_card, write_card
from hf_qep.hub.cards.facts import CardOptions, gather
from hf_qep.hub.cards.metadata import result_files
from hf_qep.hub.remote import Remote
from tests.hub.card_checkpoints import RECORD, SAMPLES, edit, enrich, numbers_in, student, task, unexplained_numbers

OPTIONS = CardOptions(repo_id="alice/tiny-llama-1bit", base_model="acme/tiny-llama")
SECTIONS = [
    "Should you use this?", "Use", "Hardware and memory", "What was quantised", "Evaluation", "Samples", "Reproduce",
    "Limitations", "Licence and attribution", "Citations", "Provenance",
]  # fmt: skip
BASE_CARD = """---
license: cc-by-nc-4.0
license_link: LICENSE
language: [en, ja]
pipeline_tag: text-generation
extra_gated_prompt: "By submitting this form you agree: all of it"
extra_gated_fields: {Name: text, I agree to non-commercial use ONLY: checkbox}
---
# The original
"""


@pytest.fixture
def rich(checkpoint) -> Path:
    (checkpoint / "README.md").unlink()
    return enrich(checkpoint)


@pytest.fixture
def base_card(tmp_path) -> Path:
    path = tmp_path / "base.md"
    path.write_text(BASE_CARD)
    return path


def section(card: str, title: str) -> str:
    return re.split(r"^## ", card.partition(f"## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def test_sections_stand_in_their_order_and_the_card_passes_its_lint(rich):
    card = render_card(gather(rich, OPTIONS))
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == SECTIONS
    assert card_problems(card) == [] and is_generated(card)
    before, _, _ = card.partition("## Should")
    assert "> [!IMPORTANT]" in before and "not made or endorsed by acme" in before
    assert re.search(r"weight files .* → .* smaller\).*perplexity .* → .*KL .*recovery on tasks", before)
    assert not re.search(r"[^\n]\n#{2,3} ", re.sub(r"```.*?```", "", card, flags=re.DOTALL)), "a heading sticks to text"


def test_every_number_is_in_the_record_or_follows_from_it(rich):
    facts = gather(rich, OPTIONS)
    card = render_card(facts)
    assert len(numbers_in(card)) > 100
    assert unexplained_numbers(card, facts, rich) == []
    # The search itself finds a number that is nowhere.
    forged = card.replace("73.3 ± 2.2", "74.9 ± 2.2")
    assert forged != card and "74.9" in unexplained_numbers(forged, facts, rich)


def test_numbers_follow_the_record(rich):
    def change(record):
        scores, size = record["text"]["subject"], record["text"]["scored_bytes"]
        scores["perplexity"] = {"value": 1234.5, "stderr": 6.5, "n": 299}
        scores["nll"]["value"] = math.log(1234.5)
        scores["bits_per_byte"]["value"] = math.log2(1234.5) * scores["nll"]["n"] / size
        record["text"]["kl"]["value"] = 0.777
        record["tasks"] = [task("reading", 0.812, 0.655, 0.25)]
        record["cost"]["subject"]["speed"]["decode"]["value"] = 43.21
        record["bits"]["file"] = 7.125

    before = render_card(gather(rich, OPTIONS))
    edit(rich, RECORD, change)
    card = render_card(gather(rich, OPTIONS))
    for shown in ("1,234.5 ± 6.5", "KL 0.777", "65.5 ± 2.4", "43.2 ± 1.2", "7.125"):
        assert shown in card and shown not in before
    assert "| guessing" not in card and "73.3" not in card


def test_recovery_is_the_mean_over_tasks_and_near_chance_is_said(rich):
    card = render_card(gather(rich, OPTIONS))
    mean = (0.733 / 0.812 + 0.262 / 0.641) / 2
    above = ((0.733 - 0.25) / (0.812 - 0.25) + (0.262 - 0.25) / (0.641 - 0.25)) / 2
    assert f"recovery on tasks {100 * mean:.1f} % (mean of 2 tasks)" in card
    row = next(line for line in card.splitlines() if line.startswith("| **mean of 2 tasks**"))
    assert f"{100 * mean:.1f} %" in row and f"{100 * above:.1f} %" in row
    assert "guessing, accuracy, %, 0-shot, chance 25.0 % (**near chance**)" in card
    assert "reading, accuracy, %, 0-shot, chance 25.0 % |" in card
    assert "* You need guessing: it may be guessing there" in section(card, "Should you use this?")
    assert "In guessing it scores near chance" in section(card, "Limitations")


def test_two_reasons_for_and_two_against(rich):
    advice = section(render_card(gather(rich, OPTIONS)), "Should you use this?")
    for part in advice.split("No, if"):
        assert part.count("\n* ") == 2


def test_slower_than_the_original_is_a_warning_with_the_measured_factor(rich):
    use = section(render_card(gather(rich, OPTIONS)), "Use")
    assert "> [!WARNING]\n> 0.678 times as many new tokens per second" in use and "Test Accelerator" in use
    edit(rich, RECORD, lambda r: r["cost"]["subject"]["speed"]["decode"].update(value=200.0))
    assert "> [!NOTE]\n> 2.19 times" in section(render_card(gather(rich, OPTIONS)), "Use")


def test_what_was_not_measured_is_called_so(checkpoint):
    def change(record):
        record.update(text=None, tasks=[], cost=None, command=None)

    edit(checkpoint, RECORD, change)
    (checkpoint / SAMPLES).unlink(missing_ok=True)
    facts = gather(checkpoint, OPTIONS)
    card = render_card(facts)
    assert "recovery on tasks not measured" in card and "perplexity" not in card.lower()
    assert "Speed was not measured" in card and "No samples were recorded" in card
    assert section(card, "Hardware and memory").count("not measured") >= 8
    assert "No task was scored" in card and "Neither text nor tasks were measured" in card
    assert "Not recorded: it was measured from Python" in card
    assert "model-index" not in card
    assert unexplained_numbers(card, facts, checkpoint) == []


def test_peak_memory_of_a_cpu_is_not_given(rich):
    assert "5.91 MiB" in render_card(gather(rich, OPTIONS))
    edit(rich, RECORD, lambda r: r["environment"].update(accelerator=None))
    assert "| peak above the weights | not measured | not measured |" in render_card(gather(rich, OPTIONS))


def test_metadata_is_that_of_the_hub(rich, base_card):
    facts = gather(rich, CardOptions("alice/tiny-llama-1bit", base_model="acme/tiny-llama", base_card=base_card))
    data = ModelCard(render_card(facts)).data
    assert (data.base_model, data.base_model_relation) == ("acme/tiny-llama", "quantized")
    assert (data.license, data.license_link) == ("cc-by-nc-4.0", "LICENSE")
    assert (data.language, data.pipeline_tag, data.library_name) == (["en", "ja"], "text-generation", "transformers")
    assert data.quantized_by == "alice" and {"hf-qep", "1-bit", "rtn"} <= set(data.tags)
    form = yaml.safe_load(BASE_CARD.split("---")[1])
    assert data.extra_gated_prompt == form["extra_gated_prompt"]
    assert data.extra_gated_fields == form["extra_gated_fields"]
    assert data.datasets is None, "the calibration text is a local file"
    card = render_card(facts)
    assert "**NonCommercial**" in card.partition("## Should")[0]
    assert "https://huggingface.co/acme/tiny-llama/blob/main/LICENSE" in section(card, "Licence and attribution")


def test_model_index_has_this_models_values_and_never_the_originals(rich):
    record = json.loads((rich / RECORD).read_text())
    data = ModelCard(render_card(gather(rich, OPTIONS))).data
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert found["held_out.txt", "perplexity"] == record["text"]["subject"]["perplexity"]["value"]
    assert found["reading", "accuracy"] == 0.733 and found["guessing", "accuracy"] == 0.262
    theirs = {record["text"]["baseline"]["perplexity"]["value"], 0.812, 0.641}
    assert not theirs & set(found.values())
    assert all(r.source_url.endswith("alice/tiny-llama-1bit/blob/main/hf_qep_eval.json") for r in data.eval_results)


def test_calibration_on_a_hub_data_set_is_named_and_linked(rich):
    source = {"name": "allenai/c4:en:train:text", "rows": 4, "weight": 1.0, "documents": 9}
    edit(rich, "hf_qep_manifest.json", lambda m: m["calibration"].update(sources=[source]))
    card = render_card(gather(rich, OPTIONS))
    assert ModelCard(card).data.datasets == ["allenai/c4"]
    assert "https://huggingface.co/datasets/allenai/c4" in card
    assert "--dataset allenai/c4:en:train:text" in section(card, "Reproduce")


def test_the_command_to_make_it_again_is_one_that_the_program_accepts(rich):
    import shlex

    import typer

    from hf_qep.cli import app

    block = re.search(r"```bash\n(hf-qep quantize .*)\n```", section(render_card(gather(rich, OPTIONS)), "Reproduce"))[
        1
    ]
    words = shlex.split(block)
    command = typer.main.get_command(app).get_command(None, "quantize")
    given = command.make_context("quantize", words[2:]).params
    made = json.loads((rich / "hf_qep_manifest.json").read_text())["recipe"]
    assert given["model"] == "acme/tiny-llama" and given["dataset"] == "river.txt"
    for key in ("method", "bits", "num_samples", "seq_len", "batch_size", "propagation", "damping", "seed", "residual"):
        assert given[key] == made[key], key


def test_the_snippet_loads_the_checkpoint(rich, monkeypatch):
    facts = gather(rich, CardOptions())
    code = re.search(r"```python\n(.*?)```", section(render_card(facts), "Use"), re.DOTALL)[1]
    assert len(code.splitlines()) <= 10 and "trust_remote_code" not in code
    monkeypatch.chdir(rich.parent)
    space: dict = {}
    exec(compile(code, "snippet", "exec"), space)
    assert type(space["model"]).__name__ == "LlamaForCausalLM" and space["tokenizer"] is not None


def test_samples_are_unedited_and_the_worst_is_marked(rich):
    samples = json.loads((rich / SAMPLES).read_text())
    items = samples["items"]
    card = section(render_card(gather(rich, OPTIONS)), "Samples")
    assert len(items) == 4 and card.count(": the worst one") == 1
    for item in items:
        assert all(item[key].strip("\n") in card for key in ("prompt", "baseline", "subject"))
    worst = min(range(4), key=lambda i: items[i]["agreement"])
    assert f"### Sample {worst + 1}: the worst one" in card


def test_a_card_without_a_record_or_of_other_weights_is_refused(rich):
    edit(rich, RECORD, lambda r: r["subject"].update(sha256={"model.safetensors": "0" * 64}))
    with pytest.raises(CardError, match="measured on other weights"):
        gather(rich, OPTIONS)
    (rich / RECORD).unlink()
    with pytest.raises(CardError, match="states only what was measured; run: hf-qep eval"):
        gather(rich, OPTIONS)


def test_samples_of_other_weights_are_refused(rich):
    edit(rich, SAMPLES, lambda s: s["subject"].update(sha256={}))
    with pytest.raises(CardError, match="comes from other weights"):
        gather(rich, OPTIONS)


def test_a_manifest_of_other_weights_is_refused(rich):
    edit(rich, "hf_qep_manifest.json", lambda m: m["files"]["model.safetensors"].update(sha256="0" * 64))
    with pytest.raises(CardError, match="lists other weight files"):
        gather(rich, OPTIONS)


@pytest.mark.parametrize(
    "key, value", [("report", None), ("bits", {"bits_linear": "1"}), ("recipe", []), ("base_model", 3)]
)
def test_a_manifest_that_cannot_be_believed_is_refused(rich, key, value):
    edit(rich, "hf_qep_manifest.json", lambda m: m.update({key: value}))
    with pytest.raises(CardError, match="quantise again"):
        gather(rich, OPTIONS)


@pytest.mark.parametrize(
    "options, message",
    [
        (CardOptions(repo_id="no-owner"), "--repo-id"),
        (CardOptions(repo_id="a/b\n---\nx: 1"), "--repo-id"),
        (CardOptions(base_model="../../etc"), "--base-model"),
        (CardOptions(quantized_by="a: b"), "--quantized-by"),
        (CardOptions(base_card=Path("nowhere.md")), "no card 'nowhere.md'"),
    ],
)
def test_names_that_cannot_be(rich, options, message):
    with pytest.raises(CardError, match=message):
        gather(rich, options)


def test_the_manifests_original_cannot_be_renamed(rich):
    edit(rich, "hf_qep_manifest.json", lambda m: m.update(base_model="acme/tiny-llama"))
    with pytest.raises(CardError, match="not what the manifest names"):
        gather(rich, CardOptions(base_model="bob/other"))


def test_a_card_of_ours_is_replaced_and_one_made_by_hand_is_kept(rich):
    facts = gather(rich, OPTIONS)
    first = write_card(rich, facts)
    assert is_generated(first.card.read_text())
    write_card(rich, facts)
    first.card.write_text(first.card.read_text().replace("## Limitations", "## My own words"))
    assert not is_generated(first.card.read_text())
    with pytest.raises(OutputExistsError, match="changed by hand"):
        write_card(rich, facts)
    assert "My own words" in first.card.read_text()
    write_card(rich, facts, overwrite=True)
    assert "My own words" not in first.card.read_text()


def test_links_are_never_written_through(rich, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (rich / "images").symlink_to(outside)
    with pytest.raises(OutputExistsError, match="is a link"):
        write_card(rich, gather(rich, OPTIONS))
    (rich / "images").unlink()
    (rich / "README.md").symlink_to(outside / "file")
    with pytest.raises(OutputExistsError, match="no regular file"):
        write_card(rich, gather(rich, OPTIONS))
    assert list(outside.iterdir()) == []


def test_the_plot_is_an_image_with_words_for_those_who_do_not_see_it(rich):
    pytest.importorskip("matplotlib")
    written = write_card(rich, gather(rich, OPTIONS))
    assert written.plot == rich / "images" / "bits_per_layer.png"
    assert written.plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert re.search(r"!\[Stored bits per weight.*matrices.*\]\(images/bits_per_layer\.png\)", written.card.read_text())
    assert [p.name for p in written.plot.parent.iterdir()] == ["bits_per_layer.png"]


def test_without_matplotlib_the_plot_is_left_out_and_said_to_be(rich, monkeypatch):
    def missing(*args):
        raise ExtraMissingError("this needs the package `matplotlib`")

    monkeypatch.setattr(card_module, "draw", missing)
    written = write_card(rich, gather(rich, OPTIONS))
    assert written.plot is None and any("matplotlib" in note for note in written.notes)
    card = written.card.read_text()
    assert "no plot of bits per layer" in card and "](images/" not in card


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"name": "gsm8k", "prompt": "lm_eval:gsm8k", "items": 1319}, "gsm8k"),
        ({"name": "gsm8k", "prompt": "lm_eval:gsm8k", "items": 100}, None),
        ({"name": "gsm8k", "prompt": "own:gsm8k", "items": 1319}, None),
        ({"name": "arc_easy", "prompt": "lm_eval:arc_easy", "items": 5000}, None),
    ],
    ids=["whole test", "a part of it", "a local file", "no registered benchmark"],
)
def test_results_are_written_for_registered_benchmarks_that_were_run_whole(rich, change, expected):
    edit(rich, RECORD, lambda r: r.update(tasks=[task("x", 0.5, 0.25, None) | change]))
    files = result_files(gather(rich, OPTIONS))
    assert list(files) == ([f".eval_results/{expected}.yaml"] if expected else [])
    if expected:
        from huggingface_hub import eval_result_entries_to_yaml, parse_eval_result_entries

        (entry,) = entries = yaml.safe_load(files[f".eval_results/{expected}.yaml"])
        assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"} and entry["value"] == 25.0
        assert isinstance(entry["date"], str) and "0-shot" in entry["notes"]
        assert eval_result_entries_to_yaml(parse_eval_result_entries(entries)) == entries


def test_a_result_that_is_no_longer_in_the_record_goes_and_one_of_somebody_else_stays(rich):
    whole = {"name": "gsm8k", "prompt": "lm_eval:gsm8k", "items": 1319}
    edit(rich, RECORD, lambda r: r.update(tasks=[task("x", 0.5, 0.25, None) | whole]))
    (written,) = write_card(rich, gather(rich, OPTIONS)).results
    foreign = written.with_name("hle.yaml")
    foreign.write_text("- {dataset: {id: cais/hle, task_id: hle}, value: 1.0}")
    edit(rich, RECORD, lambda r: r.update(tasks=[]))
    assert any("was removed" in note for note in write_card(rich, gather(rich, OPTIONS)).notes)
    assert not written.exists() and foreign.exists()


def test_the_hub_accepts_the_card_and_knows_the_original(rich, loopback_hub, hub_api):
    loopback_hub.add_repo("acme/tiny-llama", files={"README.md": BASE_CARD.encode()}, gated="auto")
    remote = Remote(hub_api)
    facts = gather(rich, OPTIONS, remote=remote)
    assert facts.base_seen and facts.base.gated == "auto" and facts.base.sha
    card = render_card(facts)
    assert remote.validate_card(card) is None
    assert "the Hub knows it" in section(card, "Provenance")
    assert remote.validate_card(card.replace("license: cc-by-nc-4.0", "license: no such licence")) is not None


def test_an_original_that_the_hub_does_not_have_is_refused(rich, loopback_hub, hub_api, base_card):
    with pytest.raises(CardError, match="shows no model 'acme/tiny-llama'"):
        gather(rich, OPTIONS, remote=Remote(hub_api))
    given = CardOptions(base_model="acme/tiny-llama", base_card=base_card)
    facts = gather(rich, given, remote=Remote(hub_api))
    assert not facts.base_seen and facts.licence == "cc-by-nc-4.0"
    assert "not checked on the Hub" in render_card(facts)


def test_a_local_original_has_no_id_on_the_hub(rich):
    data = ModelCard(render_card(gather(rich, CardOptions()))).data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data and "quantized_by" not in data


def test_licence_other_without_a_name_points_at_the_original(rich, tmp_path):
    (tmp_path / "other.md").write_text("---\nlicense: other\n---\n")
    card = render_card(gather(rich, CardOptions(base_model="acme/x", base_card=tmp_path / "other.md")))
    assert ModelCard(card).data.license_link == "https://huggingface.co/acme/x"


def test_the_card_of_a_student():
    card = render_student_card(student())
    assert card_problems(card) == []
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == [
        *SECTIONS[:3], "What was removed and added", "How it was taught", "Evaluation", *SECTIONS[6:]
    ]  # fmt: skip
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation) == ("acme/small", "finetune")
    assert data.datasets == ["acme/letters"] and data.eval_results[0].metric_value == 0.79
    assert "10.0 times smaller weight files" in card and "not for anything that is no letter" in card
    rows = {line.split("|")[1].strip(): line for line in card.splitlines() if line.startswith("|")}
    assert "| 83.0 ± 2.0 |" in rows["teacher"] and "not measured" in rows["student, before it was taught"]
    assert "| 79.0 ± 2.1 | 95.2 %" in rows["**this student**"] and "87.9 %" in rows["**this student**"]


@pytest.mark.parametrize(
    "change, message",
    [({"tasks": []}, "not scored"), ({"extra": 1}, "extra"), ({"teacher": {}}, "teacher"), ({"seed": "a"}, "seed")],
)
def test_facts_of_a_student_are_checked(change, message):
    with pytest.raises(CardError, match=message):
        render_student_card(student() | change)


def test_templates_are_part_of_the_package():
    root = Path(__file__).resolve().parents[2]
    script = (
        "from setuptools import Distribution; d = Distribution(); d.parse_config_files();"
        "d.include_package_data = False;"
        "c = d.get_command_obj('build_py'); c.ensure_finalized();"
        "print(*[f for p, _, _, files in c.data_files if p == 'hf_qep' for f in files], sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    templates = {p.relative_to(root / "model_cards").as_posix() for p in (root / "model_cards").rglob("*.jinja")}
    packaged = {line.removeprefix("bundled/model_cards/") for line in done.stdout.splitlines() if "model_cards" in line}
    assert templates and templates <= packaged
