import numpy as np
import pytest

from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.metrics import agreement_of_answers, retention_of_answers
from hf_qep.evaluation.retention import fieller, paired_retention, retention


def test_chance_is_taken_out_of_both_scores():
    kept = retention(Estimate(0.75, 0.01, 1000), Estimate(0.50, 0.01, 1000), 0.25)
    assert kept.raw.value == pytest.approx(2 / 3)
    assert kept.corrected.value == pytest.approx(0.5)
    assert kept.corrected.low < 0.5 < kept.corrected.high
    assert kept.note is None


def test_a_model_that_guesses_retains_nothing_although_raw_retention_looks_fair():
    kept = retention(Estimate(0.75, 0.01, 1000), Estimate(0.25, 0.01, 1000), 0.25)
    assert kept.raw.value == pytest.approx(1 / 3)
    assert kept.corrected.value == pytest.approx(0)
    assert kept.corrected.low < 0 < kept.corrected.high


@pytest.mark.parametrize("score", [0.26, 0.25, 0.10])
def test_no_corrected_retention_unless_the_float_model_is_above_chance(score):
    kept = retention(Estimate(score, 0.01, 1000), Estimate(0.24, 0.01, 1000), 0.25)
    assert kept.corrected is None
    assert "chance (0.250)" in kept.note


def test_no_corrected_retention_without_a_chance_level():
    kept = retention(Estimate(0.75, 0.01, 100), Estimate(0.5, 0.01, 100), None)
    assert kept.corrected is None and "unknown" in kept.note
    assert kept.raw.value == pytest.approx(2 / 3)


def test_one_item_shows_nothing():
    _, _, kept = paired_retention([1.0], [1.0], 0.25)
    assert kept.raw is None and kept.corrected is None


def test_the_interval_covers_the_truth_as_often_as_stated():
    rng = np.random.default_rng(0)
    truth, covered, runs = (0.55 - 0.25) / (0.70 - 0.25), 0, 500
    for _ in range(runs):
        draw = rng.random(400)
        baseline = (draw < 0.70).astype(float)
        subject = np.where(rng.random(400) < 0.6, draw < 0.55, rng.random(400) < 0.55).astype(float)
        _, _, kept = paired_retention(baseline, subject, 0.25)
        covered += kept.corrected.low <= truth <= kept.corrected.high
    assert 0.92 <= covered / runs <= 0.98


def test_pairing_narrows_the_interval_of_models_that_agree():
    rng = np.random.default_rng(1)
    baseline = (rng.random(500) < 0.7).astype(float)
    subject = np.where(rng.random(500) < 0.9, baseline, 0.0)
    f, q, paired = paired_retention(baseline, subject, 0.25)
    alone = retention(f, q, 0.25)
    assert paired.corrected.high - paired.corrected.low < alone.corrected.high - alone.corrected.low
    assert (paired.paired, alone.paired) == (True, False)


def test_fieller_has_no_bounded_interval_for_a_denominator_that_may_be_zero():
    assert fieller(1.0, 0.1, 0.01, 0.01, 0.0) == (None, None)


def test_fieller_agrees_with_the_delta_method_when_the_denominator_is_sure():
    low, high = fieller(0.5, 1.0, 1e-6, 1e-8, 0.0)
    half = 1.96 * np.sqrt(1e-6 + 0.25 * 1e-8)
    assert (low, high) == (pytest.approx(0.5 - half, rel=1e-5), pytest.approx(0.5 + half, rel=1e-5))


def test_different_numbers_of_items_are_refused():
    with pytest.raises(ValueError, match="3 and 2"):
        paired_retention([1, 0, 1], [1, 0], 0.5)
    with pytest.raises(ValueError, match="2 baseline predictions"):
        retention_of_answers([1, 1, 1], [1, 1, 1], [1, 1])


GOLD = [0, 1, 2, 3] * 25
FLOAT = [g if i % 5 else (g + 1) % 4 for i, g in enumerate(GOLD)]
QUANTIZED = [g if i % 5 and i % 3 else (g + 1) % 4 for i, g in enumerate(GOLD)]


def test_evaluate_metric_gives_what_the_function_gives_without_the_hub(monkeypatch):
    pytest.importorskip("evaluate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from hf_qep.evaluation.metrics import QepRetention

    result = QepRetention().compute(predictions=QUANTIZED, references=GOLD, baseline_predictions=FLOAT, chance=0.25)
    assert result == retention_of_answers(QUANTIZED, GOLD, FLOAT, 0.25)
    assert result["baseline_accuracy"]["value"] == pytest.approx(0.8)
    assert result["corrected"]["value"] == pytest.approx((result["accuracy"]["value"] - 0.25) / 0.55)


def test_evaluate_metric_works_batch_by_batch():
    pytest.importorskip("evaluate")
    from hf_qep.evaluation.metrics import QepAgreement

    metric = QepAgreement()
    for start in range(0, 100, 30):
        metric.add_batch(predictions=QUANTIZED[start : start + 30], references=FLOAT[start : start + 30])
    assert metric.compute() == agreement_of_answers(QUANTIZED, FLOAT)
