"""The exported file is the checkpoint: every weight, every fact, and, through other readers, every logit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qep.errors import CheckpointError, ExportError, OutputExistsError
from hf_qep.export.blocks import signs_from_blocks
from hf_qep.export.check import compare_facts, open_gguf
from hf_qep.export.gguf_file import check_gguf, export_gguf
from hf_qep.formats import factored, sign
from hf_qep.reader import Checkpoint
from tests.export.conftest import COHERE2, LLAMA3, YARN, pack_table

gguf = pytest.importorskip("gguf", reason="needs the package gguf, which `make install` brings")

TEXT = "The old man opened the door, and"
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
NAMES |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
NAMES |= {"mlp.down_proj": "ffn_down"}


def tensors_of(path: Path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("family", "group"),
    [("llama", 128), ("llama", None), ("mistral", 128), ("qwen2", 128), ("qwen3", 128), ("cohere2", 128)],
)
def test_weights_of_the_file_are_those_of_the_checkpoint(checkpoint, tmp_path, family, group):
    model, folder = checkpoint(family, sign.Spec(group_size=group))
    report = export_gguf(folder, tmp_path / "m.gguf")
    tensors, ours = tensors_of(tmp_path / "m.gguf"), Checkpoint(folder)
    assert not report.lost and report.bits_linear == 1.125
    assert report.file_bytes == (tmp_path / "m.gguf").stat().st_size
    assert len(ours.modules) == 14
    for module in ours.modules:
        _, _, layer, name = module.split(".", 3)
        found = tensors[f"blk.{layer}.{NAMES[name]}.weight"]
        assert found.tensor_type.name == "Q1_0"
        dense = signs_from_blocks(found.data)
        if family in ("llama", "mistral") and name in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = 4 if name == "self_attn.q_proj" else 2  # back to the order of transformers
            dense = dense.reshape(heads, 16, 2, -1).swapaxes(1, 2).reshape(dense.shape)
        columns = 256 if name == "mlp.down_proj" else 128
        assert np.array_equal(dense, ours.dequantize(module, columns=columns)), module
        assert np.array_equal(dense, model.get_submodule(module).dequantize(torch.float32).numpy()), module
    embedding = tensors["token_embd.weight"]
    assert embedding.tensor_type.name == "BF16"
    stored = model.get_input_embeddings().weight.detach()
    assert np.array_equal(embedding.data.view(np.uint16), stored.view(torch.uint16).numpy())
    assert check_gguf(tmp_path / "m.gguf", folder).differs == []


@pytest.fixture
def with_q1_0(monkeypatch):
    """The `gguf` package makes blocks of all types dense but this one; transformers asks it to."""
    official = gguf.dequantize

    def dequantize(data, kind):
        return signs_from_blocks(data) if kind.name == "Q1_0" else official(data, kind)

    monkeypatch.setattr(gguf, "dequantize", dequantize)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),  # the only size that its reader knows of this family
    ],
    ids=["llama", "llama, tied, no groups of heads", "mistral", "qwen2", "qwen3"],
)
def test_transformers_reads_the_same_model_from_the_file(checkpoint, tmp_path, with_q1_0, family, options):
    """Its reader of GGUF files knows these families, but not cohere2: names, order of rows, numbers and tokens."""
    _, folder = checkpoint(family, **options)
    export_gguf(folder, tmp_path / "m.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    assert tokenizer(TEXT).input_ids == ids[0].tolist()
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, own(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "group", "kind"), [(8, 32, "Q8_0"), (8, None, "Q8_0"), (4, 64, "Q4_0")])
def test_tables_of_whole_numbers_stay_whole_numbers(checkpoint, tmp_path, bits, group, kind):
    model, folder = checkpoint("llama")
    model, tables = type(model).from_pretrained(folder), ("model.embed_tokens", "lm_head")
    for name in tables:
        pack_table(model, name, bits, group)
    model.config.quantization_config.set_layers(
        {n: m.spec for n, m in model.named_modules() if hasattr(m, "spec") and hasattr(m, "format")}
    )
    model.save_pretrained(tmp_path / "m")
    for path in folder.glob("*token*"):
        (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    report = export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    tensors, ours = tensors_of(tmp_path / "m.gguf"), Checkpoint(tmp_path / "m")
    for name, module in zip(("token_embd", "output"), tables, strict=True):
        found = tensors[f"{name}.weight"]
        assert found.tensor_type.name == kind
        dense = gguf.dequantize(found.data, found.tensor_type)
        assert np.array_equal(dense, ours.dequantize(module, columns=128))
    assert report.parts[kind]["tensors"] == 2


def test_column_scales_are_refused_with_what_they_cost_unless_accepted(checkpoint, tmp_path):
    _, folder = checkpoint("cohere2", sign.Spec(group_size=128, column_scale=True))
    # All readers of a norm have the same scales in this checkpoint, and down_proj has up_proj: only o_proj has nobody.
    with pytest.raises(
        ExportError, match=r"layers have column scales .*`model.layers.0.*o_proj` 0\.\d\d%.*--export gguf"
    ):
        export_gguf(folder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []
    report = export_gguf(folder, tmp_path / "m.gguf", approximate=True)
    assert {f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)} <= set(report.lost)
    assert not [name for name in report.lost if "q_proj" in name or "gate_proj" in name]
    assert report.folded == ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"]
    assert max(report.lost.values()) < 0.01
    assert check_gguf(tmp_path / "m.gguf", folder).differs == []


def test_a_bias_of_up_takes_what_its_rows_take(checkpoint, tmp_path):
    model, folder = checkpoint("llama", sign.Spec(group_size=128, column_scale=True), mlp_bias=True)
    export_gguf(folder, tmp_path / "m.gguf", approximate=True)
    found, layer = tensors_of(tmp_path / "m.gguf"), model.model.layers[0].mlp
    scales = layer.down_proj.state_dict()["column_scale"].float()
    assert np.array_equal(found["blk.0.ffn_up.bias"].data, (layer.up_proj.bias.float() * scales).detach().numpy())
    assert np.array_equal(found["blk.0.ffn_gate.bias"].data, layer.gate_proj.bias.float().detach().numpy())


def test_facts_of_the_families(checkpoint, tmp_path):
    def facts(family, **options):
        export_gguf(checkpoint(family, **options)[1], tmp_path / "m.gguf", overwrite=True)
        return {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}

    found = facts("cohere2")
    assert found["general.architecture"] == "cohere2"
    assert found["cohere2.logit_scale"] == 0.25
    assert found["cohere2.attention.sliding_window"] == 8
    assert found["cohere2.attention.sliding_window_pattern"] == [True, False]
    assert found["cohere2.attention.layer_norm_epsilon"] == np.float32(1e-5)
    assert (found["cohere2.block_count"], found["cohere2.context_length"]) == (2, 256)
    assert (found["cohere2.attention.head_count"], found["cohere2.attention.head_count_kv"]) == (4, 2)
    found = facts("qwen3", rope_parameters=YARN)
    assert (found["qwen3.rope.scaling.type"], found["qwen3.rope.scaling.factor"]) == ("yarn", 4.0)
    assert found["qwen3.rope.scaling.original_context_length"] == 64
    assert found["qwen3.attention.key_length"] == 32


def test_llama3_frequencies_are_those_of_transformers(checkpoint, tmp_path):
    model, folder = checkpoint("llama", rope_parameters=LLAMA3)
    export_gguf(folder, tmp_path / "m.gguf")
    factors = tensors_of(tmp_path / "m.gguf")["rope_freqs.weight"].data
    plain = 10000.0 ** (-np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.float().numpy(), rtol=1e-2)
    assert factors[0] == 1 and factors[-1] == pytest.approx(8)


def test_what_llama_cpp_does_not_have_is_refused(checkpoint, tmp_path):
    def refused(match, family="llama", spec=sign.Spec(group_size=128), names=None, **options):  # noqa: B008, a value
        with pytest.raises(ExportError, match=match):
            export_gguf(checkpoint(family, spec, names, **options)[1], tmp_path / "m.gguf")
        assert list(tmp_path.iterdir()) == []

    refused('`factored`.*method="sign", export="gguf"', spec=factored.Spec(24))
    refused(r'scale for every 32 columns.*export="gguf"', spec=sign.Spec(group_size=32))
    refused("192 columns", intermediate_size=192, spec=sign.Spec())
    refused("sliding windows", family="mistral", sliding_window=8)
    refused("heads of 4 x 16", family="cohere2", head_dim=16, names=["model.layers.0.mlp.up_proj"])
    refused("biases in the attention of cohere2", family="cohere2", attention_bias=True)
    refused("'dynamic'", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    refused("activation 'gelu'", hidden_act="gelu")


def test_another_family_a_float_model_and_a_file_in_the_way(checkpoint, tmp_path, tiny_model):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ExportError, match="'GPT2LMHeadModel' cannot be exported to GGUF; .* llama, mistral"):
        export_gguf(tmp_path / "gpt2", tmp_path / "m.gguf")
    tiny_model("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match="quantization"):
        export_gguf(tmp_path / "float", tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="'config.json' is missing"):
        export_gguf(tmp_path / "nowhere", tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(OutputExistsError):
        export_gguf(checkpoint("llama")[1], tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_config_or_checkpoint_that_lacks_something_is_refused(checkpoint, tmp_path):
    _, folder = checkpoint("llama")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rms_norm_eps"}))
    with pytest.raises(ExportError, match="says nothing about 'rms_norm_eps'"):
        export_gguf(tmp_path, tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        left = {key: value for key, value in tensors.items() if key != name}
        save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="holds no tensor for"):
            export_gguf(tmp_path, tmp_path / "m.gguf")
    save_file(
        tensors | {"model.extra.weight": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ExportError, match="no place for `model.extra.weight`"):
        export_gguf(tmp_path, tmp_path / "m.gguf")


def test_linears_that_stayed_float_keep_their_type(checkpoint, tmp_path):
    packed = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    model, folder = checkpoint("llama", names=packed, dtype="float16")
    export_gguf(folder, tmp_path / "m.gguf")
    tensors = tensors_of(tmp_path / "m.gguf")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.1.attn_q.weight"]) == ("Q1_0", "Q1_0")
    assert (kinds["blk.0.attn_q.weight"], kinds["output.weight"], kinds["output_norm.weight"]) == ("F16", "F16", "F32")
    stored = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    turned = stored.reshape(4, 2, 16, 128).swapaxes(1, 2).reshape(128, 128)
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data, turned)


def test_a_file_of_another_model_differs_in_every_way(checkpoint, tmp_path):
    export_gguf(checkpoint("cohere2")[1], tmp_path / "m.gguf")
    other = checkpoint("cohere2", layer_types=["full_attention", "sliding_attention"], intermediate_size=128)[1]
    differs = "\n".join(check_gguf(tmp_path / "m.gguf", other).differs)
    assert "'blk.0.ffn_up.weight' is Q1_0 (256, 128), not Q1_0 (128, 128)" in differs
    assert "cohere2.attention.sliding_window_pattern is [True, False], not [False, True]" in differs
    assert "cohere2.feed_forward_length is 256, not 128" in differs
    assert COHERE2["layer_types"][0] == "sliding_attention"


def test_facts_that_were_added_or_changed_are_found(checkpoint, tmp_path):
    _, folder = checkpoint("llama")
    export_gguf(folder, tmp_path / "m.gguf")
    good = (tmp_path / "m.gguf").read_bytes()

    def found(old, new):
        (tmp_path / "bad.gguf").write_bytes(good.replace(old, new, 1))
        return check_gguf(tmp_path / "bad.gguf", folder).differs

    assert found(b"hf_qep.method", b"hf_qep.mechod") == [
        "hf_qep.mechod is 'sign', and should not be there",
        "hf_qep.method is None, not 'sign'",
    ]
    assert "llama.rope.freq_bose" in found(b"llama.rope.freq_base", b"llama.rope.freq_bose")[0]
    assert found(b"general.quantized_by", b"general.quantized_xy") == []


def test_one_flipped_bit_anywhere_in_the_weights_is_found(checkpoint, tmp_path):
    _, folder = checkpoint("qwen3")
    export_gguf(folder, tmp_path / "m.gguf")
    good, tensors = (tmp_path / "m.gguf").read_bytes(), tensors_of(tmp_path / "m.gguf")
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output_norm.weight"):
        at = tensors[name].data_offset + tensors[name].n_bytes // 2
        (tmp_path / "bad.gguf").write_bytes(good[:at] + bytes([good[at] ^ 64]) + good[at + 1 :])
        (found,) = check_gguf(tmp_path / "bad.gguf", folder).differs
        assert name in found


def test_a_damaged_file_is_an_error_and_never_an_endless_one(checkpoint, tmp_path):
    _, folder = checkpoint("qwen3")
    export_gguf(folder, tmp_path / "m.gguf")
    good, path = (tmp_path / "m.gguf").read_bytes(), tmp_path / "bad.gguf"
    head = tensors_of(tmp_path / "m.gguf")["token_embd.weight"].data_offset
    seed = np.random.default_rng(0)
    facts = gguf.GGUFReader(tmp_path / "m.gguf").fields
    for _ in range(12):
        path.write_bytes(good[: seed.integers(0, len(good))])
        with pytest.raises(CheckpointError, match="no whole GGUF file"):
            open_gguf(path)
    huge = good[:8] + (2**62).to_bytes(8, "little") * 2 + good[24:]
    for damaged in (b"", b"GGUF", b"junk" * 100, huge):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no whole GGUF file"):
            check_gguf(path, folder)
    for _ in range(20):
        at = int(seed.integers(0, head))
        path.write_bytes(good[:at] + seed.bytes(8) + good[at + 8 :])
        try:
            compare_facts(open_gguf(path), dict.fromkeys(facts, "other"))
        except CheckpointError as error:
            assert "no whole GGUF file" in str(error)
    with pytest.raises(CheckpointError, match="is no file"):
        check_gguf(tmp_path / "none.gguf", folder)


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, tmp_path):
    _, folder = checkpoint("llama")
    for name in ("a", "b"):
        export_gguf(folder, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_is_not_what_was_meant_is_not_kept(checkpoint, tmp_path, monkeypatch):
    _, folder = checkpoint("llama")
    wrong = lambda matrix, kind: np.zeros((len(matrix.octets), matrix.columns // 128 * 18), np.uint8)  # noqa: E731
    monkeypatch.setattr("hf_qep.export.tensors.to_blocks", wrong)
    with pytest.raises(CheckpointError, match="is not the checkpoint: .*nothing was kept"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_where_the_model_comes_from_is_in_the_file(checkpoint, tmp_path):
    _, folder = checkpoint("llama")
    (tmp_path / "m").mkdir()
    for path in folder.iterdir():
        (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "m" / "hf_qep_manifest.json").write_text(json.dumps({"base_model": "acme/large"}))
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.base_model.0.name"].contents() == "acme/large"
    assert fields["general.file_type"].contents() == 40
