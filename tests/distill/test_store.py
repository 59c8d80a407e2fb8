"""What a teacher said, on disk: the same as asked, whole or not at all, and of one teacher only."""

from __future__ import annotations

import json

import pytest
import torch

from hf_qep.algorithms.distillation import TopClasses
from hf_qep.distill import store as store_file
from hf_qep.distill.corrected import calibrate_teacher
from hf_qep.distill.losses import DistillLoss, class_loss
from hf_qep.distill.said import LiveTeacher, Said, take_said
from hf_qep.distill.store import TeacherStore
from hf_qep.errors import CheckpointError, ConfigError
from tests.distill.tasks import TASKS, language_model, questions, sentences, text_classifier, texts


@pytest.mark.parametrize("name", TASKS)
def test_what_was_written_down_is_what_is_said(name, tmp_path):
    model, rows = TASKS[name]
    teacher, data = model(1), rows(8)
    store = TeacherStore.build(tmp_path, teacher, data, k=1 << 20, rows_per_shard=3, batch_size=2, hidden=True)
    said = TeacherStore.open(tmp_path, teacher=teacher, data=data).said
    assert len(list(tmp_path.glob("*.safetensors"))) == store.count == 3
    for part in (torch.arange(8), torch.tensor([6, 1, 4])):
        batch = next(data.rows(part).batches(len(part)))
        live = LiveTeacher(teacher, data.task, data.answers, hidden=True).says(batch).tensors()
        kept = said.rows(part).tensors()
        assert kept.keys() == live.keys()
        for key, value in kept.items():
            torch.testing.assert_close(value.float(), live[key].float(), rtol=2e-3, atol=2e-3)
        if "log_p" in kept:
            assert torch.equal(kept["log_p"].argmax(-1), live["log_p"].argmax(-1))


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "jsd"])
def test_the_loss_is_that_of_float32_teachers(divergence, tmp_path):
    """Rounding to float16 is what differs: less than 1 in 1,000."""
    teacher, student, data = language_model(1), language_model(2), texts(8)
    said = TeacherStore.build(tmp_path, teacher, data, k=1 << 20).said
    mask = data.answer_positions()
    logits, exact = (model(**data.inputs).logits[mask].detach() for model in (student, teacher))
    labels = data.labels[data.labels != -100]
    loss = DistillLoss(divergence=divergence, alpha=0.2, temperature=1.5)
    kept = class_loss(loss, logits, labels, said.classes).mean()
    whole = class_loss(loss, logits, labels, TopClasses(None, exact.log_softmax(-1))).mean()
    assert kept.item() == pytest.approx(whole.item(), rel=1e-3)


def test_the_likeliest_are_kept_and_always_the_label(tmp_path):
    teacher, data = language_model(1), texts(8)
    said = TeacherStore.build(tmp_path, teacher, data, k=4).said
    assert said.log_p.shape == said.index.shape == (int(data.answer_positions().sum()), 4)
    labels = data.labels[data.labels != -100]
    assert (said.index == labels[:, None]).any(-1).all()
    log_p = teacher(**data.inputs).logits[data.answer_positions()].log_softmax(-1)
    torch.testing.assert_close(said.log_p.float(), log_p.gather(-1, said.index.long()), rtol=2e-3, atol=2e-3)


def test_a_teacher_of_a_larger_vocabulary_says_what_it_would_of_those_that_stay(tmp_path):
    keep = torch.cat([torch.arange(10), torch.arange(40, 62)])
    teacher, data = language_model(1, vocab=70), texts(6)
    said = TeacherStore.build(tmp_path, teacher, data, k=1 << 20, keep_ids=keep).said
    logits = teacher(input_ids=keep[data.inputs["input_ids"]]).logits[data.answer_positions()]
    torch.testing.assert_close(said.log_p.float(), logits[:, keep].log_softmax(-1), rtol=2e-3, atol=2e-3)
    with pytest.raises(ConfigError, match="settings: keep_ids"):
        TeacherStore.build(tmp_path, teacher, data, k=1 << 20, keep_ids=keep.flip(0))


