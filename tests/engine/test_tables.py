"""Embeddings and heads in whole numbers: what is replaced, what it starts from, what is reported, what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers as tf
from torch import nn

from hf_qep.accounting import bits_report
from hf_qep.architectures.tables import find_tables
from hf_qep.config import QepConfig
from hf_qep.engine import block as block_module
from hf_qep.engine import job as job_module
from hf_qep.engine import tables as tables_module
from hf_qep.engine.calibration import Calibration
from hf_qep.engine.job import quantize_model
from hf_qep.engine.planning.output import plan_output
from hf_qep.errors import ArchitectureError, ConfigError, NonFiniteError
from hf_qep.formats import integer
from hf_qep.modules import QepEmbedding, QepLinear, packed_tables
from tests.engine.test_job import quantized, state_of
from tests.tiny_models import build_batch, build_model

TIED = {
    "qwen3": ("model.embed_tokens", "lm_head"),
    "cohere2": ("model.embed_tokens", "lm_head"),
    "cohere2_vision": ("model.language_model.embed_tokens", "lm_head"),
    "gpt2": ("transformer.wte", "lm_head"),
    "bert": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
}


def made(family, **options):
    model = build_model(family)
    inputs = build_batch(family, batch_size=8)
    tokens = inputs["input_ids"].numel()
    config = QepConfig(**({"method": "rtn", "batch_size": 4, "num_samples": 8, "seq_len": 16} | options))
    return model, quantize_model(model, config, Calibration(inputs, {}, "", tokens))


@pytest.mark.parametrize("family", TIED)
def test_a_tied_pair_shares_one_tensor_that_is_counted_and_reported_once(family):
    before = bits_report(build_model(family))
    model, report = made(family, embedding_bits=8)
    embedding, head = (model.get_submodule(name) for name in TIED[family])
    assert isinstance(embedding, QepEmbedding) and isinstance(head, QepLinear) and head.weight is embedding.weight
    (table,) = report.tables
    found = bits_report(model)
    assert tuple(table.names) == TIED[family] and set(packed_tables(model)) == set(TIED[family])
    assert found["table_weights"] == 128 * 64 and found["bits_tables"] * 128 * 64 == table.stored_bits
    assert found["bits_tables"] == 8 + 32 / 64 and found["model_weights"] == before["model_weights"]
    assert not set(report.skipped) & set(TIED[family])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("options", [{"embedding_bits": 4}, {"head_bits": 8}, {"embedding_bits": 4, "head_bits": 8}])
def test_without_a_tie_each_table_has_the_bits_it_was_asked_to_have(family, options):
    model, report = made(family, **options)
    names = {"embedding_bits": "model.embed_tokens", "head_bits": "lm_head"}
    assert {t.names[0]: t.spec["bits"] for t in report.tables} == {names[o]: bits for o, bits in options.items()}
    assert {n: m.spec.bits for n, m in packed_tables(model).items()} == {names[o]: b for o, b in options.items()}
    float_ones = {n for n in names.values() if n not in packed_tables(model)}
    assert float_ones == {n for n, m in model.named_modules() if type(m) in (nn.Embedding, nn.Linear)} - {
        n for n in report.skipped if "mlp.gate" in n
    }


@torch.no_grad()
def test_a_packed_embedding_looks_up_the_rows_of_its_dense_weight_and_unpacks_no_other(monkeypatch):
    model, _ = made("llama", embedding_bits=4)
    embedding = model.model.embed_tokens
    dense, ids = embedding.dequantize(torch.float32), torch.tensor([[5, 5, 0], [127, 1, 64]])
    seen = []
    real = integer.dispatch.scaled_codes
    monkeypatch.setattr(
        integer.dispatch, "scaled_codes", lambda words, *a: (seen.append(words.shape), real(words, *a))[1]
    )
    assert torch.equal(embedding(ids), dense[ids])
    assert [shape[:-1] for shape in seen] == [(2, 3)]
    assert embedding.padding_idx == build_model("llama").model.embed_tokens.padding_idx
    for wrong in (128, -1):
        with pytest.raises(IndexError):
            embedding(torch.tensor([wrong]))


@torch.no_grad()
def test_errors_of_the_weights_are_those_of_the_report():
    original = build_model("llama")
    model, report = made("llama", embedding_bits=4, head_bits=8)
    for table in report.tables:
        weight = original.get_submodule(table.names[0]).weight
        rounded = model.get_submodule(table.names[0]).dequantize(torch.float32)
        assert table.error == pytest.approx(
            ((weight - rounded).square().sum() / weight.square().sum()).item(), rel=1e-4
        )
    four, eight = (t.error for t in report.tables)
    assert 0 < eight < 1e-4 < four < 0.02


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "cohere2"])
def test_the_quantised_stream_starts_from_the_packed_embedding_and_the_float_stream_from_the_float_one(
    family, monkeypatch
):
    original, firsts = build_model(family), {}
    real = block_module.quantize_block

    def watch(job, index, block):
        if index == 0:
            cpu = torch.device("cpu")
            firsts["float"], firsts["quantised"] = job.float_stream.get(0, cpu), job.quantized_stream.get(0, cpu)
            firsts["embedding"] = job.model.model.embed_tokens
        real(job, index, block)

    monkeypatch.setattr("hf_qep.engine.job.quantize_block", watch)
    made(family, embedding_bits=4)
    ids = build_batch(family, batch_size=8)["input_ids"][:4]
    assert torch.equal(firsts["float"], original.model.embed_tokens(ids))
    assert torch.equal(firsts["quantised"], firsts["embedding"](ids))
    assert not torch.equal(firsts["float"], firsts["quantised"])


def test_the_teacher_of_tuning_is_the_float_model(monkeypatch):
    teachers = {}
    real = job_module.take_teacher

    def watch(model, *args):
        teachers["tables"] = packed_tables(model)
        return real(model, *args)

    monkeypatch.setattr(job_module, "take_teacher", watch)
    _, report = made("llama", head_bits=4, embedding_bits=4, tune_epochs=1)
    assert teachers["tables"] == {} and len(report.tables) == 2
    assert all(math.isfinite(t.after) and t.after <= t.before for t in report.tuning)


def test_the_same_seed_gives_the_same_bytes():
    first, second = (state_of(quantized(build_model("qwen3"), embedding_bits=4)[0]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_plan_counts_the_bytes_of_the_tables(family, bits):
    head = None if family in TIED else bits
    model, _ = made(family, embedding_bits=bits, head_bits=head)
    recipe = QepConfig(method="rtn", embedding_bits=bits, head_bits=head)
    config = build_model(family).config
    plan = plan_output(config, recipe, model.dtype)
    found = bits_report(model)
    assert plan.tensors == found["weight_bytes"]
    assert plan.table_bytes * 8 == found["bits_tables"] * found["table_weights"]
    assert plan.bits_model == pytest.approx(found["bits_model"], rel=1e-9)


def test_a_scaled_word_embedding_keeps_its_scale():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 128}
    torch.manual_seed(0)
    model = tf.GemmaForCausalLM(tf.GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = build_batch("llama", batch_size=8)["input_ids"]
    original = copy.deepcopy(model)
    config = QepConfig(method="rtn", num_samples=8, seq_len=16, embedding_bits=8)
    quantize_model(model, config, Calibration({"input_ids": ids}, {}, "", ids.numel()))
    embedding, wanted = model.model.embed_tokens, original.model.embed_tokens(ids)
    assert embedding.embed_scale == 8.0
    assert (embedding(ids) - wanted).abs().max() < 0.01 * wanted.abs().max()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("vit", {"embedding_bits": 8}, "embedding_bits needs an embedding of tokens.*ViTPatchEmbeddings"),
        ("vit", {"head_bits": 8}, "head_bits needs an output head.*has none"),
        ("bert_classifier", {"head_bits": 4}, "head_bits needs an output head"),
        ("qwen3", {"embedding_bits": 4, "head_bits": 8}, "embedding_bits 4 and head_bits 8 contradict"),
        ("llama", {"head_bits": 4, "skip_modules": ["lm_head"]}, "skip_modules keeps `lm_head` float"),
        ("qwen3", {"embedding_bits": 4, "skip_modules": ["lm_head"]}, "skip_modules keeps `lm_head` float"),
    ],
)
def test_what_cannot_be_had_is_refused_before_any_work_by_the_plan_too(family, options, message, monkeypatch):
    model = build_model(family)
    before = state_of(model)
    with pytest.raises(ConfigError, match=message):
        quantized(model, **options) if family != "vit" else find_tables(model, QepConfig(**options))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    if family in ("llama", "qwen3"):
        with pytest.raises(ConfigError, match=message):
            plan_output(model.config, QepConfig(**options), model.dtype)


def test_tables_that_are_no_plain_tables_are_refused():
    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    model = build_model("llama")
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ConfigError, match=r"`model.embed_tokens` limits its rows to norm 1"):
        quantized(model, embedding_bits=8)
    model = build_model("llama")
    model.model.embed_tokens.__class__ = Shifted
    with pytest.raises(ConfigError, match="is a Shifted, which is no plain table"):
        quantized(model, embedding_bits=8)


def test_a_model_that_reads_the_weight_itself_is_refused():
    model = build_model("llama")
    forward = model.forward

    def scaled_by_its_head(**inputs):
        output = forward(**inputs)
        output.logits = output.logits / model.lm_head.weight.float().std()
        return output

    model.forward = scaled_by_its_head
    with pytest.raises(ArchitectureError, match="uses the weight of `lm_head` in another way"):
        quantized(model, head_bits=8)


def test_weights_that_are_not_finite_are_refused_with_the_name():
    model = build_model("llama")
    table = find_tables(model, QepConfig(embedding_bits=4))[0]
    model.model.embed_tokens.weight.data[3, 4] = math.inf
    with pytest.raises(NonFiniteError, match="`model.embed_tokens` holds weights that are not finite"):
        tables_module.quantize_tables(model, [table], build_batch("llama"), None)


@pytest.mark.parametrize(
    ("columns", "group"), [(4096, 128), (288, 48), (172, 43), (94, 47), (97, None), (64, 32), (8, None)]
)
def test_four_bits_have_scales_for_as_many_columns_as_the_width_allows(columns, group):
    config = tf.LlamaConfig(
        hidden_size=columns, num_hidden_layers=1, intermediate_size=8, vocab_size=8, num_attention_heads=1, head_dim=4
    )
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    assert [t.spec.group_size for t in find_tables(model, QepConfig(embedding_bits=4, head_bits=8))] == [group, None]
