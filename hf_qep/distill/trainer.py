"""transformers' Trainer with the distance to a teacher as its loss.

Accelerate places, shards and mixes precision as in any Trainer; nothing here knows of devices. The teacher is either a
model, asked at every step, or what one said about every row (`teacher.Teacher`, `said.Said`), which costs no second
forward pass. `QepDistillTrainer` brings a model's outputs close to the teacher's, `StudentTrainer` learns a task.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from hf_qep.algorithms.distillation import top_classes
from hf_qep.distill.objective import Objective, metrics
from hf_qep.distill.said import LiveTeacher, Said
from hf_qep.distill.samples import TaskData
from hf_qep.distill.teacher import Teacher
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.progress import Bar

ROW = "row"
"""Key of the inputs that says which row of the teacher they belong to."""
STATE = "training.safetensors"
"""File of a checkpoint with what trains, the projections and the best state so far."""


class GroupedTrainer(Trainer):
    """Trainer whose optimiser may get its groups of parameters from outside."""

    parameter_groups: Callable[[], list[dict[str, Any]]] | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adam over the groups that were given, without weight decay; transformers' own choice otherwise."""
        if self.parameter_groups is None or self.optimizer is not None:
            return super().create_optimizer(model)
        options = {"betas": (self.args.adam_beta1, self.args.adam_beta2), "eps": self.args.adam_epsilon}
        self.optimizer = torch.optim.Adam(self.parameter_groups(), fused=True, **options)  # a tenth of the time
        return self.optimizer


class QepDistillTrainer(GroupedTrainer):
    """Trainer that brings a model's outputs close to a teacher's.

    teacher: a model with the same vocabulary, or the outputs of one; the data then carries the number of each row
    under `row`, and `remove_unused_columns` must be off. parameter_groups: gives the optimiser its groups, each with
    its own "lr", when training starts; the rates of `args` otherwise. dropout: False trains the model that will be
    used. Other arguments: see transformers. Raises ConfigError for columns that would be removed.
    """

    loss_is_scaled_for_ga = False  # the mean over a batch's tokens

    def __init__(
        self,
        *args: Any,
        teacher: Teacher | nn.Module,
        parameter_groups: Callable[[], list[dict[str, Any]]] | None = None,
        dropout: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.label_names, self.can_return_loss = [], True  # evaluation has no labels, and compute_loss needs none
        if isinstance(teacher, Teacher) and self.args.remove_unused_columns:
            raise ConfigError(f"remove_unused_columns must be False: the column `{ROW}` says what the teacher answered")
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)
            teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self.teacher, self.parameter_groups, self.dropout = teacher, parameter_groups, dropout

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Mean distance over the tokens that attention_mask keeps."""
        rows, mask = inputs.pop(ROW, None), inputs.get("attention_mask")
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        if not self.dropout:
            model.eval()
        output = model(**inputs)
        said, rows = (self._said(inputs), slice(None)) if rows is None else (self.teacher, rows)
        loss = said.loss(output, rows, mask)
        return (loss, output) if return_outputs else loss

    def _said(self, inputs: dict[str, Any]) -> Teacher:
        if isinstance(self.teacher, Teacher):
            raise ConfigError(f"the data has no column `{ROW}`, so what the teacher said cannot be found")
        with torch.no_grad():
            output = self.teacher(**inputs)
        logits = getattr(output, "logits", None)
        return Teacher(output[0] if logits is None else top_classes(logits, logits.shape[-1]))


class StudentTrainer(GroupedTrainer):
    """Trainer of a student for a task, with or without a teacher.

    The loss of a step is divided by all its answers, of every accumulated batch and every process, so that it is the
    same step however it is cut up. objective: the loss. teacher: a model that is asked, or what one said about every
    row of the training data, found by their numbers under `row`. held_out_said: what it said about the rows of the
    evaluation, which then carry numbers too. keep_ids: see `LiveTeacher`. parameter_groups: see QepDistillTrainer.
    dropout: False trains the model that will be used. best: its state is part of a checkpoint. A checkpoint holds what
    trains, not a model; `save_model` saves the student as in any Trainer. Projections are in the former only. Raises
    ConfigError for options that would remove columns or load a model from a checkpoint.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        teacher: nn.Module | Said | None = None,
        held_out_said: Said | None = None,
        keep_ids: Tensor | None = None,
        parameter_groups: Callable[[], list[dict[str, Any]]] | None = None,
        dropout: bool = False,
        best: KeepBest | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, data_collator=collate, compute_metrics=_metrics_of, **kwargs)
        if self.args.remove_unused_columns or self.args.load_best_model_at_end:
            raise ConfigError("a student is trained with remove_unused_columns and load_best_model_at_end off")
        self.model_accepts_loss_kwargs = False  # answers are counted here
        self.objective, self.parameter_groups, self.dropout, self.best = objective, parameter_groups, dropout, best
        self.said, self.held_out_said = teacher, held_out_said
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)
            teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
            options = {"keep_ids": keep_ids, "hidden": objective.config.needs_hidden}
            self.said = LiveTeacher(teacher, objective.task, objective.answers, **options)
        self.projections = objective.projections
        if self.projections is not None and len(list(self.projections.parameters())):
            objective.projections = self.accelerator.prepare_model(self.projections)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Batches of a step and the answers in them, of all processes."""
        if self.projections is not None:
            self.projections.zero_grad()  # Trainer clears the gradients of its model only
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum((self.objective.count(batch) for batch in samples), torch.tensor(0.0)).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return samples, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Sum of the loss over the answers of a batch, divided by the answers of the step, or else of the batch."""
        if not self.dropout:
            model.eval()
        output = model(**self.objective.inputs(inputs))
        said = self._said(inputs) if self.objective.config.asks else None
        count = self.objective.count(inputs) if num_items_in_batch is None else num_items_in_batch
        loss = self.objective.total(output, inputs, said) / count.clamp_min(torch.finfo(torch.float32).tiny)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # gradients are averaged over them
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """What `metrics` makes the loss of; a teacher is asked only where there are no labels."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**self.objective.inputs(batch, judged=True))
            if self.held_out_said is not None:
                said = self._rows_of(self.held_out_said, batch)
            else:
                said = None if self.objective.judges(batch) else self._said(batch)
            return None, *self.objective.measure(output, batch, said)

    def _said(self, batch: dict[str, Any]) -> Said:
        if self.said is None:
            raise ConfigError("without labels and without a teacher there is nothing to compare with; give one of them")
        return self.said.says(batch) if isinstance(self.said, LiveTeacher) else self._rows_of(self.said, batch)

    def _rows_of(self, said: Said, batch: dict[str, Any]) -> Said:
        if ROW not in batch:
            raise ConfigError(f"the data has no column `{ROW}`, so what the teacher said cannot be found; give a model")
        return said.rows(batch[ROW]).to(self.args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers does, or over the groups that were given; and the projections."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and (own := self._projection_parameters()):
            optimizer.add_param_group({"params": list(own.values()), "lr": self.args.learning_rate})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student; into a checkpoint, what trains."""
        if not _internal_call or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            marks = {} if self.best is None else {"best": json.dumps([self.best.lowest, self.best.epoch])}
            tensors = {name: tensor.detach().clone().contiguous() for name, tensor in self._state().items()}
            save_file(tensors, Path(output_dir) / STATE, metadata=marks)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path, wanted = Path(resume_from_checkpoint) / STATE, self._state()
        if not path.exists():
            raise CheckpointError(f"{str(path)!r} is missing, so the training cannot go on; start it again")
        with safe_open(path, "pt") as f:
            if set(f.keys()) != set(wanted):
                raise CheckpointError(f"{str(path)!r} belongs to another student; start the training again")
            for name, tensor in wanted.items():
                tensor.copy_(f.get_tensor(name))
            if self.best is not None:
                self.best.lowest, self.best.epoch = json.loads(f.metadata()["best"])

    def _state(self) -> dict[str, Tensor]:
        trained = {f"model.{n}": p for n, p in self.model.named_parameters() if p.requires_grad}
        buffers = {f"buffer.{n}": b for n, b in self.model.named_buffers()}
        kept = {} if self.best is None else {f"best.{n}": t for n, t in enumerate(self.best.kept)}
        return trained | buffers | kept | self._projection_parameters()

    def _projection_parameters(self) -> dict[str, Tensor]:
        owner = self.projections
        return {} if owner is None else {f"projection.{n}": p for n, p in owner.named_parameters()}


