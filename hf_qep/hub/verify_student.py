"""What can be checked again of a float student: it loads, it has the size it states, it answers; its card is its own.

Task scores need the rows of the task, which are not a part of the repository: they are said to be not checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_qep.errors import QepError
from hf_qep.hub.allowed import DISTILLATION
from hf_qep.hub.student_folder import card_problems, note_problems, read_student, result_problems, size_problems

if TYPE_CHECKING:
    from hf_qep.hub.verify import VerifyReport


def check_card(card: str, folder: Path, report: VerifyReport, *, remote_code: bool) -> None:
    """The card against distillation.json: its results, and its text as far as this version would write the same."""
    from hf_qep.hub.cards.card import is_generated

    try:
        found = read_student(folder)
    except QepError:
        return  # the file is reported by its own check
    problems = result_problems(card, found)
    report.note(f"the results of the card are those of {DISTILLATION}", problems)
    text = card_problems(card, found, remote_code=remote_code)
    if not is_generated(card):
        report.unchecked.append("'README.md' was written or changed by hand: the numbers in its text are not compared")
    elif text and not problems:
        report.unchecked.append("the text of the card: another version of hf-qep has written it, or somebody else")
    elif not text:
        report.agrees.append(f"the card is what hf-qep writes from {DISTILLATION}")


def check_student(folder: Path, report: VerifyReport) -> None:
    """Sizes that are stated, loading without code of the folder, finite weights and outputs."""
    try:
        found = read_student(folder)
        sizes = {path.name: ("", path.stat().st_size) for path in folder.iterdir() if path.is_file()}
        report.note(
            "bytes and parameters are as stated", [*size_problems(folder, found, sizes), *note_problems(folder, found)]
        )
        model = _load(folder)
    except (QepError, RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        # Whatever files that fit their checksums and lie all the same make a model or tokenizer raise.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        report.differs.append(f"it does not load: {reason}")
        return
    report.agrees.append(f"it loads as {type(model).__name__}, and its weights are finite")
    scores = ", ".join(sorted(_scores(found)))
    report.unchecked.append(f"scores of the task ({scores}): they need its rows, which are not a part of this")
    report.unchecked.append("milliseconds: they are those of the machine of the publisher")


def _load(folder: Path) -> Any:
    """The model, every weight of which is in the files. Raises CheckpointError, NonFiniteError."""
    from hf_qep.engine.source import check_finite
    from hf_qep.hub.remeasure import load_checkpoint

    model = load_checkpoint(folder, torch.float32, "cpu")
    check_finite(model)
    return model


def _scores(found: dict[str, Any]) -> set[str]:
    """Names of the scores that are stated; "majority" and "scored" are none."""
    models = found.get("models")
    student = models.get("student") if isinstance(models, dict) else None
    score = student.get("score") if isinstance(student, dict) else None
    no_scores = ("_stderr", "answers", "majority", "scored")
    named = score.items() if isinstance(score, dict) else ()
    return {str(name) for name, value in named if value is not None and not str(name).endswith(no_scores)}
