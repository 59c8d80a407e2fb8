"""Who reads a norm, and nobody else does: what may be moved from one weight to its neighbour, by family.

A pass through a model does not show this, so it is a table of the families whose layers are written down here.
"""

from __future__ import annotations

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_ONE_AFTER_THE_OTHER = {"input_layernorm": _QKV, "post_attention_layernorm": _GATE_UP}

FEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": _ONE_AFTER_THE_OTHER,
    "mistral": _ONE_AFTER_THE_OTHER,
    "qwen2": _ONE_AFTER_THE_OTHER,
    "qwen3": _ONE_AFTER_THE_OTHER,
    "cohere2": {"input_layernorm": _QKV + _GATE_UP},
}
"""`model_type` -> norm of a layer -> all linears that read its output, which is proportional to its weight."""
FACTOR = ("mlp.up_proj", "mlp.down_proj")
"""In all of them: the output of the first is a factor of the input of the second."""
