"""A float model larger than memory: the weights of a block are read when it runs, and forgotten when it has run.

The model is built on meta and everything outside its blocks is loaded, by transformers' own `from_pretrained`. The
weights of a block go through the same conversions, by the same function, a block at a time: names, merged experts and
dtypes are those of a model that was loaded whole.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.utils import logging

from hf_qep.architectures.access import ON_DEMAND
from hf_qep.conversion import loaded_name
from hf_qep.engine.extent import block_list
from hf_qep.engine.shards import Shards
from hf_qep.engine.source import check_checkpoint, check_complete, check_finite, described_model, load_processor
from hf_qep.engine.tensor_files import TensorFile
from hf_qep.errors import ArchitectureError, CheckpointError
from hf_qep.modules import PackedTensors

MADE_UP = (1 << 20) - 3
"""Numbers that made-up weights repeat; no multiple of a width, so that no two rows of a matrix are alike."""


class BlockWeights:
    """Weights of the blocks of a model, which are on meta unless a block runs or is held.

    model: on meta. files: its safetensors files. load_config: what transformers loads it by. shards: where they are.
    """

    def __init__(self, model: PreTrainedModel, files: Iterable[str], load_config: Any, shards: Shards) -> None:
        self._model, self._load_config, self.shards = model, load_config, shards
        chain = block_list(model)
        self.names = tuple(f"{chain}.{index}" for index in range(len(model.get_submodule(chain))))
        self._held: Counter[str] = Counter()
        self._checked: set[str] = set()
        self._place: dict[str, Any] = {}
        self._made_up = False
        owned = {name: {f"{name}.{leaf}" for leaf in model.get_submodule(name).state_dict()} for name in self.names}
        self._owned, self._everything = owned, {leaf for leaves in owned.values() for leaf in leaves}
        self._keys = self._share_out(files)
        shards.expect([{file.name for file in self._keys.get(name, {}).values()} for name in self.names])
        for name in self.names:
            self._watch(name, model.get_submodule(name))

    def place(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Put the model on a device and into a dtype (of floating tensors), as `model.to` does; None: as it is."""
        self._place = {key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None}
        blocks = {id(m) for name in self.names for m in self._model.get_submodule(name).modules()}
        for module in self._model.modules():
            if id(module) not in blocks:
                module._apply(self._moved, recurse=False)

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """The weights of a block are in memory while the body runs; those of another module are all the time."""
        if name not in self.names:
            yield
            return
        self._hold(name)
        try:
            yield
        finally:
            self._let_go(name)

    @property
    def bytes(self) -> int:
        """Of the weights of all blocks, as the model holds them."""
        size = self._place.get("dtype")
        parameters = (p for name in self.names for p in self._model.get_submodule(name).parameters())
        return sum(p.numel() * (size or p.dtype).itemsize for p in parameters)

    @contextmanager
    def holding_all(self) -> Iterator[None]:
        """All weights are in memory while the body runs."""
        with ExitStack() as held:
            for name in self.names:
                held.enter_context(self.holding(name))
            yield

    @contextmanager
    def made_up(self) -> Iterator[None]:
        """While the body runs nothing is read for a block, which gets numbers of the right shapes and sizes instead."""
        self._made_up = True
        try:
            yield
        finally:
            self._made_up = False

    def settle(self, name: str) -> None:
        """A block has weights from elsewhere, which stay."""
        self._held[name] += 1

    def reopened(self) -> PreTrainedModel:
        """The model as it was opened: what lies outside its blocks is read again."""
        model, blocks, _ = load_on_demand(self.shards.folder, self._model.config.dtype, self.shards)
        blocks.place(self._place.get("device"), self._place.get("dtype"))
        return model

    def load_rest(self) -> Any:
        """Load what lies outside the blocks, and return transformers' account of it."""
        info = self._load(None)
        info.missing_keys -= self._everything
        return info

    def _share_out(self, files: Iterable[str]) -> dict[str | None, dict[str, TensorFile]]:
        """Block, or None for what is outside -> name of a tensor -> file."""
        expected = self._model.state_dict()
        owner = {leaf: name for name, leaves in self._owned.items() for leaf in leaves}
        shares: dict[str | None, dict[str, TensorFile]] = {}
        for file in map(self.shards.open, files):
            for key in file.entries:
                name = loaded_name(key, self._model, self._load_config.weight_mapping or (), expected)
                shares.setdefault(owner.get(name), {})[key] = file
        return shares

    def _watch(self, name: str, module: nn.Module) -> None:
        setattr(module, ON_DEMAND, True)
        for tensor in module.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # nothing to make up: it will be read
        own = module.__dict__.get("forward")

        def enter(module: nn.Module, _: Any) -> None:
            if module.__dict__.get("forward") is own:  # a stand-in for the block needs no weights
                self._hold(name)

        def leave(module: nn.Module, *_: Any) -> None:
            if module.__dict__.get("forward") is own:
                self._let_go(name)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def _hold(self, name: str) -> None:
        if not self._held[name]:
            (self._make_up if self._made_up else self._fetch)(name)
        self._held[name] += 1

    def _let_go(self, name: str) -> None:
        self._held[name] -= 1
        if not self._held[name]:
            forget_weights(self._model.get_submodule(name))

    def _make_up(self, name: str) -> None:
        module = self._model.get_submodule(name)
        fill_with_numbers(module, seed=self.names.index(name))
        module.to(**self._place)

    def _fetch(self, name: str) -> None:
        info, module = self._load(name), self._model.get_submodule(name)
        self.shards.run(self.names.index(name))
        if wrong := sorted([entry[0] for entry in info.mismatched_keys] + list(info.conversion_errors)):
            raise CheckpointError(
                f"the files hold {wrong[0]!r} in a form that {type(self._model).__name__} does not understand; check "
                "the config, or the version of transformers"
            )
        check_complete(self._model, info.missing_keys & self._owned[name])
        if name not in self._checked:
            check_finite(module, f"{name}.")
            self._checked.add(name)
        module.to(**self._place)

    def _load(self, name: str | None) -> Any:
        """Load one share of the files."""
        tensors = {key: file.lazily(key) for key, file in self._keys.get(name, {}).items()}
        for file in set(self._keys.get(name, {}).values()):
            file.check()
        with _without_bars():
            return convert_and_load_state_dict_in_model(self._model, tensors, self._load_config)[0]

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        place = self._place if tensor.is_floating_point() else {k: v for k, v in self._place.items() if k == "device"}
        return tensor.to(**place) if place else tensor


