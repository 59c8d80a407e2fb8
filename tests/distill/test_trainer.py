"""The trainer: a loss that means the same however it is put together, with a teacher in memory or written down."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hf_qep.distill.teacher import take_teacher
from hf_qep.distill.trainer import KeepBest, QepDistillTrainer, Rows
from hf_qep.errors import ConfigError
from tests.tiny_models import build_batch, build_model

ROWS = 8


class WithoutNumbers(Dataset):
    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.inputs.items()}


@pytest.fixture(scope="module")
def inputs():
    batch = build_batch("llama", batch_size=ROWS)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][::2, -5:] = 0
    return batch


@pytest.fixture
def pair():
    teacher = build_model("llama")
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.3 * p.abs().mean() * torch.randn(p.shape, generator=generator))
    return teacher, student


def trainer_of(student, teacher, data, folder, **options):
    rates = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": 0}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    named = {"remove_unused_columns": False, "dataloader_pin_memory": False}
    arguments = TrainingArguments(output_dir=str(folder), **(rates | quiet | named | options))
    return QepDistillTrainer(model=student, args=arguments, train_dataset=data, eval_dataset=data, teacher=teacher)


def test_a_teacher_in_memory_and_one_written_down_give_the_same_loss(pair, inputs, tmp_path):
    teacher, student = pair
    live = trainer_of(student, teacher, WithoutNumbers(inputs), tmp_path).evaluate()["eval_loss"]
    said = take_teacher(teacher, [inputs])
    kept = trainer_of(student, said, Rows(inputs, range(ROWS)), tmp_path).evaluate()["eval_loss"]
    logits, mask = (m(**inputs).logits.double().log_softmax(-1) for m in pair), inputs["attention_mask"]
    p, q = logits
    exact = ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()
    assert live == pytest.approx(exact.item(), rel=1e-2)
    assert kept == pytest.approx(live, rel=1e-2)


def test_training_brings_the_student_closer_and_leaves_the_teacher_as_it_is(pair, inputs, tmp_path):
    teacher, student = pair
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    trainer = trainer_of(student, teacher, WithoutNumbers(inputs), tmp_path, num_train_epochs=8)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * first
    assert all(torch.equal(before[name], p) for name, p in teacher.state_dict().items())


def test_accumulated_steps_are_the_same_steps(pair, tmp_path):
    inputs = build_batch("llama", batch_size=ROWS)
    teacher, student = pair
    states = []
    for size, steps in ((4, 1), (1, 4)):
        trained = copy.deepcopy(student)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        trainer = trainer_of(trained, teacher, WithoutNumbers(inputs), tmp_path, **options)
        trainer.train()
        states.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
    start = torch.cat([p.detach().flatten() for p in student.parameters()])
    assert (states[0] - states[1]).norm() < 0.02 * (states[0] - start).norm()


def test_the_likeliest_classes_are_kept_where_there_is_no_room_for_all(inputs):
    model = build_model("llama")
    room = inputs["input_ids"].numel() * 200  # 2 bytes for each of 128 classes would be 256
    said = take_teacher(model, [inputs], room).said
    assert said.log_p.shape[-1] == said.index.shape[-1] == 64 < model.config.vocab_size
    wanted = model(**inputs).logits.log_softmax(-1).topk(64, -1)
    torch.testing.assert_close(said.log_p.float(), wanted.values, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["bert", "bert_classifier", "vit", "cohere2"])
def test_what_a_model_says_in_batches_is_what_it_says_row_by_row(family):
    model, inputs = build_model(family), build_batch(family, batch_size=5)
    batches = [{key: value[start : start + 2] for key, value in inputs.items()} for start in (0, 2, 4)]
    teacher = take_teacher(model, batches)
    assert len(teacher) == 5
    with torch.no_grad():
        for rows in (slice(0, 5), torch.tensor([3, 1])):
            output = model(**{key: value[rows] for key, value in inputs.items()})
            assert teacher.loss(output, rows).abs() < 1e-3
        shifted = model(**{key: value[[2, 1]] for key, value in inputs.items()})
        assert teacher.loss(shifted, torch.tensor([3, 1])) > 1e-3


def test_a_teacher_written_down_needs_to_know_the_row(pair, inputs, tmp_path):
    teacher, student = pair
    said = take_teacher(teacher, [inputs])
    with pytest.raises(ConfigError, match="remove_unused_columns"):
        trainer_of(student, said, Rows(inputs, range(ROWS)), tmp_path, remove_unused_columns=True)
    with pytest.raises(ConfigError, match="`row`"):
        trainer_of(student, said, WithoutNumbers(inputs), tmp_path).evaluate()


def test_the_best_state_is_kept_and_only_if_it_is_better_than_what_was_there():
    parameter = nn.Parameter(torch.zeros(2))
    seen = []
    best = KeepBest([parameter], 1.0, lambda epoch, loss: seen.append((epoch, loss)))
    for epoch, loss in enumerate((1.5, 0.7, 0.9), 1):
        parameter.data.fill_(epoch)
        state = type("State", (), {"epoch": float(epoch)})
        best.on_evaluate(None, state, None, {"eval_loss": loss})
    best.restore()
    assert best.epoch == 2 and parameter.tolist() == [2, 2]
    assert seen == [(1, 1.5), (2, 0.7), (3, 0.9)]
