"""A teacher's calibration from labelled rows."""

from __future__ import annotations

from torch import Tensor

from hf_qep.algorithms.calibrated import Calibration, fit_calibration
from hf_qep.distill.said import Said, answer_labels, answer_mask
from hf_qep.distill.samples import CAUSAL_LM, IGNORED, TaskData
from hf_qep.errors import ConfigError


def calibrate_teacher(said: Said, data: TaskData) -> Calibration:
    """Temperature and bias of a teacher, from what it said about labelled rows that nothing is judged by.

    Raises ConfigError where there are no labels, where it has no classes or not all were kept, or where a class has no
    row.
    """
    if not isinstance(data.labels, Tensor) or said.log_p is None or said.log_p.ndim != 2:
        raise ConfigError(f"a teacher is calibrated by classes and their labels, and this {data.task} data has none")
    if said.index is not None:
        raise ConfigError("a calibration needs all classes of the teacher, and only the likeliest were kept")
    labels = data.labels
    if data.task == CAUSAL_LM:
        batch = dict(data.inputs) | {"labels": labels, "rationales": data.rationales}
        labels = answer_labels(batch, answer_mask(batch, data.answers is not None), data.answers)
    known = labels != IGNORED
    return fit_calibration(said.log_p[known], labels[known])
