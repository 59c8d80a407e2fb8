"""`QepServingConfig`: what vLLM asks a quantisation config of method "qep".

vLLM has names of its own for modules: it fuses some (`qkv_proj` of `q_proj`, `k_proj` and `v_proj`), and builds some
models under other prefixes. What it calls `prefix` is matched with the names in `layers` through the mappings that
vLLM's model classes give.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from hf_qep.config import QepConfig
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.kernels.dispatch import EXACT
from hf_qep.registry import FORMATS
from hf_qep.vllm_plugin.interface import layers, quantisation
from hf_qep.vllm_plugin.linear import linear_method
from hf_qep.vllm_plugin.tables import float_head_method, serve_every_table, table_method

METHOD = "qep"
MIN_CAPABILITY = 80
"""Of the Triton kernels: bfloat16 and tf32."""
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What vLLM fuses in most models, for those that do not say so."""
HEAD = "lm_head"
"""What the families that vLLM serves call an output head."""
BASE = "model."
"""Prefix that a checkpoint has or lacks depending on the class that saved it."""


class _ServingConfig:
    """See the file; vLLM's base class is added by `config_class`."""

    def __init__(self, config: QepConfig) -> None:
        super().__init__()
        self.config = config
        self.specs: dict[str, Any] = config.layer_specs()
        """Name of a module, in the checkpoint's or in vLLM's words -> its spec."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        serve_every_table(is_ours)  # vLLM sends configs to processes of its own

    def get_name(self) -> str:
        """Name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that the kernels take."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of an NVIDIA GPU."""
        return MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None besides config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Of `quantization_config` in config.json.

        Raises FormatVersionError for a newer checkpoint, CheckpointError for one without `layers`, ConfigError for
        packed experts.
        """
        parsed = QepConfig(**config)
        if not parsed.layers:
            raise CheckpointError(
                "the quantization config lists no `layers`: this is a recipe, not a packed checkpoint; quantise the "
                "model first (hf-qep quantize) and serve the folder that writes"
            )
        experts = [name for name in parsed.layer_specs() if "experts" in name.split(".")]
        if experts:
            raise ConfigError(
                f"`{experts[0]}` is a packed stack of experts, which this plugin does not serve with vLLM; quantise "
                "with these modules in skip_modules, or use transformers"
            )
        serve_every_table(is_ours)
        return cls(parsed)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Know the modules by the names that a model of vLLM gives them, too."""
        end = ".weight"  # mappings are written for names of tensors
        for name, spec in list(self.specs.items()):
            mapped = hf_to_vllm_mapper.map_name(name + end)
            if mapped is not None and mapped.endswith(end):
                self.specs[mapped.removesuffix(end)] = spec

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Method of a layer, or None where vLLM's own serves (attention, norms, float embeddings).

        Raises ConfigError for a layer that is listed and cannot be served.
        """
        known = layers()
        if isinstance(layer, known.LinearBase):
            return self._linear(prefix)
        if isinstance(layer, known.VocabParallelEmbedding):
            return self._table(prefix, isinstance(layer, known.ParallelLMHead))
        if (spec := self._spec(prefix)) is not None:
            raise ConfigError(
                f"`{prefix}` is packed in format `{spec.format}`, and this plugin serves no {type(layer).__name__}"
            )
        return None

    def _linear(self, prefix: str) -> Any:
        names = [prefix] if self._spec(prefix) is not None else self._members(prefix)
        specs = {name: self._spec(name) for name in names}
        if all(spec is None for spec in specs.values()):
            return layers().UnquantizedLinearMethod()
        return linear_method()(prefix, specs, self._activation())

    def _members(self, prefix: str) -> list[str]:
        """Modules that vLLM has fused to this one, or the one itself."""
        parent, _, leaf = prefix.rpartition(".")
        members = self.packed_modules_mapping.get(leaf) or FUSED.get(leaf) or [leaf]
        return [f"{parent}.{member}" if parent else member for member in members]

    def _table(self, prefix: str, is_head: bool) -> Any:
        name = prefix or self._only_table(is_head)
        if (spec := self._spec(name)) is not None:
            return table_method()(name, spec, self._activation())
        return float_head_method()() if is_head else None

    def _only_table(self, is_head: bool) -> str:
        """The listed table that an embedding or head of vLLM without a name must be; "" if there is none."""
        tables = [name for name, spec in self.config.layer_specs().items() if _is_table(spec)]
        found = [name for name in tables if (name.rpartition(".")[2] == HEAD) == is_head]
        if len(found) > 1:
            raise ConfigError(f"vLLM builds a table without a name, and the config lists {', '.join(found)}")
        return found[0] if found else ""

    def _spec(self, name: str) -> Any:
        """Spec of a module under its name, with or without the prefix of the base model; None if it is float."""
        for candidate in (name, BASE + name, name.removeprefix(BASE)):
            if candidate in self.specs:
                return self.specs[candidate]
        return None

    def _activation(self) -> str:
        return self.config.activation or EXACT


def _is_table(spec: Any) -> bool:
    return hasattr(FORMATS.get(spec.format), "rows")


def is_ours(config: Any) -> bool:
    """Whether a quantisation config of vLLM is of this method."""
    return isinstance(config, _ServingConfig)


@cache
def config_class() -> type:
    """The class that vLLM gets; vLLM pickles its objects, so they must be found under this name in the package.

    Raises as `interface.quantisation` does.
    """
    names = {"__module__": "hf_qep.vllm_plugin", "__qualname__": "QepServingConfig", "__doc__": __doc__}
    return type("QepServingConfig", (_ServingConfig, quantisation().QuantizationConfig), names)
