"""Layers of vLLM with packed weights, at every rank: they load what is theirs and compute their share of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_qep.config import QepConfig
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.formats import factored, integer, sign
from hf_qep.registry import FORMATS
from hf_qep.vllm_plugin.config import config_class
from hf_qep.vllm_plugin.windows import parts_of
from tests.vllm_plugin.test_shards import packed

WIDTH, HEAD, HEADS, KV_HEADS = 96, 8, 8, 2
SIGN, GROUPED, FACTORED = sign.Spec(column_scale=True), sign.Spec(group_size=32), factored.Spec(24, flat=True)


def config_of(specs: dict[str, Any]) -> Any:
    """The plugin's config, as vLLM makes it of config.json."""
    stored = QepConfig(layers=[])
    stored.set_layers({name: spec for name, spec in specs.items() if spec is not None})
    return config_class().from_config(stored.to_dict())


def matrix(spec: Any, out: int, width: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors and the dense weight; a float one without a spec."""
    if spec is None:
        weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
        return {"weight": weight}, weight
    tensors = packed(spec, out, width, seed)
    return tensors, FORMATS.get(spec.format).dequantize(tensors, spec, out, width, torch.float32)


def load(layer: Any, tensors: dict[str, Tensor], *key: Any) -> None:
    for leaf, tensor in tensors.items():
        parameter = getattr(layer, leaf)
        parameter.weight_loader(parameter, tensor, *key)


def finish(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def inputs(width: int = WIDTH, tokens: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    rounding = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.5}[found.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=rounding / 10, atol=rounding * 10)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "specs",
    [(SIGN, SIGN, SIGN), (GROUPED, FACTORED, None), (factored.Spec(40), factored.Spec(8), SIGN), (None, SIGN, None)],
    ids=["sign", "sign-factored-float", "ranks", "float-sign-float"],
)
def test_queries_keys_and_values_have_formats_scales_and_ranks_of_their_own(vllm, ranks, specs):
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    quant_config = config_of(dict(zip(names, specs, strict=True)))
    sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
    made = [matrix(spec, size, WIDTH, i) for i, (spec, size) in enumerate(zip(specs, sizes, strict=True))]
    bias = [torch.randn(size) for size in sizes]
    x, shares = inputs(), []
    for rank in range(ranks):
        with vllm.at(rank, ranks):
            layer = vllm.linear.QKVParallelLinear(
                WIDTH, HEAD, HEADS, KV_HEADS, quant_config=quant_config, prefix="model.layers.0.self_attn.qkv_proj"
            )
            for key, (tensors, _), own in zip("qkv", made, bias, strict=True):
                load(layer, tensors, key)
                layer.bias.weight_loader(layer.bias, own, key)
            shares.append(finish(layer)(x)[0].split(layer.output_partition_sizes, -1))
    replicas = max(1, ranks // KV_HEADS)
    for part, (_, weight) in enumerate(made):
        held = [share[part] for share in shares][:: replicas if part else 1]
        close(torch.cat(held, -1), x @ weight.t() + bias[part])
    for share, first in zip(shares, range(ranks), strict=True):  # ranks that share a head hold the same
        assert torch.equal(share[1], shares[first // replicas * replicas][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("specs", [(SIGN, GROUPED), (FACTORED, None)], ids=["sign", "factored-float"])
def test_gate_and_up_in_the_dtype_of_the_model(vllm, ranks, specs, dtype):
    names = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    quant_config = config_of(dict(zip(names, specs, strict=True)))
    made = [matrix(spec, 64, WIDTH, i) for i, spec in enumerate(specs)]
    x, shares = inputs(dtype=dtype), []
    for rank in range(ranks):
        with vllm.at(rank, ranks):
            layer = vllm.linear.MergedColumnParallelLinear(
                WIDTH, [64, 64], False, params_dtype=dtype, quant_config=quant_config,
                prefix="model.layers.0.mlp.gate_up_proj",
            )  # fmt: skip
            for key, (tensors, _) in enumerate(made):
                load(layer, tensors, key)
            shares.append(finish(layer)(x)[0].split(64 // ranks, -1))
    for part, (_, weight) in enumerate(made):
        found = torch.cat([share[part] for share in shares], -1)
        assert found.dtype == dtype
        close(found, x.float() @ weight.t())


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "spec",
    [SIGN, sign.Spec(), FACTORED, factored.Spec(33), integer.Spec(4)],
    ids=["sign", "rows", "flat", "33", "integer"],
)
def test_shares_of_divided_columns_add_up_and_the_bias_comes_once(vllm, ranks, spec):
    quant_config = config_of({"model.layers.0.mlp.down_proj": spec})
    tensors, weight = matrix(spec, 40, WIDTH, 0)  # 24 columns for each of 4 ranks: no whole word of signs
    bias, x = torch.randn(40), inputs()
    total = torch.zeros(5, 40)
    for rank in range(ranks):
        with vllm.at(rank, ranks):
            layer = vllm.linear.RowParallelLinear(
                WIDTH, 40, quant_config=quant_config, prefix="model.layers.0.mlp.down_proj"
            )
            load(layer, tensors)
            layer.bias.weight_loader(layer.bias, bias)
            share = x.split(WIDTH // ranks, -1)[rank]
            total += finish(layer)(share)[0]
    close(total, x @ weight.t() + bias)


@pytest.mark.parametrize("kind", ["ReplicatedLinear", "ColumnParallelLinear"])
def test_layers_of_one_part(vllm, kind):
    quant_config = config_of({"model.layers.0.gate": GROUPED})
    tensors, weight = matrix(GROUPED, 48, WIDTH, 0)
    shares = []
    for rank in range(2):
        with vllm.at(rank, 2):
            layer = getattr(vllm.linear, kind)(
                WIDTH, 48, False, quant_config=quant_config, prefix="model.layers.0.gate"
            )
            load(layer, tensors)
            shares.append(finish(layer)(inputs())[0])
    found = shares if kind == "ReplicatedLinear" else [torch.cat(shares, -1)]
    for each in found:
        close(each, inputs() @ weight.t())


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("spec", [SIGN, factored.Spec(24)], ids=["sign", "factored"])
def test_a_matrix_that_was_fused_before_it_was_quantised(vllm, ranks, spec):
    quant_config = config_of({"model.layers.0.self_attn.qkv_proj": spec})
    sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
    tensors, weight = matrix(spec, sum(sizes), WIDTH, 0)
    x, shares = inputs(), []
    for rank in range(ranks):
        with vllm.at(rank, ranks):
            layer = vllm.linear.QKVParallelLinear(
                WIDTH,
                HEAD,
                HEADS,
                KV_HEADS,
                False,
                quant_config=quant_config,
                prefix="model.layers.0.self_attn.qkv_proj",
            )  # fmt: skip
            load(layer, tensors)
            shares.append(finish(layer)(x)[0].split(layer.output_partition_sizes, -1))
    replicas = max(1, ranks // KV_HEADS)
    for part, expected in enumerate((x @ weight.t()).split(sizes, -1)):
        close(torch.cat([share[part] for share in shares][:: replicas if part else 1], -1), expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("spec", [integer.Spec(8), integer.Spec(4, 32)], ids=["8", "4"])
def test_tables_are_divided_by_rows_and_filled_up_with_zeros(vllm, ranks, spec):
    tokens = 200  # padded to 256
    quant_config = config_of({"model.embed_tokens": spec, "lm_head": spec})
    tensors, weight = matrix(spec, tokens, WIDTH, 0)
    ids, x = torch.tensor([0, 3, 63, 64, 127, 128, 199]), inputs()
    rows, logits = torch.zeros(len(ids), WIDTH), []
    for rank in range(ranks):
        with vllm.at(rank, ranks):
            embedding = vllm.tables.VocabParallelEmbedding(tokens, WIDTH, quant_config=quant_config)
            head = vllm.tables.ParallelLMHead(tokens, WIDTH, quant_config=quant_config, prefix="lm_head")
            for layer in (embedding, head):
                load(layer, tensors)
                finish(layer)
            rows += embedding(ids)
            logits.append(head.quant_method.apply(head, x))
    assert torch.equal(rows, weight[ids])
    found = torch.cat(logits, -1)
    close(found[:, :tokens], x @ weight.t())
    assert not found[:, tokens:].any()


def test_a_head_that_is_tied_to_a_packed_embedding_reads_its_table(vllm):
    spec = integer.Spec(8)
    quant_config = config_of({"model.embed_tokens": spec})
    tensors, weight = matrix(spec, 128, WIDTH, 0)
    with vllm.at(0, 1):
        embedding = vllm.tables.VocabParallelEmbedding(128, WIDTH, quant_config=quant_config)
        head = vllm.tables.ParallelLMHead(128, WIDTH, quant_config=quant_config, prefix="lm_head")
        head = head.tie_weights(embedding)
        load(embedding, tensors)
    close(head.quant_method.apply(head, inputs()), inputs() @ weight.t())
    assert head.weight is embedding.weight


def test_tables_that_stayed_float_are_vllms_own(vllm):
    quant_config = config_of({"model.layers.0.mlp.down_proj": SIGN})
    with vllm.at(0, 1):
        embedding = vllm.tables.VocabParallelEmbedding(128, WIDTH, quant_config=quant_config)
        head = vllm.tables.ParallelLMHead(128, WIDTH, quant_config=quant_config, prefix="lm_head")
        linear = vllm.linear.RowParallelLinear(
            WIDTH, 40, quant_config=quant_config, prefix="model.layers.1.mlp.down_proj"
        )
        assert type(embedding.quant_method) is vllm.tables.UnquantizedEmbeddingMethod
        assert isinstance(head.quant_method, vllm.tables.UnquantizedEmbeddingMethod)
        assert type(linear.quant_method) is vllm.linear.UnquantizedLinearMethod
        head.tie_weights(embedding)
        assert head.weight is embedding.weight


def test_an_embedding_whose_model_gives_no_config_is_packed_all_the_same(vllm):
    spec = integer.Spec(8)
    quant_config = config_of({"model.embed_tokens": spec})
    tensors, weight = matrix(spec, 128, WIDTH, 0)
    with vllm.at(0, 1, quant_config):
        embedding = vllm.tables.VocabParallelEmbedding(128, WIDTH)
        load(embedding, tensors)
        assert torch.equal(embedding(torch.tensor([5, 7])), weight[[5, 7]])
    with vllm.at(0, 1, None):  # another model in the same process
        assert vllm.tables.VocabParallelEmbedding(128, WIDTH).weight.dtype == torch.float32


@torch.no_grad()
def test_layers_are_traced_into_one_graph(vllm):
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    quant_config = config_of({"model.embed_tokens": integer.Spec(8), names[0]: SIGN, names[1]: FACTORED})
    with vllm.at(0, 1):
        embedding = vllm.tables.VocabParallelEmbedding(128, WIDTH, quant_config=quant_config)
        layer = vllm.linear.QKVParallelLinear(
            WIDTH, HEAD, HEADS, KV_HEADS, False, quant_config=quant_config, prefix="model.layers.0.self_attn.qkv_proj"
        )
    load(embedding, matrix(integer.Spec(8), 128, WIDTH, 0)[0])
    for key, spec, size in zip("qkv", (SIGN, FACTORED, None), layer.output_partition_sizes, strict=True):
        load(layer, matrix(spec, size, WIDTH, 0)[0], key)
    finish(layer)

    def both(ids: Tensor) -> Tensor:
        return layer.quant_method.apply(layer, embedding.quant_method.embedding(embedding, ids))

    ids = torch.arange(7)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="eager")(ids), both(ids))


def test_parameters_are_empty_so_that_vllm_misses_none(vllm):
    quant_config = config_of({"model.layers.0.mlp.down_proj": FACTORED})
    with vllm.at(0, 1):
        layer = vllm.linear.RowParallelLinear(
            WIDTH, 40, False, quant_config=quant_config, prefix="model.layers.0.mlp.down_proj"
        )
    names = {name: (parameter.numel(), parameter.dtype) for name, parameter in layer.named_parameters()}
    dtypes = {name: dtype for name, (_, dtype) in factored.layout(FACTORED, 40, WIDTH).items()}
    assert names == {name: (0, dtype) for name, dtype in dtypes.items()}


# ---- what is refused ----


def row_parallel(vllm, spec: Any, width: int = WIDTH) -> Any:
    quant_config = config_of({"model.layers.0.mlp.down_proj": spec})
    return vllm.linear.RowParallelLinear(
        width, 40, False, quant_config=quant_config, prefix="model.layers.0.mlp.down_proj"
    )


def test_a_group_that_does_not_divide_the_shard_is_refused_before_anything_is_loaded(vllm):
    with vllm.at(0, 2), pytest.raises(ConfigError, match=r"`model.layers.0.mlp.down_proj` .*group of 96 columns"):
        row_parallel(vllm, sign.Spec(group_size=96), 288)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(vllm):
    tensors, _ = matrix(SIGN, 40, WIDTH, 0)
    with vllm.at(0, 1):
        layer = row_parallel(vllm, SIGN)
        del tensors["column_scale"]
        load(layer, tensors)
        with pytest.raises(CheckpointError, match="lacks model.layers.0.mlp.down_proj.column_scale"):
            finish(layer)
        with pytest.raises(CheckpointError, match=r"`model.layers.0.mlp.down_proj` cannot be loaded: `weight` is"):
            load(layer, {"weight": torch.zeros(40, 4, dtype=torch.int32)})


def test_weights_are_loaded_once(vllm):
    tensors, _ = matrix(SIGN, 40, WIDTH, 0)
    with vllm.at(0, 1):
        layer = row_parallel(vllm, SIGN)
        load(layer, tensors)
        assert finish(finish(layer)).quant_method is layer.quant_method
        with pytest.raises(ConfigError, match="cannot be loaded again"):
            load(layer, tensors)


def test_packed_signs_where_a_float_part_belongs_are_refused(vllm):
    quant_config = config_of({"model.layers.0.mlp.gate_proj": SIGN})
    with vllm.at(0, 1):
        layer = vllm.linear.MergedColumnParallelLinear(
            WIDTH, [64, 64], False, quant_config=quant_config, prefix="model.layers.0.mlp.gate_up_proj"
        )
        with pytest.raises(CheckpointError, match=r"up_proj.* the quantization config does not list it"):
            load(layer, {"weight": matrix(SIGN, 64, WIDTH, 0)[0]["weight"]}, 1)


def test_a_model_that_divides_a_fused_matrix_itself_is_refused(vllm):
    quant_config = config_of({"model.layers.0.mlp.gate_up_proj": SIGN})
    with vllm.at(0, 1):
        layer = vllm.linear.MergedColumnParallelLinear(
            WIDTH, [64, 64], False, quant_config=quant_config, prefix="model.layers.0.mlp.gate_up_proj"
        )
        with pytest.raises(CheckpointError, match="fuses or divides its weights"):
            load(layer, matrix(SIGN, 128, WIDTH, 0)[0], 1)


def test_a_layer_with_rules_of_its_own_is_refused(vllm):
    class Odd(vllm.linear.ColumnParallelLinear):
        def weight_loader(self, param, loaded_weight):
            """Something else."""

    quant_config = config_of({"model.layers.0.odd": SIGN})
    with vllm.at(0, 1), pytest.raises(ConfigError, match="class Odd, which loads weights in a way of its own"):
        Odd(WIDTH, 40, False, quant_config=quant_config, prefix="model.layers.0.odd")


def test_parts_that_do_not_fit_the_layer_are_refused(vllm):
    quant_config = config_of({"model.layers.0.mlp.a_proj": SIGN})
    quant_config.packed_modules_mapping = {"abc_proj": ["a_proj", "b_proj", "c_proj"]}
    with vllm.at(0, 1), pytest.raises(ConfigError, match="2 parts and is made of 3 modules"):
        vllm.linear.MergedColumnParallelLinear(
            WIDTH, [64, 64], False, quant_config=quant_config, prefix="model.layers.0.mlp.abc_proj"
        )


def test_heads_that_the_processes_cannot_share_are_refused(vllm):
    quant_config = config_of({"model.layers.0.self_attn.k_proj": SIGN})
    prefix = "model.layers.0.self_attn.qkv_proj"
    with vllm.at(0, 1):
        layer = vllm.linear.QKVParallelLinear(
            WIDTH, HEAD, HEADS, KV_HEADS, False, quant_config=quant_config, prefix=prefix
        )
    layer.tp_size, layer.tp_rank = 4, 3  # not what its heads were divided for
    with pytest.raises(ConfigError, match="`q` has 8 heads, which 4 processes cannot share"):
        parts_of(layer, prefix, [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"])


def test_a_table_in_a_format_of_linears_is_refused(vllm):
    quant_config = config_of({"lm_head": SIGN})
    with vllm.at(0, 1), pytest.raises(ConfigError, match="`lm_head` has format `sign`"):
        vllm.tables.ParallelLMHead(128, WIDTH, quant_config=quant_config, prefix="lm_head")


def test_a_layer_of_another_kind_that_is_listed_is_refused(vllm):
    quant_config = config_of({"model.layers.0.conv": SIGN})
    with pytest.raises(ConfigError, match=r"`model.layers.0.conv` .* serves no Conv1d"):
        quant_config.get_quant_method(torch.nn.Conv1d(2, 2, 1), "model.layers.0.conv")
    assert quant_config.get_quant_method(torch.nn.Conv1d(2, 2, 1), "model.layers.0.attn") is None
