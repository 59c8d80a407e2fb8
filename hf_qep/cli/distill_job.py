"""The folder of a distillation: what was asked for, and where everything that is found lies.

job.json    what was asked for, so that later commands need not be told again
seen.json   fingerprints of the teacher and of the rows, so that later commands see the same
analysis/   what each layer and unit of the teacher does for the task
search/     the search and its result
teacher/    what the teacher says about the rows
training/   a training that has not come to its end
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.samples import CAUSAL_LM, EMBEDDING, TASKS
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.files import write_text_aside

JOB, SEEN, ANALYSIS, SEARCH, TEACHER, TRAINING = "job.json", "seen.json", "analysis", "search", "teacher", "training"


@dataclass(frozen=True)
class Job:
    """What was asked for.

    data, test: sources of rows (`reading.read_rows`); without `test` a share `held_out` of the rows is kept for it. A
    second share judges candidates and epochs. classes: names in the order of the teacher's outputs. limit: most rows
    that are read of each source. prompt: text that the teacher reads before every row and the student never does.
    Raises ConfigError for values that are out of range, and for a prompt of another task than causal-lm.
    """

    teacher: str
    task: str
    data: str
    revision: str | None = None
    test: str | None = None
    template: str | None = None
    text: str | None = None
    label: str | None = None
    image: str = "image"
    objects: str = "objects"
    classes: tuple[str, ...] | None = None
    answers: tuple[str, ...] | None = None
    max_length: int = 512
    limit: int | None = None
    held_out: float = 0.15
    seed: int = 0
    device: str = "cpu"
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"the task must be one of {', '.join(TASKS)}, not {self.task!r}")
        if not 0 < self.held_out < 0.5:
            raise ConfigError(
                f"the share of rows that is held out must be above 0 and below 0.5, not {self.held_out:g}"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"at least 1 row must be read, not {self.limit}")
        if self.prompt is not None and self.task != CAUSAL_LM:
            raise ConfigError(f"only a teacher of {CAUSAL_LM} reads a prompt, not one of {self.task}; leave it out")

    def save(self, folder: Path) -> None:
        """Write job.json."""
        write_text_aside(folder / JOB, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Job:
        """Read job.json. Raises CheckpointError if the folder is none of a distillation."""
        try:
            values = json.loads((folder / JOB).read_text(encoding="utf-8"))
            for name in ("classes", "answers"):
                values[name] = None if values[name] is None else tuple(values[name])
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{str(folder)!r} is not the folder of a distillation ({error}); make it with hf-qep distill analyze"
            ) from error


def located(source: str) -> str:
    """A source that a later command finds from wherever it is called: the whole path of what lies on this machine."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def read_prompt(path: Path) -> str:
    """The text of a file as it is, line ends included. Raises ConfigError where there is none, or not in UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the teacher's prompt {str(path)!r} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise ConfigError(f"the teacher's prompt {str(path)!r} is empty; write one, or leave it out")
    return text


def public_name(source: str) -> str:
    """What others may know a source by: its id on the Hub, or the name of a file or folder without where it lies."""
    return Path(source).resolve().name if Path(source).exists() else source


def default_loss(task: str) -> DistillLoss:
    """Half labels, half teacher; an embedding learns from the teacher alone."""
    return DistillLoss(alpha=0.0, relation=0.5) if task == EMBEDDING else DistillLoss()
