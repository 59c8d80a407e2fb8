"""The native operators, the order of their tensors, and what modules do with it; all against the torch reference."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from hf_qep.errors import KernelError
from hf_qep.kernels import build, dispatch, native, reference, tiling
from hf_qep.modules import QepLinear
from hf_qep.registry import FORMATS

SPECS = [
    ("sign", {"column_scale": True}),
    ("sign", {}),
    ("sign", {"group_size": 32, "column_scale": True}),
    ("sign", {"group_size": 128}),
    ("factored", {"rank": 24}),
    ("factored", {"rank": 40, "flat": True}),
    ("factored", {"rank": 200, "flat": True}),
    ("integer", {"bits": 4, "group_size": 32}),
    ("integer", {"bits": 8}),
]
DTYPES = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def needs_native():
    found = native.kernels()
    if not found.native:
        pytest.skip(f"no native kernels: {found.why}")


def random_layer(name, options, out=200, width=256, dtype=torch.float32, seed=0):
    """A packed layer with a bias, in the stored order."""
    torch.manual_seed(seed)
    module = FORMATS.get(name)
    spec = module.Spec(**options)
    layer = QepLinear(width, out, True, spec, dtype)
    if name == "integer":
        groups = width // (spec.group_size or width)
        half = 2 ** (spec.bits - 1)
        parts = {"codes": torch.randint(-half, half, (out, width)).to(torch.int8), "row_scale": torch.rand(out, groups)}
        layer.load_packed(module.pack(parts, spec))
    else:
        layer.load_packed(
            {
                key: torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
                if kind == torch.int32
                else (torch.rand(shape) + 0.1).to(kind)
                for key, (shape, kind) in module.layout(spec, out, width).items()
            }
        )
        if name == "sign" and width % 32:
            layer.load_packed(module.pack(module.unpack(layer.tensors(), spec, out, width), spec))
    layer.bias.data.normal_()
    return layer


def tiled_copy(layer):
    other = copy.deepcopy(layer)
    other.tile()
    return other


@pytest.mark.parametrize("shape", [(1, 1), (63, 3), (64, 2), (65, 1), (200, 7)])
def test_tiles_are_another_order_of_the_same_words(shape):
    words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
    tiles = tiling.tile(words)
    assert tiles.shape == (-(-shape[0] // 64), shape[1], 64)
    assert tiles.data_ptr() % 64 == 0
    assert tiles[0, 0, 0] == words[0, 0]
    assert tiles[-1, -1, (shape[0] - 1) % 64] == words[-1, -1]
    assert torch.equal(tiling.untile(tiles, shape[0]), words)
    assert tiles.flatten().sum() == words.sum()  # what was added is zero


@pytest.mark.parametrize(("name", "options"), SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_products_equal_the_reference(name, options, dtype):
    needs_native()
    layer = random_layer(name, options, dtype=dtype)
    fast = tiled_copy(layer)
    assert fast.tiled == (name != "integer")
    dense = layer.dequantize(torch.float32).double()
    for tokens in (1, 2, 3, 7, 33):
        x = torch.randn(2, tokens, 256).to(dtype)
        exact = x.double() @ dense.T + layer.bias.double()
        with torch.inference_mode():
            y = fast(x)
        assert y.dtype == dtype
        assert y.shape == exact.shape
        assert (y - exact).abs().max() <= DTYPES[dtype] * exact.abs().max()


@pytest.mark.parametrize(("out", "width"), [(1, 1), (3, 31), (65, 33), (64, 172), (130, 1000)])
@pytest.mark.parametrize("name", ["sign", "factored", "integer"])
def test_no_shape_is_too_odd(name, out, width):
    needs_native()
    layer = random_layer(name, {"sign": {}, "factored": {"rank": 8}, "integer": {"bits": 4}}[name], out, width)
    x = torch.randn(3, width)
    with torch.inference_mode():
        assert torch.allclose(tiled_copy(layer)(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), SPECS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_int8_activations_are_those_of_the_reference(name, options, tokens, monkeypatch):
    needs_native()
    layer = random_layer(name, options, out=96, width=512)
    x = torch.randn(tokens, 512)
    x[:, 7] = 60  # an outlier spoils its own block of 128 only
    fast = tiled_copy(layer)
    fast.activation = "int8"
    layer.activation = "int8"
    with torch.inference_mode():
        y = fast(x)
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "kernels", lambda: native.Kernels("torch", why="a test"))
            modelled, layer.activation = layer(x), "exact"
            exact = layer(x)
    assert (modelled - exact).abs().max() > 1e-3 or options.get("group_size") == 32 and name == "integer"
    # A sum that lies between two whole numbers may round either way in the middle of a factored layer.
    assert (y - modelled).abs().max() <= (2e-2 if name == "factored" else 1e-4) * modelled.abs().max()


def test_rounding_keeps_zeros_blocks_and_what_is_not_finite():
    x = torch.zeros(1, 300)
    x[0, 130], x[0, 131] = 127.0, 1.4
    assert torch.equal(reference.rounded_activations(x)[0, 128:140], torch.tensor([0, 0, 127.0, 1.0] + [0] * 8))
    x[0, 5] = float("inf")
    assert not torch.isfinite(reference.rounded_activations(x)[0, 5])
    scale = torch.ones(300)
    scale[130] = 0
    assert reference.rounded_activations(x, scale)[0, 130] == 0


@pytest.mark.parametrize(("name", "options"), SPECS)
def test_gradients_of_tiled_layers_are_those_of_the_reference(name, options):
    needs_native()
    layer = random_layer(name, options)
    found = []
    for each in (layer, tiled_copy(layer)):
        each.bias.requires_grad_(True)
        x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(3)).requires_grad_(True)
        each(x).square().sum().backward()
        found.append((x.grad, each.bias.grad))
    for slow, fast in zip(*found, strict=True):
        assert (slow - fast).abs().max() <= 1e-4 * slow.abs().max()


@pytest.mark.parametrize(("name", "options"), SPECS)
def test_a_tiled_layer_is_stored_copied_and_moved_as_any_other(name, options):
    needs_native()
    layer = random_layer(name, options)
    fast = tiled_copy(layer)
    stored = {key: value.clone() for key, value in layer.state_dict().items()}

    def same(state):
        return state.keys() == stored.keys() and all(torch.equal(state[k], stored[k]) for k in stored)

    assert same(fast.state_dict())
    assert same(pickle.loads(pickle.dumps(fast)).state_dict())
    assert all(torch.equal(t, layer.packed_state()[k]) for k, t in fast.packed_state().items())
    assert torch.equal(fast.dequantize(torch.float32), layer.dequantize(torch.float32))
    other = tiled_copy(random_layer(name, options, seed=1))
    other.load_state_dict(stored)
    assert same(other.state_dict())
    assert other.tiled == fast.tiled
    other.load_state_dict({"bias": stored["bias"]}, strict=False)
    assert same(other.state_dict())
    assert other.tiled == fast.tiled
    assert same(copy.deepcopy(fast).to(torch.float32).state_dict())
    assert fast.to("meta").weight.shape == layer.weight.shape
    half = tiled_copy(layer).to(torch.bfloat16)
    assert all(half.state_dict()[k].dtype == t.dtype for k, t in layer.held().items())
    fast = tiled_copy(layer)
    fast.train_scales()
    assert not fast.tiled


def test_what_the_kernels_cannot_do_stays_in_the_stored_order():
    needs_native()
    odd = tiled_copy(random_layer("sign", {"group_size": 8}))
    assert not odd.tiled
    fast = tiled_copy(random_layer("sign", {}))
    x = torch.randn(2, 256, dtype=torch.float64)  # no such kernel: computed by the reference from the tiles
    assert (fast(x) - x @ fast.dequantize(torch.float64).T - fast.bias).abs().max() < 1e-3
    trained = random_layer("sign", {})
    trained.train_scales()
    trained.tile()
    assert not trained.tiled


@pytest.mark.parametrize(("name", "options"), SPECS[:5] + SPECS[7:])
def test_compiles_without_a_break(name, options):
    needs_native()
    torch._dynamo.reset()
    fast = tiled_copy(random_layer(name, options))
    x = torch.randn(3, 256)
    compiled = torch.compile(lambda x: torch.relu(fast(x * 2)), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), torch.relu(fast(x * 2)))
    x.requires_grad_(True)
    compiled(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_operators_are_registered_as_torch_asks():
    needs_native()
    sign, factored = (
        tiled_copy(random_layer("sign", {"column_scale": True})),
        tiled_copy(random_layer("factored", {"rank": 24})),
    )
    integer, x, bias = random_layer("integer", {"bits": 8}), torch.randn(3, 256), torch.randn(200)
    ops, f = native.kernels(), factored.held()
    with torch.no_grad():
        torch.library.opcheck(
            ops.sign_linear, (x, sign.weight.data, sign.weight_scale.data, sign.column_scale.data, bias, 200, 0)
        )
        scales = [f[k].data for k in ("weight_scale", "middle_scale", "column_scale")]
        torch.library.opcheck(ops.factored_linear, (x, f["left"].data, f["weight"].data, *scales, None, 0))
        torch.library.opcheck(ops.integer_linear, (x, integer.weight.data, bias, 8, 1, 0))


def test_operators_refuse_what_does_not_fit():
    needs_native()
    if native.kernels().backend != "operator":
        pytest.skip("the plain library trusts its caller")
    fast, ops = tiled_copy(random_layer("sign", {})), native.kernels()
    x, tiles, scale = torch.randn(1, 256), fast.weight.data, fast.weight_scale.data
    for wrong in (
        (x[:, :200], tiles, scale, None, None, 200, 0),
        (x, tiles, scale, None, None, 300, 0),
        (x, tiles, scale.float(), None, None, 200, 0),
        (x, tiles[:, :, ::2], scale, None, None, 200, 0),
        (x, tiles, scale, None, torch.zeros(7), 200, 0),
        (x.double(), tiles, scale, None, None, 200, 0),
        (x, tiles, scale, scale[:5, 0], None, 200, 0),
    ):
        with pytest.raises(RuntimeError):
            ops.sign_linear(*wrong)


CHILD = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from tests.kernels.test_native import SPECS, random_layer, tiled_copy
from hf_qep.kernels import native
worst = 0.0
for name, options in SPECS:
    layer = random_layer(name, options)
    fast, x = tiled_copy(layer), torch.randn(3, 256)
    with torch.inference_mode():
        exact = x @ layer.dequantize(torch.float32).T + layer.bias
        worst = max(worst, float((fast(x) - exact).abs().max() / exact.abs().max()))
print(json.dumps({"worst": worst, "backend": native.kernels().backend, "isa": native.kernels().isa}))
"""


