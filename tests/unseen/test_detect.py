"""Detection of unseen classes: the whole run at its quick sizes, and what the methods may and may not learn from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from unseen import detect, strokes
from unseen.detect_table import OURS, summary, table
from unseen.detect_train import METHODS, UNLABELLED, EmbeddingLoss, Lessons, Method
from unseen.glyphs import Glyphs

from hf_qep.errors import ConfigError, UnknownNameError


def invented(count, drawers, seed):
    """Characters that nobody wrote, as if `drawers` hands had drawn each of them."""
    make = torch.Generator().manual_seed(seed)
    characters = strokes.invent(count, make)
    images = strokes.drawn(characters.again(drawers), make)
    labels = torch.arange(count).repeat(drawers)
    hands = torch.arange(drawers).repeat_interleave(count) + 21 - drawers
    names = tuple(f"Invented/{n}" for n in range(count))
    return Glyphs(images, labels, names, hands, tuple(map(str, range(len(labels)))))


def embed(images):
    """A teacher that needs no training: coarse pixels."""
    return F.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture(scope="module")
def material():
    other = strokes.drawn(strokes.invent(8, torch.Generator().manual_seed(3)), torch.Generator().manual_seed(4))
    return detect.Material(invented(6, 6, 1), invented(5, 3, 2), other)


def run(material, folder, **more):
    bank = embed(torch.cat([material.seen.images, material.other]))
    return detect.run_detection(
        material, more.pop("embed", embed), bank, preset="quick", folder=folder, workers=1, **more
    )


@pytest.fixture(scope="module")
def results(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection")
    return SimpleNamespace(folder=folder, found=run(material, folder))


def test_every_method_is_judged_with_every_seed(results):
    found = json.loads(json.dumps(results.found, allow_nan=False))
    assert set(found["units"]) == set(METHODS)
    for name, units in found["units"].items():
        assert set(units) == {"0", "1"}
        for one in units.values():
            kinds = {"own", "teacher", "both"} if METHODS[name].taught else {"own"}
            assert all(set(one["ap"][part]) == kinds for part in ("unseen", "seen"))
            values = [v for part in one["ap"].values() for kind in part.values() for v in kind] + one["any"]["unseen"]
            assert all(0 <= v <= 1 for v in values)


def test_a_run_goes_on_where_it_stopped_and_repeats_itself(results, material, tmp_path):
    lines = (results.folder / detect.JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / detect.JOURNAL).write_bytes(b"".join(lines[:-2]) + lines[-2][:50])
    again = run(material, tmp_path)
    assert (tmp_path / detect.JOURNAL).read_bytes().startswith(b"".join(lines[:-2]))
    for name in METHODS:
        for seed in ("0", "1"):
            assert again["units"][name][seed]["ap"] == results.found["units"][name][seed]["ap"]
    assert run(material, tmp_path) == again


def test_results_of_another_teacher_are_refused(results, material):
    with pytest.raises(ConfigError, match="material"):
        run(material, results.folder, embed=lambda images: embed(images.flip(3)))


def test_an_unknown_preset_is_refused(material, tmp_path):
    with pytest.raises(UnknownNameError, match="quick"):
        detect.run_detection(material, embed, embed(material.other), preset="fast", folder=tmp_path)


def test_nothing_of_unseen_classes_and_of_held_out_drawers_is_learned(material):
    job = detect.prepare(material, embed, embed(material.other), detect.PRESETS["quick"]())
    learned = {image.numpy().tobytes() for image in job.lessons.drawings}
    held_out = material.seen.images[material.seen.drawers > detect.HELD_OUT]
    assert not learned & {image.numpy().tobytes() for image in torch.cat([material.unseen.images, held_out])}
    assert (job.lessons.labels == UNLABELLED).sum() == len(material.other)
    for exam in job.exams.values():
        for episode in exam.episodes:
            assert not set(episode.support.tolist()) & set(episode.scenes.rows.tolist())


def lessons(labels):
    make = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(n, 8, generator=make), dim=1) for n in (len(labels), 3, 20)]
    return Lessons(torch.zeros(len(labels), 1, 4, 4), torch.tensor(labels), *rows)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.labels])
def test_methods_without_labels_do_not_depend_on_them(name):
    found, rows = F.normalize(torch.randn(4, 8), dim=1), torch.arange(4)
    losses = [EmbeddingLoss(METHODS[name], lessons(labels), 0.1)(found, rows) for labels in ([0, 1, 2, 0], [-1] * 4)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("term", ["seen", "squared", "bank", "relation", "cosine"])
def test_every_term_is_least_at_the_teacher(term):
    taught = lessons([0, 1, 2, UNLABELLED])
    loss = EmbeddingLoss(Method(fixed=True, **{term: 1.0}), taught, 0.1)
    rows = torch.arange(4)
    other = F.normalize(taught.wanted + 0.3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    assert loss(taught.wanted, rows) == pytest.approx(0, abs=1e-5)
    assert loss(other, rows) > 1e-3


def test_objects_of_no_class_do_not_count_as_one():
    loss = EmbeddingLoss(Method(labels=1.0), lessons([1, UNLABELLED]), 0.1)
    found = F.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(2)), dim=1)
    assert torch.allclose(loss(found, torch.tensor([0, 1])), loss(found[:1], torch.tensor([0])))


def unit(unseen, seen=0.5):
    ap = {kind: [value] * 3 for kind, value in unseen.items()}
    return {
        "ap": {"unseen": ap, "seen": {k: [seen if k == "own" else 0.1] * 3 for k in unseen}},
        "any": {"unseen": [0.9]},
    }


def test_others_show_their_best_prototypes_and_ours_those_of_seen_classes():
    units = {"baseline": {"0": unit({"own": 0.2, "teacher": 0.3})}, OURS: {"0": unit({"own": 0.4, "teacher": 0.6})}}
    found = summary({"units": units})
    assert found["baseline"]["kind"] == "teacher" and found["baseline"]["unseen"] == pytest.approx(30)
    assert found[OURS]["kind"] == "own" and found[OURS]["unseen"] == pytest.approx(40)
    assert [found["baseline"][k] for k in ("ahead", "low", "high")] == pytest.approx([10, 10, 10], abs=1e-4)
    assert "+10.0 (+10.0 to +10.0)" in table({"units": units})
