"""Stored bits are those of the files, whatever dtype a model computes in."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_qep.accounting import bits_report
from hf_qep.cli.job import cast_weights
from tests.plugin.packing import pack_model


@pytest.mark.parametrize("family", ["llama", "cohere2", "qwen3_moe"])
def test_a_model_that_computes_in_float32_has_the_bits_of_its_half_precision_files(tiny_model, tmp_path, family):
    model = pack_model(tiny_model(family).to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    stored = bits_report(model)
    wide = copy.deepcopy(model)
    cast_weights(wide, torch.float32)
    assert bits_report(wide)["bits_model"] > stored["bits_model"]
    for found in (bits_report(wide, tmp_path), bits_report(wide, stored_as=torch.bfloat16)):
        assert found["bits_model"] == pytest.approx(stored["bits_model"], rel=1e-9)
        assert found["bits_linear"] == stored["bits_linear"]
        assert found["weight_bytes"] > stored["weight_bytes"]
    assert bits_report(model, tmp_path)["file_bytes"] * 8 > stored["bits_model"] * stored["model_weights"]
