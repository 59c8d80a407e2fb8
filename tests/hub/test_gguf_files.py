"""A GGUF file is published with its checkpoint only if it is that model."""

from __future__ import annotations

import shutil

import pytest

from hf_qep.export.gguf_file import export_gguf
from hf_qep.hub.allowed import MADE_LATER, kind_of
from hf_qep.hub.gguf_files import gguf_problems
from hf_qep.hub.preflight import check_folder
from hf_qep.hub.verify import verify
from tests.export.conftest import checkpoint as wide

__all__ = ["wide"]

pytest.importorskip("gguf", reason="needs the package gguf, which `make install` brings")


def test_the_same_model_passes_and_another_one_is_named(wide, tmp_path):
    folder = shutil.copytree(wide("cohere2")[1], tmp_path / "m")
    export_gguf(folder, folder / "m-Q1_0.gguf")
    names = sorted(path.name for path in folder.iterdir())
    assert gguf_problems(folder, names) == []
    export_gguf(wide("cohere2", logit_scale=0.5)[1], folder / "m-Q1_0.gguf", overwrite=True)
    (found,) = gguf_problems(folder, names)
    assert "'m-Q1_0.gguf' is not this checkpoint: cohere2.logit_scale is 0.5, not 0.25" in found
    (folder / "m-Q1_0.gguf").write_bytes(b"GGUF")
    (found,) = gguf_problems(folder, names)
    assert "cannot be compared" in found and "no whole GGUF file" in found


def test_before_a_push_and_in_a_check_it_is_compared(checkpoint):
    (checkpoint / "m.gguf").write_bytes(b"GGUF")
    (problem,) = check_folder(checkpoint).problems
    assert "'m.gguf' cannot be compared with the checkpoint" in problem
    (differs,) = verify(str(checkpoint)).differs
    assert "'m.gguf' cannot be compared with the checkpoint" in differs


def test_names():
    assert kind_of("qwen3-0.6b-Q1_0.gguf") == "gguf" and "gguf" in MADE_LATER
    assert kind_of("../m.gguf") is None and kind_of(".gguf") is None
