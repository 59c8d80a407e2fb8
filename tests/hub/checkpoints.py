"""A finished checkpoint of a few kB, made once per session: quantised, measured, with a card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_qep.engine.headers import INDEX_FILE, MANIFEST, SINGLE_FILE
from hf_qep.engine.manifest import file_table
from hf_qep.hub.cards.card import sealed
from hf_qep.hub.preflight import RECORD, SAMPLES
from tests.cli.test_commands import run

BASE = "acme/tiny-llama"
TEXT = "He walked down to the river in the morning and sat upon a stone. " * 8
CARD = """---
base_model: {base}
base_model_relation: quantized
library_name: transformers
pipeline_tag: text-generation
license: {licence}
quantized_by: alice
tags: [hf-qep, 1-bit]
---

# tiny-llama in one bit

Numbers are in `hf_qep_eval.json`.
"""


@pytest.fixture(scope="session")
def float_checkpoint(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    """The original: a tiny Llama in float32 with its tokenizer."""
    folder = tmp_path_factory.mktemp("float") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory, float_checkpoint) -> Path:
    """quantize + eval (on the bundled tales) + a card; tests copy it before they change it."""
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("finished")
    (work / "river.txt").write_text(TEXT)
    out = work / "tiny-llama-1bit"
    small = ("--num-samples", 4, "--seq-len", 16, "--method", "rtn", "--dtype", "float32", "--remote-code")
    done = run("quantize", float_checkpoint, "--out", out, "--dataset", work / "river.txt", *small)
    assert done.exit_code == 0, (done.output, done.exception)
    done = run("eval", out, "--baseline", float_checkpoint, "--max-tokens", 300, "--window", 64, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    (out / "README.md").write_text(sealed(CARD.format(base=BASE, licence="apache-2.0")))
    return out


@pytest.fixture
def checkpoint(finished, tmp_path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


@pytest.fixture
def relicensed(checkpoint) -> Callable[[str | None], Path]:
    """`relicensed(licence)`: the checkpoint with another licence in its card; None removes it."""

    def change(licence: str | None) -> Path:
        path = checkpoint / "README.md"
        line = f"license: {licence}\n" if licence else ""
        path.write_text(re.sub(r"^license: .*\n", line, path.read_text(), flags=re.MULTILINE))
        return checkpoint

    return change


def edit_json(path: Path, change: Callable) -> None:
    """Apply `change` to the json object in `path`."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def reseal(folder: Path) -> Path:
    """Checksums in manifest and record made to fit the files again: what somebody who hides a change would do."""
    edit_json(folder / MANIFEST, lambda manifest: manifest.update(files=file_table(folder)))
    weights = {path.name: file_table(folder)[path.name]["sha256"] for path in folder.glob("*.safetensors")}
    if (folder / RECORD).is_file():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        edit_json(folder / RECORD, lambda record: record["cost"]["subject"].update(file_bytes=size))
    for name in (RECORD, SAMPLES):
        if (folder / name).is_file():
            edit_json(folder / name, lambda value: value["subject"].update(sha256=weights))
    return folder


def make_shards(folder: Path) -> Path:
    """The weights in two files with an index, sealed again."""
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    names = sorted(tensors)
    half = len(names) // 2
    parts = {f"model-0000{i}-of-00002.safetensors": part for i, part in ((1, names[:half]), (2, names[half:]))}
    for shard, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in parts.items() for name in part}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return reseal(folder)
