"""The reader reads files that are damaged or made to deceive, and config files that mean nothing, with one error."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.config import FORMAT_VERSION
from hf_qep.formats import factored, integer, sign
from hf_qep.reader import LEAVES, Checkpoint, ReaderError
from tests.hostile.conftest import read_parts, write_parts
from tests.reader.conftest import ONE, write


@pytest.fixture
def llama(saved, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved("llama")[1], tmp_path / "model"))


def rewrite(folder, change):
    """Apply `change` to the header."""
    header, data = read_parts(folder / ONE)
    change(header)
    write_parts(folder / ONE, header, data)


UP = "model.layers.0.mlp.up_proj"
HEADERS = {
    "overlap": (
        lambda h: h[f"{UP}.weight"].update(data_offsets=h["model.layers.0.mlp.down_proj.weight"]["data_offsets"])
    ),
    "hole": lambda h: h.pop(f"{UP}.weight"),
    "negative shape": lambda h: h[f"{UP}.weight"].update(shape=[-96, -2]),
    "backwards": lambda h: h[f"{UP}.weight"]["data_offsets"].reverse(),
    "floats": lambda h: h[f"{UP}.weight"].update(shape=[96.0, 2]),
    "huge": lambda h: h[f"{UP}.weight"].update(shape=[2**62, 2**62]),
    "huge but empty": lambda h: h.update(x={"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}),
    "unknown dtype": lambda h: h[f"{UP}.weight"].update(dtype="I2"),
    "wrong dtype": lambda h: h[f"{UP}.weight"].update(dtype="F32"),
    "wrong size": lambda h: h[f"{UP}.weight"].update(shape=[48, 4]),
    "no dimension": lambda h: h[f"{UP}.weight"].update(shape=[]),
    "no object": lambda h: h.update({f"{UP}.weight": 5}),
    "a tensor too much": lambda h: h.update(
        {f"{UP}.column_scale": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}
    ),
    "missing scale": lambda h: h.update(x=h.pop(f"{UP}.weight_scale")),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies_is_refused(llama, what):
    rewrite(llama, HEADERS[what])
    with pytest.raises(ReaderError, match=r"model\.safetensors|tensors of 'model.layers"):
        Checkpoint(llama)


@pytest.mark.parametrize("length", [1, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length_is_refused(llama, length):
    (llama / ONE).write_bytes(struct.pack("<Q", length) + b"{")
    with pytest.raises(ReaderError, match="no json|claims a header"):
        Checkpoint(llama)


@pytest.mark.parametrize("text", [b"[]", b"{", b"[" * 100_000, b'{"a":1,"a":1}', b"\xff\xfe", b"9" * 10_000, b"NaN"])
def test_a_header_that_is_no_object_is_refused(llama, text):
    write_parts(llama / ONE, text, b"")
    with pytest.raises(ReaderError, match="json"):
        Checkpoint(llama)


@pytest.mark.parametrize("kept", [0, 7, 8, 300, -1])
def test_a_truncated_file_is_refused(llama, kept):
    (llama / ONE).write_bytes((llama / ONE).read_bytes()[:kept])
    with pytest.raises(ReaderError, match="truncated"):
        Checkpoint(llama)


def test_a_file_that_is_too_long_is_refused(llama):
    with (llama / ONE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ReaderError, match="1 bytes that belong to no tensor"):
        Checkpoint(llama)


def test_missing_files_are_named(llama, tmp_path):
    (llama / ONE).rename(llama / "model-1.safetensors")
    with pytest.raises(ReaderError, match=r"index\.json' cannot be read: No such file"):
        Checkpoint(llama)
    index = llama / "model.safetensors.index.json"
    for shards, message in (
        ({"x": "model-2.safetensors"}, r"model-2\.safetensors' cannot be read"),
        ({"x": "../model.safetensors"}, "no plain name"),
        ({"x": 3}, "no plain name"),
        ([], "no plain name"),
        ({"x": "model-1.safetensors"}, "places 'x' in 'model-1.safetensors'"),
        ({f"{UP}.weight": "model-1.safetensors"}, "no file holds the weight"),
    ):
        index.write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(ReaderError, match=message):
            Checkpoint(llama)
    with pytest.raises(ReaderError, match=r"config\.json' cannot be read"):
        Checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "no quantization_config of method 'qep'"),
        ({"format_version": FORMAT_VERSION + 1}, f"knows 1 to {FORMAT_VERSION}"),
        ({"format_version": "1"}, "knows 1 to"),
        ({"format_version": None}, "knows 1 to"),
        ({"layers": None}, "names no modules"),
        ({"layers": [{"format": "sign"}]}, "names no modules"),
        ({"layers": [{"format": "ternary", "modules": ["m"]}]}, "names the format 'ternary'"),
        ({"layers": [{"format": [], "modules": ["m"]}]}, "names the format"),
        ({"layers": [{"format": "sign", "modules": ["m", "m"]}]}, "twice"),
        ({"layers": [{"format": "sign", "modules": ["m"], "zero": 1}]}, "do not fit their format"),
        ({"layers": [{"format": "sign", "modules": ["m"], "group_size": 0}]}, "do not fit their format"),
        ({"layers": [{"format": "sign", "modules": ["m"], "column_scale": 1}]}, "do not fit their format"),
        ({"layers": [{"format": "factored", "modules": ["m"]}]}, "do not fit their format"),
        ({"layers": [{"format": "factored", "modules": ["m"], "rank": 12, "flat": True}]}, "do not fit their format"),
        ({"layers": [{"format": "integer", "modules": ["m"], "bits": 4.0}]}, "do not fit their format"),
        (
            {"layers": [{"format": "integer", "modules": ["m"], "bits": 4, "group_size": 7}]},
            "tensors of 'm' do not fit",
        ),
        ({"layers": [{"format": "factored", "modules": ["m"], "rank": 10**30}]}, "tensors of 'm' do not fit"),
        ({"layers": [{"format": "sign", "modules": ["m"], "group_size": 10**30}]}, "tensors of 'm' do not fit"),
    ],
)
def test_a_config_that_means_nothing_is_refused(tmp_path, change, message):
    spec = sign.Spec(group_size=8)
    write(tmp_path, spec, sign.pack({"signs": torch.ones(2, 40) > 0, "row_scale": torch.ones(2, 5)}, spec), **change)
    with pytest.raises(ReaderError, match=message):
        Checkpoint(tmp_path)


def test_questions_without_an_answer(saved):
    read, moe = Checkpoint(saved("llama")[1]), Checkpoint(saved("qwen3_moe")[1])
    experts = "model.layers.0.mlp.experts.down_proj"
    for ask, message in (
        (lambda: read.dequantize("model.norm"), "'model.norm' is none of the 14 quantised modules"),
        (lambda: read.tensor("model.nothing"), "no tensor 'model.nothing'"),
        (lambda: read.linear(UP, np.ones(3)), "cannot be 3"),
        (lambda: read.linear(UP, np.float32(1)), "cannot be 0"),
        (lambda: read.rows(UP, [96]), "from 0 to 95"),
        (lambda: read.rows(UP, [0.5]), "whole numbers"),
        (lambda: read.matrices(UP, 0), "has no experts"),
        (lambda: moe.matrices(experts), "has 4 experts, so `expert` cannot be None"),
        (lambda: moe.matrices(experts, 4), "has 4 experts, so `expert` cannot be 4"),
    ):
        with pytest.raises(ReaderError, match=message):
            ask()


SMALL = [*range(-2, 5), 8, 2**31, 2**63, 10**40, 1.5, None, True, "I32", "F16", "BF16", [], {}]
VALUES = st.recursive(st.sampled_from(SMALL), lambda inner: st.lists(inner, max_size=3), max_leaves=6)
FIELDS = st.fixed_dictionaries({}, optional={"dtype": VALUES, "shape": VALUES, "data_offsets": VALUES})
TENSORS = st.dictionaries(st.sampled_from(["m", *(f"m.{leaf}" for leaf in LEAVES)]), FIELDS | VALUES)


@settings(max_examples=80, deadline=None)
@given(TENSORS | st.binary(max_size=40), st.binary(max_size=64), st.integers(0, 80))
def test_whatever_a_header_says_the_only_error_is_its_own(header, data, kept):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = sign.pack({"signs": torch.ones(1, 8) > 0, "row_scale": torch.ones(1, 1)}, sign.Spec())
        write(folder, sign.Spec(), tensors)
        write_parts(folder / ONE, header, data)
        if kept < 40:
            (folder / ONE).write_bytes((folder / ONE).read_bytes()[:kept])
        with pytest.raises(ReaderError):
            Checkpoint(folder)


PARTS = {
    "signs": torch.ones(2, 16) > 0,
    "codes": torch.ones(2, 16, dtype=torch.int8),
    "left": torch.ones(2, 8) > 0,
    "right": torch.ones(8, 16) > 0,
    "middle_scale": torch.ones(8),
    "column_scale": torch.ones(16),
}
MATRICES = [
    (sign, sign.Spec(8, True), torch.ones(2, 2)),
    (integer, integer.Spec(4, 8), torch.ones(2, 2)),
    (factored, factored.Spec(8), torch.ones(2)),
]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_header_with_a_changed_value_means_the_same_or_is_refused(data):
    kind, spec, rows = data.draw(st.sampled_from(MATRICES))
    tensors = kind.pack(PARTS | {"row_scale": rows}, spec)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, spec, tensors)
        header, content = read_parts(folder / ONE)
        entry = header[data.draw(st.sampled_from(sorted(f"m.{leaf}" for leaf in tensors)))]
        entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(VALUES)
        write_parts(folder / ONE, header, content)
        expected = kind.dequantize(tensors, spec, 2, 16, torch.float32).numpy()
        try:
            assert np.array_equal(Checkpoint(folder).dequantize("m"), expected)
        except ReaderError as error:
            assert len(str(error)) < 1000
