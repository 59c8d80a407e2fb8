"""A search from end to end on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_qep.distill.losses import DistillLoss
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.search.analysis import analyse
from hf_qep.search.costs import Choice
from hf_qep.search.limits import Limits, Workload
from hf_qep.search.proxies import ProxyContext
from hf_qep.search.results import SearchResult
from hf_qep.search.run import SearchPlan, cost_model, measure, run_search
from hf_qep.search.space import SearchSpace
from hf_qep.search.study import StudyOptions
from hf_qep.search.workload import CachedStep, bench_for, peak_bytes
from hf_qep.students.family import teacher_shape
from tests.search.rows import rows_for

LADDER = (("short@1", 0.5), ("short@2", 0.5))


def setting(teacher, family, **space):
    fit, judge = rows_for(family, count=24), rows_for(family, count=12, seed=4)
    loss = DistillLoss(alpha=0.0, label_correction=False)
    context = ProxyContext(teacher, analyse(teacher, fit), fit, judge, loss=loss)
    return context, SearchSpace.around(teacher_shape(teacher), ffn=[48, 96, 128], **space)


def plan(**changes):
    workload = Workload(batch=2, sequence=8, threads=1)
    return replace(
        SearchPlan(workload, Limits(), StudyOptions(trials=6), ladder=LADDER, seeds=2, climbers=3, repeats=2), **changes
    )


@pytest.mark.parametrize("family", ["llama", "bert_classifier", "vit"])
def test_the_winner_is_within_the_limits_and_measured(tiny_model, tmp_path, family):
    context, space = setting(tiny_model(family), family, max_added=1)
    most = sum(p.numel() for p in context.teacher.parameters()) - 10_000
    result = run_search(context, space, plan(limits=Limits(parameters=most)), tmp_path / "s")
    winner = result.pick("accurate")
    assert winner.measured.parameters == winner.predicted.parameters <= most
    assert winner.measured.latency_ms > 0 and abs(winner.errors()["memory_mb"]) < 0.1
    student = context.student(winner.choice.spec)
    assert sum(p.numel() for p in student.parameters()) == winner.measured.parameters
    assert SearchResult.read(tmp_path / "s").to_dict() == result.to_dict()
    assert "short" in (tmp_path / "s" / "report.md").read_text()


def test_a_search_goes_on_where_it_was_stopped(tiny_model, tmp_path):
    context, space = setting(tiny_model("vit"), "vit")
    calls = []

    class Counting(ProxyContext):
        def student(self, spec, **options):
            calls.append(spec.key())
            if len(calls) == self.most:
                raise KeyboardInterrupt
            return super().student(spec, **options)

    counting = Counting(**{n: getattr(context, n) for n in ("teacher", "analysis", "fit", "judge", "loss")})
    counting.most = 16
    with pytest.raises(KeyboardInterrupt):
        run_search(counting, space, plan(), tmp_path / "a")
    counting.most = -1
    resumed = run_search(counting, space, plan(), tmp_path / "a")
    whole = run_search(context, space, plan(), tmp_path / "b")
    assert calls.count(calls[0]) == 1, "a change that is known is not measured again"
    values = [{c.choice.key(): dict(c.values) for c in r.candidates} for r in (resumed, whole)]
    assert values[0].keys() == values[1].keys()


def test_limits_that_nothing_meets_name_the_nearest(tiny_model, tmp_path):
    context, space = setting(tiny_model("llama"), "llama")
    with pytest.raises(ConfigError, match="nearest"):
        run_search(context, space, plan(limits=Limits(parameters=100)), tmp_path / "s")


def test_a_folder_of_another_search_is_refused(tiny_model, tmp_path):
    context, space = setting(tiny_model("vit"), "vit")
    run_search(context, space, plan(), tmp_path / "s")
    context.judge = rows_for("vit", count=12, seed=8)
    with pytest.raises((CheckpointError, ConfigError), match="another search"):
        run_search(context, space, plan(), tmp_path / "s")


def test_bits_make_a_larger_student_fit(tiny_model, tmp_path):
    """At a memory that a float teacher does not fit into, blocks at one bit let all layers stay."""
    teacher = tiny_model("llama")
    context, space = setting(teacher, "llama", bits=(None, 1.0))
    sizes = sum(p.numel() for p in teacher.parameters()) * 4 / 1e6
    result = run_search(context, space, plan(limits=Limits(memory_mb=0.6 * sizes)), tmp_path / "s")
    assert any(c.choice.bits == 1.0 and len(c.choice.spec.layers) == 2 for c in result.finalists())


def test_decoding_is_timed_with_a_cache_of_constant_length(tiny_model):
    teacher, data = tiny_model("llama"), rows_for("llama")
    bench = bench_for(teacher, data, Workload(batch=2, sequence=1, context=20))
    model, spec = teacher, teacher_shape(teacher).identity()
    inputs = bench.inputs(spec)
    with torch.inference_mode():
        for _ in range(3):
            bench.step(model, inputs)
    assert isinstance(bench.step, CachedStep) and inputs["input_ids"].shape == (2, 1)
    assert bench.step._caches[model].get_seq_length() == 20


def test_only_a_language_model_has_a_cache(tiny_model):
    with pytest.raises(ConfigError, match="keeps no cache"):
        bench_for(tiny_model("vit"), rows_for("vit"), Workload(context=20))


def test_peak_bytes_are_those_of_the_weights_and_of_what_is_alive_at_once():
    model = torch.nn.Sequential(torch.nn.Linear(100, 1000, bias=False), torch.nn.Linear(1000, 10, bias=False))
    x = torch.zeros(50, 100)
    with torch.inference_mode():
        found = peak_bytes(model, lambda: model(x))
    assert found == 4 * (100 * 1000 + 1000 * 10) + 4 * (50 * 1000 + 50 * 10)


@pytest.mark.parametrize("family", ["llama", "cohere2", "bert_classifier", "vit"])
def test_memory_of_students_is_foretold(tiny_model, family):
    context, space = setting(tiny_model(family), family)
    bench = bench_for(context.teacher, context.fit, Workload(batch=8, sequence=32, threads=1))
    cost = cost_model(context, space, Workload(batch=8, sequence=32), None, bench)
    make = torch.Generator().manual_seed(3)
    choices = [Choice(space.random(make)) for _ in range(5)]
    for key, found in measure(bench, choices, cost).items():
        predicted = next(cost(choice) for choice in choices if choice.key() == key)
        assert predicted.memory_mb == pytest.approx(found.memory_mb, rel=0.03)
        assert predicted.parameters == found.parameters
