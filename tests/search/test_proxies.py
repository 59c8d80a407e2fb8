"""Stand-ins for the worth of a candidate."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_qep.distill.losses import DistillLoss
from hf_qep.errors import CheckpointError, UnknownNameError
from hf_qep.search.analysis import analyse
from hf_qep.search.library import Library, measure_library
from hf_qep.search.proxies import PROXIES, ProxyContext, proxy
from hf_qep.search.space import SearchSpace
from hf_qep.students.family import teacher_shape
from tests.search.rows import rows_for

FAMILIES = ["llama", "bert_classifier", "vit"]
LOSS = DistillLoss(alpha=0.0, label_correction=False)
"""The labels of random rows teach nothing."""
LOOSE = ("influence", "synflow", "short", "short_kl")
"""Proxies that a narrower network need not make worse."""


@pytest.fixture
def context(tiny_model):
    def make(family):
        teacher, fit = tiny_model(family), rows_for(family, count=32)
        return ProxyContext(teacher, analyse(teacher, fit), fit, rows_for(family, count=16, seed=5), loss=LOSS)

    return make


def halved(spec):
    return replace(spec, layers=tuple(replace(x, intermediate_size=x.intermediate_size // 2) for x in spec.layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_teacher_is_at_no_distance(context, family):
    found = context(family)
    spec = teacher_shape(found.teacher).identity()
    for name in ("one_shot", "healed", "healed_all", "units"):
        assert proxy(name)(found, spec) == pytest.approx(0, abs=2e-3), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(PROXIES))
def test_every_proxy_gives_a_number_that_a_smaller_student_makes_worse(context, family, name):
    found = context(family)
    spec = teacher_shape(found.teacher).identity()
    assert proxy(name)(found, halved(spec)) > proxy(name)(found, spec) - 1e-3 or name in LOOSE


def test_a_short_distillation_comes_closer_than_the_cut(context):
    found = context("vit")
    spec = replace(halved(teacher_shape(found.teacher).identity()), hidden_size=32)
    assert proxy("short_kl@12")(found, spec) < proxy("one_shot")(found, spec)


def test_proxies_repeat(context):
    spec = halved(teacher_shape(context("vit").teacher).identity())
    first, second = (proxy("short@3")(context("vit"), spec) for _ in range(2))
    assert first == second != proxy("short@4")(context("vit"), spec)


def test_an_unknown_proxy_names_the_known_ones():
    for name in ("magic", "short@0", "healed@3", "short@x"):
        with pytest.raises(UnknownNameError, match="healed"):
            proxy(name)


def test_the_library_knows_every_change_of_its_space(context, tmp_path):
    found = context("llama")
    shape = teacher_shape(found.teacher)
    space = SearchSpace.around(shape, ffn=[48, 96], kv_heads=[1, 2])
    library = measure_library(found, space, Library())
    layer = shape.layers[1]
    for form in (None, *space.layer_options(layer)):
        assert library.score(0, layer, form) >= 0
    assert library.score(0, layer, layer) == 0
    narrow, dropped = library.score(0, layer, replace(layer, intermediate_size=48)), library.score(0, layer, None)
    assert narrow < dropped
    library.save(tmp_path / "library.json", "a")
    assert Library.load(tmp_path / "library.json", "a").known == library.known
    with pytest.raises(CheckpointError, match="another teacher"):
        Library.load(tmp_path / "library.json", "b")
