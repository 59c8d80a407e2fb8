"""Measuring what quantisation cost: text metrics, tasks, embeddings, speed and memory, in one typed record."""

from hf_qep.evaluation.pair import EvalOptions, evaluate_pair
from hf_qep.evaluation.record import EvalRecord
from hf_qep.evaluation.tasks import find_tasks

__all__ = ["EvalOptions", "EvalRecord", "evaluate_pair", "find_tasks"]
