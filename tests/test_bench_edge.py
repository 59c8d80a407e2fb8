"""The bench of small machines: every contender has a row, and what llama.cpp computes is set beside transformers."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from hf_qep.cli.demo import DEMO_MODEL
from tests.script_modules import imported
from tests.test_bench_speed import executable

pytest.importorskip("gguf", reason="needs the package gguf, which `make install` brings")
STUB = """#!{python}
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    times = {{"prefill": 0.002, "decode": 0.004, "decode_cpu": 0.008}}
    print(json.dumps(times if request["verb"] == "run" else {{}}), flush=True)
"""


@pytest.fixture(scope="module")
def bench():
    with imported("bench_edge", "peer_llamacpp", "bench_speed", "speed_models", "speed_kernels") as modules:
        yield modules.bench_edge


@pytest.fixture(scope="module")
def made(bench, tmp_path_factory):
    work = tmp_path_factory.mktemp("edge")
    bench.main(["make", "cohere2-tiny", "--work", str(work)])
    return work


def test_every_contender_has_a_row_for_every_number_of_threads(bench, made, tmp_path, capsys):
    stub, out = executable(tmp_path / "stub", STUB), tmp_path / "out.json"
    sizes = ["--rounds", "1", "--new", "4", "--prompt", "4", "--threads", "1,2"]
    bench.main(["run", "--checkpoint", str(made / "1bit"), "--llamacpp", stub, *sizes, "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    names = ["transformers 1-bit, exact", "transformers 1-bit, int8", "llama.cpp Q1_0"]
    assert [(row["threads"], row["contender"]) for row in rows] == [(n, name) for n in (1, 2) for name in names]
    for row in rows:
        assert row["tokens/s"] > 0 and row["CPU ms per token"] > 0 and row["peak MB"] >= row["resident MB"] > 1
    assert rows[2]["tokens/s"] == 4 / 0.004 and rows[2]["CPU ms per token"] == 2
    assert 0 < rows[2]["files MB"] < 1.3 * rows[0]["files MB"]
    assert "| llama.cpp Q1_0 | 2 | 1000 | 2 |" in capsys.readouterr().out


def test_without_llama_cpp_the_way_to_get_it_is_told(bench, made, tmp_path):
    with pytest.raises(SystemExit, match="No such file.*peer_llamacpp.py says how to build"):
        bench.main(["run", "--checkpoint", str(made / "1bit"), "--llamacpp", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="cannot be exported"):
        bench.main(["run", "--checkpoint", str(DEMO_MODEL), "--llamacpp", str(tmp_path / "none")])


def test_differences_are_those_of_two_distributions(bench):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([1, 2, 3, 4, 5])
    kl, other, mine, alike, wrong, _ = bench.differences(logits, logits, ids).mean(1)
    assert (kl, wrong, alike, other) == (0, 0, 1, mine)
    kl, other, mine, alike, wrong, _ = bench.differences(-logits, logits, ids).mean(1)
    assert kl > 0.1 and wrong > 0.1 and alike < 1 and other != mine


def test_llama_cpp_computes_the_same(bench, made):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which pip builds in some minutes")
    args = bench.read_arguments(["agree", "--checkpoint", str(made / "1bit"), "--llamacpp", sys.executable])
    found = bench.agree_command(args)
    assert found["tokens_are_the_same"] and found["kl"] < 0.01 and found["logits_error"] < 0.05
