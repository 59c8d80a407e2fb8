"""A packed model goes to the Hub and comes back through transformers alone: `push_to_hub`, then the id of the repo."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.loopback_hub import LoopbackHub
from tests.plugin.packing import logits, pack_model
from tests.plugin.processes import QUIET

REPO = "alice/tiny-1bit"
SHARD = "40KB"
LOAD = """
import json, sys
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({repo!r}, revision={revision!r})
tokenizer = AutoTokenizer.from_pretrained({repo!r})
with torch.no_grad():
    out = model(torch.tensor({ids!r})).logits
save_file({{"logits": out}}, {out!r})
kinds = sorted({{type(m).__name__ for m in model.modules() if type(m).__module__.startswith("hf_qep")}})
print(json.dumps({{"ids": tokenizer("a river")["input_ids"], "kinds": kinds}}))
"""


@pytest.fixture
def pushed(loopback_hub: LoopbackHub, tiny_model: Callable, tiny_tokenizer: Any) -> PreTrainedModel:
    """The model that was pushed, in several files, and its tokenizer with it."""
    model = pack_model(tiny_model("llama"))
    model.push_to_hub(REPO, private=True, max_shard_size=SHARD)
    tiny_tokenizer.push_to_hub(REPO)
    return model


def test_a_pushed_model_loads_by_its_name_elsewhere(pushed, loopback_hub, tiny_batch, tiny_tokenizer, tmp_path):
    files = loopback_hub.files(REPO)
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1 and "tokenizer.json" in files
    assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "qep"
    assert all(blob.sha256 for path, blob in loopback_hub.repo(REPO).commits[-1].tree.items() if path in shards)

    batch, out = tiny_batch("llama"), tmp_path / "logits.safetensors"
    commit = loopback_hub.repo(REPO).commits[-1].id
    load = LOAD.format(repo=REPO, revision=commit, ids=batch["input_ids"].tolist(), out=str(out))
    done = loopback_hub.run_python("import hf_qep\n" + QUIET + load)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert torch.equal(load_file(out)["logits"], logits(pushed, batch))
    assert said["ids"] == tiny_tokenizer("a river")["input_ids"]
    assert "QepLinear" in said["kinds"]

    done = loopback_hub.run_python(QUIET + load)  # the files are in the cache of the first process
    assert done.returncode == 1
    assert done.stdout == "" and done.stderr.rstrip().splitlines()[-1].startswith("RuntimeError")


def test_who_may_not_load_it_is_told_why(pushed, loopback_hub, tmp_path):
    load = {"cache_dir": tmp_path, "token": loopback_hub.other_token}
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained(REPO, **load)
    repo = loopback_hub.repo(REPO)
    repo.private, repo.gated = False, "manual"
    for loader in (AutoModelForCausalLM, AutoTokenizer):
        with pytest.raises(OSError, match="gated repo"):
            loader.from_pretrained(REPO, **load)
    assert not list(Path(tmp_path).rglob("*.safetensors"))
    repo.granted.add("bob")
    assert AutoModelForCausalLM.from_pretrained(REPO, **load).config.model_type == "llama"


def test_a_reader_cannot_push(loopback_hub, tiny_model):
    loopback_hub.add_repo(REPO)
    model = pack_model(tiny_model("llama"))
    for token in (loopback_hub.read_token, loopback_hub.other_token):
        with pytest.raises(OSError, match="403"):
            model.push_to_hub(REPO, token=token)
    assert loopback_hub.files(REPO) == {}
