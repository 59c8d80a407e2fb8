"""Files that are written and read tensor by tensor are those of the library."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_qep.engine.tensor_files import DTYPES, Described, TensorFile, write_tensors
from hf_qep.errors import CheckpointError


def some_tensors():
    """One or two of each dtype, of several shapes, an empty one and one without dimensions among them."""
    shapes = [(3, 5), (), (0, 4), (7,), (1, 2, 3)]
    found = {}
    for number, dtype in enumerate(DTYPES):
        shape = shapes[number % len(shapes)]
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        found[f"z{number}.weight"] = numbers.to(dtype)
        found[f"a{number}.weigh\u00e4t"] = torch.ones(2, 2).to(dtype)
    return found


def test_a_file_is_byte_for_byte_that_of_the_library(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    write_tensors(tmp_path / "own", {n: Described.of(t) for n, t in tensors.items()}, tensors.__getitem__)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()


def test_what_is_read_is_what_the_library_reads(tmp_path):
    save_file(some_tensors(), tmp_path / "x.safetensors")
    file, expected = TensorFile(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert file.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        found = file.lazily(name)[...]
        assert Described.of(found) == Described.of(tensor)
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else found == tensor


def test_another_tensor_than_was_described_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'x' is"):
        write_tensors(tmp_path / "x", {"x": Described(torch.float32, (2,))}, lambda name: torch.zeros(3))


def test_a_file_that_is_no_such_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"12345678901234567890")
    with pytest.raises(CheckpointError, match="'x' claims a header"):
        TensorFile(tmp_path / "x")
    with pytest.raises(CheckpointError, match="'y' is gone"):
        TensorFile(tmp_path / "y")
