"""The tables of a model that have a row per token: its word embeddings and its output head, which may be one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from torch import nn

from hf_qep.architectures.linears import skipped_by_user
from hf_qep.config import QepConfig
from hf_qep.errors import ConfigError
from hf_qep.formats.integer import Spec

KERNEL_GROUP, GROUP_SIZE, LEAST_GROUP = 128, 64, 16
"""Columns that share a scale in 4 bits: the size that the kernels are made for, or else as many as the width allows,
within the other limits. Finer groups gain less than their scales would if they were spent on the linears; in 8 bits one
scale per row is as good as any."""


@dataclass(frozen=True)
class Table:
    """One weight matrix to be stored as whole numbers."""

    names: tuple[str, ...]
    """Modules that hold it: one, or embedding and head if they are tied."""
    rows: int
    columns: int
    spec: Spec


def find_tables(model: nn.Module, config: QepConfig) -> list[Table]:
    """What `embedding_bits` and `head_bits` ask for, embedding first; the model may be on meta.

    Position and type embeddings are no tables of tokens. Raises ConfigError if the model lacks what is asked for, if
    skip_modules names it, if the two options contradict each other for one tied weight, or if another module uses it.
    """
    asked = {"embedding": config.embedding_bits, "head": config.head_bits}
    modules = dict(zip(asked, embeddings_of(model), strict=True))
    for role, bits in asked.items():
        if bits is not None:
            _check_table(model, role, modules[role])
    weights = {role: getattr(module, "weight", None) for role, module in modules.items()}
    if weights["embedding"] is not None and weights["embedding"] is weights["head"] and any(asked.values()):
        if None not in asked.values() and len(set(asked.values())) > 1:
            raise ConfigError(
                f"embedding_bits {config.embedding_bits} and head_bits {config.head_bits} contradict each other: the "
                f"head of {type(model).__name__} is tied to its embedding, so give one of them"
            )
        for role in asked:
            _check_table(model, role, modules[role])
        found = [(tuple(modules.values()), config.embedding_bits or config.head_bits)]
    else:
        found = [((modules[role],), bits) for role, bits in asked.items() if bits is not None]
    return [_table(model, members, bits, config) for members, bits in found]


def embeddings_of(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Input embedding and output head, as far as the model says that it has them."""
    found: list[nn.Module | None] = [None, None]
    with contextlib.suppress(NotImplementedError):  # vision models may have neither
        found[0] = model.get_input_embeddings()
        found[1] = model.get_output_embeddings()
    return found[0], found[1]


def _check_table(model: nn.Module, role: str, module: nn.Module | None) -> None:
    kind = nn.Embedding if role == "embedding" else nn.Linear
    if not isinstance(module, kind):
        has = "none" if module is None else f"a {type(module).__name__}"
        what = "an embedding of tokens" if role == "embedding" else "an output head over the tokens"
        raise ConfigError(f"{role}_bits needs {what}, but {type(model).__name__} has {has}; leave {role}_bits out")


def _table(model: nn.Module, members: tuple[nn.Module, ...], bits: int, config: QepConfig) -> Table:
    names = tuple(next(n for n, m in model.named_modules() if m is member) for member in members)
    if skipped := skipped_by_user(model, names, config.skip_modules or ()):
        raise ConfigError(f"skip_modules keeps `{min(skipped)}` float, but it is to be stored in {bits} bits; drop one")
    weight = members[0].weight
    users = {n.rpartition(".")[0] for n, p in model.named_parameters(remove_duplicate=False) if p is weight}
    if others := sorted(users - set(names)):
        raise ConfigError(
            f"the weight of `{names[0]}` is also that of `{others[0]}`, so it cannot be stored in {bits} bits"
        )
    rows, columns = weight.shape
    return Table(names, rows, columns, Spec(bits, None if bits == 8 else _group_size(columns)))


def _group_size(columns: int) -> int | None:
    sizes = [KERNEL_GROUP] * (columns > KERNEL_GROUP) + [*range(min(GROUP_SIZE, columns - 1), LEAST_GROUP - 1, -1)]
    return next((size for size in sizes if columns % size == 0), None)