def test_a_build_that_was_stopped_goes_on(tmp_path, monkeypatch):
    teacher, data = text_classifier(1), sentences(10)
    whole = take_said(teacher, data)
    asked = []

    def counted(model, part, **options):
        asked.append(len(part))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return take_said(model, part, **options)

    monkeypatch.setattr(store_file, "take_said", counted)
    with pytest.raises(KeyboardInterrupt):
        TeacherStore.build(tmp_path, teacher, data, rows_per_shard=3)
    with pytest.raises(CheckpointError, match="is missing, one of 4 shards"):
        TeacherStore.open(tmp_path).said  # noqa: B018
    store = TeacherStore.build(tmp_path, teacher, data, rows_per_shard=3)
    assert asked == [3, 3, 3, 3, 1] and torch.equal(store.said.log_p, whole.log_p)
    assert not list(tmp_path.glob(".said-*"))


def test_processes_may_build_different_shards(tmp_path):
    teacher, data = text_classifier(1), sentences(10)
    for own in ([0, 2], [1, 3]):
        TeacherStore.build(tmp_path, teacher, data, rows_per_shard=3, shards=own)
    torch.testing.assert_close(TeacherStore.open(tmp_path).said.log_p, take_said(teacher, data).log_p)


def test_another_teacher_other_rows_or_settings_are_refused(tmp_path):
    teacher, data = text_classifier(1), sentences(10)
    TeacherStore.build(tmp_path, teacher, data)
    for other in (text_classifier(2), text_classifier(1, layers=1)):
        with pytest.raises(ConfigError, match="another teacher"):
            TeacherStore.open(tmp_path, teacher=other)
    with pytest.raises(ConfigError, match="another rows"):
        TeacherStore.build(tmp_path, teacher, sentences(10, seed=1))
    with pytest.raises(ConfigError, match="settings: hidden is False, not True"):
        TeacherStore.build(tmp_path, teacher, data, hidden=True)


def test_damaged_files_are_told_from_good_ones(tmp_path):
    TeacherStore.build(tmp_path, text_classifier(1), sentences(10), rows_per_shard=5)
    path = tmp_path / "said-00001.safetensors"
    good = path.read_bytes()
    for bad, message in (
        (good[:-6], "truncated or damaged"),
        (b"", "truncated or damaged"),
        (good[:-1] + bytes([good[-1] ^ 1]), "its tensors changed"),
    ):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=message):
            TeacherStore.open(tmp_path).said  # noqa: B018
    path.write_bytes(good)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"data": "0"}))
    with pytest.raises(CheckpointError, match="another index.json"):
        TeacherStore.open(tmp_path).said  # noqa: B018
    (tmp_path / "index.json").write_text(json.dumps(index | {"version": 9}))
    with pytest.raises(CheckpointError, match="version 9"):
        TeacherStore.open(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match="no index"):
        TeacherStore.open(tmp_path)


def test_a_teacher_is_calibrated_by_its_answers():
    data = questions(40)
    found = calibrate_teacher(take_said(language_model(1), data), data)
    assert found.temperature > 0 and len(found.bias) == 2
    few = data.rows((data.inputs["input_ids"][:, 0] % 2).nonzero()[:, 0])
    with pytest.raises(ConfigError, match=r"classes \[0\] have no row"):
        calibrate_teacher(take_said(language_model(1), few), few)
    likeliest = take_said(language_model(1), texts(4), k=3)
    with pytest.raises(ConfigError, match="only the likeliest"):
        calibrate_teacher(likeliest, texts(4))
    with pytest.raises(ConfigError, match="has none"):
        calibrate_teacher(Said(embedding=torch.zeros(4, 2)), texts(4))
