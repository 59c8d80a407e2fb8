"""Specifications and scores that the tests of students share."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_qep.students.scores import UnitScores
from hf_qep.students.spec import CandidateSpec, LayerSpec, TeacherShape


def mixed_spec(shape: TeacherShape, skip: bool = True) -> CandidateSpec:
    """Layers that all differ: fewer heads here, fewer units there, a sub-block left out in the first and last."""

    def stack(layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        first = replace(layers[0], intermediate_size=24, skip={"attention"} if skip else ())
        kv, q = max(layers[1].kv_heads - 1, 1), max(layers[1].q_per_kv - 1, 1)
        second = replace(layers[1], kv_heads=kv, q_per_kv=q, intermediate_size=40)
        last = [replace(layer, q_per_kv=1, skip={"mlp"} if skip else ()) for layer in layers[2:]]
        return (first, second, *last)

    decoder = stack(shape.decoder_layers) if shape.decoder_layers else ()
    return CandidateSpec(stack(shape.layers), shape.hidden_size, decoder)


def uniform_spec(shape: TeacherShape) -> CandidateSpec:
    """Equal layers that are smaller than the teacher's, one layer fewer in each stack."""

    def stack(layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        return tuple(replace(layer, kv_heads=1, intermediate_size=32) for layer in layers[1:])

    return CandidateSpec(stack(shape.layers), shape.hidden_size, stack(shape.decoder_layers))


def random_scores(shape: TeacherShape, seed: int = 0) -> UnitScores:
    """Scores without meaning or ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator)

    stacks = [layers for _, layers in shape.identity().stacks()]
    heads = tuple(tuple(draw(layer.heads) for layer in layers) for layers in stacks)
    ffn = tuple(tuple(draw(layer.intermediate_size) for layer in layers) for layers in stacks)
    return UnitScores(heads, ffn, draw(shape.hidden_size))
