"""One-shot recognition: who is asked for, who is known, and what embeddings of known worth come to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from hf_qep.distill.samples import IGNORED
from hf_qep.errors import ConfigError
from hf_qep.search import recognition
from hf_qep.search.recognition import WAYS, can_recognise, episodes, recognised

LABELS = st.lists(st.sampled_from([IGNORED, 0, 1, 2, 3, 7, 50]), min_size=1, max_size=40).map(torch.tensor)


def alphabet(classes: int, rows: int) -> Tensor:
    """So many rows of each class, mixed."""
    labels = torch.arange(classes).repeat(rows)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


@given(LABELS, st.integers(2, 8), st.integers(0, 99))
def test_every_row_with_a_partner_is_asked_for_once_among_different_classes(labels, ways, seed):
    assume(can_recognise(labels))
    asked = episodes(labels, ways=ways, seed=seed)
    counts = {label: labels.tolist().count(label) for label in set(labels.tolist()) - {IGNORED}}
    assert asked.queries.tolist() == [row for row, label in enumerate(labels.tolist()) if counts.get(label, 0) > 1]
    assert asked.ways == min(ways, len(counts))
    own = asked.supports.gather(1, asked.answers.unsqueeze(1))[:, 0]
    assert torch.equal(labels[own], labels[asked.queries]), "the right answer is of the class that is asked for"
    assert (asked.supports != asked.queries.unsqueeze(1)).all(), "nothing is known by itself"
    for known in labels[asked.supports].tolist():
        assert len(set(known)) == asked.ways and IGNORED not in known


@given(LABELS, st.integers(0, 9))
def test_what_tells_all_classes_apart_is_always_right(labels, seed):
    assume(can_recognise(labels))
    perfect = torch.eye(64)[labels.clamp(min=0)]
    assert recognised(perfect, episodes(labels, seed=seed)).all()


@pytest.mark.parametrize("kind", ["constant", "zero", "noise"])
@pytest.mark.parametrize("classes", [2, 8, 60])
def test_what_tells_nothing_apart_is_right_by_chance(kind, classes):
    """Also where all are equally near: the right one stands in no column more often than in another."""
    labels = alphabet(classes, 4800 // classes)
    noise = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(0))
    embeddings = {"constant": torch.ones(len(labels), 16), "zero": torch.zeros(len(labels), 16), "noise": noise}[kind]
    asked = episodes(labels)
    chance = 1 / min(classes, WAYS)
    assert abs(recognised(embeddings, asked).float().mean() - chance) < 5 * (chance * (1 - chance) / len(labels)) ** 0.5


def test_the_nearest_by_cosine_names_a_row():
    labels = torch.tensor([0, 0, 1])
    asked = episodes(labels)
    assert asked.queries.tolist() == [0, 1] and sorted(asked.supports[0].tolist()) == [1, 2]
    far_but_aligned = torch.tensor([[1.0, 0.0], [100.0, 1.0], [0.5, 0.5]])
    assert recognised(far_but_aligned, asked).tolist() == [True, True]
    assert recognised(far_but_aligned[[0, 2, 1]], asked).tolist() == [False, False]


@given(st.integers(0, 99), st.floats(1e-3, 1e3))
def test_lengths_of_embeddings_do_not_matter(seed, scale):
    labels, make = alphabet(5, 4), torch.Generator().manual_seed(seed)
    embeddings = torch.randn(20, 6, generator=make)
    lengths = scale * (0.1 + torch.rand(20, 1, generator=make))
    asked = episodes(labels, seed=seed)
    assert torch.equal(recognised(embeddings, asked), recognised(embeddings * lengths, asked))


def test_questions_follow_the_labels_and_the_seed_alone():
    labels = alphabet(30, 5)
    once, again, other = (episodes(labels, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(getattr(once, name), getattr(again, name)) for name in ("queries", "supports", "answers"))
    assert torch.equal(once.queries, other.queries) and not torch.equal(once.supports, other.supports)
    renamed = episodes(labels * 7 + 3, seed=3)
    assert torch.equal(once.supports, renamed.supports), "names of classes are only names"


def test_all_other_rows_of_a_class_are_known_equally_often():
    """The rows of class 0 are 0 to 3; in 1,000 seeds each is known to each other one in a third of them."""
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 3, 3])
    known = torch.zeros(4, 4)
    for seed in range(1000):
        asked = episodes(labels, ways=3, seed=seed)
        own = asked.supports.gather(1, asked.answers.unsqueeze(1))[:4, 0]
        known[torch.arange(4), own] += 1
    assert known.diag().sum() == 0
    assert (known + torch.eye(4) * 1000 / 3 - 1000 / 3).abs().max() < 5 * (1000 * 2 / 9) ** 0.5


def test_it_does_not_matter_how_many_questions_are_answered_at_once(monkeypatch):
    labels = alphabet(25, 6)
    embeddings = torch.randn(150, 8, generator=torch.Generator().manual_seed(2)) + torch.eye(25, 8)[labels]
    asked = episodes(labels)
    at_once = recognised(embeddings, asked)
    monkeypatch.setattr(recognition, "AT_ONCE", 7)
    assert torch.equal(at_once, recognised(embeddings, asked)) and 0 < at_once.float().mean() < 1
    monkeypatch.setattr(recognition, "KEYS", 100)
    few = episodes(labels)
    assert few.supports.shape == asked.supports.shape and torch.equal(few.queries, asked.queries)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [IGNORED, IGNORED, 4], [IGNORED] * 3, [0, 0, IGNORED]])
def test_without_two_classes_and_two_rows_of_one_there_is_nothing_to_ask(labels):
    assert not can_recognise(torch.tensor(labels))
    with pytest.raises(ConfigError, match="two classes"):
        episodes(torch.tensor(labels))


def test_one_class_alone_is_no_choice():
    with pytest.raises(ConfigError, match="at least 2 classes, not 1"):
        episodes(alphabet(3, 2), ways=1)
