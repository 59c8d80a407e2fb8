"""The reader that knows nothing of the package reads what the package writes, to the last bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_qep import QepConfig, quantize_model
from hf_qep import reader as reader_file
from hf_qep.config import FORMAT_VERSION
from hf_qep.engine.calibration import calibration_of
from hf_qep.formats import factored, integer, sign
from hf_qep.modules import QepEmbedding, QepExpertWeight, packed_modules
from hf_qep.reader import Checkpoint, Matrix, ReaderError
from hf_qep.registry import FORMATS
from tests.plugin.packing import pack_model
from tests.reader.conftest import SPECS, write

FAMILIES = [family for family in SPECS if family != "vit"]


HUB_NAMES = {
    "vit.layers": "vit.encoder.layer",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def hub_name(name):
    """Of a module of a ViT: its name in transformers -> in the files."""
    for ours, theirs in HUB_NAMES.items():
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def tables(tiny_model, tmp_path_factory):
    """Models whose embedding and head are whole numbers: tied, and with a head of its own."""
    made = {}
    for family, bits in {"qwen3": {"embedding_bits": 4}, "llama": {"embedding_bits": 8, "head_bits": 4}}.items():
        rows = {"input_ids": torch.randint(3, 120, (4, 8), generator=torch.Generator().manual_seed(0))}
        recipe = QepConfig(method="rtn", dataset=rows, num_samples=4, batch_size=4, **bits)
        model, folder = tiny_model(family), tmp_path_factory.mktemp(f"{family}-tables")
        quantize_model(model, recipe, calibration_of(recipe, None, model))
        model.save_pretrained(folder)
        made[family] = model, folder
    return made


def assert_equal_bits(found, expected):
    assert found.dtype == np.float32 and found.shape == tuple(expected.shape)
    assert np.array_equal(found.view(np.int32), expected.numpy().view(np.int32))


def assert_factors(found, tensors, spec, out, width):
    """Both matrices of format `factored`; the sums of their product have no order of their own."""
    parts = factored.unpack(tensors, spec, out, width)
    left, right = (parts[side].float() * 2 - 1 for side in ("left", "right"))
    assert_equal_bits(found[0].dense(), left * parts["row_scale"].unsqueeze(-1))
    assert_equal_bits(found[1].dense(), right * parts["middle_scale"].unsqueeze(-1) * parts["column_scale"])


def assert_same(read, name, module):
    weight, found = module.dequantize(torch.float32), read.dequantize(name)
    if module.spec.format != "factored":
        return assert_equal_bits(found, weight)
    assert found.dtype == np.float32 and found.shape == tuple(weight.shape)
    assert np.allclose(found, weight.numpy(), rtol=0, atol=1e-6 * np.abs(weight.numpy()).max())
    tensors, spec, shape = module.tensors(), module.spec, (module.out_features, module.in_features)
    if not isinstance(module, QepExpertWeight):
        return assert_factors(read.matrices(name), tensors, spec, *shape)
    for expert in range(module.experts):
        single = {leaf: tensor[expert] for leaf, tensor in tensors.items()}
        assert_factors(read.matrices(name, expert), single, spec, *shape)


def assert_same_model(model, read):
    packed, listed = packed_modules(model), model.config.quantization_config.layer_specs()
    assert read.modules.keys() == listed.keys() and listed
    for name in listed:
        assert_same(read, name, packed[name])
        assert read.modules[name].spec == asdict(packed[name].spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_has_the_weight_that_the_package_gives_it(saved, family):
    model, folder = saved(family)
    assert_same_model(model, Checkpoint(folder))


def test_files_with_names_of_the_hub_are_read_by_a_renaming(saved):
    model, folder = saved("vit")
    with pytest.raises(ReaderError, match=r"no file holds the weight of 'vit.layers.*rename"):
        Checkpoint(folder)
    read = Checkpoint(folder, rename=hub_name)
    assert_same_model(model, read)
    name = "vit.layers.0.mlp.fc1"
    assert np.array_equal(read.bias(name), packed_modules(model)[name].bias.numpy())


def test_embedding_and_head_are_read_row_by_row(tables):
    for family, (model, folder) in tables.items():
        read = Checkpoint(folder)
        assert_same_model(model, read)
        assert ("lm_head" in read.modules) == (family == "llama"), "a tied head is its embedding"
        ids = torch.tensor([[5, 0], [127, 5]])
        embedding = next(m for m in packed_modules(model).values() if isinstance(m, QepEmbedding))
        assert np.array_equal(read.rows("model.embed_tokens", ids.numpy()), embedding(ids).numpy())
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        head = "lm_head" if family == "llama" else "model.embed_tokens"
        assert np.allclose(read.linear(head, x.numpy()), model.lm_head(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_is_the_forward_of_the_module(saved, family, monkeypatch):
    monkeypatch.setattr(reader_file, "PANEL_WEIGHTS", 1000)
    model, folder = saved(family)
    read, packed = Checkpoint(folder), packed_modules(model)
    for name, module in read.modules.items():
        x = torch.randn(2, 3, packed[name].in_features, generator=torch.Generator().manual_seed(1))
        expert = None if module.experts is None else module.experts - 1
        with torch.no_grad():
            expected = packed[name](x) if expert is None else x @ packed[name][expert].T
        found = read.linear(name, x.numpy(), expert)
        assert found.dtype == np.float32
        assert np.allclose(found, expected.numpy(), rtol=0, atol=1e-5 * max(1, expected.abs().max().item())), name


def test_shards_and_bfloat16(tiny_model, tmp_path):
    model = pack_model(tiny_model("bert").to(torch.bfloat16))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(shards := sorted(tmp_path.glob("*.safetensors"))) > 2
    read = Checkpoint(tmp_path)
    assert_same_model(model, read)
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert read.entries.keys() == stored.keys()
    for name, tensor in stored.items():
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert np.array_equal(read.tensor(name), tensor.numpy())
    query = "bert.encoder.layer.0.attention.self.query"
    assert np.array_equal(read.bias(query), stored[f"{query}.bias"].float().numpy())


def test_a_copy_of_the_file_needs_numpy_alone(saved, tmp_path):
    _, folder = saved("llama")
    shutil.copy(reader_file.__file__, tmp_path / "elsewhere.py")
    script = (
        "import sys, importlib.util as u\n"
        "spec = u.spec_from_file_location('elsewhere', 'elsewhere.py'); m = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
        "c = m.Checkpoint(sys.argv[1]); w = c.dequantize('model.layers.0.mlp.up_proj')\n"
        "print(w.shape, sorted({n.split('.')[0] for n in sys.modules} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script, str(folder)], **_without_site(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(" ", 2)[:2] == ["(96,", "64)"] and "torch" not in done.stdout
    assert {"hf_qep", "safetensors", "transformers"}.isdisjoint(done.stdout.split("'")) and "'numpy'" in done.stdout


def _without_site(folder):
    """Run there, with the folder of numpy on the path but no .pth file, which might import anything."""
    packages = str(Path(np.__file__).parent.parent)
    return {"cwd": folder, "env": {"PYTHONPATH": packages}, "capture_output": True, "text": True, "timeout": 60}


@st.composite
def packed_matrices(draw):
    """(format, spec, tensors, out, in) of random signs, codes and scales."""
    out, groups, group = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 45))
    width, whole = groups * group, draw(st.booleans())
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scales = torch.randn(out, 1 if whole else groups, generator=g)
    kind = draw(st.sampled_from([sign, factored, integer]))
    if kind is sign:
        spec = sign.Spec(None if whole else group, draw(st.booleans()))
        parts = {"signs": torch.rand(out, width, generator=g) > 0.5, "row_scale": scales}
    elif kind is integer:
        spec = integer.Spec(draw(st.sampled_from([4, 8])), None if whole else group)
        low = -(1 << spec.bits - 1)
        codes = torch.randint(low, -low, (out, width), generator=g, dtype=torch.int8)
        parts = {"codes": codes, "row_scale": scales}
    else:
        rank = draw(st.integers(1, 40))
        spec = factored.Spec(rank, rank % 8 == 0 and draw(st.booleans()))
        signs = {"left": torch.rand(out, rank, generator=g) > 0.5, "right": torch.rand(rank, width, generator=g) > 0.5}
        parts = {**signs, "row_scale": torch.randn(out, generator=g), "middle_scale": torch.randn(rank, generator=g)}
    parts["column_scale"] = torch.randn(width, generator=g)
    return kind, spec, kind.pack(parts, spec), out, width


@settings(max_examples=80, deadline=None)
@given(packed_matrices())
def test_any_width_is_read_exactly_or_asked_for(case):
    kind, spec, tensors, out, width = case
    expected = kind.dequantize(tensors, spec, out, width, torch.float32)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), spec, tensors)
        read = Checkpoint(name)
        given_width = read.dequantize("m", columns=width)
        if kind is factored:
            assert_factors(read.matrices("m"), tensors, spec, out, width)
            assert np.allclose(given_width, expected.numpy(), rtol=0, atol=1e-4)
        else:
            assert_equal_bits(given_width, expected)
        try:
            assert np.array_equal(read.dequantize("m"), given_width)
        except ReaderError as error:
            assert "`columns` cannot be None" in str(error) and kind is not factored
        for wrong in {0, width + 300}:
            with pytest.raises(ReaderError, match=f"cannot be {wrong}"):
                read.dequantize("m", columns=wrong)


def test_a_width_that_would_cut_signs_off_is_refused(tmp_path):
    tensors = sign.pack({"signs": torch.ones(2, 40) > 0, "row_scale": torch.ones(2, 1)}, sign.Spec())
    write(tmp_path, sign.Spec(), tensors)
    read = Checkpoint(tmp_path)
    assert np.array_equal(read.dequantize("m", 40), np.ones((2, 40)))
    assert np.array_equal(read.dequantize("m", 41)[:, 40], [-1, -1])
    for wrong in (39, None, 65, 32):
        with pytest.raises(ReaderError, match="33 to 64 columns"):
            read.dequantize("m", wrong)
    with pytest.raises(ReaderError, match="cannot be 39"):
        read.linear("m", np.ones((1, 39)))


def test_known_words_become_known_weights():
    octets = np.array([[0b0110], [0b1001]], np.uint8)
    scale, column = np.array([[1, 2], [0.5, 4]], np.float16), np.array([1, 1, 3, 1], np.float16)
    assert Matrix(octets, 4, scale, column).dense().tolist() == [[-1, 1, 6, -2], [0.5, -0.5, -12, 4]]
    assert Matrix(np.array([[0x80, 0xF7]], np.uint8), 4, np.array([[1, -2]], np.float16), None, 4).dense().tolist() == [
        [-8, 0, 2, -14]
    ]


def test_version_formats_and_options_are_those_of_the_package():
    assert reader_file.FORMAT_VERSION == FORMAT_VERSION
    options = {name: {f.name for f in fields(FORMATS.get(name).Spec)} - {"format"} for name in FORMATS.names()}
    assert {name: set(known) for name, known in reader_file.OPTIONS.items()} == options
