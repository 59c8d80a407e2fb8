"""The last step: all packed layers are trained together, so that the model answers as the float model does.

Signs train through latents and a straight-through gradient, scales, norms and biases as they are, towards the outputs
of the float model on the calibration rows (the Kullback-Leibler divergence where it has classes). One row in eight is
never trained on; the epoch with the lowest loss on those rows is kept, as it will be stored, or none.  An epoch costs
what one forward and backward pass of the model costs, so it grows with the depth, not with its square.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_qep.architectures.skeleton import forward_replaced
from hf_qep.config import QepConfig
from hf_qep.distill.learning import quiet_trainer, trainer_arguments
from hf_qep.distill.teacher import Teacher
from hf_qep.distill.trainable import BETAS, HELD_OUT, Trainable, nothing_else_trains
from hf_qep.engine.extent import block_list
from hf_qep.engine.report import Training
from hf_qep.engine.seeds import derived_seed
from hf_qep.modules import cast_weights, packed_modules
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from hf_qep.distill.trainer import KeepBest, Rows


def distill_model(
    model: Any,
    config: QepConfig,
    inputs: dict[str, Tensor],
    teacher: Teacher,
    latents: Mapping[str, dict[str, Tensor]],
    *,
    rows_per_step: int,
    progress: Progress,
) -> Training | None:
    """Train a packed model in place for `config.distill_epochs` and report it; None if there are too few rows.

    inputs: of the model, one entry per row of the teacher. latents: of the signs that may turn, see `Trainable`.
    """
    from hf_qep.distill.trainer import KeepBest, Rows  # transformers' Trainer loads peft and datasets

    count = len(teacher)
    held = max(1, count // HELD_OUT)
    if count < 2:
        return None
    train, test = Rows(inputs, range(count - held)), Rows(inputs, range(count - held, count))
    stored = model.dtype
    solved = {name: tensor.clone() for name, tensor in _changing(model, signs=bool(latents)).items()}
    before = held_out_loss(model, test, teacher, rows_per_step)
    cast_weights(model, torch.float32)
    with nothing_else_trains(model), progress.bar("distilling", config.distill_epochs, "epoch") as bar:
        trained = Trainable(model, latents)
        best = KeepBest(trained.parameters(), before, lambda _, loss: bar.advance(1, detail=f"loss {loss:.4f}"))
        _train(model, config, trained, best, train, test, teacher, rows_per_step)
        best.restore()
        flips = trained.flips()
        trained.finish()
    cast_weights(model, stored)
    after = held_out_loss(model, test, teacher, rows_per_step)
    if not best.epoch or not after < before:  # rounding of scales and norms can undo a small gain
        model.load_state_dict(solved, strict=False)
        best.epoch, after, flips = 0, before, 0.0
    return Training(len(train), len(test), before, after, best.epoch, flips)


def _changing(model: Any, *, signs: bool) -> dict[str, Tensor]:
    """What training may change of a packed model: vectors, scales, and words of signs if these train."""
    state = model.state_dict()
    packed = {
        f"{name}.{leaf}"
        for name, module in packed_modules(model).items()
        for leaf, tensor in module.tensors().items()
        if signs or tensor.is_floating_point()
    }
    return {name: tensor for name, tensor in state.items() if tensor.ndim < 2 or name in packed}


@torch.no_grad()
def held_out_loss(model: Any, data: Rows, teacher: Teacher, rows_per_step: int) -> float:
    """Mean distance to the teacher over rows, each counted once."""
    total = 0.0
    for start in range(data.numbers.start, data.numbers.stop, rows_per_step):
        rows = slice(start, min(start + rows_per_step, data.numbers.stop))
        batch = {key: value[rows].to(model.device) for key, value in data.inputs.items()}
        loss = teacher.loss(model(**batch), rows, batch.get("attention_mask"))
        total += loss.item() * (rows.stop - rows.start)
    return total / len(data)


def _train(
    model: Any,
    config: QepConfig,
    trained: Trainable,
    best: KeepBest,
    train: Rows,
    test: Rows,
    teacher: Teacher,
    rows_per_step: int,
) -> None:
    from transformers import PrinterCallback

    from hf_qep.distill.trainer import QepDistillTrainer

    with tempfile.TemporaryDirectory(prefix="hf_qep_") as folder, quiet_trainer(), torch.random.fork_rng():
        arguments = trainer_arguments(
            model,
            folder,
            batch_size=rows_per_step,
            betas=BETAS,
            seed=derived_seed("distill", config.seed),
            num_train_epochs=config.distill_epochs,
            max_grad_norm=0.0,
            eval_strategy="epoch",
            prediction_loss_only=True,
            save_strategy="no",
        )
        trainer = QepDistillTrainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=test,
            teacher=teacher,
            parameter_groups=trained.groups,
            callbacks=[best],
        )
        trainer.remove_callback(PrinterCallback)
        # Where only scales train, each weight is made dense to bring gradients to them: those of one block at a time.
        blocks = [] if trained.linears else model.get_submodule(block_list(model))
        with torch.enable_grad(), ExitStack() as undo:
            for block in blocks:
                undo.enter_context(forward_replaced(block, partial(checkpoint, block.forward, use_reentrant=False)))
            trainer.train()
