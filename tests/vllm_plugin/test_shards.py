"""Parts of packed matrices are parts of what they stand for, and outputs of the parts are the output of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.formats import factored, integer, sign
from hf_qep.registry import FORMATS
from hf_qep.vllm_plugin.shards import Window, divided, shard, shard_spec, shard_tensor, whole


def packed(spec, out: int, width: int, seed: int) -> dict[str, Tensor]:
    """Random tensors of a matrix (out, width)."""
    g = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g) < 0.5

    def scale(*shape: int) -> Tensor:
        return 0.5 + torch.rand(shape, generator=g)

    if spec.format == "factored":
        parts = {"left": signs(out, spec.rank), "right": signs(spec.rank, width), "row_scale": scale(out)}
        return factored.pack(parts | {"middle_scale": scale(spec.rank), "column_scale": scale(width)}, spec)
    rows = scale(out, width // (spec.group_size or width))
    if spec.format == "integer":
        high = 1 << (spec.bits - 1)
        codes = torch.randint(-high, high, (out, width), generator=g, dtype=torch.int8)
        return integer.pack({"codes": codes, "row_scale": rows}, spec)
    parts = {"signs": signs(out, width), "row_scale": rows}
    return sign.pack(parts | ({"column_scale": scale(width)} if spec.column_scale else {}), spec)


def dense(tensors: dict[str, Tensor], spec, shape: tuple[int, int]) -> Tensor:
    return FORMATS.get(spec.format).dequantize(tensors, spec, *shape, torch.float32)


def exact(tensors: dict[str, Tensor], spec, shape: tuple[int, int]) -> dict[str, Tensor]:
    """What can be compared bit by bit: the weight, or its factors, whose product depends on the order of its sums."""
    if spec.format == "factored":
        return factored.unpack(tensors, spec, *shape)
    return {"dense": dense(tensors, spec, shape)}


def product(x: Tensor, tensors: dict[str, Tensor], spec) -> Tensor:
    return FORMATS.get(spec.format).linear(x, tensors, spec, None)


SPECS = st.one_of(
    st.builds(sign.Spec, st.sampled_from([None, 8, 32, 64, 128]), st.booleans()),
    st.builds(factored.Spec, st.sampled_from([8, 24, 40, 64])),
    st.builds(factored.Spec, st.sampled_from([8, 24, 40, 64]), st.just(True)),
    st.builds(integer.Spec, st.sampled_from([4, 8]), st.sampled_from([None, 32, 64])),
)


@st.composite
def matrices(draw):
    """A spec, a shape that it fits and that 4 ranks can share, and tensors."""
    spec = draw(SPECS)
    group = getattr(spec, "group_size", None) or 1
    step = max(4, group)
    width = step * draw(st.integers(1, max(1, 520 // step)))
    out = 4 * draw(st.integers(1, 12))
    return spec, (out, width), packed(spec, out, width, draw(st.integers(0, 99)))


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from([1, 2, 4]))
def test_rows_of_all_ranks_are_the_rows_of_the_whole(matrix, ranks):
    spec, shape, tensors = matrix
    out, width = shape
    parts = []
    for rank in range(ranks):
        window = Window((divided(out, ranks, rank, "rows"),), range(width))
        own = shard_spec(spec, shape, window)
        assert own == spec
        parts.append(shard(tensors, spec, shape, window))
        layout = FORMATS.get(spec.format).layout(own, *window.shape)
        assert {k: (tuple(t.shape), t.dtype) for k, t in parts[-1].items()} == layout
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    found = [exact(part, spec, (out // ranks, width)) for part in parts]
    for name, value in exact(tensors, spec, shape).items():
        if name in ("left", "row_scale", "dense"):
            assert torch.equal(torch.cat([part[name] for part in found]), value)
        else:
            assert all(torch.equal(part[name], value) for part in found)
    torch.testing.assert_close(
        torch.cat([product(x, p, spec) for p in parts], -1), product(x, tensors, spec), rtol=1e-4, atol=1e-3
    )


@settings(max_examples=100, deadline=None)
@given(matrices(), st.sampled_from([1, 2, 4]))
def test_columns_of_all_ranks_are_the_columns_of_the_whole_and_their_outputs_add_up(matrix, ranks):
    spec, shape, tensors = matrix
    out, width = shape
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    total, columns = torch.zeros(3, out), []
    for rank in range(ranks):
        window = Window((range(out),), divided(width, ranks, rank))
        try:
            own = shard_spec(spec, shape, window)
        except ConfigError as error:
            assert "does not divide the shard" in str(error) and spec.group_size % len(window.columns)
            return
        part = shard(tensors, spec, shape, window)
        layout = FORMATS.get(spec.format).layout(own, *window.shape)
        assert {k: (tuple(t.shape), t.dtype) for k, t in part.items()} == layout
        repacked = FORMATS.get(spec.format).pack(FORMATS.get(spec.format).unpack(part, own, *window.shape), own)
        assert all(torch.equal(repacked[k], part[k]) for k in part), "bits behind the last column must be 0"
        columns.append(exact(part, own, window.shape))
        total += product(x[:, window.columns.start : window.columns.stop], part, own)
    for name, value in exact(tensors, spec, shape).items():
        if name in ("right", "column_scale", "dense"):
            assert torch.equal(torch.cat([part[name] for part in columns], -1), value)
        else:
            assert all(torch.equal(part[name], value) for part in columns)
    torch.testing.assert_close(total, product(x, tensors, spec), rtol=1e-4, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(matrices(), st.data())
def test_any_window_dequantises_to_that_part(matrix, data):
    spec, shape, tensors = matrix
    out, width = shape
    cuts = sorted(data.draw(st.lists(st.integers(0, out), min_size=4, max_size=4)))
    start = data.draw(st.integers(0, width - 1))
    columns = range(start, data.draw(st.integers(start + 1, width)))
    window = Window((range(cuts[0], cuts[1]), range(cuts[2], cuts[3])), columns)
    if not window.shape[0]:
        return
    try:
        own = shard_spec(spec, shape, window)
    except ConfigError:
        return
    found = dense(shard(tensors, spec, shape, window), own, window.shape)
    rows = [i for span in window.rows for i in span]
    expected = dense(tensors, spec, shape)[rows][:, columns.start : columns.stop]
    torch.testing.assert_close(found, expected, rtol=1e-5 if spec.format == "factored" else 0, atol=1e-5)


def test_groups_that_a_part_cuts_become_smaller_ones_of_whole_words():
    spec, shape = sign.Spec(group_size=96), (4, 192)
    assert shard_spec(spec, shape, Window((range(4),), range(64, 128))) == sign.Spec(group_size=32)
    assert shard_spec(spec, shape, Window((range(4),), range(96, 192))) == sign.Spec()
    assert shard_spec(spec, shape, whole(shape)) == spec


def test_groups_that_cannot_be_cut_are_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"group of 96 columns .* shard of 72 .* column 72.* divides 72"):
        shard_spec(sign.Spec(group_size=96), (4, 288), Window((range(4),), range(72, 144)))
    with pytest.raises(ConfigError, match="10 columns cannot be divided among 4 processes"):
        divided(10, 4, 0)


def test_a_tensor_that_the_format_does_not_store_is_refused():
    tensors = packed(sign.Spec(), 8, 64, 0)
    with pytest.raises(CheckpointError, match=r"`weight` is torch.int32 \(8, 2\), and a matrix \(8, 96\)"):
        shard_tensor("weight", tensors["weight"], sign.Spec(), (8, 96), whole((8, 96)))
    with pytest.raises(CheckpointError, match="`left`, which format `sign` does not have"):
        shard_tensor("left", tensors["weight"], sign.Spec(), (8, 64), whole((8, 64)))
    with pytest.raises(CheckpointError, match="torch.int64"):
        shard_tensor("weight", tensors["weight"].long(), sign.Spec(), (8, 64), whole((8, 64)))
