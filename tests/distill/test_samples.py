"""Rows of a task."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_qep.distill.said import answer_labels, answer_mask
from hf_qep.distill.samples import IGNORED, TaskData
from hf_qep.errors import ConfigError
from tests.distill.tasks import TASKS, questions, scenes, texts


@pytest.mark.parametrize("name", TASKS)
def test_rows_batches_and_splits_agree(name):
    data = TASKS[name][1](8)
    train, test = data.split(0.25)
    assert (len(train), len(test)) == (6, 2)
    batches = list(data.batches(3))
    assert [len(next(iter(b.values()))) for b in batches] == [3, 3, 2]
    assert len(batches[1]["labels"]) == 3
    part = data.rows(torch.tensor([5, 2]))
    for key, value in part.inputs.items():
        assert torch.equal(value, data.inputs[key][[5, 2]])


def test_the_fingerprint_sees_every_change():
    data = texts(8)
    others = [data.rows(slice(0, 7)), texts(8, seed=1), replace(data, labels=None), replace(data, answers=(1, 2))]
    others.append(replace(data, rationales=torch.arange(8) < 2))
    labels = data.labels.clone()
    labels[0, -1] += 1
    others.append(replace(data, labels=labels))
    assert len({data.fingerprint(), *(other.fingerprint() for other in others)}) == 7
    assert data.fingerprint() == texts(8).fingerprint()
    moved = scenes(4)
    moved.labels[2]["boxes"][0, 0] += 0.1
    assert moved.fingerprint() != scenes(4).fingerprint()


@pytest.mark.parametrize(
    "change",
    [{"task": "poetry"}, {"inputs": {}}, {"labels": torch.zeros(3, 4)}, {"rationales": torch.zeros(3)}]
    + [{"labels": torch.full((8, 10), IGNORED)}],
)
def test_rows_that_cannot_be_are_refused(change):
    with pytest.raises(ConfigError):
        replace(texts(8), **change)
    with pytest.raises(ConfigError, match="leaves nothing"):
        texts(8).split(0.01)


def test_rationales_follow_their_rows_and_are_no_answers():
    data = replace(texts(8), rationales=torch.arange(8) % 2 == 1)
    assert data.rows(torch.tensor([3, 4])).rationales.tolist() == [True, False]
    with pytest.raises(ConfigError, match="rationales"):
        TaskData("text-classification", {"input_ids": torch.zeros(2, 3)}, rationales=torch.zeros(2).bool())
    batch = dict(data.inputs) | {"labels": data.labels, "rationales": data.rationales}
    mask = answer_mask(batch, False)
    assert not mask[1::2].any() and torch.equal(mask[::2], data.answer_positions()[::2])
    assert torch.equal(answer_labels(batch, mask, None), data.labels[::2][data.labels[::2] != IGNORED])


def test_without_labels_a_classifier_answers_at_its_last_token():
    data = questions(6)
    batch = dict(data.inputs)
    ends = batch["attention_mask"].sum(1) - 1
    assert torch.equal(answer_mask(batch, True).long().argmax(1), ends) and answer_mask(batch, True).sum() == 6
    assert torch.equal(answer_mask(batch, False).sum(1), ends)
    left = {name: value.flip(1) for name, value in batch.items()}
    assert answer_mask(left, True)[:, -1].all()
    assert answer_mask({"input_ids": batch["input_ids"]}, False).sum(1).tolist() == [9] * 6
