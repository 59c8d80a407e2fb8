"""Fixtures of every room. The environment is set before transformers or huggingface_hub is first imported."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny_models import FAMILIES, build_batch, build_model, build_tokenizer

__all__ = ["FAMILIES"]

# The same examples in every run; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("search")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

torch.set_num_threads(1)  # tiny models gain nothing from a second thread and lose when the machine is busy


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """What a test did to the number of threads ends with it: a job is only resumed with as many as it began with."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], PreTrainedModel]:
    """`tiny_model(family)`: a fresh copy per call, equal weights every time; tests may change it."""
    built = cache(build_model)
    return lambda family: copy.deepcopy(built(family))


@pytest.fixture(scope="session")
def tiny_batch() -> Callable[..., dict[str, Tensor]]:
    """`tiny_batch(family, seed=0, batch_size=2, length=16)`: forward keyword arguments."""
    return build_batch


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Character tokenizer with bos, eos, pad and a chat template; do not change it."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real data and models (HF_QEP_SHARED, default `shared` beside the repository); skips if absent."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("HF_QEP_SHARED", default))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data: {folder} has no `data` folder; set HF_QEP_SHARED to run this test")
    return folder
