"""What optional packages get to see of the packed signs. Nothing here runs on a GPU.

gemlite looks for a GPU when it is imported, so the comparison with it runs in a process of its own with a made-up one;
its kernels then run in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from hf_qep.bitorder import pack_signs
from hf_qep.errors import ConfigError, ExtraMissingError
from hf_qep.kernels import gpu_backends

CPU = torch.device("cpu")


def problem(rows: int, columns: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows + groups)
    positive, scale = torch.rand(rows, columns) > 0.5, (torch.rand(rows, groups) - 0.2).half()
    signs = (2.0 * positive.double() - 1).unflatten(-1, (groups, -1))
    return pack_signs(positive), scale, (signs * scale.double().unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize(("rows", "columns", "groups"), [(63, 96, 1), (40, 256, 2), (7, 576, 9)])
def test_gemlite_formulas_give_the_same_weight(rows, columns, groups):
    words, scale, wanted = problem(rows, columns, groups)
    held = gpu_backends.gemlite_tensors(words, scale, columns)
    assert held.words.shape == (columns // 32, rows) and held.words.is_contiguous()
    # As its kernels: word k // 32 of column n, shifted by k % 32; then (q - zero) * scale, or q * scale + zero.
    k = torch.arange(columns)
    codes = ((held.words[k // 32] >> (k % 32).int().unsqueeze(-1)) & 1).double()
    scales, zeros = (t.double() if len(t) == 1 else t.double()[k // held.group_size] for t in (held.scales, held.zeros))
    weight = (codes - zeros) * scales if groups == 1 else codes * scales + zeros
    assert torch.equal(weight.t(), wanted)


def test_there_is_room_behind_the_scales_and_it_is_zero():
    words, scale, _ = problem(40, 256, 2)
    held = gpu_backends.gemlite_tensors(words, scale, 256)
    for tensor in (held.scales, held.zeros):
        beyond = tensor.as_strided((gpu_backends.GEMLITE_SPARE // 128, 40), (40, 1), tensor.storage_offset() + 2 * 40)
        assert not beyond.any()


@pytest.mark.parametrize(("columns", "groups"), [(31, 1), (32, 1), (256, 8), (96, 2), (192, 5)])
def test_shapes_that_gemlite_does_not_take(columns, groups):
    words = pack_signs(torch.rand(4, columns) > 0.5)
    with pytest.raises(ConfigError, match="gemlite cannot multiply"):
        gpu_backends.gemlite_tensors(words, torch.ones(4, groups).half(), columns)


def test_scales_that_cannot_be_doubled():
    words, scale, _ = problem(4, 128, 2)
    with pytest.raises(ConfigError, match="twice the scale"):
        gpu_backends.gemlite_tensors(words, torch.full_like(scale, 40000), 128)
    assert gpu_backends.gemlite_tensors(words, torch.full_like(scale[:, :1], 40000), 128).scales.max() == 80000


def test_what_cannot_be_used_says_why(monkeypatch):
    assert gpu_backends.available(CPU) == ()
    assert "there is no backend 'bitblas'" in gpu_backends.why_not("bitblas", CPU)
    monkeypatch.setattr(gpu_backends.importlib.util, "find_spec", lambda name: None)
    assert "hf-qep[gemlite]" in gpu_backends.why_not("gemlite", CPU)
    monkeypatch.setattr(gpu_backends.importlib.util, "find_spec", lambda name: True)
    assert "the device is cpu" in gpu_backends.why_not("gemlite", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in gpu_backends.why_not("gemlite", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert gpu_backends.available(torch.device("cuda")) == ("gemlite",)


def test_preparing_without_the_package_or_for_another_dtype(monkeypatch):
    words, scale, _ = problem(4, 128, 1)
    monkeypatch.setitem(sys.modules, "gemlite", None)
    with pytest.raises(ExtraMissingError, match="gemlite"):
        gpu_backends.prepare_gemlite(words, scale, None, None, 128, torch.float16)
    with pytest.raises(ConfigError, match="float32"):
        gpu_backends.prepare_gemlite(words, scale, None, None, 128, torch.float32)
    layer = gpu_backends.GemliteLinear(None, None, torch.float16)
    with pytest.raises(ConfigError, match="prepared for torch.float16"):
        gpu_backends.gemlite_linear(torch.ones(1, 128), layer)


WITH_GEMLITE = """
import types, torch, triton
from triton.backends.compiler import GPUTarget

gpu = types.SimpleNamespace(name="none", multi_processor_count=132, total_memory=1 << 37)
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: gpu
torch.cuda.is_current_stream_capturing = lambda: False
triton.runtime.driver.set_active(types.SimpleNamespace(
    utils=types.SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448}),
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_active_torch_device=lambda: torch.device("cpu"),
    get_benchmarker=lambda: lambda launch, quantiles: [1.0, 1.0, 1.0],
))
import gemlite
from hf_qep.kernels import gpu_backends
from tests.kernels.test_gpu_backends import problem

for rows, columns, groups in [(200, 96, 1), (40, 256, 2), (72, 576, 9)]:
    words, scale, weight = problem(rows, columns, groups)
    column_scale, bias = torch.rand(columns).half(), torch.randn(rows).half()
    layer = gpu_backends.prepare_gemlite(words, scale, column_scale, bias, columns, torch.float16)
    kind, twice = gemlite.DType.FP16, 2 * (scale.float() if groups == 1 else scale)
    own = gemlite.GemLiteLinear(1, columns // groups, columns, rows, kind, kind)
    own.pack((weight * scale.double().repeat_interleave(columns // groups, 1) > 0).to(torch.uint8), twice,
             torch.full_like(twice, 0.5), bias=bias)
    for name in ("W_q", "scales", "zeros", "bias"):
        ours, theirs = getattr(layer.module, name), getattr(own, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours.expand_as(theirs), theirs), name
        assert ours.is_contiguous(), name
    assert layer.module.get_meta_args() == own.get_meta_args()
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, columns).half()
        wanted = (x.double() * column_scale.double()) @ weight.t() + bias.double()
        error = (gpu_backends.gemlite_linear(x, layer).double() - wanted).norm() / wanted.norm()
        assert error < 2e-3, (rows, columns, groups, tokens, error)
"""


def test_gemlite_packs_the_same_and_its_kernels_give_the_product(tmp_path):
    if importlib.util.find_spec("gemlite") is None:
        pytest.skip("gemlite is not installed; run: pip install 'hf-qep[gemlite]'")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    kept |= {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WITH_GEMLITE], env=kept, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
