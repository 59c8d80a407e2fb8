"""LoRA on packed layers trains, saves and reloads; merging needs float weights and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_qep
from hf_qep.errors import NotMergeableError
from hf_qep.modules import PackedTensors, packed_modules
from tests.plugin.conftest import Packed
from tests.plugin.packing import logits

peft = pytest.importorskip("peft")
FAMILIES = ["llama", "cohere2", "gpt2", "qwen3_moe"]
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "qwen3_moe": ["q_proj", "v_proj", "o_proj"]}


def with_lora(saved: Packed, family: str, **options: object) -> peft.PeftModel:
    torch.manual_seed(0)
    targets = TARGETS.get(family, ["q_proj", "v_proj", "down_proj"])
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved.folder), config)


def train(model: torch.nn.Module, saved: Packed, steps: int = 12) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**saved.batch, labels=saved.batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def trained(packed: Callable[[str], Packed]) -> Callable[[str], peft.PeftModel]:
    """`trained(family)`: a fresh adapter after some steps, different from its base model."""

    def build(family: str) -> peft.PeftModel:
        model = with_lora(packed(family), family)
        train(model, packed(family))
        return model.eval()

    return build


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_leaves_the_packed_weights_alone(
    family: str, packed: Callable[[str], Packed]
) -> None:
    saved = packed(family)
    model = with_lora(saved, family)
    losses = train(model, saved)
    assert losses[-1] < 0.9 * losses[0], losses
    with model.disable_adapter():
        assert saved.difference(model.eval()) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_on_the_reloaded_checkpoint_gives_the_same_logits(
    family: str, packed: Callable[[str], Packed], trained: Callable, tmp_path: Path
) -> None:
    saved, model = packed(family), trained(family)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved.folder), tmp_path)
    assert saved.difference(again) > 0.01
    assert torch.equal(logits(again, saved.batch), logits(model, saved.batch))


def test_all_linear_finds_every_packed_layer(packed: Callable[[str], Packed]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed("llama").folder)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert all(name.endswith(".base_layer") for name in packed_modules(wrapped))


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_into_packed_weights_says_what_to_do(merge: str, trained: Callable, packed: Callable) -> None:
    model = trained("llama")
    before = logits(model, packed("llama").batch)
    with pytest.raises(NotMergeableError, match=r"hf_qep.merge_adapter\(model\), or model.dequantize\(\)"):
        getattr(model, merge)()
    assert torch.equal(logits(model, packed("llama").batch), before)


def test_the_guard_is_there_when_peft_is_imported_first() -> None:
    from tests.plugin.processes import run_python

    show = "print(peft.tuners.tuners_utils.BaseTuner._check_merge_allowed._by_hf_qep)"
    for imports in ("import peft, hf_qep", "import hf_qep, peft"):
        result = run_python(f"{imports}\n{show}")
        assert result.stdout == "True\n", result.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_after_dequantising_keeps_the_logits(
    family: str, packed: Callable[[str], Packed], trained: Callable, tmp_path: Path
) -> None:
    saved, model = packed(family), trained(family)
    before = logits(model, saved.batch)
    merged = hf_qep.merge_adapter(model)
    assert isinstance(merged, PreTrainedModel)
    assert not any(isinstance(m, PackedTensors) for m in merged.modules())
    assert (logits(merged, saved.batch) - before).abs().max() < 1e-4
    merged.save_pretrained(tmp_path)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path), saved.batch) - before).abs().max() < 1e-4


def test_an_adapter_on_a_float_model_merges_as_ever(tiny_model: Callable, tiny_batch: Callable) -> None:
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    before = logits(model.eval(), tiny_batch("llama"))
    assert (logits(hf_qep.merge_adapter(model), tiny_batch("llama")) - before).abs().max() < 1e-4
