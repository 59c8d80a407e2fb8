"""Scores of models against formulae and counting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_qep.distill.said import take_said
from hf_qep.distill.samples import IGNORED
from hf_qep.errors import ConfigError
from hf_qep.search.scoring import auc_error, can_score, score, score_said
from tests.distill.tasks import (
    TASKS,
    image_encoder,
    images,
    language_model,
    questions,
    sentences,
    text_classifier,
    texts,
)


def test_a_classifier_is_scored_row_by_row():
    model, data = text_classifier(), sentences(24)
    found = score(model, data, batch_size=7)
    with torch.no_grad():
        logits = model(**data.inputs).logits
    assert torch.allclose(found.nll, -logits.log_softmax(-1).gather(1, data.labels[:, None])[:, 0], atol=1e-5)
    assert torch.equal(found.correct, logits.argmax(-1) == data.labels)
    margin = logits[:, 1] - logits[:, 0]
    pairs = margin[data.labels == 1][:, None] - margin[data.labels == 0][None]
    assert found.auc == pytest.approx(((pairs > 0).float() + 0.5 * (pairs == 0)).mean().item(), abs=1e-6)
    assert found.chance == max(data.labels.float().mean().item(), 1 - data.labels.float().mean().item())


def test_a_language_model_is_scored_at_its_answers():
    model = language_model()
    classified, free = score(model, questions(20)), score(model, texts(6))
    assert len(classified.nll) == 20 and classified.auc is not None
    assert len(free.nll) == int((texts(6).labels[:, 1:] != IGNORED).sum()) and free.auc is None


def test_a_summary_holds_means_with_standard_errors():
    found = score(text_classifier(), sentences(24))
    said = found.summary()
    assert said["answers"] == 24 and said["nll"] == pytest.approx(found.nll.mean().item())
    assert said["nll_stderr"] == pytest.approx(found.nll.std().item() / 24**0.5)
    p = said["accuracy"]
    assert said["accuracy_stderr"] == pytest.approx((p * (1 - p) / 23) ** 0.5, rel=1e-4)
    assert said["auc_stderr"] > 0
    assert score(text_classifier(), sentences(1)).summary()["nll_stderr"] is None


def test_rows_without_a_label_are_left_out():
    data = sentences(24)
    some = replace(data, labels=torch.where(torch.arange(24) % 2 == 0, data.labels, IGNORED))
    assert torch.allclose(score(text_classifier(), some).nll, score(text_classifier(), data).nll[::2], atol=1e-5)
    with pytest.raises(ConfigError, match="no row has a label"):
        score(text_classifier(), replace(data, labels=torch.full_like(data.labels, IGNORED)))


@pytest.mark.parametrize("name", ["embeddings", "scenes"])
def test_tasks_without_right_answers_are_refused(name):
    model, rows = TASKS[name][0], TASKS[name][1](4)
    rows = replace(rows, labels=None) if name == "embeddings" else rows
    assert not can_score(rows)
    with pytest.raises(ConfigError, match="cannot be scored"):
        score(model(), rows)
    with pytest.raises(ConfigError, match="are scored by"):
        score_said(take_said(model(), rows), rows)


def test_an_embedding_is_scored_by_one_shot_recognition():
    """Among the three classes of the rows, whose brightness the tiny encoder sees, with the same questions for all."""
    model, data = image_encoder(), images(40, task="image-embedding")
    found = score(model, data, batch_size=7)
    said = found.summary()
    assert found.nll is None and found.chance == pytest.approx(1 / 3) and len(found.correct) == said["answers"] == 40
    assert (said["nll"], said["nll_stderr"], said["auc"], said["auc_stderr"]) == (None,) * 4
    assert said["majority"] == found.chance and said["accuracy"] == found.correct.float().mean().item() > 0.5
    assert said["scored"].startswith("one-shot recognition among 3 classes")
    told = score_said(take_said(model, data, batch_size=7), data)
    assert torch.equal(told.correct, found.correct) and told.chance == found.chance
    assert "scored" not in score(text_classifier(), sentences(8)).summary()


def test_rows_of_an_embedding_without_two_of_a_class_are_not_scored():
    data = images(3, task="image-embedding")
    assert not can_score(data) and can_score(images(4, task="image-embedding"))


@given(st.floats(0, 1), st.integers(1, 500), st.integers(1, 500))
def test_the_error_of_an_area_is_that_of_a_mean_at_most(auc, ones, zeros):
    """No area in 0 to 1 has a variance above a (1 - a) / min(n): each class counts at least once per row."""
    assert 0 <= auc_error(auc, ones, zeros) <= (auc * (1 - auc) / min(ones, zeros)) ** 0.5 + 1e-9


def test_the_error_of_an_area_is_the_one_of_the_paper():
    """Hanley and McNeil 1982: an area of 0.893 of 58 normal and 51 abnormal cases has an error of about 0.032."""
    assert auc_error(0.893, 51, 58) == pytest.approx(0.032, abs=2e-3)


@pytest.mark.parametrize(
    ("model", "data"),
    [(text_classifier(), sentences(24)), (language_model(), questions(24))],
    ids=["classes", "answers"],
)
def test_what_was_said_scores_like_the_one_who_said_it(model, data):
    """Up to the rounding of what is kept; a row without a label does not count."""
    if data.answers is None:
        data = replace(data, labels=data.labels.clone().index_fill(0, torch.tensor([3]), IGNORED))
    asked, told = score(model, data), score_said(take_said(model, data), data)
    torch.testing.assert_close(told.nll, asked.nll, atol=2e-3, rtol=2e-3)
    assert (told.correct == asked.correct).float().mean() > 0.95
    assert told.chance == asked.chance and told.nll.shape == asked.nll.shape
    assert told.auc == pytest.approx(asked.auc, abs=0.02)


def test_the_likeliest_classes_alone_score_nothing():
    model, data = language_model(), texts(4)
    with pytest.raises(ConfigError, match="all classes"):
        score_said(take_said(model, data, k=5), data)
