"""A student while it learns, and as it was meant to be afterwards."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_qep.distill.trainable import BETAS, Trainable, nothing_else_trains
from hf_qep.errors import ConfigError
from hf_qep.modules import QepLinear, cast_weights, packed_modules

START = 0.25
"""Size of a latent whose weight is not known any more, in units of its scale. A quarter left a packed teacher of 32
inputs per row 0.16 nats on a small task where 1 left 0.36, with one word of signs in four unchanged;
less turned nearly all words."""


@dataclass(frozen=True)
class Learning:
    """What `learning` gives.

    tensors: all that changes. groups: of the optimiser, None for its own choice. betas: of Adam. finish: leaves the
    student as it will be stored. undo: gives it back what it had before, after `finish`.
    """

    tensors: list[Tensor]
    groups: Callable[[], list[dict[str, Any]]] | None
    betas: tuple[float, float]
    finish: Callable[[], None]
    undo: Callable[[], None]


@contextmanager
def learning(student: Any) -> Iterator[Learning]:
    """Make a student ready to learn.

    All weights train, or the adapters of a model of peft, or of a packed one its scales, norms and biases and latents
    of its signs. They train in float32, whatever they are stored in. If training fails the student is as before.
    Raises ConfigError if nothing would train.
    """
    mode, before = student.training, {name: t.detach().clone() for name, t in student.state_dict().items()}
    kind = _adapters if hasattr(student, "peft_config") else _packed if packed_modules(student) else _plain
    stored = student.dtype
    if kind is not _adapters:
        cast_weights(student, torch.float32)
    with kind(student) as (parameters, groups, settle), _not_called_quantized(student):
        if not parameters:
            raise ConfigError("no parameter of the student trains; give it some with requires_grad, or adapters")

        def finish() -> None:
            settle()
            if kind is not _adapters:
                cast_weights(student, stored)

        buffers = [b for b in student.buffers() if b.is_floating_point()]
        betas = BETAS if groups is not None else (0.9, 0.999)
        learns = Learning([*parameters, *buffers], groups, betas, finish, lambda: student.load_state_dict(before))
        try:
            yield learns
        except BaseException:
            learns.finish()
            learns.undo()
            raise
        finally:
            student.train(mode)


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Generators of torch, numpy and Python are as before afterwards."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def trainer_arguments(
    model: Any, folder: str, *, batch_size: int, betas: tuple[float, float], seed: int, **others: Any
) -> Any:
    """TrainingArguments of a training that says nothing, leaves all columns and falls down a cosine.

    batch_size: rows, for training and evaluation. others: further arguments.
    """
    from transformers import TrainingArguments

    device = model.device.type
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        lr_scheduler_type="cosine",
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=device == "cpu",
        bf16=device == "cuda" and torch.cuda.is_bf16_supported(),
        seed=seed % 2**32,
        **others,
    )


@contextmanager
def quiet_trainer() -> Iterator[None]:
    """Trainer and accelerate speak of what is of no use to someone who did not start them."""
    loggers = [logging.getLogger(name) for name in ("transformers.trainer", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def own_latents(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Latents of all sign matrices of a packed model, by linear.

    The weight that was solved for, of which `tuned_linear.latents_of` makes them, is gone; all signs are as doubtful.
    """
    found = {}
    for name, module in packed_modules(model).items():
        if isinstance(module, QepLinear):
            shape = (module.out_features, module.in_features)
            parts = module.format.unpack(module.packed_state(), module.spec, *shape)
            signs = {key: torch.where(p, START, -START) for key, p in parts.items() if p.dtype == torch.bool}
            found |= {name: signs} if signs else {}
    return found


Kind = Iterator[tuple[list[nn.Parameter], Callable[[], list[dict[str, Any]]] | None, Callable[[], None]]]


@contextmanager
def _plain(student: nn.Module) -> Kind:
    yield [p for p in student.parameters() if p.requires_grad], None, lambda: None


_adapters = _plain
"""What peft leaves with a gradient."""


@contextmanager
def _packed(student: nn.Module) -> Kind:
    with nothing_else_trains(student):
        trained = Trainable(student, own_latents(student))
        yield trained.parameters(), trained.groups, trained.finish


@contextmanager
def _not_called_quantized(student: Any) -> Iterator[None]:
    """Trainer refuses models that say they are quantised, because it does not know that latents train."""
    said = student.__dict__.pop("is_quantized", None)
    try:
        yield
    finally:
        if said is not None:
            student.is_quantized = said
