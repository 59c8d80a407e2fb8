"""The accuracy bench on a tiny model: what a row holds, how a run goes on, what the tables say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.script_modules import imported

ROOT = Path(__file__).resolve().parent.parent
TEXT = (
    "The old man walked down to the river. He sat upon a large grey stone. The boat lay by the water all the night. "
    "In the morning he opened the door. Then he went along the road to the house. She gave him a piece of bread. "
)
MODULES = ("accuracy_row", "accuracy_table", "bench_accuracy", "peer_onecomp")

STUB_PEER = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
names = json.loads(Path(value("--modules")).read_text())
weights = LlamaForCausalLM.from_pretrained(words[0]).state_dict()
out = Path(value("--out"))
save_file({f"{n}.weight": weights[f"{n}.weight"] * 1.0 for n in names}, out / "weights.safetensors")
size = sum(weights[f"{n}.weight"].numel() for n in names)
facts = {"stored_bits": 3 * size, "linear_weights": size, "seconds": 1.0, "cpu_seconds": 2.0, "peak_bytes": 5}
assert load_file(value("--tokens"))["input_ids"].shape == (8, 32) and "--qep" in words
(out / "peer.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def scripts():
    """The modules of the bench by name."""
    with imported(*MODULES) as modules:
        yield modules


@pytest.fixture
def setting(scripts, tiny_model, tiny_tokenizer, tmp_path):
    """A tiny model in a folder, with text to calibrate and measure on."""
    tiny_model("llama").save_pretrained(tmp_path / "float")
    tiny_tokenizer.save_pretrained(tmp_path / "float")
    (tmp_path / "text.txt").write_text(TEXT * 3)
    return scripts.accuracy_row.Setting(
        name="tiny", model=str(tmp_path / "float"), dataset=str(tmp_path / "text.txt"), num_samples=8, seq_len=32,
        text=str(tmp_path / "text.txt"), window=64, max_tokens=200, cloze=None, cloze_items=10,
    )  # fmt: skip


def a_row(scripts, **changes):
    return replace(scripts.bench_accuracy.Row("gptq", "baselines", 1.0, 0, {"method": "gptq"}), **changes)


def test_a_row_of_ours_holds_bits_three_ways_distance_cost_and_cloze(scripts, setting, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "held.txt").write_text(TEXT * 4)
    setting = replace(setting, cloze=str(tmp_path / "held.txt"))
    found = scripts.accuracy_row.by_us(setting, a_row(scripts, cloze=True), tmp_path)
    assert 1 < found["bits_linear"] < found["bits_model"] < 32
    assert found["kl"]["value"] > 0 and 0 <= found["top1_agreement"]["value"] < 1
    weights = sum(t.numel() for t in load_file(tmp_path / "float" / "model.safetensors").values())
    assert found["file_bytes"] == pytest.approx(found["bits_model"] * weights / 8, rel=0.1)
    assert found["peak_bytes"] > 1e8 and found["seconds"] > 0
    assert found["cloze"]["chance"] == pytest.approx(0.2) and found["cloze"]["quantized"]["n"] == 10
    (kept,) = tmp_path.glob("answers-*.json")
    before = kept.stat().st_mtime_ns
    again = scripts.accuracy_row.by_us(setting, a_row(scripts, cloze=True), tmp_path)
    assert again["kl"] == found["kl"] and again["cloze"] == found["cloze"]
    assert kept.stat().st_mtime_ns == before


def test_a_row_of_the_peer_is_measured_on_its_weights_and_counted_by_its_bits(scripts, setting, tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB_PEER)
    monkeypatch.setattr(scripts.accuracy_row, "PEER_SCRIPT", tmp_path / "stub.py")
    row = scripts.bench_accuracy.peer_row("dbf", 1.5, True)
    found = scripts.accuracy_row.by_peer(setting, row, tmp_path, sys.executable)
    assert found["kl"]["value"] == pytest.approx(0, abs=1e-6)  # the stub gives the float weights back
    assert found["bits_linear"] == 3 and found["cpu_seconds"] == 2.0
    floats = load_file(tmp_path / "float" / "model.safetensors")
    weights = sum(t.numel() for t in floats.values())
    linears = sum(t.numel() for name, t in floats.items() if "proj" in name)
    assert found["bits_model"] == pytest.approx((3 * linears + 32 * (weights - linears)) / weights)


def test_what_the_peer_said_when_it_failed_is_told(scripts, setting, tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text("import sys; sys.exit('no such method')")
    monkeypatch.setattr(scripts.accuracy_row, "PEER_SCRIPT", tmp_path / "stub.py")
    with pytest.raises(RuntimeError, match="exit status 1 and said: no such method"):
        scripts.accuracy_row.by_peer(
            setting, scripts.bench_accuracy.peer_row("dbf", 1.5, False), tmp_path, sys.executable
        )


def test_all_rows_of_a_seed_see_the_same_tokens(scripts, setting, tmp_path):
    model, tokenizer, _ = scripts.accuracy_row.load(setting)
    first, again, other = (
        scripts.accuracy_row.calibration_of(setting, seed, model, tokenizer, tmp_path) for seed in (0, 0, 1)
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(list(tmp_path.glob("tokens-*.safetensors"))) == 2
    assert torch.equal(scripts.accuracy_row.without_padding(first.inputs), first.inputs["input_ids"])


def test_the_peer_gets_the_tokens_of_padded_rows_without_the_padding(scripts):
    ids = torch.arange(12).reshape(3, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    dense = scripts.accuracy_row.without_padding({"input_ids": ids, "attention_mask": mask})
    assert dense.tolist() == [[0, 1, 2, 4], [5, 8, 9, 10]]


def test_a_run_goes_on_where_it_stopped_and_writes_failures_down(scripts, setting, tmp_path, monkeypatch):
    bench = scripts.bench_accuracy
    in_a_process = bench.run_row
    monkeypatch.setattr(bench, "run_row", lambda *_: {k: v for k, v in line_of("gptq", 1.0, 0.5).items() if k in FOUND})
    good, bad = a_row(scripts), a_row(scripts, label="too few bits", recipe={"method": "factored", "bits": 0.3})
    results, work = tmp_path / "r.jsonl", tmp_path / "work"
    assert bench.carry_out(setting, [good], results, work, None) == 0
    results.write_text(results.read_text() + '{"cut o')
    assert bench.carry_out(setting, [good, bad], results, work, None, seconds=-1) == 0
    (line,) = bench.read_results(results)
    assert (line["status"], line["label"], line["model"]) == ("ok", "gptq", "tiny")
    results.write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(bench, "run_row", in_a_process)
    assert bench.carry_out(setting, [good, bad], results, work, None) == 1
    ok, failed = bench.read_results(results)
    assert ok == line and failed["status"] == "failed" and "bits per weight" in failed["reason"]
    assert not list(work.glob("order-*")) and not list(work.glob("result-*"))
    tables = scripts.accuracy_table
    assert any("too few bits" in text for text in tables.table([ok, failed], "tiny", None))


def test_a_row_is_known_by_all_that_decides_it(scripts, setting):
    row = a_row(scripts)
    changed = [a_row(scripts, seed=1), a_row(scripts, bits=1.5), a_row(scripts, recipe={"method": "sign"})]
    keys = {scripts.accuracy_row.key_of(setting, r) for r in [row, *changed]}
    keys.add(scripts.accuracy_row.key_of(replace(setting, num_samples=4), row))
    assert len(keys) == 5
    assert scripts.accuracy_row.key_of(replace(setting, model="elsewhere/float"), row) in keys


def test_every_recipe_is_one_that_the_config_takes(scripts, setting):
    from hf_qep.config import QepConfig
    from hf_qep.registry import METHODS

    bench = scripts.bench_accuracy
    rows = list(bench.comparison_rows([1.1, 2.0], ["ours", "baselines", "peer"]))
    for name in [*bench.ABLATIONS, "tokens", "text"]:
        rows += bench.ablation_rows(name, [1.1], setting, {"wiki": "wiki.jsonl", "self": None})
    tried = [QepConfig(**row.recipe) for row in rows if not row.peer and row.recipe["method"] in METHODS.names()]
    assert len(tried) > 20
    assert {row.recipe["method"] for row in rows if row.peer} == set(scripts.peer_onecomp.METHODS)
    assert not any(row.recipe["qep"] for row in rows if row.peer and "jointq" in row.label)
    rows = bench.ablation_rows("tokens", [1.1], replace(setting, num_samples=64), {})
    assert sorted({row.setting["num_samples"] for row in rows}) == [4, 16, 64]


def test_seeds_repeat_the_rows_and_the_first_answers_the_cloze(scripts):
    rows = scripts.bench_accuracy.with_seeds([a_row(scripts), a_row(scripts, group="tuning")], [3, 5])
    assert [(row.seed, row.cloze) for row in rows] == [(3, True), (3, False), (5, False), (5, False)]


FOUND = ("status", "text", "bits_linear", "bits_model", "file_bytes", "seconds", "cpu_seconds", "peak_bytes", "kl")
FOUND += ("top1_agreement", "perplexity", "cloze")


def line_of(label, bits, kl, seed=0, **changes):
    measured = {"value": kl, "stderr": 0.01, "n": 100}
    return {
        "label": label, "group": "peer", "peer": True, "bits": bits, "seed": seed, "recipe": {}, "status": "ok",
        "model": "m", "text": "t.txt", "calibration": {"dataset": "self", "num_samples": 8, "seq_len": 32},
        "bits_linear": bits, "bits_model": 2.0, "file_bytes": 1e6, "seconds": 60, "cpu_seconds": 30, "peak_bytes": 1e9,
        "kl": measured, "top1_agreement": measured, "perplexity": measured, "cloze": None, **changes,
    }  # fmt: skip


def test_the_table_means_over_seeds_and_names_the_peer_to_beat(scripts):
    lines = [line_of("a", 1.05, 0.4), line_of("a", 1.05, 0.6, seed=1), line_of("b", 1.08, 0.7), line_of("c", 1.9, 0.1)]
    lines.append(line_of("ours", 1.0, 0.2, group="ours", peer=False))
    text = list(scripts.accuracy_table.table(lines, "m", None))
    (row,) = [line for line in text if line.startswith("| a |")]
    assert "| 0.5 ± 0.1 |" in row and row.endswith("| 2 |")
    best = [line for line in text if line.startswith("OneComp's best")]
    assert [line.partition(": ")[2][:1] for line in best] == ["a", "a", "c"]


def test_bits_of_the_peer_are_its_packed_signs_and_16_bit_scales(scripts):
    peer = scripts.peer_onecomp
    signs = torch.ones(5, 7)
    onebit = type("OnebitResult", (), {"sign": signs, "a": torch.ones(5), "b": torch.ones(7)})()
    assert peer.stored_bits(onebit) == 40 + 16 * 12
    vectors = {"dbf_Da": torch.ones(5), "dbf_mid": torch.ones(3), "dbf_Db": torch.ones(7)}
    dbf = type("DBFResult", (), {"dbf_A": torch.ones(2), "dbf_B": torch.ones(3), **vectors})()
    assert peer.stored_bits(dbf) == 40 + 16 * 15
    codes = {"bits": 2, "assignment": torch.ones(5, 1, 7), "scale": torch.ones(5, 1), "zero_point": torch.ones(5, 1)}
    assert peer.stored_bits(type("JointQResult", (), codes)()) == 2 * 40 + 16 * 5
    with pytest.raises(TypeError, match="no way to count"):
        peer.stored_bits(signs)
    assert peer.largest_target(lambda t: t + 0.3, 1.5) == pytest.approx(1.2)
    assert peer.largest_target(lambda t: 9.0, 1.5) == 0.05
