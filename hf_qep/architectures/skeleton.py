"""A model without its blocks: what enters the first one, and what each is called with besides the hidden state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qep.architectures.observe import StopForward
from hf_qep.architectures.parts import Block, Structure
from hf_qep.errors import ArchitectureError

HIDDEN = "hidden_states"
"""Name of the hidden state where a model passes it to its blocks by keyword."""


@dataclass(frozen=True)
class BlockCall:
    """Arguments of one call of a block, without the hidden state."""

    args: tuple[Any, ...]
    """Positional arguments behind the hidden state."""
    kwargs: dict[str, Any]
    by_keyword: bool
    """Whether the hidden state is passed as `hidden_states=` instead of first."""


@dataclass
class BlockInputs:
    """Result of `block_inputs`."""

    first_hidden: list[Tensor] = field(default_factory=list)
    """Input of the first block, one tensor (batch, ..., hidden) per batch."""
    calls: list[list[BlockCall]] = field(default_factory=list)
    """calls[block][batch]. Equal tensors are one tensor, across blocks and batches."""

    def call(self, block: int, batch: int, device: torch.device) -> BlockCall:
        """Arguments of a block for a batch, with tensors on `device`."""
        found = self.calls[block][batch]
        args, kwargs = _map_tensors((found.args, found.kwargs), lambda t: t.to(device))
        return BlockCall(args, kwargs, found.by_keyword)


@torch.no_grad()
def block_inputs(
    model: PreTrainedModel,
    structure: Structure,
    batches: Sequence[dict[str, Tensor]],
    keep: Callable[[Tensor], None] | None = None,
) -> BlockInputs:
    """What the blocks get for each batch, found without running one.

    keep: takes the input of the first block for each batch in turn, in the place of `first_hidden`.

    Each block hands its input on in the form in which it returns its output, and the last one ends the pass, so the
    cost is that of embeddings, masks and (for vision-language models) the vision tower. Caches are off. The blocks are
    put back in any case. Raises ArchitectureError if the model calls a block in a way that is not understood.
    """
    result = BlockInputs(calls=[[] for _ in structure.blocks])
    keep = keep or result.first_hidden.append
    pool = TensorPool()
    with forward_only(model), ExitStack() as undo:
        for index, block in enumerate(structure.blocks):
            last = index == len(structure.blocks) - 1
            recorder = _recorder(result, pool, index, keep, None if last else _return_form(block))
            undo.enter_context(forward_replaced(model.get_submodule(block.name), recorder))
        for number, batch in enumerate(batches):
            pool.next_batch()
            run_model(model, batch)
            if any(len(calls) != number + 1 for calls in result.calls):
                raise ArchitectureError(f"batch {number} does not call every block once; expected one call per block")
    return result


def forward_block(model: nn.Module, block: Block, hidden: Tensor, call: BlockCall) -> Tensor:
    """Output hidden state of a block for an input hidden state; runs whatever modules the block holds now."""
    module = model.get_submodule(block.name)
    if call.by_keyword:
        output = module(*call.args, **{HIDDEN: hidden}, **call.kwargs)
    else:
        output = module(hidden, *call.args, **call.kwargs)
    return output if block.outputs is None else output[0]


@torch.no_grad()
def run_block(model: nn.Module, block: Block, hidden: Tensor, call: BlockCall) -> Tensor:
    """`forward_block` without gradients."""
    return forward_block(model, block, hidden, call)


def forward_rest(
    model: PreTrainedModel, structure: Structure, index: int, hidden: Tensor, batch: dict[str, Tensor]
) -> Any:
    """Output of the model when its block `index` returns `hidden`; the blocks up to that one are not run.

    batch: inputs of the model for the same rows, from which it makes its masks.
    """
    with ExitStack() as undo:
        for block in structure.blocks[: index + 1]:
            undo.enter_context(
                forward_replaced(model.get_submodule(block.name), _constant(_return_form(block), hidden))
            )
        return model(**{key: value.to(model.device) for key, value in batch.items()})


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Hidden state and the other arguments. Raises ArchitectureError if the hidden state is neither first nor named."""
    if args and isinstance(args[0], Tensor):
        return args[0], BlockCall(args[1:], dict(kwargs), by_keyword=False)
    if not args and isinstance(kwargs.get(HIDDEN), Tensor):
        rest = {key: value for key, value in kwargs.items() if key != HIDDEN}
        return kwargs[HIDDEN], BlockCall((), rest, by_keyword=True)
    raise ArchitectureError(f"a block is called without a hidden state: neither a first argument nor `{HIDDEN}`")


def run_model(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """One forward pass for its side effects, on the model's device; StopForward ends it quietly."""
    try:
        model(**{key: value.to(model.device) for key, value in batch.items()})
    except StopForward:
        return


@contextmanager
def forward_only(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no key-value cache while the body runs; both are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False)]
    model.eval()
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for config in cached:
            config.use_cache = True


def _recorder(
    result: BlockInputs,
    pool: TensorPool,
    index: int,
    keep: Callable[[Tensor], None],
    form: Callable[[Tensor], Any] | None,
) -> Callable[..., Any]:
    """Stand-in for the forward of block `index`. form: wraps the output; None ends the pass."""

    def record(*args: Any, **kwargs: Any) -> Any:
        hidden, call = split_call(args, kwargs)
        if index == 0:
            keep(hidden)
        shared_args, shared_kwargs = _map_tensors((call.args, call.kwargs), pool.share)
        result.calls[index].append(BlockCall(shared_args, shared_kwargs, call.by_keyword))
        if form is None:
            raise StopForward
        return form(hidden)

    return record


def _return_form(block: Block) -> Callable[[Tensor], Any]:
    """Wraps a hidden state as the block returns it; what else it returns (attention weights) is None."""
    if block.outputs is None:
        return lambda hidden: hidden
    return lambda hidden: (hidden, *[None] * (block.outputs - 1))


def _constant(form: Callable[[Tensor], Any], hidden: Tensor) -> Callable[..., Any]:
    return lambda *args, **kwargs: form(hidden)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one module another forward; models may still read the attributes of the module (`attention_type`)."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:  # accelerate sets forward on instances
            module.forward = before


class TensorPool:
    """Maps equal tensors to one of them, so that masks of equal batches are stored once."""

    def __init__(self) -> None:
        self._by_content: dict[tuple, Tensor] = {}
        self._by_identity: dict[int, tuple[Tensor, Tensor]] = {}

    def next_batch(self) -> None:
        """Forget which tensors were seen; within a batch blocks get the very same masks, which saves hashing them."""
        self._by_identity.clear()

    def share(self, tensor: Tensor) -> Tensor:
        """`tensor` or an equal one from before."""
        if id(tensor) not in self._by_identity:
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest = hashlib.blake2b(content, digest_size=16).digest()
            key = (digest, tensor.shape, tensor.dtype, tensor.device)
            # The tensor is kept beside its double: an id is only unique while its object lives.
            self._by_identity[id(tensor)] = tensor, self._by_content.setdefault(key, tensor)
        return self._by_identity[id(tensor)][1]


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in nested tuples, lists and dicts replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {key: _map_tensors(item, change) for key, item in value.items()}
    return value
