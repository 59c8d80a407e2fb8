"""Parts that learn: the vision transformer's beginning, Muon, losses, and a teacher that goes on where it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from unseen import baselines, teacher, vit
from unseen.baselines import Batch
from unseen.lessons import Lesson, glyph_lesson
from unseen.material import invented_material
from unseen.optimizers import share_of_rate
from unseen.presets import PRESETS
from unseen.vit import Size

from hf_qep.errors import ConfigError

TINY = Size(hidden=24, layers=2, heads=4, ffn=24)


def tiny(seed: int = 0, **changes):
    return vit.build(replace(TINY, **changes), side=28, channels=1, width=16, seed=seed)


def test_the_class_token_begins_by_looking_at_one_patch_per_head():
    model = tiny(hidden=64)
    model.set_attn_implementation("eager")
    found = model(pixel_values=torch.rand(1, 1, 28, 28), output_attentions=True).attentions
    gaze = torch.cat([layer[0, :, 0, 1:] for layer in found])  # (heads of both layers, patches)
    assert gaze.argmax(1).tolist() == list(range(8))
    assert (gaze.max(1).values > 3 * gaze.mean(1)).all()


def test_a_model_follows_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, again, other = tiny(0), tiny(0), tiny(1)
    assert torch.equal(before, torch.get_rng_state())
    first, second, third = (m.pooler.dense.weight for m in (one, again, other))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_too_narrow_a_model_is_refused():
    with pytest.raises(ConfigError, match="above 17"):
        tiny(hidden=16)


def test_the_rate_rises_stays_and_falls():
    rates = [share_of_rate(step, 1000) for step in (0, 100, 500, 900, 999)]
    assert rates[0] < 0.1 and rates[1] == rates[2] == 1.0 and rates[2] > rates[3] > rates[4] > 0


def batch_of(embedding, teacher_rows):
    labels = torch.arange(len(embedding)) % 3
    logits = F.normalize(embedding, dim=-1)[:, :3]
    return Batch(embedding, logits, labels, teacher_rows, F.normalize(teacher_rows, dim=-1)[:, :3])


@pytest.mark.parametrize("name", ["feature", "relation"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name):
    rows = torch.randn(6, 5)
    assert baselines.LOSSES[name](batch_of(rows, rows)).item() == pytest.approx(0, abs=1e-4)
    assert baselines.LOSSES[name](batch_of(torch.randn(6, 5), rows)).item() > 0.05


def test_relations_do_not_mind_turning_moving_and_scaling():
    rows = torch.randn(6, 5)
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    assert baselines.relation(batch_of(3 * rows @ turn + 1, rows)).item() == pytest.approx(0, abs=1e-3)


def test_distillation_of_logits_is_least_where_they_agree():
    same = batch_of(rows := torch.randn(6, 5), rows)
    assert baselines.kd(same).item() == pytest.approx((1 - baselines.SHARE) * baselines.ce(same).item(), abs=1e-5)


def test_contrast_is_least_when_partners_are_the_nearest():
    rows = F.normalize(torch.randn(8, 16), dim=1)
    near = teacher.contrast(rows, rows, 0.05)
    assert near < 0.2 < teacher.contrast(rows, rows.roll(1, 0), 0.05)


def test_a_baseline_learns_the_classes_it_sees():
    material = invented_material(28, ways=3, drawers=8)
    rows = material.seen
    said = F.normalize(torch.randn(len(rows), 16), dim=1)
    lesson = Lesson(rows.images, rows.labels, said, said)
    before = tiny()
    student = baselines.teach(tiny(), lesson, "ce", steps=40, batch_size=12, learning_rate=3e-3, seed=0)
    inner, between = (_spread(model, rows) for model in (student, before))
    assert inner > between + 0.1


def _spread(model, rows) -> float:
    """How much nearer drawings of one class are than those of two."""
    found = vit.embed(model, rows.images)
    near, same = found @ found.T, rows.labels == rows.labels[:, None]
    return (near[same].mean() - near[~same].mean()).item()


def test_a_lesson_shows_seen_drawings_only_and_survives_its_file(tmp_path):
    material = invented_material(28, ways=4, drawers=3)
    lesson = glyph_lesson(tiny(), material.seen, copies=2, invented=5, seed=0)
    assert len(lesson.pixels) == 2 * len(material.seen) and lesson.classes <= 4 * 8
    assert len(lesson.bank) == lesson.classes + 5
    lesson.save(tmp_path / "0.safetensors")
    again = Lesson.load(tmp_path / "0.safetensors")
    assert all(torch.equal(getattr(lesson, n), getattr(again, n)) for n in ("pixels", "labels", "teacher", "bank"))


def test_a_teacher_that_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    preset = PRESETS["quick"]()
    preset = replace(preset, teacher=replace(preset.teacher, size=TINY, steps=6, pairs=8))
    known = invented_material(28, ways=4, drawers=3).known
    straight = teacher.train_teacher(known, preset, tmp_path / "a")
    monkeypatch.setattr(teacher, "KEEP_EVERY", 2)
    calls, draw = [], teacher.Pairs.draw

    def stopped(self):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(self)

    monkeypatch.setattr(teacher.Pairs, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        teacher.train_teacher(known, preset, tmp_path / "b")
    resumed = teacher.train_teacher(known, preset, tmp_path / "b")
    assert len(calls) == 7  # four before the stop, the one that stopped, the last two
    for one, two in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)
