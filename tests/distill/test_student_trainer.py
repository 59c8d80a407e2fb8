"""A student learns its task: every kind of task, student and teacher; the same step however it is cut up."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainingArguments

from hf_qep.distill import trainer as trainer_file
from hf_qep.distill.corrected import calibrate_teacher
from hf_qep.distill.hidden import projections_for
from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.objective import Objective
from hf_qep.distill.said import take_said
from hf_qep.distill.samples import IGNORED, TaskData
from hf_qep.distill.store import TeacherStore
from hf_qep.distill.student_trainer import train_student
from hf_qep.distill.trainer import StudentTrainer, TaskRows
from hf_qep.errors import CheckpointError, ConfigError, OutputExistsError
from hf_qep.modules import packed_modules
from tests.distill.tasks import (
    CLASSES,
    TASKS,
    bytes_of,
    detector,
    image_classifier,
    image_encoder,
    images,
    language_model,
    questions,
    same,
    scenes,
    sentences,
    state,
    text_classifier,
    texts,
)
from tests.distill.two_processes import CASES, train
from tests.plugin.packing import pack_model

FULL = DistillLoss(alpha=0.5, hidden=0.5, relation=0.5)
BANK = torch.randn(CLASSES, 32, generator=torch.Generator().manual_seed(0))


def bank_for(name):
    return BANK if name == "embeddings" else None


def trainer_of(student, data, folder, teacher=None, loss=FULL, **options):
    """A trainer with plain steps, so that differences of rounding stay differences of rounding."""
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    named = {"remove_unused_columns": False, "dataloader_pin_memory": False, "optim": "sgd", "max_grad_norm": 0.0}
    named |= {"learning_rate": 0.1, "lr_scheduler_type": "constant", "seed": 0}
    projections = projections_for(student, teacher, data.task, loss, 0) if teacher is not None else None
    return StudentTrainer(
        model=student,
        args=TrainingArguments(output_dir=str(folder), **(quiet | named | options)),
        train_dataset=TaskRows(data),
        eval_dataset=TaskRows(data),
        objective=Objective(loss, data.task, data.answers, projections=projections),
        teacher=teacher,
    )


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_learnt(name, kept):
    model, rows = TASKS[name]
    data = rows(24)
    teacher, student = model(1), model(2)
    before, trains = bytes_of(teacher), [p.requires_grad for p in teacher.parameters()]
    said = take_said(teacher, data, hidden=True) if kept else teacher
    loss = replace(FULL, alpha=0.7)
    rate = 1e-2 if name == "scenes" else 2e-3
    options = {"epochs": 8, "batch_size": 8, "learning_rate": rate, "prototypes": bank_for(name)}
    report = train_student(student, data, held_out=data, teacher=said, loss=loss, **options)
    assert report.steps == 8 * -(-len(data) // 8) and report.best_epoch > 0
    assert report.after["loss"] < 0.9 * report.before["loss"]
    assert same(before, bytes_of(teacher)) and [p.requires_grad for p in teacher.parameters()] == trains
    assert ("accuracy" in report.after) == (name != "scenes") and ("auc" in report.after) == (
        name in ("questions", "sentences")
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_student_without_labels_comes_closer_to_its_teacher(name):
    model, rows = TASKS[name]
    data, held = (replace(rows(24, seed=seed), labels=None) for seed in (0, 1))
    loss = DistillLoss(alpha=0.0)
    options = {"epochs": 6, "batch_size": 8, "learning_rate": 2e-3, "prototypes": bank_for(name)}
    report = train_student(model(2), data, held_out=held, teacher=model(1), loss=loss, **options)
    assert set(report.after) == {"loss"} and report.after["loss"] < 0.95 * report.before["loss"]


def test_measurements_are_those_of_the_answers():
    model, data = text_classifier(3), sentences(21)
    report = train_student(model, data, held_out=data, loss=DistillLoss(alpha=1.0), steps=1, learning_rate=1e-12)
    log_p = model(**data.inputs).logits.detach().log_softmax(-1)
    assert report.before["nll"] == pytest.approx(-log_p[torch.arange(21), data.labels].mean().item(), rel=1e-4)
    assert report.before["accuracy"] == pytest.approx((log_p.argmax(-1) == data.labels).float().mean().item())
    score, right = log_p[:, 1] - log_p[:, 0], data.labels == 1
    pairs = score[right][:, None] - score[~right]
    assert report.before["auc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(dtype=torch.float32).item())
    uneven, model = texts(7), language_model(3)
    report = train_student(model, uneven, held_out=uneven, loss=DistillLoss(alpha=1.0), steps=1, batch_size=3)
    torch.testing.assert_close(
        report.before["nll"], language_model(3)(**uneven.inputs, labels=uneven.labels).loss.item(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["texts", "questions", "sentences", "images"])
def test_epochs_are_judged_by_what_is_learnt(name):
    model, rows = TASKS[name]
    data, held = rows(24), rows(24, seed=1)
    teacher, student, loss = model(1), model(2), DistillLoss(alpha=0.25, label_correction=False)
    said, judged = (take_said(teacher, part) for part in (data, held))
    report = train_student(
        student, data, held_out=held, held_out_said=judged, teacher=said, loss=loss, epochs=1, batch_size=24
    )
    log_q, log_p = (take_said(one, held).log_p.float() for one in (model(2), teacher))
    distance = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    wanted = 0.25 * report.before["nll"] + 0.75 * distance
    assert report.before["loss"] == pytest.approx(wanted, rel=1e-3)


def test_labels_that_contradict_a_teacher_do_not_undo_what_was_learnt_from_it_alone():
    data, held, teacher = sentences(48), sentences(48, seed=1), text_classifier(1)
    said, judged = (take_said(teacher, part) for part in (data, held))
    contrary = replace(held, labels=judged.log_p.argmin(-1))
    loss = DistillLoss(alpha=0.0, label_correction=False)
    options = {"loss": loss, "teacher": said, "epochs": 4, "batch_size": 8, "learning_rate": 2e-3}
    blind = train_student(text_classifier(2), data, held_out=contrary, **options)
    report = train_student(text_classifier(2), data, held_out=contrary, held_out_said=judged, **options)
    assert blind.best_epoch < 4
    assert report.best_epoch > blind.best_epoch and report.after["loss"] < 0.9 * report.before["loss"]


@pytest.mark.parametrize("name", ["embeddings", "scenes"])
def test_what_was_said_about_embeddings_and_objects_judges_nothing(name):
    model, rows = TASKS[name]
    data, teacher = rows(8), model(1)
    with pytest.raises(ConfigError, match="not judged"):
        train_student(
            model(2), data, held_out=data, held_out_said=take_said(teacher, data), teacher=teacher,
            loss=DistillLoss(alpha=0.5), prototypes=bank_for(name), steps=1,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["texts", "questions", "sentences"])
def test_accumulated_steps_are_the_same_steps(name, tmp_path):
    model, rows = TASKS[name]
    data, found = rows(16), []
    if name == "texts":
        data = replace(data, rationales=torch.arange(16) % 5 == 0)
    for size, steps in ((4, 1), (1, 4)):
        student = model(2, width=16)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        trainer = trainer_of(student, data, tmp_path, model(1), **options)
        trainer.train()
        found.append((state(student), torch.tensor([x["loss"] for x in trainer.state.log_history if "loss" in x])))
    start = state(model(2, width=16))
    assert (found[0][0] - start).norm() > 1e-2
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
    assert (found[0][0] - found[1][0]).norm() < 1e-4 * (found[0][0] - start).norm()


def test_two_processes_are_one(tmp_path):
    script, root = Path(__file__).with_name("two_processes.py"), Path(__file__).parents[2]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(tmp_path / "found.pt")]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launch], capture_output=True, text=True, env=os.environ | threads, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt")
    for name, (model, _) in CASES.items():
        alone, start = train(name, 4), state(model(2, width=16))
        assert (alone[:-2] - start).norm() > 1e-2
        torch.testing.assert_close(found[name], alone, rtol=1e-3, atol=1e-4)


def test_the_gradient_of_projections_is_that_of_one_step(tmp_path):
    student, teacher, data = text_classifier(2, width=16), text_classifier(1), sentences(16)
    options = {"learning_rate": 1e-12, "per_device_train_batch_size": 16}
    trainer = trainer_of(student, data, tmp_path, teacher, num_train_epochs=3, **options)
    sizes, projection = [], next(trainer.projections.parameters())
    trainer.create_optimizer().register_step_pre_hook(lambda *_: sizes.append(projection.grad.norm().item()))
    trainer.train()
    assert len(sizes) == 3 and max(sizes) == pytest.approx(min(sizes), rel=1e-3)


@pytest.mark.parametrize("name", ["questions", "texts", "sentences"])
def test_a_stored_teacher_and_one_that_is_asked_train_alike(name, tmp_path):
    model, rows = TASKS[name]
    data, teacher, states = rows(16), model(1), []
    store = TeacherStore.build(tmp_path, teacher, data, k=1 << 20)
    for said in (teacher, store):
        student = model(2)
        train_student(student, data, teacher=said, loss=DistillLoss(alpha=0.2), steps=4, batch_size=4)
        states.append(state(student))
    assert (states[0] - states[1]).norm() < 0.02 * (states[0] - state(model(2))).norm()


def test_the_same_seed_gives_the_same_bytes_and_the_callers_randomness_is_left_alone():
    data, found, drawn = sentences(16), [], []
    for seed in (3, 3, 4):
        random.seed(5)
        np.random.seed(5)
        student, teacher = text_classifier(2, width=16), text_classifier(1)
        torch.manual_seed(5)
        train_student(student, data, held_out=data, teacher=teacher, loss=FULL, seed=seed, batch_size=4)
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
        found.append(bytes_of(student))
    assert same(found[0], found[1]) and not same(found[0], found[2])
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert set(drawn) == {(torch.rand(1).item(), random.random(), np.random.rand())}


def test_projections_are_trained_and_never_saved_with_the_student(tmp_path):
    student, teacher, data = text_classifier(2, width=16), text_classifier(1), sentences(8)
    names = set(student.state_dict())
    trainer = trainer_of(student, data, tmp_path, teacher, max_steps=2)
    before = [p.detach().clone() for p in trainer.projections.parameters()]
    trainer.train()
    assert before and all(not torch.equal(a, b) for a, b in zip(before, trainer.projections.parameters(), strict=True))
    assert set(student.state_dict()) == names
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert same(bytes_of(again), bytes_of(student))
    files = {p.name for p in (tmp_path / "saved").iterdir()}
    assert trainer_file.STATE not in files and files >= {"config.json", "model.safetensors"}


def test_a_student_with_adapters_learns_and_its_base_stays(tmp_path):
    peft = pytest.importorskip("peft")
    data, base = sentences(24), text_classifier(2)
    before = bytes_of(base)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    student = peft.get_peft_model(copy.deepcopy(base), config)
    options = {"epochs": 6, "learning_rate": 5e-3, "batch_size": 8}
    report = train_student(student, data, held_out=data, teacher=text_classifier(1), loss=FULL, **options)
    assert report.best_epoch > 0 and report.after["loss"] < 0.9 * report.before["loss"]
    left = student.get_base_model().bert.encoder.layer[0].attention.self.query.base_layer.weight
    assert torch.equal(left, before["bert.encoder.layer.0.attention.self.query.weight"])
    student.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    logits = (model(**data.inputs).logits for model in (again, student.eval()))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_a_packed_student_learns_and_stays_packed(tmp_path):
    data, teacher = sentences(32), text_classifier(1)
    student = pack_model(text_classifier(2)).eval()
    signs = {n: m.packed_state()["weight"].clone() for n, m in packed_modules(student).items()}
    assert signs and student.is_quantized
    report = train_student(student, data, held_out=data, teacher=teacher, loss=FULL, epochs=16, batch_size=4)
    assert report.best_epoch > 0 and report.after["loss"] < 0.9 * report.before["loss"]
    after = {n: m.packed_state()["weight"] for n, m in packed_modules(student).items()}
    assert after.keys() == signs.keys() and any(not torch.equal(after[n], signs[n]) for n in signs)
    assert student.is_quantized and not student.training
    student.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**data.inputs).logits, student(**data.inputs).logits, rtol=1e-3, atol=1e-3)


def test_a_student_may_be_better_than_its_teacher_where_labels_put_it_right():
    """The teacher calls the brightest images the darkest; its other classes are right."""
    data, held = images(96), images(96, seed=1)
    teacher = image_classifier(1)
    wrong = replace(data, labels=torch.where(data.labels == 2, 0, data.labels))
    train_student(teacher, wrong, loss=DistillLoss(alpha=1.0), epochs=10, learning_rate=2e-3)
    accuracy = (teacher(**held.inputs).logits.argmax(-1) == held.labels).float().mean().item()
    assert 0.6 < accuracy < 0.72
    found = {}
    for right in (True, False):
        loss, options = DistillLoss(alpha=0.0, label_correction=right), {"epochs": 10, "learning_rate": 2e-3}
        report = train_student(image_classifier(2), data, held_out=held, teacher=teacher, loss=loss, **options)
        found[right] = report.after["accuracy"]
    assert found[True] > 0.95 and found[False] < accuracy + 0.1


def test_calibration_reaches_the_loss():
    data, teacher = sentences(24), text_classifier(1)
    said, states = take_said(teacher, data), []
    for calibration in (None, calibrate_teacher(said, data)):
        student = text_classifier(2)
        train_student(student, data, teacher=said, loss=DistillLoss(alpha=0.0), steps=3, calibration=calibration)
        states.append(state(student))
    assert not torch.equal(*states)


def test_rationales_are_learnt_beside_the_answers():
    data = texts(24)
    told = torch.arange(24) % 2 == 1
    reasons, answers = (replace(data.rows(which.nonzero()[:, 0]), rationales=None) for which in (told, ~told))
    found = {}
    for weight in (0.0, 1.0):
        student, loss = language_model(2), DistillLoss(alpha=1.0, rationale=weight)
        train_student(student, replace(data, rationales=told), loss=loss, epochs=12, learning_rate=2e-3)
        found[weight] = [student(**d.inputs, labels=d.labels).loss.item() for d in (reasons, answers)]
    assert found[1.0][0] < 0.7 * found[0.0][0] and found[0.0][1] < 3


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_that_was_stopped_ends_as_if_it_was_not(packed, tmp_path, monkeypatch):
    data, teacher = sentences(16), text_classifier(1)
    options = {"held_out": data, "teacher": teacher, "loss": FULL, "epochs": 4, "batch_size": 4}

    def fresh():
        return pack_model(text_classifier(2)) if packed else text_classifier(2, width=16)

    whole, stopped = fresh(), fresh()
    wanted = train_student(whole, data, **options)
    steps, step = [], StudentTrainer.training_step

    def failing(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 11:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StudentTrainer, "training_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train_student(stopped, data, output_dir=tmp_path, **options)
    assert same(bytes_of(stopped), bytes_of(fresh()))
    again = fresh()
    report = train_student(again, data, output_dir=tmp_path, resume=True, **options)
    assert len(steps) == 10 + 1 + 8
    assert same(bytes_of(again), bytes_of(whole))
    assert (report.best_epoch, report.before, report.after) == (wanted.best_epoch, wanted.before, wanted.after)
    with pytest.raises(OutputExistsError):
        train_student(again, data, output_dir=tmp_path, **options)
    with pytest.raises(ConfigError, match="another schedule"):
        train_student(again, data, output_dir=tmp_path, resume=True, **(options | {"epochs": 5}))
    next(tmp_path.glob("checkpoint-*/" + trainer_file.STATE)).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        train_student(again, data, output_dir=tmp_path, resume=True, **options)


def test_nothing_is_kept_that_is_no_better(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, data = text_classifier(2), sentences(16)
    before = bytes_of(student)
    report = train_student(student, data, held_out=data, loss=DistillLoss(alpha=1.0), learning_rate=30.0, warmup=0)
    assert report.best_epoch == 0 and report.before == report.after and same(bytes_of(student), before)
    assert not list(tmp_path.iterdir())


def test_a_student_in_half_precision_is_trained_in_full():
    student, data = text_classifier(2).to(torch.bfloat16), sentences(16)
    report = train_student(student, data, held_out=data, loss=DistillLoss(alpha=1.0), epochs=6, batch_size=4)
    assert report.best_epoch > 0 and student.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("student", "data", "teacher", "options", "message"),
    [
        (
            language_model,
            texts,
            lambda: language_model(vocab=40),
            {},
            "32 tokens and the teacher with 40; give the ids",
        ),
        (text_classifier, sentences, lambda: text_classifier(classes=3), {}, "2 classes and the teacher with 3"),
        (detector, scenes, lambda: detector(queries=4), {}, "6 queries and the teacher 4"),
        (detector, scenes, lambda: detector(classes=5), {}, "3 classes and the teacher with 5"),
        (image_encoder, lambda: images(8, 0, "image-embedding"), image_encoder, {}, "give prototypes or alpha=0"),
        (text_classifier, sentences, lambda: None, {}, "alpha=0.5 .* need a teacher"),
        (text_classifier, sentences, lambda: None, {"loss": DistillLoss(alpha=1, hidden=1)}, "need a teacher"),
        (text_classifier, sentences, text_classifier, {"steps": 0}, "`steps`"),
        (text_classifier, sentences, text_classifier, {"warmup": 1.0}, "`warmup`"),
        (text_classifier, sentences, text_classifier, {"resume": True}, "output_dir"),
        (text_classifier, sentences, text_classifier, {"held_out": texts()}, "same task"),
        (language_model, texts, language_model, {"keep_ids": torch.arange(32) + 9}, "keep_ids must be tokens"),
    ],
)
def test_what_does_not_fit_is_refused(student, data, teacher, options, message):
    with pytest.raises(ConfigError, match=message):
        train_student(student(), data(), teacher=teacher(), **options)


def test_labels_and_images_that_do_not_fit_are_refused():
    teacher, data = text_classifier(1), sentences(8)
    wrong = replace(data, labels=data.labels + 1)
    with pytest.raises(ConfigError, match="labels run from 1 to 2, and there are 2 classes"):
        train_student(text_classifier(), wrong, teacher=teacher)
    with pytest.raises(ConfigError, match="the rows have none"):
        train_student(text_classifier(), replace(data, labels=None), teacher=teacher)
    with pytest.raises(ConfigError, match="token 7 is a label, and the answers are"):
        train_student(language_model(), replace(questions(8), answers=(9, 11)), teacher=language_model(1))
    with pytest.raises(ConfigError, match="vocabulary ends at 19"):
        train_student(language_model(vocab=20), texts(8), teacher=language_model(1))
    large = TaskData("image-classification", {"pixel_values": torch.zeros(4, 3, 20, 16)}, torch.arange(4) % 3)
    with pytest.raises(ConfigError, match="20 x 16, and the model takes 16 x 16"):
        train_student(image_classifier(), large, teacher=image_classifier(1))
    grey = TaskData("image-classification", {"pixel_values": torch.zeros(4, 1, 16, 16)}, torch.arange(4) % 3)
    with pytest.raises(ConfigError, match="1 channels, and the model takes 3"):
        train_student(image_classifier(), grey, teacher=image_classifier(1))
    frozen = text_classifier().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter"):
        train_student(frozen, data, teacher=teacher)


def test_what_a_teacher_said_must_be_about_these_rows(tmp_path):
    teacher, data = text_classifier(1), sentences(8)
    store = TeacherStore.build(tmp_path, teacher, data)
    with pytest.raises(ConfigError, match="another rows"):
        train_student(text_classifier(), sentences(8, seed=1), teacher=store)
    with pytest.raises(ConfigError, match="8 rows, and there are 6"):
        train_student(text_classifier(), sentences(6), teacher=store.said)
    with pytest.raises(ConfigError, match="ask with hidden=True"):
        train_student(text_classifier(), data, teacher=store, loss=FULL)
    with pytest.raises(ConfigError, match="leave layer_map out"):
        loss = replace(FULL, layer_map=(1, 2))
        train_student(text_classifier(), data, teacher=take_said(teacher, data, hidden=True), loss=loss)
    held = replace(data, labels=None)
    with pytest.raises(ConfigError, match="only be judged by a teacher that is a model"):
        train_student(text_classifier(), data, held_out=held, teacher=store)
    other = texts(8)
    labels = other.labels.clone()
    labels[0] = IGNORED
    labels[0, 5] = 3
    said = take_said(language_model(1), replace(other, labels=labels))
    with pytest.raises(ConfigError, match="other answers"):
        train_student(language_model(), other, teacher=said)


def test_a_trimmed_student_learns_from_a_teacher_with_all_tokens():
    keep = torch.cat([torch.arange(10), torch.arange(40, 62)])
    teacher, data = language_model(1, vocab=70), texts(16)
    options = {"keep_ids": keep, "loss": DistillLoss(alpha=0.0), "epochs": 4, "batch_size": 4, "learning_rate": 2e-3}
    held = replace(texts(16, seed=1), labels=None)
    report = train_student(language_model(2), data, held_out=held, teacher=teacher, **options)
    assert report.after["loss"] < report.before["loss"]


def test_options_that_would_lose_something_are_refused(tmp_path):
    for option in ({"remove_unused_columns": True}, {"load_best_model_at_end": True, "eval_strategy": "no"}):
        with pytest.raises(ConfigError, match="off"):
            trainer_of(text_classifier(), sentences(8), tmp_path, text_classifier(1), **option)
    trainer = trainer_of(text_classifier(), sentences(8), tmp_path, loss=DistillLoss(alpha=1.0))
    assert trainer.evaluate()["eval_accuracy"] >= 0
