"""The analysis of a teacher: what does nothing is found, and nothing depends on how rows are batched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_qep.errors import CheckpointError
from hf_qep.search.analysis import Analysis, analyse
from hf_qep.students.family import family_of, layers_of, teacher_shape
from tests.search.rows import rows_for

FAMILIES = ["llama", "qwen3", "cohere2", "bert_classifier", "vit"]


@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_write_nothing_come_last(tiny_model, family):
    teacher, layout = tiny_model(family), family_of(tiny_model(family)).layout
    layer, shape = layers_of(teacher)[1][1], teacher_shape(teacher)
    with torch.no_grad():
        layer.get_submodule(layout.mlp_out).weight[:, [3, 40]] = 0
        layer.get_submodule(layout.attention_out).weight[:, 2 * shape.head_dim : 3 * shape.head_dim] = 0
    found = analyse(teacher, rows_for(family))
    assert set(found.scores.ffn[0][1].argsort()[:2].tolist()) == {3, 40}
    assert found.scores.heads[0][1].argmin().item() == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_the_size_of_batches(tiny_model, family):
    data = rows_for(family)
    one, five = (analyse(tiny_model(family), data, batch_size=size) for size in (1, 5))
    for a, b in zip(one.scores.state().values(), five.scores.state().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)
    assert one.influence[0] == pytest.approx(five.influence[0], rel=1e-4)
    assert (one.rows, one.tokens) == (five.rows, five.tokens)


def test_a_layer_that_does_nothing_has_no_influence(tiny_model):
    teacher = tiny_model("llama")
    layout = family_of(teacher).layout
    with torch.no_grad():
        for name in (layout.attention_out, layout.mlp_out):
            layers_of(teacher)[0][1].get_submodule(name).weight.zero_()
    found = analyse(teacher, rows_for("llama"))
    assert found.influence[0][0] == pytest.approx(0, abs=1e-6) and found.influence[0][1] > 1e-3


def test_a_unit_that_the_task_does_not_need_scores_below_one_that_writes_as_much(tiny_model):
    """The Fisher half: in the last layer a unit that writes where the head's classes do not look is of no use."""
    teacher = tiny_model("vit")
    with torch.no_grad():
        layer = layers_of(teacher)[-1][1]
        size = layer.mlp.fc2.weight.norm(dim=0).mean()
        blind = torch.linalg.svd(teacher.classifier.weight * teacher.vit.layernorm.weight)[2][-1]
        layer.mlp.fc2.weight[:, 7] = size * blind
    found = analyse(teacher, rows_for("vit", count=32)).scores.ffn[0][-1]
    assert found[7] < found.median()


def test_padding_counts_for_nothing(tiny_model):
    data, teacher = rows_for("llama"), tiny_model("llama")
    ids = torch.cat([data.inputs["input_ids"], torch.full((12, 4), 7)], 1)
    mask = torch.cat([torch.ones(12, 10), torch.zeros(12, 4)], 1).long()
    labels = torch.cat([data.labels, torch.full((12, 4), -100)], 1)
    padded = replace(data, inputs={"input_ids": ids, "attention_mask": mask}, labels=labels)
    a, b = analyse(teacher, data), analyse(teacher, padded)
    assert torch.allclose(a.scores.ffn[0][0], b.scores.ffn[0][0], atol=1e-3) and a.tokens == b.tokens


def test_without_labels_the_teacher_answers_itself(tiny_model):
    found = analyse(tiny_model("vit"), replace(rows_for("vit"), labels=None))
    assert all(scores.isfinite().all() for scores in found.scores.state().values())


def test_the_teacher_is_left_as_it_was(tiny_model):
    teacher = tiny_model("llama").train()
    analyse(teacher, rows_for("llama"))
    assert teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_a_folder_gives_it_back(tiny_model, tmp_path):
    teacher = tiny_model("qwen3")
    found = analyse(teacher, rows_for("qwen3"))
    found.save(tmp_path / "a")
    again = Analysis.load(tmp_path / "a", teacher_shape(teacher))
    assert again.facts() == found.facts()
    assert all(
        torch.equal(a, b) for a, b in zip(again.scores.state().values(), found.scores.state().values(), strict=True)
    )
    with pytest.raises(CheckpointError, match="no analysis of this teacher"):
        Analysis.load(tmp_path / "a", teacher_shape(tiny_model("cohere2")))
