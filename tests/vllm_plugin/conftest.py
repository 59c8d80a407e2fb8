"""vLLM, imitated or real: every test of the plugin runs against both, the real one where it can be imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from hf_qep.vllm_plugin import config, interface, linear, tables
from tests.vllm_plugin import checkpoints, imitation

LAYERS = "vllm.model_executor.layers"
CACHES = (
    interface.quantisation,
    interface.layers,
    linear.linear_method,
    tables.table_method,
    tables.float_head_method,
    config.config_class,
)


class Backend:
    """One vLLM: its modules, and the place of this process in the tensor parallel group."""

    def __init__(self, patch: pytest.MonkeyPatch, real: bool) -> None:
        self.patch, self.real = patch, real
        self.linear = importlib.import_module(f"{LAYERS}.linear")
        self.tables = importlib.import_module(f"{LAYERS}.vocab_parallel_embedding")
        self.quantization = importlib.import_module(f"{LAYERS}.quantization")
        self.utils = importlib.import_module("vllm.model_executor.models.utils")
        if real:  # tests add the shares of the ranks themselves
            for module in (self.linear, self.tables):
                patch.setattr(module, "tensor_model_parallel_all_reduce", lambda x: x)
        self.oot = importlib.import_module("vllm.model_executor.custom_op").op_registry_oot

    @contextmanager
    def at(self, rank: int, size: int, quant_config: Any = None) -> Iterator[None]:
        """Build layers as process `rank` of `size`, for a model with this config."""
        with self.patch.context() as patch:
            current = SimpleNamespace(quant_config=quant_config)
            patch.setattr(interface.layers(), "get_current_vllm_config_or_none", lambda: current)
            if not self.real:
                patch.setattr(imitation.WORLD, "rank", rank)
                patch.setattr(imitation.WORLD, "size", size)
            else:
                self._place(patch, rank, size)
            yield

    def _place(self, patch: pytest.MonkeyPatch, rank: int, size: int) -> None:
        parameter = importlib.import_module("vllm.model_executor.parameter")
        for module in (self.linear, self.tables, parameter):
            patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


def unimportable() -> str | None:
    """Why the real vLLM cannot be tested here, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    try:
        for module in ("linear", "vocab_parallel_embedding", "quantization"):
            importlib.import_module(f"{LAYERS}.{module}")
        importlib.import_module("vllm.model_executor.models.utils")
    except Exception as error:  # whatever a build for another machine raises
        return f"vLLM is installed and cannot be imported: {error}"
    return None


@pytest.fixture(params=["imitation", "vllm"])
def vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """A vLLM with the plugin registered."""
    real = request.param == "vllm"
    if real and (reason := unimportable()):
        pytest.skip(reason)
    if not real:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        for name, module in imitation.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    forget()
    backend = Backend(monkeypatch, real)
    importlib.import_module("hf_qep.vllm_plugin").register()
    yield backend
    backend.oot.pop("VocabParallelEmbedding", None)
    forget()


def forget() -> None:
    """Drop the classes that were made for one vLLM."""
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture(scope="session")
def saved(
    tiny_model: Callable, tiny_batch: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], checkpoints.Saved]:
    """`saved(family)`: a quantised tiny model and its folder."""

    @cache
    def build(family: str) -> checkpoints.Saved:
        batch = tiny_batch(family, batch_size=4)
        return checkpoints.write(family, tiny_model(family), batch, tmp_path_factory.mktemp(family))

    return build