def load_on_demand(
    folder: Path, dtype: torch.dtype | str = "auto", shards: Shards | None = None
) -> tuple[PreTrainedModel, BlockWeights, Any]:
    """As `load_float_model`, but with the weights of the blocks on meta until they are needed; the second value reads
    them.

    shards: the weight files; default: those in `folder`.
    Raises what `load_float_model` raises; a weight of a block that is missing or not finite is found when it is read.
    ArchitectureError if the model has no list of blocks, or if blocks share weights.
    """
    folder = Path(folder)
    shards = shards or Shards(folder)
    check_checkpoint(folder, entries=shards.entries)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    shards.prepare(config)
    kind, found = type(described_model(folder)), []

    def load(model: Any, state_dict: Any, files: Any, load_config: Any, expected_keys: Any = None) -> tuple[Any, None]:
        found.append(BlockWeights(model, files, load_config, shards))
        return found[0].load_rest(), None

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    partly = type(kind.__name__, (kind,), names | {"_load_pretrained_model": staticmethod(load)})
    model, info = partly.from_pretrained(
        folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model.__class__ = kind
    blocks = found[0]
    check_complete(model, info["missing_keys"])
    _check_untied(model, blocks)
    check_finite(model)
    return model.eval(), blocks, load_processor(folder)


def forget_weights(module: nn.Module) -> None:
    """Put the stored tensors of a module on meta; packed ones in the stored order."""
    for part in module.modules():
        if isinstance(part, PackedTensors):
            part.untile()
        for leaf, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for leaf, buffer in part._buffers.items():
            if buffer is not None and leaf not in part._non_persistent_buffers_set:
                part._buffers[leaf] = torch.empty_like(buffer, device="meta")


def fill_with_numbers(module: nn.Module, seed: int) -> None:
    """Give tensors on meta values on the CPU: about 1 in vectors, such as norms, zero in whole numbers, and in matrices
    what keeps the size of an activation. Cheap: a few random numbers over and over, of other ones for each seed."""
    most = max((tensor.numel() for tensor in module.state_dict().values()), default=0)
    numbers = torch.randn(min(most, MADE_UP), generator=torch.Generator().manual_seed(seed))
    for part in module.modules():
        for place in (part._parameters, part._buffers):
            for leaf, tensor in place.items():
                if tensor is None or not tensor.is_meta:
                    continue
                floating = tensor.is_floating_point()
                made = (torch.empty if floating else torch.zeros)(tensor.shape, dtype=tensor.dtype)
                if floating:
                    scale, shift = (0.05, 1.0) if tensor.ndim < 2 else (tensor.shape[-1] ** -0.5, 0.0)
                    values = (numbers[: tensor.numel()] * scale + shift).to(tensor.dtype)
                    for piece in made.view(-1).split(MADE_UP):
                        piece.copy_(values[: len(piece)])
                place[leaf] = nn.Parameter(made, requires_grad=False) if place is part._parameters else made


def free_memory() -> int:
    """Bytes that this process may still take: what the machine has, and what limits leave."""
    free = [sys.maxsize]
    if found := re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo")):
        free.append(int(found[1]) << 10)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        free.append(int(limit) - int(used))
    if (found := re.search(r"VmSize:\s+(\d+) kB", _read("/proc/self/status"))) and sys.platform == "linux":
        import resource

        if (most := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            free.append(most - (int(found[1]) << 10))
    return max(0, min(free))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _check_untied(model: PreTrainedModel, blocks: BlockWeights) -> None:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    inside = [name for pair in tied.items() for name in pair if name.startswith(tuple(f"{b}." for b in blocks.names))]
    if inside:
        raise ArchitectureError(f"`{inside[0]}` is tied to another weight, so blocks cannot be read one by one")


@contextmanager
def _without_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
