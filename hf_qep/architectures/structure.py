"""Describe a model from one small forward pass.

The pass shows the order of the linears, which of them read the same tensor, and which list of modules is the chain of
blocks. A second, block by block, proves that the chain is all there is: it must reproduce the output of the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_qep.architectures.chain import Chain, Trace, find_chain, trace_forward
from hf_qep.architectures.families import (
    EXPERTS_EXEMPT,
    LANGUAGE_MODEL,
    ROUTER_SKIPPED,
    eager_experts,
    is_expert,
    is_router,
)
from hf_qep.architectures.linears import check_float, check_unshared, find_linears, skipped_by_user
from hf_qep.architectures.parts import Block, Group, LinearRef, Structure
from hf_qep.architectures.skeleton import block_inputs, forward_only, run_block
from hf_qep.architectures.tables import embeddings_of
from hf_qep.errors import ArchitectureError

__all__ = ["Block", "Group", "LinearRef", "Structure", "describe"]

CHAIN_TOLERANCE = 1e-3
"""Relative to the largest output: float16 kernels differ a little from run to run, a wrong mask by far more."""

NOT_CALLED = "its own forward made no product x W^T in the sample forward pass"


def describe(model: PreTrainedModel, sample: dict[str, Tensor], skip_modules: Sequence[str] = ()) -> Structure:
    """Blocks of a float model, their linears in order of execution, and what stays float and why.

    sample: forward keyword arguments, such as input_ids (1, T) or pixel_values (1, C, H, W); a few tokens are enough.
    skip_modules: linears to leave alone, see `linears.skipped_by_user`. The model is not changed.
    Raises ArchitectureError with the reason if the model is no chain of blocks, AlreadyQuantizedError, and ConfigError
    for an entry of skip_modules that matches nothing.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{type(model).__name__} is an encoder-decoder model; only one chain of blocks can be quantised"
        )
    check_float(model)
    weights = find_linears(model)
    user_skipped = skipped_by_user(model, list(dict.fromkeys(ref.name for ref in weights)), skip_modules)
    with torch.inference_mode(False), torch.no_grad(), forward_only(model), eager_experts(model):
        trace = trace_forward(model, sample, weights)
        chain = find_chain(model, trace, weights)
        skipped = _skipped_in_chain(model, trace, chain, weights, user_skipped)
        refs = [ref for ref in weights if ref.name not in skipped]
        blocks = tuple(
            Block(name, _groups(trace, [ref for ref in refs if _inside(ref.name, name)]), outputs)
            for name, outputs in zip(chain.members, chain.outputs, strict=True)
        )
        skipped |= _skipped_outside(model, chain)
        structure = Structure(model.config.model_type, blocks, skipped)
        if not structure.linears():
            why = next((f": `{name}`: {reason}" for name, reason in skipped.items() if _inside(name, chain.name)), "")
            raise ArchitectureError(f"nothing is left to quantise in `{chain.name}`{why}")
        check_unshared(model, structure.linears())
        _check_chain(model, structure, sample, chain.final)
    return structure


def _inside(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")


def _groups(trace: Trace, refs: Sequence[LinearRef]) -> tuple[Group, ...]:
    """Linears of one block by the identity of their input, in order of first use; experts by their parameter."""
    wanted, seen = set(refs), set()
    members: dict[object, list[LinearRef]] = {}
    for ref, key in trace.products:
        if ref not in wanted:
            continue
        if ref in seen:
            raise ArchitectureError(
                f"`{ref.label}` is used twice in one forward pass; a linear is solved for one input, "
                "so name it in skip_modules to keep it float"
            )
        seen.add(ref)
        members.setdefault(key if ref.expert is None else ref.name, []).append(ref)
    for ref in refs:  # experts that got no token of the sample
        if ref not in seen:
            members.setdefault(ref.name, []).append(ref)
    return tuple(_group(linears) for linears in members.values())


def _group(linears: list[LinearRef]) -> Group:
    linears.sort(key=lambda ref: -1 if ref.expert is None else ref.expert)
    return Group(tuple(linears), EXPERTS_EXEMPT if is_expert(linears[0].name) else None)


def _skipped_in_chain(
    model: nn.Module, trace: Trace, chain: Chain, refs: Iterable[LinearRef], user_skipped: set[str]
) -> dict[str, str]:
    """Linears inside the blocks that stay float -> reason."""
    used = {ref.name for ref, _ in trace.products}
    skipped: dict[str, str] = {}
    for ref in refs:
        if not _inside(ref.name, chain.name):
            continue
        if ref.name in user_skipped:
            skipped[ref.name] = "named in skip_modules"
        elif ref.expert is None and is_router(model, ref.name, ref.out_features):
            skipped[ref.name] = ROUTER_SKIPPED
        elif ref.name not in used and (ref.expert is not None or not is_expert(ref.name)):
            skipped[ref.name] = NOT_CALLED
    for name, module in model.get_submodule(chain.name).named_modules(prefix=chain.name):
        weight = getattr(module, "weight", None)
        bare = isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Linear | Conv1D)
        if bare and is_router(model, name, len(weight)):
            skipped[name] = ROUTER_SKIPPED
    return skipped


def _skipped_outside(model: PreTrainedModel, chain: Chain) -> dict[str, str]:
    """Roots of the subtrees that hold linears or embeddings but no blocks -> reason."""
    roots: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and not _inside(name, chain.name):
            parts = name.split(".")
            depth = next(d for d in range(1, len(parts) + 1) if not _inside(chain.name, ".".join(parts[:d])))
            root = ".".join(parts[:depth])
            roots.setdefault(root, _reason_outside(model, root, chain))
    return roots


def _reason_outside(model: PreTrainedModel, root: str, chain: Chain) -> str:
    members = list(model.get_submodule(root).modules())
    embedding, head = embeddings_of(model)
    if head is not None and head in members:
        tied = embedding is not None and getattr(embedding, "weight", None) is head.weight
        return "output embeddings, tied to the input embeddings" if tied else "output embeddings"
    if embedding is not None and embedding in members:
        return "input embeddings"
    if LANGUAGE_MODEL in chain.name.split(".") and not _inside(root, chain.name.partition(f"{LANGUAGE_MODEL}.")[0]):
        return "outside the language model"
    return "outside the chain of blocks"


def _check_chain(model: PreTrainedModel, structure: Structure, sample: dict[str, Tensor], expected: Tensor) -> None:
    """Run the blocks one by one. Raises ArchitectureError if they need more than the model's own forward shows."""
    try:
        inputs = block_inputs(model, structure, [sample])
        hidden = inputs.first_hidden[0]
        for index, block in enumerate(structure.blocks):
            hidden = run_block(model, block, hidden, inputs.call(index, 0, hidden.device))
    except ArchitectureError:
        raise
    except Exception as error:  # a stand-in that returns no attention bias, a state shared between blocks, ...
        raise ArchitectureError(f"the blocks of {type(model).__name__} cannot run one by one: {error}") from error
    scale = expected.nan_to_num(0, 0, 0).abs().max().item()
    close = {"rtol": CHAIN_TOLERANCE, "atol": CHAIN_TOLERANCE * scale, "equal_nan": True}
    if hidden.shape != expected.shape or not torch.allclose(hidden.float(), expected.float(), **close):
        raise ArchitectureError(
            f"the blocks of {type(model).__name__}, run one by one, do not give its hidden states: "
            "a block depends on more than the output of the block before it"
        )
