from __future__ import annotations

from dataclasses import replace

import pytest

from hf_qep.errors import ConfigError
from hf_qep.search.costs import Choice, Cost, CostModel
from hf_qep.search.limits import Limits, Workload, nearest, within
from hf_qep.students.spec import CandidateSpec, LayerSpec
from tests.search.shapes import cost_of, count, prices, teacher

TWO = CandidateSpec((LayerSpec(0, 4, 2, 64), LayerSpec(1, 2, 2, 32, skip=frozenset({"mlp"}))), 32)


def test_memory_is_the_sum_of_its_parts():
    work = Workload(batch=3, sequence=10, context=50, dtype="bfloat16")
    model = CostModel(teacher(types=("full_attention", "sliding_attention") * 2), work, count, window=20)
    blocks = 2 * 32 * 4 * 12 + 3 * 32 * 64 + 2 * 32 * 4 * 6
    rest = 100 * 32 + 2 * 32 * 2
    cache = 2 * (4 * 50 + 2 * 20) * 4 * 3 * 2
    peak = 3 * 10 * max(64, 4 * 32) * 2 + 3 * 1 * 100 * 4
    cost = model(Choice(TWO))
    assert cost.memory_mb == pytest.approx(((blocks + rest) * 2 + cache + peak) / 1e6)
    assert cost.parameters == blocks + rest
    quantised = model(Choice(TWO, 1.25))
    assert cost.memory_mb - quantised.memory_mb == pytest.approx(blocks * (2 - 1.25 / 8) / 1e6)


def test_only_a_decoder_keeps_keys_and_values_and_a_skipped_attention_none():
    decoder, encoder = prices(), prices(decoder=False)
    assert encoder.cache_bytes(TWO) == 0
    without = TWO.with_layer(0, skip=frozenset({"attention"}))
    assert decoder.cache_bytes(TWO) - decoder.cache_bytes(without) == 2 * 4 * 4 * 16 * 4


def test_logits_are_those_of_the_head():
    model = prices(positions=16)
    full, none = model.activation_bytes(TWO), model.activation_bytes(replace(TWO, head="none"))
    assert full - none == 16 * 100 * 4
    assert model.activation_bytes(replace(TWO, head="classifier", num_labels=3)) - none == 3 * 4
    assert model.activation_bytes(replace(TWO, vocabulary=(1, 2))) - none == 16 * 2 * 4


def test_a_quantised_larger_student_can_cost_less_than_a_float_smaller_one():
    model = prices()
    larger, smaller = teacher().identity(), TWO
    assert model(Choice(larger, 1.0)).memory_mb < model(Choice(smaller)).memory_mb


def test_choices_share_a_key_only_if_they_are_equal_and_come_back_from_json():
    keys = {Choice(TWO).key(), Choice(TWO, 1.0).key(), Choice(TWO, 2.0).key(), Choice(teacher().identity()).key()}
    assert len(keys) == 4
    assert Choice.from_dict(Choice(TWO, 1.5).to_dict()) == Choice(TWO, 1.5)


@pytest.mark.parametrize("bits", [0, -1, 17])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ConfigError, match="bits per weight"):
        Choice(TWO, bits)


def test_a_count_by_other_parts_and_an_unknown_type_are_refused():
    with pytest.raises(ConfigError, match="counted by"):
        replace(prices(), count_parameters=lambda spec: {"all": 1})(Choice(TWO))
    with pytest.raises(ConfigError, match="torch type"):
        replace(prices(), workload=Workload(dtype="float3"))(Choice(TWO))


def test_a_violation_is_what_is_above_the_limit():
    limits = Limits(latency_ms=10, memory_mb=2)
    assert limits.violations(Cost(12, 2, 10**9)) == {"latency_ms": 2}
    assert limits.margins(Cost(12, 1, 1)) == {"latency_ms": pytest.approx(0.2), "memory_mb": -0.5}
    assert Limits().violations(Cost(1e9, 1e9, 1e9)) == {}


def test_nearest_is_the_least_relative_excess():
    limits = Limits(latency_ms=10, memory_mb=100)
    candidates = [("slow", cost_of(15, 1)), ("large", cost_of(1, 120)), ("both", cost_of(12, 115))]
    assert nearest(candidates, limits)[0] == "large"


def test_where_nothing_fits_the_error_names_the_nearest_and_what_it_misses():
    candidates = [("far", cost_of(30)), ("near", cost_of(11, 1, 5))]
    with pytest.raises(ConfigError) as caught:
        within(candidates, Limits(latency_ms=10, memory_mb=3))
    text = str(caught.value)
    assert "none of 2 students" in text and "near" in text and "far" not in text
    assert "`latency_ms` 11 is 1 ms (10.0%) above the limit of 10" in text and "memory_mb" not in text
    assert within([*candidates, ("in", cost_of(9))], Limits(latency_ms=10)) == [("in", cost_of(9))]


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_a_limit_must_be_a_positive_number(value):
    with pytest.raises(ConfigError, match="positive number"):
        Limits(latency_ms=value)


def test_a_workload_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="`batch`"):
        Workload(batch=0)