def in_child(root, **environment):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(root)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )
    return json.loads(done.stdout)


def test_each_backend_can_be_asked_for(request):
    needs_native()
    for backend in ("ctypes", "torch", "operator"):
        if backend == "operator" and native.kernels().backend != "operator":
            continue
        found = in_child(request.config.rootpath, HF_QEP_KERNELS=backend)
        assert found["backend"] == backend
        assert (found["isa"] is None) == (backend == "torch")
        assert found["worst"] < 3e-5
    found = in_child(request.config.rootpath, HF_QEP_ISA="scalar")
    assert (found["isa"], found["worst"] < 3e-5) == ("scalar", True)


def test_a_wish_that_cannot_be_met_is_refused(monkeypatch, tmp_path):
    with pytest.raises(KernelError, match="must be one of"):
        native._choose("cuda")
    monkeypatch.setattr(native, "folders", lambda: [tmp_path])
    with pytest.raises(KernelError, match="not built at installation"):
        native._choose("operator")
    monkeypatch.setattr(build, "compiler", lambda: None)
    with pytest.raises(KernelError, match="no C\\+\\+ compiler"):
        native._choose("ctypes")
    found = native._choose(None)
    assert (found.backend, found.native) == ("torch", False)
    assert "compiler" in found.why


def test_a_failed_build_says_what_the_compiler_said_and_leaves_nothing(monkeypatch, tmp_path):
    if build.compiler() is None:
        pytest.skip("no compiler")
    monkeypatch.setattr(build, "FLAGS", ["-std=c++20", "-DHFQ_ABI=syntax error("])
    with pytest.raises(build.BuildError, match="failed on"):
        build.build_library(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_native_kernels_tiles_still_mean_the_same(monkeypatch):
    needs_native()
    for name, options in SPECS:
        layer = random_layer(name, options)
        fast, x = tiled_copy(layer), torch.randn(2, 256)
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "kernels", lambda: native.Kernels("torch", why="a test"))
            assert torch.equal(fast(x), layer(x))


def test_pages_of_a_mapped_file_are_let_go_of_and_come_back(tmp_path):
    from safetensors.torch import load_file, save_file

    saved = torch.arange(1 << 16, dtype=torch.int32)
    save_file({"first": saved.clone(), "second": saved + 1}, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    tiling.drop_pages(found["first"])
    assert torch.equal(found["first"], saved)  # read from the file again
    assert torch.equal(found["second"], saved + 1)
    memory = saved.clone()
    tiling.drop_pages(memory)
    assert torch.equal(memory, saved)
