"""Packed checkpoints of tiny models, one folder per family and run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.plugin.packing import logits, pack_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@dataclass(frozen=True)
class Packed:
    """A packed model as it was saved. Do not change the folder or the model."""

    folder: Path
    model: PreTrainedModel
    batch: dict[str, Tensor]
    logits: Tensor

    def difference(self, other: PreTrainedModel) -> float:
        """Largest difference to the logits of the model that was saved."""
        return (logits(other, self.batch) - self.logits).abs().max().item()


@pytest.fixture(scope="session")
def packed(
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_batch: Callable[..., dict[str, Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Packed]:
    """`packed(family)`: the saved checkpoint of a packed tiny model."""

    @cache
    def build(family: str) -> Packed:
        model = pack_model(tiny_model(family))
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        batch = tiny_batch(family)
        return Packed(folder, model, batch, logits(model, batch))

    return build


@pytest.fixture(autouse=True)
def no_warnings_about_ignored_configs() -> object:
    """transformers warns whenever loading options are given for a packed checkpoint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        yield
