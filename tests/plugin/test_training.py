"""Quantisation-aware training of scales, and the errors of those who forget to ask for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from hf_qep import QepConfig
from hf_qep.modules import packed_modules
from tests.plugin.conftest import Packed
from tests.plugin.packing import logits


class Rows(Dataset):
    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


def trainer(model: PreTrainedModel, saved: Packed, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        folder, max_steps=12, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        per_device_train_batch_size=2, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(saved.batch["input_ids"]))


def trainable(saved: Packed) -> PreTrainedModel:
    config = QepConfig(layers=[], trainable_scales=True)
    model = AutoModelForCausalLM.from_pretrained(saved.folder, quantization_config=config)
    packed = {f"{name}.{leaf}" for name, m in packed_modules(model).items() for leaf in m.tensor_names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in packed and parameter.is_floating_point())
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_scales_train_and_are_saved_packed(family: str, packed: Callable[[str], Packed], tmp_path: Path) -> None:
    saved = packed(family)
    model = trainable(saved)
    assert saved.difference(model) < 1e-5
    run = trainer(model, saved, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0], losses
    run.save_model(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert saved.difference(again) > 0.01
    # What differs is the rounding of trained float32 scales to the stored float16 (relative 2^-11).
    assert (logits(again, saved.batch) - logits(model.eval(), saved.batch)).abs().max() < 0.02
    for name, module in packed_modules(again).items():
        original = saved.model.get_submodule(name)
        assert torch.equal(module.weight, original.weight)
        assert module.weight_scale.dtype == torch.float16


def test_without_the_option_the_trainer_refuses(packed: Callable[[str], Packed], tmp_path: Path) -> None:
    saved = packed("llama")
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(model, saved, tmp_path)


def test_the_option_is_not_stored(packed: Callable[[str], Packed], tmp_path: Path) -> None:
    trainable(packed("llama")).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert packed("llama").difference(again) == 0.0
    assert not again.hf_quantizer.is_qat_trainable
    assert not any(p.requires_grad for m in packed_modules(again).values() for p in m.parameters())
