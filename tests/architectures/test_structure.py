"""What describe says of particular families, what it refuses, and which entries of skip_modules it takes."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_qep.architectures.structure import describe
from hf_qep.errors import AlreadyQuantizedError, ArchitectureError, ConfigError

IDS = {"input_ids": torch.arange(32).reshape(2, 16) + 3}


class StackConfig(PreTrainedConfig):
    model_type = "test_stack"
    hidden_size = 16
    wiring = "chain"


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.gate, self.second = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, hidden_states):
        inner = self.first(hidden_states) * self.gate(hidden_states).sigmoid()
        return hidden_states + self.second(inner)


class Stack(PreTrainedModel):
    """A family that no table knows; `wiring` breaks the chain in one way or another."""

    config_class = StackConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(64, 16)
        self.stack = nn.ModuleList([Layer() for _ in range(3)])
        if config.wiring == "shared weight":
            self.stack[2].first.weight = self.stack[1].first.weight
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x, skip = self.embed(input_ids), 0
        for layer in self.stack:
            if self.config.wiring == "twice":
                layer(x)
            if self.config.wiring == "linear twice":
                layer.first(x)
            if self.config.wiring == "between":
                x = x + 1
            if self.config.wiring == "in place":
                x.mul_(2)
            x = {"output": x} if self.config.wiring == "dict" else x
            x = layer(x)
        return (x + skip,)


def stack(wiring="chain"):
    torch.manual_seed(0)
    return Stack(StackConfig(wiring=wiring)).eval()


def names(structure):
    return [[ref.name for ref in group.linears] for block in structure.blocks for group in block.groups]


def test_an_unknown_family_is_described_from_its_forward_pass():
    structure = describe(stack(), IDS)
    assert structure.family == "test_stack"
    assert [block.name for block in structure.blocks] == ["stack.0", "stack.1", "stack.2"]
    assert names(structure)[:2] == [["stack.0.first", "stack.0.gate"], ["stack.0.second"]]
    assert structure.skipped == {"embed": "input embeddings"}


@pytest.mark.parametrize(
    ("wiring", "reason"),
    [
        ("twice", r"`stack.0` is called 2 times"),
        ("between", r"the output of `stack.0` is not the input of `stack.1`"),
        ("in place", r"the output of `stack.0` is not the input of `stack.1`"),
        ("linear twice", r"`stack.0.first` is used twice"),
        ("shared weight", r"`stack.1.first.weight` and `stack.2.first.weight` are one tensor"),
        ("dict", r"cannot run the sample batch with input_ids"),
    ],
)
def test_a_model_that_is_no_chain_is_refused_with_the_reason(wiring, reason):
    with pytest.raises(ArchitectureError, match=reason):
        describe(stack(wiring), IDS)


def test_a_linear_that_is_used_twice_is_no_obstacle_once_it_is_skipped():
    structure = describe(stack("linear twice"), IDS, ["first"])
    assert names(structure)[:2] == [["stack.0.gate"], ["stack.0.second"]]
    assert structure.skipped["stack.0.first"] == "named in skip_modules"


def test_a_model_without_a_list_of_blocks_is_refused():
    class Flat(Stack):
        def __init__(self, config):
            super().__init__(config)
            self.stack = Layer()

        def forward(self, input_ids):
            return (self.stack(self.embed(input_ids)),)

    with pytest.raises(ArchitectureError, match="no chain of blocks"):
        describe(Flat(StackConfig()), IDS)


def test_blocks_that_share_state_behind_the_hidden_state_are_refused():
    config = tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(ArchitectureError, match="depends on more than the output of the block before it"):
        describe(tf.T5EncoderModel(config), IDS)


def test_an_encoder_decoder_model_is_refused():
    config = tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ArchitectureError, match="encoder-decoder"):
        describe(tf.T5ForConditionalGeneration(config), IDS)


def test_two_towers_are_refused_by_name():
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8}))
    with pytest.raises(ArchitectureError, match=r"text_model\.encoder\.layers, vision_model\.encoder\.layers"):
        describe(model, {**IDS, "pixel_values": torch.randn(2, 3, 16, 16)})


def test_a_quantised_model_is_refused():
    model = stack()
    model.stack[0].first.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.int32), requires_grad=False)
    with pytest.raises(AlreadyQuantizedError, match=r"`stack.0.first.weight` is torch.int32"):
        describe(model, IDS)


def test_weights_on_the_meta_device_are_refused():
    with pytest.raises(ArchitectureError, match="meta device"):
        describe(stack().to("meta"), IDS)


def test_a_module_whose_weight_is_read_by_other_code_is_skipped():
    class Reader(Stack):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for layer in self.stack:
                x = layer(x)
            return (x,)

    model = Reader(StackConfig())
    for layer in model.stack:
        layer.first.forward = None  # an own forward is never reached: its weight is used directly
        layer.forward = lambda h, layer=layer: (
            h + layer.second(nn.functional.linear(h, layer.first.weight) * layer.gate(h))
        )
    structure = describe(model, IDS)
    assert names(structure)[0] == ["stack.0.gate"]
    assert "no product" in structure.skipped["stack.0.first"]


@pytest.mark.parametrize(
    ("entry", "gone"),
    [
        ("down_proj", {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        ("model.layers.0.mlp", {f"model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")}),
        (r"model\.layers\.[01]\.self_attn\.o_proj", {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)}),
        ("lm_head", set()),
    ],
)
def test_skip_modules_takes_starts_patterns_and_ends_of_names(entry, gone, tiny_model, tiny_batch):
    model, batch = tiny_model("llama"), tiny_batch("llama")
    everything = {ref.name for ref in describe(model, batch).linears()}
    structure = describe(model, batch, [entry])
    assert everything - {ref.name for ref in structure.linears()} == gone
    assert {name for name, reason in structure.skipped.items() if reason == "named in skip_modules"} == gone


@pytest.mark.parametrize("entry", ["down_porj", "layers.0", "("])
def test_an_entry_of_skip_modules_that_matches_nothing_is_named(entry, tiny_model, tiny_batch):
    with pytest.raises(ConfigError) as caught:
        describe(tiny_model("llama"), tiny_batch("llama"), ["o_proj", entry])
    assert f"`{entry}`" in str(caught.value)


def test_an_unknown_entry_of_skip_modules_gets_the_nearest_name(tiny_model, tiny_batch):
    with pytest.raises(ConfigError, match="did you mean `down_proj`"):
        describe(tiny_model("llama"), tiny_batch("llama"), ["down_porj"])


def test_skipping_everything_is_refused(tiny_model, tiny_batch):
    with pytest.raises(ArchitectureError, match="nothing is left to quantise"):
        describe(tiny_model("llama"), tiny_batch("llama"), ["model.layers"])


def test_experts_are_listed_slice_by_slice_and_exempt_even_without_tokens(tiny_model, tiny_batch):
    model = tiny_model("qwen3_moe")
    structure = describe(model, {"input_ids": torch.full((1, 1), 5)})  # one token: two experts of four
    for block in structure.blocks:
        gate_up, down = block.groups[2:]
        assert [ref.expert for ref in gate_up.linears] == [0, 1, 2, 3]
        assert [(ref.out_features, ref.in_features) for ref in down.linears] == [(64, 48)] * 4
        assert "router" in gate_up.exempt and "router" in down.exempt
        assert block.groups[0].exempt is None
        assert "router" in structure.skipped[f"{block.name}.mlp.gate"]


def test_of_a_vision_language_model_only_the_language_model_is_quantised(tiny_model, tiny_batch):
    structure = describe(tiny_model("cohere2_vision"), tiny_batch("cohere2_vision"))
    assert {block.name for block in structure.blocks} == {f"model.language_model.layers.{i}" for i in range(3)}
    assert structure.skipped["model.vision_tower"] == "outside the language model"
    assert structure.skipped["model.multi_modal_projector"] == "outside the language model"
    assert structure.skipped["lm_head"] == "output embeddings, tied to the input embeddings"


def test_heads_and_embeddings_stay_float_with_a_reason(tiny_model, tiny_batch):
    skipped = describe(tiny_model("bert_classifier"), tiny_batch("bert_classifier")).skipped
    assert set(skipped) == {"bert.embeddings", "bert.pooler", "classifier"}
    assert describe(tiny_model("vit"), tiny_batch("vit")).skipped == {"classifier": "outside the chain of blocks"}


DECODER = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {**DECODER, **HEADS, "num_key_value_heads": 2}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
QKV = ["q_proj", "k_proj", "v_proj"]
GATED = [QKV, ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
OTHERS = {
    "Mistral": (tf.MistralForCausalLM, tf.MistralConfig(**SMALL, sliding_window=6), GATED),
    "Gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config(**SMALL, **SLIDING), GATED),
    "Gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**SMALL, **SLIDING), GATED),
    "Phi": (tf.PhiForCausalLM, tf.PhiConfig(**SMALL), [[*QKV, "fc1"], ["dense"], ["fc2"]]),
    "OPT": (
        tf.OPTForCausalLM,
        tf.OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, **HEADS),
        [QKV, ["out_proj"], ["fc1"], ["fc2"]],
    ),
    "GPT-NeoX": (
        tf.GPTNeoXForCausalLM,
        tf.GPTNeoXConfig(**DECODER, **HEADS),
        [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    ),
    "DistilBERT": (
        tf.DistilBertForMaskedLM,
        tf.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
        [["q_lin", "k_lin", "v_lin"], ["out_lin"], ["lin1"], ["lin2"]],
    ),
    "Falcon": (  # multiplies by weight.T instead of calling functional.linear; returns tuples
        tf.FalconForCausalLM,
        tf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, **HEADS),
        [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],
    ),
    "Mixtral": (
        tf.MixtralForCausalLM,
        tf.MixtralConfig(**SMALL, num_local_experts=3),
        [QKV, ["o_proj"], ["gate_up_proj"] * 3, ["down_proj"] * 3],
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_transformers_families_need_no_table(family):
    model_class, config, expected = OTHERS[family]
    torch.manual_seed(0)
    structure = describe(model_class(config), IDS)
    assert len(structure.blocks) == 2
    for block in structure.blocks:
        assert [[ref.name.rpartition(".")[2] for ref in g.linears] for g in block.groups] == expected
