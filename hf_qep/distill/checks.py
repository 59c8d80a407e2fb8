"""Whether teacher, student and rows belong together, before anything is run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.said import Said, answer_mask
from hf_qep.distill.samples import CAUSAL_LM, DETECTION, EMBEDDING, IGNORED, TaskData, shifted
from hf_qep.distill.store import TeacherStore
from hf_qep.errors import ConfigError


def check_run(
    student: Any,
    data: TaskData,
    held_out: TaskData | None,
    teacher: nn.Module | TeacherStore | Said | None,
    loss: DistillLoss,
    keep_ids: Tensor | None,
    prototypes: Tensor | None,
) -> nn.Module | Said | None:
    """The teacher that a training asks, a model or what one said. Raises ConfigError if anything does not fit."""
    check_data(data, student, labels=loss.alpha > 0)
    _check_prototypes(data, loss, prototypes)
    if held_out is not None:
        if (held_out.task, held_out.answers) != (data.task, data.answers):
            raise ConfigError(
                "held-out rows must be of the same task, with the same answers, as those that are trained on"
            )
        check_data(held_out, student)
    silent = data.task == EMBEDDING and prototypes is None  # labels of embeddings judge nothing without prototypes
    unlabelled = held_out is not None and (held_out.labels is None or silent)
    if teacher is None and (loss.asks or unlabelled):
        what = "held-out rows without labels need" if unlabelled else f"alpha={loss.alpha:g} or hidden states need"
        raise ConfigError(f"{what} a teacher; give one, or labels with alpha=1")
    if isinstance(teacher, nn.Module):
        check_teacher(student, teacher, data.task, keep_ids)
        return teacher if loss.asks or unlabelled else None
    if unlabelled:
        raise ConfigError("held-out rows without labels can only be judged by a teacher that is a model; give labels")
    if teacher is None or not loss.asks:
        return None
    if isinstance(teacher, TeacherStore):
        teacher.check(data=data)
        teacher = teacher.said
    check_said(teacher, data, loss, student)
    return teacher


def check_judged(held_out: TaskData | None, said: Said | None, loss: DistillLoss, student: Any) -> Said | None:
    """What held-out rows are judged by besides their labels: what a teacher said about them, where the loss asks one.

    Raises ConfigError unless it belongs to these rows, or where there is no loss of answers that it could be put into.
    """
    if said is None or held_out is None or loss.alpha == 1:
        return None
    if held_out.task in (EMBEDDING, DETECTION):
        raise ConfigError(f"held-out rows of {held_out.task} are not judged by what a teacher said; leave it out")
    check_said(said, held_out, replace(loss, hidden=0.0, relation=0.0), student)
    return said


def _check_prototypes(data: TaskData, loss: DistillLoss, prototypes: Tensor | None) -> None:
    if data.task != EMBEDDING:
        return
    if prototypes is None and loss.alpha:
        raise ConfigError("labels of embeddings are learnt by their nearness to prototypes; give prototypes or alpha=0")
    if prototypes is not None and isinstance(data.labels, Tensor):
        _check_range(data.labels, len(prototypes))


def check_data(data: TaskData, model: Any, *, labels: bool = False) -> None:
    """Raise ConfigError unless a model can take the rows and have their labels as answers. labels: they are needed."""
    if labels and data.labels is None:
        raise ConfigError("the loss has a share alpha of the labels, and the rows have none; give labels or alpha=0")
    _check_images(data, model.config)
    tokens = data.inputs.get("input_ids")
    if tokens is not None and (size := vocabulary(model)) is not None and int(tokens.max()) >= size:
        raise ConfigError(f"the rows hold token {int(tokens.max())}, and the model's vocabulary ends at {size - 1}")
    if data.labels is not None and data.task != EMBEDDING:
        _check_labels(data, model)


def check_teacher(student: Any, teacher: Any, task: str, keep_ids: Tensor | None) -> None:
    """Raise ConfigError unless a teacher answers with the same classes, or queries, as the student."""
    if task == EMBEDDING:
        return
    ours, theirs = classes_of(student, task), classes_of(teacher, task)
    if keep_ids is not None:
        if len(keep_ids) and not 0 <= int(keep_ids.min()) <= int(keep_ids.max()) < theirs:
            raise ConfigError(f"keep_ids must be tokens of the teacher, 0 to {theirs - 1}")
        theirs = len(keep_ids)
    if ours != theirs:
        what, way = ("tokens", "; give the ids it keeps as keep_ids") if task == CAUSAL_LM else ("classes", "")
        raise ConfigError(f"the student answers with {ours} {what} and the teacher with {theirs}{way}")
    ours, theirs = (_queries(model.config) for model in (student, teacher))
    if task == DETECTION and ours != theirs:
        raise ConfigError(f"the student has {ours} queries and the teacher {theirs}; they are compared one by one")


def check_said(said: Said, data: TaskData, loss: DistillLoss, student: Any) -> None:
    """Raise ConfigError unless what a teacher said belongs to these rows and serves this loss."""
    if len(said) != len(data):
        raise ConfigError(f"the teacher was asked about {len(said)} rows, and there are {len(data)}")
    if data.task == CAUSAL_LM:
        batch = dict(data.inputs) | {"labels": data.labels, "rationales": data.rationales}
        if not torch.equal(answer_mask(batch, data.answers is not None).sum(1), said.counts):
            raise ConfigError("the teacher was asked about other answers than these rows have")
    if loss.needs_hidden and said.hidden is None and not (data.task == EMBEDDING and not loss.hidden):
        raise ConfigError("the loss compares hidden states, and the teacher's were not kept; ask with hidden=True")
    if loss.hidden and loss.layer_map is not None:
        raise ConfigError("only the teacher's last hidden state was kept: leave layer_map out or give the teacher")
    classes = len(data.answers) if data.answers is not None else classes_of(student, data.task)
    classes += data.task == DETECTION  # and no object
    if said.log_p is not None and said.index is None and said.log_p.shape[-1] != classes:
        raise ConfigError(f"the student answers with {classes} classes and the teacher with {said.log_p.shape[-1]}")


def vocabulary(model: Any) -> int | None:
    """Tokens that a model knows; None where it reads none."""
    return getattr(model.config.get_text_config(), "vocab_size", None)


def classes_of(model: Any, task: str) -> int:
    """Classes that a model answers with: tokens, or labels; a detector's one for no object is not counted."""
    return vocabulary(model) or 0 if task == CAUSAL_LM else model.config.num_labels


