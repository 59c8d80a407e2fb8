"""Files of a checkpoint that are damaged or made to deceive: each is refused by name, before any weight is read."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_qep.engine.headers import read_header
from hf_qep.engine.source import check_checkpoint, load_float_model
from hf_qep.errors import CheckpointError
from tests.hostile.conftest import edit_json, read_parts, write_parts

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def test_a_good_checkpoint_passes(good_checkpoint, good_shards, tiny_model):
    whole, sharded = check_checkpoint(good_checkpoint), check_checkpoint(good_shards)
    assert whole.weight_bytes == sharded.weight_bytes == sum(4 * p.numel() for p in tiny_model("llama").parameters())
    assert whole.tensors.keys() == sharded.tensors.keys()


def test_a_missing_shard_is_named(shards):
    first_shard(shards).unlink()
    with pytest.raises(CheckpointError, match=r"'model-00001-of-\d+\.safetensors' is missing.*download"):
        check_checkpoint(shards)


@pytest.mark.parametrize("kept", [0, 5, 8, 200, -1])
def test_a_truncated_file_is_named(shards, kept):
    path = first_shard(shards)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model-00001-of.*download it again"):
        check_checkpoint(shards)


def test_bytes_behind_the_last_tensor_are_refused(checkpoint):
    with (checkpoint / ONE).open("ab") as file:
        file.write(b"\0" * 7)
    with pytest.raises(CheckpointError, match="'model.safetensors' has 7 bytes that belong to no tensor"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("length", [100_000_001, 2**40, 2**64 - 1])
def test_an_absurd_header_length_allocates_nothing(checkpoint, length):
    (checkpoint / ONE).write_bytes(struct.pack("<Q", length) + b"{}")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"claims a header of {length} bytes, but has 10 bytes"):
        check_checkpoint(checkpoint)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_sparse_file_cannot_make_the_header_large(checkpoint):
    with (checkpoint / ONE).open("wb") as file:
        file.write(struct.pack("<Q", 2**37))
        file.truncate(2**38)
    with pytest.raises(CheckpointError, match=f"claims a header of {2**37} bytes.*limit 100000000"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "not readable json"),
        (b"[1]", "holds a json list"),
        (b'{"a": ' * 100_000 + b"1", "not readable json"),
        (b'{"a": 1, "a": 2}', "key 'a' twice"),
        (b"\xff\xfe{}", "not readable json"),
        ({"a": 5}, "tensor 'a'.*lacks dtype"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "tensor 'a'.*lacks dtype, shape or data_offsets"),
        ({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}, "unknown dtype 'Q9'"),
        ({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, r"impossible shape \[-1\]"),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, r"impossible shape \[1.0\]"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "impossible shape"),
        ({"a": {"dtype": "F32", "shape": [2**33, 0], "data_offsets": [0, 0]}}, "impossible shape"),
        ({"a": {"dtype": "F32", "shape": [2**31, 2**31, 4], "data_offsets": [0, 0]}}, "'a'.* has 0 bytes, but F32"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "'a'.* has -4 bytes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, r"impossible data_offsets \[-4, 0\]"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "impossible data_offsets"),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            "'a'.* has 4 bytes, but F32 of shape .* needs 8",
        ),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "truncated: the tensor 'a' ends at byte 16"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "'a'.* leaves a hole after 'the header'"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "has 4 bytes that belong to no tensor"),
    ],
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(checkpoint, header, message):
    write_parts(checkpoint / ONE, header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_checkpoint(checkpoint)
    assert ONE in str(caught.value)


def test_overlapping_tensors_are_named(checkpoint):
    header, data = read_parts(checkpoint / ONE)
    names = [n for n, e in header.items() if n != "__metadata__" and e["shape"] == [64]]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    write_parts(checkpoint / ONE, header, data)
    with pytest.raises(CheckpointError, match="overlaps with"):
        check_checkpoint(checkpoint)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_of_a_header_gives_an_error_of_ours_or_a_header_that_still_fits(
    tmp_path, good_checkpoint, data
):
    raw = bytearray((good_checkpoint / ONE).read_bytes())
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / ONE
    path.write_bytes(raw)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    length = struct.unpack("<Q", raw[:8])[0]
    assert sum(entry.bytes for entry in entries.values()) == len(raw) - 8 - length


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_are_never_a_crash(tmp_path, raw):
    path = tmp_path / ONE
    path.write_bytes(raw)
    try:
        read_header(path)
    except CheckpointError as error:
        assert ONE in str(error)


# --- the index


@pytest.mark.parametrize(
    "name",
    ["/etc/secret.safetensors", "../secret.safetensors", "sub/secret.safetensors", "a\\b.safetensors", "x.bin",
     ".hidden.safetensors", "", None, 7, ["x"], "..", "secret.safetensors\0"],
)  # fmt: skip
def test_a_weight_map_that_leads_out_of_the_folder_is_refused(shards, tmp_path, name):
    (tmp_path / "secret.safetensors").write_bytes(first_shard(shards).read_bytes())
    edit_json(shards / INDEX, lambda index: index["weight_map"].update({NORM: name}))
    with pytest.raises(CheckpointError, match="only plain file names inside the folder"):
        check_checkpoint(shards)


@pytest.mark.parametrize("name", [ONE, "config.json", "generation_config.json"])
def test_a_link_to_outside_the_folder_is_refused(checkpoint, tmp_path, name):
    outside = tmp_path / name
    os.replace(checkpoint / name, outside)
    (checkpoint / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"'{name}' is a link to outside"):
        check_checkpoint(checkpoint)


def test_the_links_of_the_hub_cache_are_followed(checkpoint, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / ("0" * 40), tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in checkpoint.iterdir():
        os.replace(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert check_checkpoint(snapshot).tensors


@pytest.mark.parametrize("marked", [True, False])
def test_links_to_what_all_repositories_of_the_cache_share_are_followed(checkpoint, tmp_path, marked):
    """The cache marks the folder of these; without the mark it is any folder."""
    cache = tmp_path / "cache"
    snapshot, blobs, shared = (
        cache / "models--x--y/snapshots" / ("0" * 40),
        cache / "models--x--y/blobs",
        cache / "blobs",
    )
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        os.replace(path, shared / path.name)
        (blobs / path.name).symlink_to(f"../../blobs/{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    if marked:
        (shared / ".huggingface-shared-blobs").write_text("1\n")
        assert check_checkpoint(snapshot).tensors
    else:
        with pytest.raises(CheckpointError, match="is a link to outside"):
            check_checkpoint(snapshot)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(shards):
    edit_json(shards / INDEX, lambda index: index["weight_map"].update({"ghost.weight": first_shard(shards).name}))
    with pytest.raises(CheckpointError, match=r"places 'ghost.weight' in 'model-00001.*does not hold it"):
        check_checkpoint(shards)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_weight_map_is_refused(shards, weight_map):
    edit_json(shards / INDEX, lambda index: index.update(weight_map=weight_map))
    with pytest.raises(CheckpointError, match=r"index\.json' has no `weight_map`"):
        check_checkpoint(shards)


@pytest.mark.parametrize("claimed", [0, 10**18])
def test_the_size_that_an_index_claims_is_not_believed(shards, claimed):
    true = check_checkpoint(shards).weight_bytes
    edit_json(shards / INDEX, lambda index: index["metadata"].update(total_size=claimed))
    assert check_checkpoint(shards).weight_bytes == true


def test_only_pickled_weights_are_refused_and_never_opened(checkpoint, tmp_path):
    (checkpoint / ONE).unlink()
    trap = b"cos\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR."
    (checkpoint / "pytorch_model.bin").write_bytes(trap)
    for refused in (check_checkpoint, load_float_model):
        with pytest.raises(CheckpointError, match=r"'pytorch_model\.bin'.*run code.*convert them to safetensors"):
            refused(checkpoint)
    assert not (tmp_path / "opened").exists()


def test_a_folder_without_weights_is_refused(checkpoint):
    (checkpoint / ONE).unlink()
    with pytest.raises(CheckpointError, match="neither 'model.safetensors' nor"):
        check_checkpoint(checkpoint)


def test_a_missing_tensor_is_refused_instead_of_being_random(checkpoint):
    header, data = read_parts(checkpoint / ONE)
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    start = header.pop(last)["data_offsets"][0]
    write_parts(checkpoint / ONE, header, data[:start])
    with pytest.raises(CheckpointError, match=f"lack 1 weights of LlamaForCausalLM: '{last}'.*random"):
        load_float_model(checkpoint)


def test_messages_show_no_folder_above_the_checkpoint(checkpoint, tmp_path):
    (checkpoint / ONE).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(checkpoint)
    assert str(tmp_path) not in str(caught.value)


def test_json_beyond_the_limit_is_not_read(checkpoint):
    with (checkpoint / "config.json").open("r+b") as file:
        file.truncate(2**36)
    with pytest.raises(CheckpointError, match=rf"'config.json' has {2**36} bytes"):
        check_checkpoint(checkpoint)


def test_configs_are_json_objects(checkpoint):
    for text, message in [("", "not readable json"), (json.dumps([1]), "json list")]:
        (checkpoint / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"config.json.*{message}"):
            check_checkpoint(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match="'config.json' is missing"):
        check_checkpoint(checkpoint)
