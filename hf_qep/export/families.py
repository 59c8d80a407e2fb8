"""Model families that llama.cpp knows too: how it calls them, and what it must be told about one.

A family is a row of FAMILIES. What a row cannot say about a configuration is refused, so that no file is written whose
model would be another one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_qep.errors import ExportError
from hf_qep.extras import require

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp."""

    architecture: str
    """Name in the files, and in upper case in the `gguf` package."""
    eps: tuple[str, str] = ("rms_norm_eps", "add_layer_norm_rms_eps")
    """Name in the configuration, and method of the writer."""
    pairs_side_by_side: bool = False
    """Whether llama.cpp turns neighbouring rows of a head where transformers turns those half a head apart."""
    head_is_embedding: bool = False
    """Whether llama.cpp knows no head of its own."""
    facts: Callable[[dict[str, Any], Any], None] = lambda config, writer: None
    """Adds what this family alone has; raises ExportError for what llama.cpp cannot do."""


def _cohere2(config: dict[str, Any], writer: Any) -> None:
    size = head_size(config)
    if config["num_attention_heads"] * size != config["hidden_size"]:
        _refuse(f"heads of {config['num_attention_heads']} x {size} that are not as wide as the model")
    if config.get("attention_bias"):
        _refuse("biases in the attention of cohere2")
    kinds = config.get("layer_types") or []
    if len(kinds) != config["num_hidden_layers"] or set(kinds) - {"sliding_attention", "full_attention"}:
        _refuse(f"layers of the kinds {sorted(set(kinds))}")
    writer.add_logit_scale(float(config["logit_scale"]))
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])


def _everywhere_full(config: dict[str, Any], writer: Any) -> None:
    kinds = config.get("layer_types") or []
    slides = "sliding_attention" in kinds if kinds else config.get("sliding_window") is not None
    if slides and config.get("use_sliding_window", True):
        _refuse("sliding windows in this family")


def _refuse(what: str) -> None:
    raise ExportError(f"llama.cpp does not know {what}; this model cannot be exported to it")


FAMILIES = {
    "llama": Family("llama", pairs_side_by_side=True, facts=_everywhere_full),
    "mistral": Family("llama", pairs_side_by_side=True, facts=_everywhere_full),
    "qwen2": Family("qwen2", facts=_everywhere_full),
    "qwen3": Family("qwen3", facts=_everywhere_full),
    "cohere2": Family(
        "cohere2",
        eps=("layer_norm_eps", "add_layer_norm_eps"),
        head_is_embedding=True,
        facts=_cohere2,
    ),
}
"""`model_type` of transformers -> family."""


class Facts(dict[str, Any]):
    """config.json as a dictionary that says what it lacks. Raises ExportError for a missing key."""

    def __missing__(self, key: str) -> Any:
        raise ExportError(f"config.json says nothing about {key!r}, which llama.cpp must be told")


def family_of(config: dict[str, Any]) -> Family:
    """The family of a model's configuration. Raises ExportError if it is not one of FAMILIES."""
    kind, known = config.get("model_type"), ", ".join(FAMILIES)
    if kind not in FAMILIES or not str((config.get("architectures") or [""])[0]).endswith("ForCausalLM"):
        raise ExportError(
            f"{(config.get('architectures') or [kind])[0]!r} cannot be exported to GGUF; language models of the "
            f"families {known} can"
        )
    family = FAMILIES[kind]
    if family.head_is_embedding and not config.get("tie_word_embeddings", True):
        _refuse(f"a head of its own in {kind}")
    if config.get("hidden_act", "silu") != "silu":
        _refuse(f"the activation {config['hidden_act']!r} in {kind}")
    return family


def head_size(config: dict[str, Any]) -> int:
    """Width of an attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def columns_of(config: dict[str, Any], module: str) -> int:
    """Input width of a quantised module, which a checkpoint does not always store."""
    if module.endswith("mlp.down_proj"):
        return config["intermediate_size"]
    if module.endswith("self_attn.o_proj"):
        return config["num_attention_heads"] * head_size(config)
    return config["hidden_size"]


def turned_heads(config: dict[str, Any], family: Family, module: str) -> int | None:
    """Heads whose rows change their order on the way to llama.cpp, or None if the rows of a module stay as they are."""
    keys = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
    found = _IN_LAYER.fullmatch(module)
    if not family.pairs_side_by_side or found is None or found[2] not in keys:
        return None
    return config.get(keys[found[2]]) or config["num_attention_heads"]


def add_facts(config: dict[str, Any], family: Family, writer: Any) -> None:
    """Tell a `gguf.GGUFWriter` the sizes and numbers of a model. Raises ExportError."""
    heads, size = config["num_attention_heads"], head_size(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config["vocab_size"])
    key, method = family.eps
    getattr(writer, method)(float(config[key]))
    _add_rope(config, size, writer)
    family.facts(config, writer)


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding as transformers 5 writes it, from either of the two ways in which configurations do."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_type", found.pop("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return found


def _add_rope(config: dict[str, Any], size: int, writer: Any) -> None:
    scaling = require("gguf", "gguf").RopeScalingType
    rope = rope_parameters(config)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse("rotary embeddings of a part of each head in this family")
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(scaling.LINEAR if kind == "linear" else scaling.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        _add_yarn(config, rope, writer)
    elif kind == "default":
        writer.add_rope_scaling_type(scaling.NONE)
    elif kind not in ("linear", "llama3"):
        _refuse(f"rotary embeddings of the kind {kind!r} as this export would write them")


def _add_yarn(config: dict[str, Any], rope: dict[str, Any], writer: Any) -> None:
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    if unknown := sorted(set(rope) - known):
        _refuse(f"the options {unknown} of yarn")
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(int(original))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """float32 (head size / 2,): what llama.cpp divides each rotary frequency by, or None if there is nothing to divide.

    As transformers computes them for rope type `llama3`.
    """
    if rope_parameters(config)["rope_type"] != "llama3":
        return None
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    whole = AutoConfig.for_model(config["model_type"], **given)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](whole, torch.device("cpu"))
    size = head_size(config)
    plain = rope_parameters(config)["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / frequencies.double()).float().numpy()