def _queries(config: Any) -> int | None:
    return getattr(config, "num_queries", getattr(config, "num_detection_tokens", None))


def _check_images(data: TaskData, config: Any) -> None:
    """A model without position embeddings of one size, a convolutional one, says no image_size, and takes any."""
    images = data.inputs.get("pixel_values")
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if images is None or size is None:
        return
    wanted = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if tuple(images.shape[-2:]) != wanted:
        raise ConfigError(f"the images are {_by(images.shape[-2:])}, and the model takes {_by(wanted)}; resize them")
    channels = getattr(config, "num_channels", images.shape[-3])
    if images.shape[-3] != channels:
        raise ConfigError(f"the images have {images.shape[-3]} channels, and the model takes {channels}")


def _by(size: Any) -> str:
    return " x ".join(str(int(side)) for side in size)


def _check_labels(data: TaskData, model: Any) -> None:
    count = classes_of(model, data.task)
    if data.task == DETECTION:
        found = torch.cat([row["class_labels"] for row in data.labels])
    else:
        found = shifted(data.labels) if data.task == CAUSAL_LM else data.labels
        told = torch.zeros(len(data), dtype=torch.bool) if data.rationales is None else data.rationales
        if data.answers is not None:
            _check_answers(found[~told], data.answers, count)
    _check_range(found, count)
    if data.classes is not None and data.task != CAUSAL_LM and len(data.classes) != count:
        raise ConfigError(f"the data has {len(data.classes)} classes and the model {count}")


def _check_answers(labels: Tensor, answers: tuple[int, ...], count: int) -> None:
    if len(set(answers)) != len(answers) or not all(0 <= token < count for token in answers):
        raise ConfigError(f"answers must be different tokens of 0 to {count - 1}, not {list(answers)}")
    other = set(labels.unique().tolist()) - {IGNORED, *answers}
    if other:
        raise ConfigError(f"token {min(other)} is a label, and the answers are {list(answers)}")


def _check_range(labels: Tensor, count: int) -> None:
    known = labels[labels != IGNORED]
    if len(known) and not 0 <= int(known.min()) <= int(known.max()) < count:
        raise ConfigError(f"labels run from {int(known.min())} to {int(known.max())}, and there are {count} classes")
