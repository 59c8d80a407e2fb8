"""transformers' Trainer with the distance to a teacher as its loss.

Accelerate places, shards and mixes precision as in any Trainer; nothing here knows of devices. The teacher is either a
model, asked at every step, or what one said about every row (`teacher.Teacher`), which costs no second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from hf_qep.algorithms.distillation import top_classes
from hf_qep.distill.teacher import Teacher
from hf_qep.errors import ConfigError

ROW = "row"
"""Key of the inputs that says which row of the teacher they belong to."""


class QepDistillTrainer(Trainer):
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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adam over the groups that were given, without weight decay; transformers' own choice otherwise."""
        if self.parameter_groups is None or self.optimizer is not None:
            return super().create_optimizer(model)
        options = {"betas": (self.args.adam_beta1, self.args.adam_beta2), "eps": self.args.adam_epsilon}
        self.optimizer = torch.optim.Adam(self.parameter_groups(), fused=True, **options)  # a tenth of the time
        return self.optimizer


class Rows(Dataset):
    """Rows of calibration inputs with their numbers. inputs: tensors whose first dimension are rows."""

    def __init__(self, inputs: dict[str, Tensor], numbers: range) -> None:
        self.inputs, self.numbers = inputs, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.numbers[index]
        return {key: value[row] for key, value in self.inputs.items()} | {ROW: torch.tensor(row)}


class KeepBest(TrainerCallback):
    """Copies, in memory, what trains whenever an evaluation is better than all before.

    lowest: loss that has to be beaten. `epoch` is the best one, 0 if none was better.
    """

    def __init__(self, parameters: list[nn.Parameter], lowest: float, seen: Callable[[int, float], None]) -> None:
        self.parameters, self.lowest, self.epoch, self.seen = parameters, lowest, 0, seen
        self.kept = [p.detach().clone() for p in parameters]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Called by Trainer."""
        loss = metrics["eval_loss"]
        self.seen(round(state.epoch), loss)
        if loss < self.lowest:
            self.lowest, self.epoch = loss, round(state.epoch)
            for kept, parameter in zip(self.kept, self.parameters, strict=True):
                kept.copy_(parameter.detach())

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the best state."""
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            parameter.copy_(kept)
