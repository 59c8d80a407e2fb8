"""peft adapters on packed layers.

LoRA trains, saves and reloads on `QepLinear` as on any nn.Linear. What cannot work is adding its float update to packed
signs: `merge_adapter` dequantises first, and peft's own merge functions say so instead of failing on a tensor shape.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from hf_qep.errors import NotMergeableError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Dequantise the base model of `model`, merge the active adapters into it and return it: a plain float model.

    It needs the memory of the float model, and `model` must not be used afterwards.
    """
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        base.dequantize()
    return model.merge_and_unload()


def guard_merges() -> None:
    """Make peft's merge functions raise NotMergeableError for packed base layers.

    peft has no registry of quantised layers that a plugin could join; the one method all its merges ask beforehand is
    `BaseTuner._check_merge_allowed`.
    """
    tuner = sys.modules["peft.tuners.tuners_utils"].BaseTuner
    if getattr(tuner._check_merge_allowed, "_by_hf_qep", False):
        return
    check = tuner._check_merge_allowed

    @functools.wraps(check)
    def check_merge_allowed(self: Any) -> None:
        _refuse_packed(self.model)
        check(self)

    check_merge_allowed._by_hf_qep = True  # type: ignore[attr-defined]
    tuner._check_merge_allowed = check_merge_allowed


def _refuse_packed(model: Any) -> None:
    from hf_qep.modules import packed_modules

    packed = next((name for name in packed_modules(model) if name.endswith(".base_layer")), None)
    if packed is not None:
        raise NotMergeableError(
            f"an adapter cannot be merged into the packed weights of `{packed.removesuffix('.base_layer')}`; call "
            "hf_qep.merge_adapter(model), or model.dequantize() before merging"
        )
