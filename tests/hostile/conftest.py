"""A good checkpoint to damage, and a way to write safetensors files that lie."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def good_checkpoint(tmp_path_factory, tiny_model):
    """A tiny llama in one file; do not change it."""
    folder = tmp_path_factory.mktemp("good") / "good"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def good_shards(tmp_path_factory, tiny_model):
    """The same in several shards with an index; do not change it."""
    folder = tmp_path_factory.mktemp("shards") / "shards"
    tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def checkpoint(tmp_path, good_checkpoint):
    """A copy of the single-file checkpoint that a test may damage."""
    return Path(shutil.copytree(good_checkpoint, tmp_path / "model"))


@pytest.fixture
def shards(tmp_path, good_shards):
    """A copy of the sharded checkpoint that a test may damage."""
    return Path(shutil.copytree(good_shards, tmp_path / "model"))


def edit_json(path, change):
    """Apply `change` to the json object in `path`."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def read_parts(path):
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_parts(path, header, data):
    """A safetensors file from a header (object or bytes) and data, whether they fit or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
