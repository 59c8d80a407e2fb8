"""The speed bench at its quick sizes: every contender has a row of positive numbers, absent peers are told."""

from __future__ import annotations

import json
import re
import stat
import sys
from pathlib import Path

import pytest
import torch

from tests.script_modules import SCRIPTS, imported

MODULES = ("bench_speed", "peer_llamacpp", "speed_kernels", "speed_models")
NATIVE = [
    f"{form}, {how}" for form in ("1-bit", "1-bit group 128", "factored 1 bit", "4-bit") for how in ("exact", "int8")
]
TORCH = ["torch bf16", "torch fp32", "torch int8 weights", "torch int4 weights"]

STUB = """#!{python}
import sys
for line in sys.stdin:
    verb, name, *rest = line.split()
    wrong = verb == "make" and rest[0] == "TQ1_0"
    answers = {{"make": "ok 1.125 2 plain", "run": "ok 0.001", "drop": "ok 0"}}
    print("no the width is no multiple of its block" if wrong else answers[verb], flush=True)
"""

STUB_LLAMACPP = """#!{python}
import json, sys
from pathlib import Path
for line in sys.stdin:
    request = json.loads(line)
    answer = {{"run": {{"prefill": 0.002, "decode": 0.004}}}}.get(request["verb"], {{}})
    if request["verb"] == "write":
        assert request["shape"]["hidden"] == 256 and request["table"] == "Q4_0"
        Path(request["file"]).write_bytes(bytes(1000))
        answer = {{"error": "no such type"}} if request["kind"] == "TQ1_0" else {{"bytes": 1000}}
    print(json.dumps(answer), flush=True)
"""


