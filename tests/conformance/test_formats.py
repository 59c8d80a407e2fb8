"""Every format keeps the same promises; a new one is judged the moment its file exists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.modules import QepExpertWeight, QepLinear
from hf_qep.registry import FORMATS

SPECS = {
    "sign": [{"group_size": None, "column_scale": True}, {"group_size": None}, {"group_size": 4, "column_scale": True}],
    "factored": [{"rank": 1}, {"rank": 24}, {"rank": 40}, {"rank": 8, "flat": True}, {"rank": 40, "flat": True}],
    "integer": [{"bits": 4, "group_size": 4}, {"bits": 8, "group_size": None}, {"bits": 4, "group_size": None}],
}
LARGE = {
    "sign": {"group_size": 128, "column_scale": True},
    "factored": {"rank": 1056},
    "integer": {"bits": 4, "group_size": 128},
}
SHAPES = [(5, 44), (64, 172), (96, 64), (7, 32), (1, 4)]


def cases():
    return [(name, options, shape) for name in FORMATS.names() for options in SPECS[name] for shape in SHAPES]


def random_parts(module, spec, out_features, in_features, seed=0):
    """Parts that the format can hold: random tensors, unpacked."""
    generator = torch.Generator().manual_seed(seed)
    if module.NAME == "integer":  # its scales are bits of a word, and random bits may be no number
        half, groups = 2 ** (spec.bits - 1), in_features // (spec.group_size or in_features)
        codes = torch.randint(-half, half, (out_features, in_features), generator=generator).to(torch.int8)
        scales = (torch.rand(out_features, groups, generator=generator) + 0.1).half().float()
        return {"codes": codes, "row_scale": scales * torch.where(scales > 0.5, 1, -1)}
    tensors = {}
    for name, (shape, dtype) in module.layout(spec, out_features, in_features).items():
        if dtype == torch.int32:
            tensors[name] = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32)
        else:
            tensors[name] = (torch.rand(shape, generator=generator) + 0.1).to(dtype)
    return module.unpack(tensors, spec, out_features, in_features)


def dense(name, parts, out_features, in_features):
    """The format's meaning, written a second time and slowly."""

    def sign(b):
        return b.double() * 2 - 1

    if name == "integer":
        row = parts["row_scale"].double().repeat_interleave(in_features // parts["row_scale"].shape[1], 1)
        return row * parts["codes"].double()
    if name == "sign":
        row = parts["row_scale"].double().repeat_interleave(in_features // parts["row_scale"].shape[1], 1)
        column = parts.get("column_scale", torch.ones(in_features)).double()
        return row * sign(parts["signs"]) * column
    left = parts["row_scale"].double()[:, None] * sign(parts["left"]) * parts["middle_scale"].double()
    return left @ (sign(parts["right"]) * parts["column_scale"].double())


def test_every_format_has_specs_to_test():
    assert set(SPECS) == set(FORMATS.names())


@pytest.mark.parametrize(("name", "options", "shape"), cases())
def test_pack_then_unpack_is_the_identity(name, options, shape):
    module = FORMATS.get(name)
    spec = module.Spec(**options)
    parts = random_parts(module, spec, *shape)
    back = module.unpack(module.pack(parts, spec), spec, *shape)
    assert back.keys() == parts.keys()
    assert all(torch.equal(back[k], parts[k]) for k in parts)


@pytest.mark.parametrize(("name", "options", "shape"), cases())
def test_packed_tensors_have_the_declared_layout_and_bits(name, options, shape):
    module = FORMATS.get(name)
    spec = module.Spec(**options)
    tensors = module.pack(random_parts(module, spec, *shape), spec)
    declared = {k: (tuple(size), dtype) for k, (size, dtype) in module.layout(spec, *shape).items()}
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == declared
    assert module.stored_bits(spec, *shape) == sum(8 * t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize(("name", "options", "shape"), cases())
def test_the_packed_weight_never_has_the_shape_of_the_float_weight(name, options, shape):
    module = FORMATS.get(name)
    if shape != (1, 4) or name != "factored":  # one row, one column word and rank 1 cannot be told apart
        assert tuple(module.layout(module.Spec(**options), *shape)["weight"][0]) != shape


@pytest.mark.parametrize(("name", "options", "shape"), cases())
def test_dequantize_and_forward_agree_with_the_definition(name, options, shape):
    module = FORMATS.get(name)
    spec = module.Spec(**options)
    parts = random_parts(module, spec, *shape)
    layer = QepLinear(shape[1], shape[0], True, spec, torch.float32)
    layer.load_packed(module.pack(parts, spec))
    layer.bias.data.normal_()
    expected = dense(name, parts, *shape)
    scale = expected.abs().max()
    assert (layer.dequantize(torch.float32) - expected).abs().max() <= 1e-5 * scale
    x = torch.randn(3, 2, shape[1])
    y = x.double() @ expected.T + layer.bias.double()
    assert (layer(x) - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("name", FORMATS.names())
@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_large_layers_take_other_paths_to_the_same_result(name, tokens, monkeypatch):
    monkeypatch.setattr("hf_qep.kernels.reference.PANEL_WEIGHTS", 1 << 17)
    module = FORMATS.get(name)
    spec = module.Spec(**LARGE[name])
    layer = QepLinear(1024, 1030, False, spec)
    layer.load_packed(module.pack(random_parts(module, spec, 1030, 1024), spec))
    x = torch.randn(tokens, 1024)
    expected = x.double() @ layer.dequantize(torch.float32).double().T
    with torch.inference_mode():
        assert (layer(x) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(("name", "options", "shape"), cases())
def test_one_slice_of_a_stack_is_the_single_matrix(name, options, shape):
    module = FORMATS.get(name)
    spec = module.Spec(**options)
    stack = QepExpertWeight(3, shape[1], shape[0], spec, torch.float32)
    parts = random_parts(module, spec, *shape)
    stack.load_packed_expert(1, module.pack(parts, spec))
    single = QepLinear(shape[1], shape[0], False, spec)
    single.load_packed(module.pack(parts, spec))
    assert torch.equal(stack[1], single.dequantize(torch.float32))
    assert stack[0].abs().max() == 0
    assert stack.dequantize(torch.float32).shape == stack.shape == (3, *shape)


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_any_shape_survives_packing(columns, rows, seed):
    module = FORMATS.get("sign")
    spec = module.Spec()
    parts = random_parts(module, spec, rows, columns, seed)
    assert torch.equal(module.unpack(module.pack(parts, spec), spec, rows, columns)["signs"], parts["signs"])


@pytest.mark.parametrize("name", FORMATS.names())
def test_gradients_reach_the_input_and_trained_scales(name):
    module = FORMATS.get(name)
    spec = module.Spec(**SPECS[name][0])
    layer = QepLinear(44, 5, True, spec, torch.float32)
    layer.load_packed(module.pack(random_parts(module, spec, 5, 44), spec))
    layer.train_scales()
    x = torch.randn(2, 44, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.abs().max() > 0
    scales = [t for t in layer.tensors().values() if t.is_floating_point()]
    assert scales or name == "integer"  # whose scales are bits of words
    assert all(t.dtype == torch.float32 and t.grad.abs().max() > 0 for t in scales)
    assert all(t.dtype in (torch.int32, torch.float16) for t in layer.packed_state().values())


@pytest.mark.parametrize(("name", "options", "shape"), cases())
def test_parts_are_put_together_as_defined_and_every_part_gets_a_gradient(name, options, shape):
    module = FORMATS.get(name)
    parts = random_parts(module, module.Spec(**options), *shape)
    floats = {
        k: (p.float() * 2 - 1 if p.dtype == torch.bool else p.float()).requires_grad_(True) for k, p in parts.items()
    }
    made, expected = module.assemble(floats), dense(name, parts, *shape)
    assert (made.detach() - expected).abs().max() <= 1e-5 * expected.abs().max()
    made.square().sum().backward()
    assert all(torch.isfinite(f.grad).all() and f.grad.shape == f.shape for f in floats.values())
