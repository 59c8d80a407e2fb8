"""The hooks that transformers calls while it loads, saves and trains a model of method "qep".

Hooks only: what they do lives in `conversion` (checkpoints) and `engine` (quantising a float model after it is loaded).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer

from hf_qep.config import QepConfig
from hf_qep.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform


class QepHfQuantizer(HfQuantizer):
    """Quantizer of method "qep".

    Packed checkpoint: linears are replaced on meta tensors, the files are checked against them by header, then
    transformers loads as usual. Float checkpoint: loaded whole, then quantised in place by the engine.
    """

    requires_calibration = False
    quantization_config: QepConfig

    def __init__(self, quantization_config: QepConfig, **kwargs: Any) -> None:
        # A copy: transformers hands over the user's own object, which may be used for the next model as well.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._files: list[str] | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ConfigError for placements that cannot work."""
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        config = self.quantization_config
        if "disk" in places and (config.dequantize or config.trainable_scales or not self.pre_quantized):
            doing = "dequantising or training" if self.pre_quantized else "quantising while loading"
            raise ConfigError(
                f"{doing} needs all weights in memory, but the device map puts some on disk; load on one device, "
                "or quantise to a folder with `hf-qep quantize` and load that"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from hf_qep import conversion

        if self.pre_quantized:
            conversion.swap_modules(model, self.quantization_config)
            self._files = checkpoint_files

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Keep the family's own converters off packed experts; then check the files, whose names are now known."""
        from hf_qep import conversion

        transforms = conversion.packed_transforms(model, weight_conversions)
        if self._files is not None:
            conversion.check_files(model, self._files, transforms)
        return transforms

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from hf_qep import conversion

        config = self.quantization_config
        if not self.pre_quantized:
            from hf_qep.on_the_fly import quantize_loaded

            quantize_loaded(model, config)
            model.hf_quantizer.quantization_config.trainable_scales = config.trainable_scales
        elif self._files is None:
            conversion.check_loaded(model)
        if self.pre_quantized and config.dequantize:
            conversion.dequantize_modules(model, model.config.dtype)
            return
        conversion.finish_loading(model, config, mapped=self._files is not None)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        import torch

        from hf_qep import conversion

        if isinstance(dtype, str):  # what save_pretrained leaves in the config of the model
            dtype = getattr(torch, dtype)
        conversion.dequantize_modules(model, dtype or model.dtype)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Tensors in their stored dtypes: scales that train are float32 in memory."""
        from hf_qep import conversion

        return (conversion.stored_state(model) if self.quantization_config.trainable_scales else None), {}

    def is_serializable(self) -> bool:
        """Always: safetensors with packed signs."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top of packed layers."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without adapters only scales train, and only when the user asked for it."""
        return bool(self.quantization_config.trainable_scales)

    @property
    def is_compileable(self) -> bool:
        """torch.compile traces packed layers without graph breaks."""
        return True
