"""Teachers without weights, a price list for their students, and a proxy that is a formula."""

from __future__ import annotations

from hf_qep.search.costs import Choice, Cost, CostModel
from hf_qep.search.limits import Workload
from hf_qep.search.space import SearchSpace
from hf_qep.students.spec import ATTENTION, MLP, CandidateSpec, LayerSpec, TeacherShape

HEAD_DIM = 4
IMPORTANCE = (5.0, 1.0, 3.0, 2.0, 4.0, 6.0)


def teacher(layers=4, *, hidden=32, kv=4, q=2, width=64, vocab=100, types=None, decoder=0) -> TeacherShape:
    def stack(count):
        return tuple(LayerSpec(n, kv, q, width) for n in range(count))

    return TeacherShape("llama", stack(layers), hidden, HEAD_DIM, vocab, stack(decoder), types)


def space(layers=4, **options) -> SearchSpace:
    return SearchSpace.around(teacher(layers), **options)


def count(spec: CandidateSpec) -> dict[str, int]:
    """Parameters of a decoder with tied embeddings and gated feed-forward networks."""
    blocks = 0
    for layer in spec.all_layers():
        attention = 2 * spec.hidden_size * HEAD_DIM * (layer.heads + layer.kv_heads)
        blocks += attention * (ATTENTION not in layer.skip)
        blocks += 3 * spec.hidden_size * layer.intermediate_size * (MLP not in layer.skip)
    rows = 100 if spec.vocabulary is None else len(spec.vocabulary)
    return {"blocks": blocks, "embeddings": rows * spec.hidden_size, "rest": 2 * spec.hidden_size * len(spec.layers)}


def milliseconds(choice: Choice) -> float:
    return 1.0 + sum(
        0.5 * layer.heads / 8 * (ATTENTION not in layer.skip) + layer.intermediate_size / 64 * (MLP not in layer.skip)
        for layer in choice.spec.all_layers()
    )


def prices(layers=4, **options) -> CostModel:
    return CostModel(teacher(layers), Workload(sequence=16, context=16), count, milliseconds, **options)


def loss(choice: Choice) -> float:
    """Falls with every unit that stays, more where the layer matters."""
    kept = 0.0
    for layer in choice.spec.layers:
        share = 0.4 * layer.heads / 8 * (ATTENTION not in layer.skip)
        share += 0.6 * (layer.intermediate_size / 64) ** 0.5 * (MLP not in layer.skip)
        kept += IMPORTANCE[layer.source] * share * (0.1 if layer.added else 1)
    return 25 - kept + 0.2 * (choice.bits is not None)


def cost_of(latency, memory=1.0, parameters=1.0) -> Cost:
    return Cost(latency, memory, parameters)
