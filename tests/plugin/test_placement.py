"""Where the parts of a packed checkpoint go, and what loading it leaves behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.accelerate import compute_module_sizes

from hf_qep.modules import packed_modules
from tests.clean_process import exit_code
from tests.plugin.packing import logits, pack_model

CONFIG = LlamaConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=64,
)  # fmt: skip
IDS = {"input_ids": torch.arange(8)[None]}
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 10, "vocab_size": 64}
"""84 MB of signs."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model): packed, in several files; 0.9 MB in the place of 21."""
    torch.manual_seed(0)
    model = pack_model(LlamaForCausalLM(CONFIG))
    folder = tmp_path_factory.mktemp("placed")
    model.save_pretrained(folder, max_shard_size="200kB")
    return folder, model.eval()


def placed(folder, budget, offload):
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": budget}, offload_folder=offload
    )


def stored(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_budget_for_packed_weights_alone_holds_all_of_them(saved, tmp_path):
    folder, model = saved
    budget = int(1.1 * stored(folder))
    assert 10 * budget < sum(4 * p.numel() for p in LlamaForCausalLM(CONFIG).parameters())
    loaded = placed(folder, budget, tmp_path)
    assert not any(p.is_meta for p in loaded.parameters())
    assert all(m.tiled for m in packed_modules(loaded).values())
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_what_does_not_fit_is_read_from_the_disk_block_by_block(saved, tmp_path):
    folder, model = saved
    loaded = placed(folder, stored(folder) // 2, tmp_path)
    places = [loaded.hf_device_map[f"model.layers.{index}"] for index in range(8)]
    assert places == sorted(places) and set(places) == {"cpu", "disk"}
    held = {name: p.nbytes for name, p in loaded.named_parameters() if not p.is_meta}
    assert stored(folder) // 4 < sum(held.values()) <= stored(folder) // 2
    assert torch.allclose(logits(loaded, IDS), logits(model, IDS), atol=1e-5)


def test_sizes_that_places_are_chosen_by_are_those_of_the_files(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    sizes, _ = compute_module_sizes(model, model.hf_quantizer)
    frequencies = sum(buffer.nbytes for buffer in model.buffers())
    assert sizes[""] - frequencies == pytest.approx(stored(saved[0]), rel=0.06)  # headers, tiles filled up


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the list of mapped files")
def test_no_file_stays_mapped_for_the_sake_of_small_tensors(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    assert str(saved[0]) not in Path("/proc/self/maps").read_text()
    assert torch.equal(logits(model, IDS), logits(saved[1], IDS))


def high_water() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if words[0].startswith("Vm")}


def load_and_watch(small, folder):
    logits(AutoModelForCausalLM.from_pretrained(small), IDS)  # a new process has few pages of the libraries yet
    before = high_water()["VmRSS"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(m.tiled for m in packed_modules(model).values())
    peak = high_water()["VmHWM"] - before
    assert peak < 1.35 * stored(folder), f"{peak} bytes for {stored(folder)}"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and fork")
def test_loading_holds_each_tensor_once(saved, tmp_path):
    from hf_qep import conversion
    from hf_qep.config import QepConfig
    from hf_qep.formats import sign

    config = QepConfig()
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**LARGE))
    names = [name for name, m in empty.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    config.set_layers(dict.fromkeys(names, sign.Spec()))
    conversion.swap_modules(empty, config)
    state = {name: torch.ones(t.shape, dtype=t.dtype) for name, t in empty.state_dict().items()}
    whole = LlamaConfig(**LARGE, quantization_config=config.to_dict(), architectures=["LlamaForCausalLM"])
    model = LlamaForCausalLM.from_pretrained(None, config=whole, state_dict=state)
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    assert exit_code(load_and_watch, saved[0], tmp_path) == 0
