"""Embedding and output head in whole numbers.

They are rounded before the first block is solved, so that the quantised stream starts from the rounded embedding and
error propagation corrects it like any other error, and tuning takes its loss behind the rounded head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from hf_qep.algorithms.integers import round_to_integers
from hf_qep.architectures.parts import Structure
from hf_qep.architectures.skeleton import block_inputs, forward_rest
from hf_qep.architectures.tables import Table
from hf_qep.engine.report import QuantizationReport, TableReport
from hf_qep.errors import ArchitectureError, NonFiniteError
from hf_qep.formats import integer
from hf_qep.modules import packed_like, replace_module

PANEL_WEIGHTS = 1 << 22
"""Weights that are rounded at a time; the search holds several float32 copies of them."""
TOLERANCE = 1e-3
"""Relative to the largest output: the same weights through other code."""


@torch.no_grad()
def quantize_tables(
    model: nn.Module,
    tables: Sequence[Table],
    sample: dict[str, Tensor],
    report: QuantizationReport,
    structure: Structure | None = None,
) -> None:
    """Replace the tables in place and report them; modules that shared a weight share the packed tensor.

    sample: a few tokens as inputs of the model. It must answer on them as it does with the same rounded weights in its
    float modules. structure: its blocks, which are passed over then; they say nothing about its tables.
    Raises ArchitectureError if it does not, because it reads the weights itself, and NonFiniteError.
    """
    for table in tables:
        weight = model.get_submodule(table.names[0]).weight.data
        tensors, error = _round_in_place(weight, table)  # the float modules say what the packed ones must answer
        new = {name: packed_like(model, name, table.spec) for name in table.names}
        packed = new[table.names[0]]
        packed.load_packed(tensors)
        expected = _answer(model, sample, structure)
        for name, module in new.items():
            module.weight = packed.weight
            if (bias := getattr(model.get_submodule(name), "bias", None)) is not None:
                module.bias = bias  # the very parameter: it may be tied as well
            replace_module(model, name, module)
            _note(report, name)
        _check_same(model, table, expected, _answer(model, sample, structure))
        bits = packed.format.stored_bits(table.spec, table.rows, table.columns)
        report.tables.append(TableReport(list(table.names), table.rows, table.columns, asdict(table.spec), bits, error))


def _note(report: QuantizationReport, name: str) -> None:
    """A table stays float no more; if it is only a part of what was to stay float, say so there."""
    report.skipped.pop(name, None)
    for root in report.skipped:
        if name.startswith(f"{root}."):
            report.skipped[root] = f"all but `{name}`, which holds whole numbers"


def _round_in_place(weight: Tensor, table: Table) -> tuple[dict[str, Tensor], float]:
    """Packed tensors and relative squared error of a weight (rows, columns), which gets the rounded values.

    A panel of rows at a time, so that no second table in float32 is needed.
    """
    words, lost, total = [], 0.0, 0.0
    for panel in weight.split(max(1, PANEL_WEIGHTS // table.columns)):
        if not torch.isfinite(panel).all():
            raise NonFiniteError(f"`{table.names[0]}` holds weights that are not finite; no scale can store them")
        codes, scales = round_to_integers(panel, table.spec.bits, table.spec.group_size)
        tensors = integer.pack({"codes": codes, "row_scale": scales}, table.spec)
        rounded = integer.dequantize(tensors, table.spec, len(panel), table.columns, torch.float32)
        lost += (panel - rounded).square().sum().item()
        total += panel.float().square().sum().item()
        panel.copy_(rounded)
        words.append(tensors["weight"])
    return {"weight": torch.cat(words)}, lost / max(total, 1e-30)


def _answer(model: Any, sample: dict[str, Tensor], structure: Structure | None) -> Tensor:
    if structure is not None:
        hidden = block_inputs(model, structure, [sample]).first_hidden[0]
        return forward_rest(model, structure, len(structure.blocks) - 1, hidden, sample)[0].float()
    return model(**{key: value.to(model.device) for key, value in sample.items()})[0].float()


def _check_same(model: nn.Module, table: Table, expected: Tensor, found: Tensor) -> None:
    allowed = TOLERANCE * expected.nan_to_num(0, 0, 0).abs().max().item()
    if not torch.allclose(found, expected, rtol=TOLERANCE, atol=allowed, equal_nan=True):
        raise ArchitectureError(
            f"{type(model).__name__} uses the weight of `{table.names[0]}` in another way than to look up rows or to "
            "multiply by it, so it cannot be packed; leave embedding_bits and head_bits out"
        )