def _metrics_of(found: Any) -> dict[str, float]:
    return metrics(found.predictions, found.label_ids)


class Rows(Dataset):
    """Rows of calibration inputs with their numbers. inputs: tensors whose first dimension are rows."""

    def __init__(self, inputs: dict[str, Tensor], numbers: range) -> None:
        self.inputs, self.numbers = inputs, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.numbers[index]
        return {key: value[row] for key, value in self.inputs.items()} | {ROW: torch.tensor(row)}


class TaskRows(Dataset):
    """Rows of a task. numbered: with their numbers, under which a teacher's words are found."""

    def __init__(self, data: TaskData, numbered: bool = True) -> None:
        self.data, self.numbered = data, numbered

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        data = self.data
        row: dict[str, Any] = {name: value[index] for name, value in data.inputs.items()}
        if data.labels is not None:
            row["labels"] = data.labels[index]
        if data.rationales is not None:
            row["rationales"] = data.rationales[index]
        return row | ({ROW: torch.tensor(index)} if self.numbered else {})


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of rows; labels that are no tensors stay a list."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: torch.stack(c) if isinstance(c[0], Tensor) else c for name, c in columns.items()}


class StepBar(TrainerCallback):
    """Shows the steps of a training."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        self.bar.advance()


class KeepBest(TrainerCallback):
    """Copies, in memory, what trains whenever an evaluation is better than all before.

    parameters: and any other tensors that change. lowest: loss that has to be beaten. `epoch` is the best one, or the
    one that it is in the middle of, 0 if none was better.
    """

    def __init__(self, parameters: list[Tensor], lowest: float, seen: Callable[[int, float], None]) -> None:
        self.parameters, self.lowest, self.epoch, self.seen = parameters, lowest, 0, seen
        self.kept = [p.detach().clone() for p in parameters]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Called by Trainer."""
        loss, epoch = metrics["eval_loss"], math.ceil(state.epoch)
        self.seen(epoch, loss)
        if loss < self.lowest:
            self.lowest, self.epoch = loss, epoch
            for kept, parameter in zip(self.kept, self.parameters, strict=True):
                kept.copy_(parameter.detach())

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the best state."""
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            parameter.copy_(kept)