def executable(path, text):
    """A script that the running Python carries out."""
    path.write_text(text.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture(scope="module")
def scripts():
    """The modules of the bench by name."""
    with imported(*MODULES) as modules:
        yield modules


@pytest.fixture
def bench(scripts, tmp_path, capsys):
    """Words of the command line -> (what the JSON file holds, what was printed)."""

    def run(*words):
        threads = torch.get_num_threads()
        scripts.bench_speed.main([words[0], "--quick", "--json", str(tmp_path / "found.json"), *words[1:]])
        assert torch.get_num_threads() == threads
        printed = capsys.readouterr().out
        assert str(Path.home()) not in printed and str(SCRIPTS.parent) not in printed
        return json.loads((tmp_path / "found.json").read_text()), printed

    return run


def has_native():
    """Whether there are native kernels."""
    from hf_qep.kernels.native import kernels

    return kernels().native


def test_products_of_every_contender_and_an_absent_peer(bench):
    found, printed = bench("kernels")
    rows = found["tables"]["Products with packed weights"]
    ours = NATIVE if has_native() else ["1-bit, torch reference"]
    for shape in ("128x256", "192x512"):
        for batch in (1, 4):
            chosen = [r for r in rows if (r["shape"], r["batch"]) == (shape, batch)]
            assert [r["contender"] for r in chosen] == [*ours, *TORCH, "memory read"]
            assert all(r["GB/s"] > 0 for r in chosen) and all(r["us"] > 0 for r in chosen[:-1])
            assert all(r["x torch bf16"] > 0 and r["x llama.cpp Q1_0"] is None for r in chosen[:-1])
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1
    (absent,) = [line for line in found["absent"] if "llama.cpp" in line]
    assert "--ggml" in absent and "peer_llamacpp.py" in absent and f"* {absent}" in printed
    assert found["facts"]["isa"] and re.search("threads|cores", printed)


def test_a_peer_takes_part_and_what_it_cannot_do_is_told(bench, tmp_path):
    stub = executable(tmp_path / "stub", STUB)
    found, _ = bench("kernels", "--shapes", "128x256", "--batches", "1", "--ggml", stub)
    rows = {row["contender"]: row for row in found["tables"]["Products with packed weights"]}
    assert rows["llama.cpp Q1_0"]["bits"] == 1.125 and rows["llama.cpp Q1_0"]["x llama.cpp Q1_0"] == 1
    assert rows["torch bf16"]["x llama.cpp Q1_0"] > 0 and "llama.cpp TQ1_0" not in rows
    assert any("TQ1_0" in line and "no multiple" in line for line in found["absent"])
    found, _ = bench("kernels", "--shapes", "128x256", "--batches", "1", "--ggml", str(tmp_path / "nothing"))
    assert any("does not start" in line for line in found["absent"])


def test_overhead_of_every_way_to_call(bench):
    found, _ = bench("overhead")
    rows = {row["call"]: row for row in found["tables"]["One call with 64 x 64 signs"]}
    ways = [f"{way}, {how}" for how in ("exact", "int8") for way in ("ctypes", "torch operator", "QepLinear")]
    ours = ways if has_native() else ["QepLinear, torch reference"]
    assert {*ours, "F.linear bf16", "nn.Linear bf16"} - {"ctypes, exact", "ctypes, int8"} <= set(rows)
    assert all(row["us"] > 0 for row in rows.values())


def test_tokens_of_every_lane_and_where_the_time_goes(bench):
    found, _ = bench("generate", "--model", "llama-tiny", "--no-load", "--profile")
    rows = {row["lane"]: row for row in found["tables"]["Generation"]}
    lanes = ["torch bf16", "1-bit sign, exact", "1-bit sign, int8"]
    assert list(rows) == [name for lane in lanes for name in (lane, f"{lane}, static")]
    assert all(row["prefill tokens/s"] > 0 and row["decode tokens/s"] > 0 for row in rows.values())
    profiles = [table for title, table in found["tables"].items() if title.startswith("A decoded token")]
    assert len(profiles) == len(lanes) and all(table[0]["us"] > 0 for table in profiles)
    assert any("--llamacpp" in line for line in found["absent"])


def test_llama_cpp_takes_part_in_the_rounds(bench, tmp_path):
    stub = executable(tmp_path / "stub", STUB_LLAMACPP)
    found, _ = bench("generate", "--model", "llama-tiny", "--no-load", "--llamacpp", stub, "--work", str(tmp_path))
    rows = {row["lane"]: row for row in found["tables"]["Generation"]}
    assert rows["llama.cpp Q1_0"]["prefill tokens/s"] == 8 / 0.002
    assert rows["llama.cpp Q4_0"]["decode tokens/s"] == 4 / 0.004 and rows["llama.cpp Q4_0"]["MB"] == 0.001
    assert rows["torch bf16"]["decode x llama.cpp Q1_0"] > 0 and "llama.cpp TQ1_0" not in rows
    assert any("TQ1_0" in line and "no such type" in line for line in found["absent"])
    assert len(list(tmp_path.glob("*.gguf"))) == 2


def test_loading_is_measured_in_a_process_of_its_own(bench):
    found, _ = bench("generate", "--model", "cohere2-tiny", "--no-float", "--format", "factored", "--untied")
    rows = found["tables"]["Generation"]
    assert {row["lane"] for row in rows} >= {"1-bit factored, exact", "1-bit factored, int8, static"}
    assert all(row["load s"] > 0 and row["peak MB"] >= row["MB before"] > 0 and row["MB"] > 0.1 for row in rows)


@pytest.mark.parametrize("family", ["llama", "cohere2"])
@pytest.mark.parametrize("form", ["sign", "group128", "factored"])
def test_a_packed_model_is_one_that_is_saved_and_loaded(scripts, tmp_path, family, form):
    from transformers import AutoModelForCausalLM

    models = scripts.speed_models
    shape = models.SHAPES[f"{family}-tiny"]
    model, ids = models.build(shape, form, 4), models.prompt_of(shape, 8)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        logits = model(ids).logits
        assert logits.isfinite().all() and logits.std() > 0.01
        assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert models.stored_bytes(tmp_path) > 0


def test_the_peer_gets_the_matrices_of_the_model(scripts):
    from dataclasses import asdict, replace

    for family in ("llama", "cohere2"):
        shape = replace(scripts.speed_models.SHAPES[f"{family}-tiny"], tied=family == "cohere2")
        state = scripts.speed_models.build(shape).state_dict()
        ours = sorted(
            tuple(t.shape) for name, t in state.items() if t.dim() == 2 and (name != "lm_head.weight" or not shape.tied)
        )
        assert sorted(size for _, size, _ in scripts.peer_llamacpp.matrices(asdict(shape))) == ours
        assert len(scripts.peer_llamacpp.norms(asdict(shape))) == sum(t.dim() == 1 for t in state.values())


def test_spread_and_rounds(scripts):
    kernels = scripts.speed_kernels
    assert kernels.spread([2.0]) == 0 and kernels.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)
    order = []
    slices = {name: lambda name=name: order.append(name) for name in "ab"}
    assert kernels.in_turns(slices, 2) == {"a": [None, None], "b": [None, None]} and order == ["a", "b", "a", "b"]
    seen = []
    run = kernels.in_a_row([lambda i=i: seen.append(i) for i in range(3)])
    assert run(2) >= 0 and run(2) >= 0 and seen == [0, 1, 2, 0]
