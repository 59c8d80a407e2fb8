"""What the weights alone say: scores of units without data, and the gain of norms over fewer channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qep.students.family import VOCAB, family_of, layers_of, named_axes, teacher_shape
from hf_qep.students.modeling_student import HIDDEN, Layout
from hf_qep.students.scores import UnitScores
from hf_qep.students.spec import ATTENTION, MLP, LayerSpec


@torch.no_grad()
def weight_scores(model: PreTrainedModel) -> UnitScores:
    """Writer-column norm times reader-row norm of each unit (magnitude pruning), float32 on the CPU.

    A head is worth ‖W_o[:, h]‖ ‖W_v[h]‖ (Frobenius norms of what it writes and of the values that it reads), a unit of
    the MLP ‖W_out[:, j]‖ ‖W_in[j]‖, a channel its energy by `channel_energy`. A sub-block that is skipped scores 0.
    """
    layout, shape = family_of(model).layout, teacher_shape(model)
    stacks = [
        [
            (_head_scores(module, layout, spec, shape.head_dim), _unit_scores(module, layout, spec))
            for (_, module), spec in zip(layers_of(model, stack), specs, strict=True)
        ]
        for stack, specs in shape.identity().stacks()
    ]
    heads, ffn = (tuple(tuple(pair[kind] for pair in layers) for layers in stacks) for kind in (0, 1))
    return UnitScores(heads, ffn, channel_energy(model))


def _head_scores(layer: nn.Module, layout: Layout, spec: LayerSpec, head_dim: int) -> Tensor:
    if ATTENTION in spec.skip:
        return torch.zeros(spec.heads)
    written = _norms(layer, layout.attention_out, 0).unflatten(0, (spec.heads, head_dim)).norm(dim=1)
    read = _norms(layer, layout.value, 1).unflatten(0, (spec.kv_heads, head_dim)).norm(dim=1)
    return written * read.repeat_interleave(spec.q_per_kv)


def _unit_scores(layer: nn.Module, layout: Layout, spec: LayerSpec) -> Tensor:
    if MLP in spec.skip:
        return torch.zeros(spec.intermediate_size)
    read = torch.stack([_norms(layer, name, 1) for name in layout.mlp_in]).norm(dim=0)
    return _norms(layer, layout.mlp_out, 0) * read


def _norms(layer: nn.Module, name: str, dim: int) -> Tensor:
    """Norms of the columns (dim 0) or rows (dim 1) of a linear, float32."""
    return layer.get_submodule(name).weight.float().norm(dim=dim).cpu()


@torch.no_grad()
def channel_energy(model: PreTrainedModel) -> Tensor:
    """Energy of each channel of the residual stream by the weights that write it, (hidden_size,) float32 on the CPU.

    Σ over the linears that write into the stream of ‖row‖² (their inputs taken as white), and the mean square of every
    table of embeddings.
    """
    layout, total = family_of(model).layout, None
    for place, weight, axes in named_axes(model).values():
        if place.layer is not None:
            writes = place.name in (f"{layout.attention_out}.weight", f"{layout.mlp_out}.weight")
        else:
            writes = place.in_base and "embed" in place.name and "Norm" not in place.name
        if not writes or HIDDEN not in axes:
            continue
        rows = weight.float().movedim(axes.index(HIDDEN), 0).flatten(1) if weight.dim() > 1 else weight.float()[:, None]
        energy = rows.square().mean(1) if axes[0] in (VOCAB, None) else rows.square().sum(1)
        total = energy if total is None else total + energy
    if total is None:
        return torch.zeros(teacher_shape(model).hidden_size)
    return total.cpu()


def norm_gain(energy: Tensor, kept: Tensor) -> float:
    """Factor for the gains of norms that see only the channels `kept` of the residual stream.

    A norm divides by the root of the mean square over its channels. With d channels of mean energy ē, of which d' with
    mean energy ē' stay, the divisor changes by √(ē'/ē), so the same factor on the gain keeps the channels as they were:
    1 if all channels are alike, √(d/d') if those that go were silent. energy: (d,), as of `channel_energy`.
    """
    mean = energy.mean().item()
    return math.sqrt(energy[kept].mean().item() / mean) if mean > 0 else 1.0
