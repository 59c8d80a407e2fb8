"""Methods by the names that answers are kept under and that the page speaks of."""

from __future__ import annotations

STUDENT, FEW_SHOT, TUNED = "student", "teacher few-shot", "teacher fine-tuned"
ALONE, ONE_BIT = "student without distillation", "student 1-bit"
RAW = f"{FEW_SHOT}, as it answers"
"""The teacher without what validation labels could tell it: the answer with the higher probability."""
BOOSTING, MAJORITY = "gradient boosting", "majority"
