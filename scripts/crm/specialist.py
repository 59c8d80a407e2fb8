"""One task from its table to the answers of every method: teacher few-shot and fine-tuned, students, baselines.

What a method says about validation and test rows is a file of its own, so a run that was stopped goes on:

    rows/       train, validation and test rows as jsonl, records.json, teacher_prompt.txt
    work/       the folder of `hf-qep distill`: analysis, search, what the teacher says
    answers/    method.seed.npz: P(yes) of validation and test rows
    student-K/  students as they are published; tuned-K/ and one-bit-K/ likewise
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from crm.names import ALONE, FEW_SHOT, ONE_BIT, STUDENT, TUNED
from crm.prompts import ANSWERS
from crm.tabular import BASELINES, Table
from crm.tasks import Sizes, examples, write_rows

from hf_qep import QepConfig
from hf_qep.algorithms.ranks import area_under_curve
from hf_qep.cli.distill_analyze import analyze
from hf_qep.cli.distill_job import Job
from hf_qep.cli.distill_opened import Opened, open_job
from hf_qep.cli.distill_search import Wishes, search
from hf_qep.cli.distill_student import begin, load
from hf_qep.cli.distill_train import Lesson, Teaching, train
from hf_qep.cli.job import quantize_and_save
from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.reading import read_task
from hf_qep.distill.said import Said, take_said
from hf_qep.distill.samples import CAUSAL_LM, TaskData
from hf_qep.distill.student_trainer import train_student
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.source import load_processor
from hf_qep.files import write_text_aside
from hf_qep.progress import SILENT, Progress
from hf_qep.search.costs import Choice
from hf_qep.search.scoring import auc_error
from hf_qep.students.saving import load_student

METHODS = (FEW_SHOT, STUDENT, ALONE, ONE_BIT, TUNED)

CALIBRATION_ROWS = 512
LABELS = DistillLoss(alpha=1.0)


@dataclass(frozen=True)
class Mix:
    """alpha: share of the labels in what a student learns. as_it_answers: the teacher's part is what it says, which
    neither labels nor their share among the rows put right."""

    alpha: float
    as_it_answers: bool = False

    def loss(self) -> dict[str, Any]:
        """Fields of DistillLoss."""
        return {"alpha": self.alpha, "label_correction": not self.as_it_answers}

    def told(self) -> str:
        """A sentence."""
        put_right = "as it answers" if self.as_it_answers else "calibrated and put right by the labels"
        return (
            f"The student learns {self.alpha:.0%} from labels and {1 - self.alpha:.0%} from the teacher, {put_right}."
        )


FROM_LABELS = Mix(1.0)


@dataclass(frozen=True)
class Plan:
    """How much is done. seeds: of each method, by name; 0 leaves it out. tuned_rows, tuned_epochs: of the teacher.
    widths: of the student's residual stream. least_layers: below two nothing can weigh one column by another, which
    short distillations do not miss. judge_rows, trials, proxy_steps, climbers: of the search. epochs, rate, batch: of
    the student. mixes: what it may learn from, those that lean least on labels first; the area under the curve on the
    validation rows chooses. bits_epochs: of the 1-bit student. room: tokens of prompt and row together. share: how many
    times fewer parameters than the teacher a student has."""

    sizes: Sizes
    seeds: dict[str, int]
    tuned_rows: int = 4_000
    tuned_epochs: float = 2.0
    tuned_rate: float = 3e-4
    widths: tuple[int, ...] = (32, 48)
    ffn: tuple[int, ...] = (64, 128, 192)
    least_layers: int = 2
    judge_rows: int = 384
    trials: int = 24
    proxy_steps: int = 180
    climbers: int = 9
    epochs: float = 6.0
    rate: float = 4e-3
    batch: int = 64
    mixes: tuple[Mix, ...] = (Mix(0.2), Mix(0.5), Mix(0.8))
    bits_epochs: float = 3.0
    room: int = 448
    share: int = 100


@dataclass
class Specialist:
    """One task. folder: of everything about it. teacher: folder of the generalist."""

    table: Table
    teacher: Path
    folder: Path
    plan: Plan
    progress: Progress = SILENT

    def run(self) -> None:
        """Everything that is not there yet."""
        self.prepare()
        for name in BASELINES:
            for seed in range(self._seeds(name)):
                self._baseline(name, seed)
        for seed in range(self._seeds(FEW_SHOT)):
            self.once(FEW_SHOT, seed, lambda s=seed: self._few_shot(s))
        for seed in range(self._seeds(STUDENT)):
            self.once(STUDENT, seed, lambda s=seed: self._student(s))
            if seed < self._seeds(ALONE):
                self.once(ALONE, seed, lambda s=seed: self._alone(s))
            if seed < self._seeds(ONE_BIT):
                self.once(ONE_BIT, seed, lambda s=seed: self._one_bit(s))
        for seed in range(self._seeds(TUNED)):
            self.once(TUNED, seed, lambda s=seed: self._tuned(s))

    def units(self) -> list[Path]:
        """Files of everything that is to be done."""
        return [self._path(name, seed) for name in [*BASELINES, *METHODS] for seed in range(self._seeds(name))]

    def answers(self, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """P(yes) of validation and test rows, for each seed of a method."""
        found = [np.load(self._path(name, seed)) for seed in range(self._seeds(name))]
        return [(values["valid"], values["test"]) for values in found]

    def facts_of(self, baseline: str) -> dict[str, Any]:
        """What else is known of a baseline."""
        return json.loads(self._path(baseline, 0).with_suffix(".json").read_text(encoding="utf-8"))

    def told(self) -> str:
        """How many examples the teacher was shown, and what the student learned from."""
        shots = [
            json.loads((self.folder / "rows" / f"shots-{number}.json").read_text(encoding="utf-8"))["shots"]
            for number in range(self._seeds(FEW_SHOT))
        ]
        shown = f" Examples in the teacher's prompt: {', '.join(map(str, shots))}." if shots else ""
        return shown + (f" {self.mix.told()}" if self._seeds(STUDENT) else "")

    def once(self, name: str, seed: int, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> None:
        """What a method says about validation and test rows, as a file, unless it is there."""
        path = self._path(name, seed)
        if path.exists():
            return
        started = time.monotonic()
        valid, test = make()
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(".aside.npz")
        np.savez(aside, valid=valid, test=test, seconds=time.monotonic() - started)
        aside.replace(path)

    def prepare(self) -> None:
        """Rows and prompts as files, and the folder of the distillation."""
        rows = self.folder / "rows"
        rows.mkdir(parents=True, exist_ok=True)
        if not (rows / "test.jsonl").exists():
            records = self.table.records()
            records.save(rows / "records.json")
            for number in range(max(1, self._seeds(FEW_SHOT))):
                text, shots = examples(self.table, records, self.tokenizer, self.plan.room, number)
                write_text_aside(rows / _prompt_name(number), text)
                write_text_aside(rows / f"shots-{number}.json", json.dumps({"shots": shots}))
            for name in ("train", "valid", "test"):
                write_rows(rows / f"{name}.jsonl", records, getattr(self.table, name))
        if not (self.folder / "work" / "job.json").exists():
            analyze(self._job(), self.folder / "work", 16, False, True, self.progress)

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's."""
        return load_processor(self.teacher)

    @cached_property
    def opened(self) -> Opened:
        """The folder of the distillation."""
        return open_job(self.folder / "work")

    @cached_property
    def valid(self) -> TaskData:
        """Validation rows, which thresholds are chosen by, in the teacher's tokens."""
        return read_task(str(self.folder / "rows" / "valid.jsonl"), CAUSAL_LM, self.opened.processor, answers=ANSWERS)

    @cached_property
    def choice(self) -> Choice:
        """The student that the search picks."""
        if not (self.folder / "work" / "search" / "result.json").exists():
            search(self.opened, self._wishes(), self.progress)
        return self.opened.chosen("accurate", None)

    @cached_property
    def lesson(self) -> Lesson:
        """That student before it learns, with its rows."""
        return Lesson(self.opened, begin(self.opened, self.choice), self._teaching(0, FROM_LABELS), self.progress)

    @cached_property
    def mix(self) -> Mix:
        """The first of the plan that is within a standard error of the best, by the area on the validation rows."""
        path = self.folder / "mix.json"
        if not path.exists():
            mixes, yes = self.plan.mixes, self.table.valid.yes
            areas = [self._area(mix) for mix in mixes] if len(mixes) > 1 else [0.5]
            least = max(areas) - auc_error(max(areas), int(yes.sum()), int((~yes).sum()))
            tried = [asdict(mix) | {"validation AUC": area} for mix, area in zip(mixes, areas, strict=True)]
            chosen = next(mix for mix, area in zip(mixes, areas, strict=True) if area >= least)
            write_text_aside(path, json.dumps({"chosen": asdict(chosen), "tried": tried}, indent=1) + "\n")
        return Mix(**json.loads(path.read_text(encoding="utf-8"))["chosen"])

    def _area(self, mix: Mix) -> float:
        start = copy.deepcopy(self.lesson.start)
        lesson = Lesson(self.opened, start, self._teaching(0, mix), self.progress)
        student, _ = lesson.teach(start.student, DistillLoss(**mix.loss()), f"mix-{mix.alpha:g}-{mix.as_it_answers:d}")
        lesson.forget()
        said = self._says(student, start.rows(self.valid))
        return area_under_curve(said, self.table.valid.yes)

    def _job(self) -> Job:
        rows = self.folder / "rows"
        return Job(
            str(self.teacher),
            CAUSAL_LM,
            str(rows / "train.jsonl"),
            test=str(rows / "test.jsonl"),
            answers=ANSWERS,
            prompt=(rows / _prompt_name(0)).read_text(encoding="utf-8"),
        )

    def _wishes(self) -> Wishes:
        plan, longest = self.plan, self.opened.train.inputs["input_ids"].shape[1]
        return Wishes(
            limits={"parameters": self.opened.teacher.num_parameters() // plan.share},
            workload={"batch": 1, "sequence": longest, "threads": 1},
            space={
                "hidden_sizes": plan.widths,
                "kv_heads": (1,),
                "q_per_kv": (1,),
                "ffn": plan.ffn,
                "min_layers": plan.least_layers,
                "skip": False,
            },
            options={"trials": plan.trials, "sampler": "nsga2", "seed": 0},
            proxy={"batch_size": 32, "seed": 0, "judge_rows": plan.judge_rows},
            proxy_steps=plan.proxy_steps,
            climbers=plan.climbers,
            trim_vocabulary=True,
            storage=None,
        )

    def _teaching(self, seed: int, mix: Mix, epochs: float | None = None) -> Teaching:
        plan = self.plan
        schedule = {
            "epochs": epochs or plan.epochs,
            "learning_rate": plan.rate,
            "batch_size": plan.batch,
            "accumulate": 1,
            "seed": seed,
        }
        return Teaching(mix.loss(), schedule, calibrate=False if mix.as_it_answers else None, resume=True)

    def _baseline(self, name: str, seed: int) -> None:
        def make() -> tuple[np.ndarray, np.ndarray]:
            fitted = BASELINES[name](self.table, seed)
            write_text_aside(self._path(name, seed).with_suffix(".json"), json.dumps({"parameters": fitted.parameters}))
            return fitted.probability(self.table.valid.rows), fitted.probability(self.table.test.rows)

        (self.folder / "answers").mkdir(exist_ok=True)
        self.once(name, seed, make)

    def _few_shot(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        text = (self.folder / "rows" / _prompt_name(seed)).read_text(encoding="utf-8")
        opened = replace(self.opened, job=replace(self.opened.job, prompt=text))
        valid = self._says(opened.asked, self.valid)
        if seed == 0:  # the prompt that students learn behind, so the folder of the distillation knows what it says
            return valid, _yes(self.lesson.said("test"))
        return valid, self._says(opened.asked, self.opened.test)

    def _tuned(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        plan = self.plan
        teacher = copy.deepcopy(self.opened.teacher)
        rows = self.opened.train.rows(slice(0, None, max(1, len(self.opened.train) // plan.tuned_rows)))
        train_student(
            teacher,
            rows,
            held_out=self.opened.judge.rows(slice(0, 512)),
            loss=LABELS,
            epochs=plan.tuned_epochs,
            learning_rate=plan.tuned_rate,
            batch_size=32,
            seed=seed,
            progress=self.progress,
        )
        return self._says(teacher, self.valid), self._says(teacher, self.opened.test)

    def _student(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Taught and saved as it is published, with what a card says of it."""
        out = self.folder / f"student-{seed}"
        if not (out / "distillation.json").exists():
            teaching = self._teaching(seed, self.mix)
            train(self.opened, self.choice, None, teaching, out, overwrite=True, progress=self.progress)
        return self._student_says(load(self.opened, str(out)))

    def _alone(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        start = copy.deepcopy(self.lesson.start)
        lesson = Lesson(self.opened, start, self._teaching(seed, FROM_LABELS), self.progress)
        student, _ = lesson.teach(start.student, LABELS, f"alone-{seed}")
        lesson.forget()
        return self._student_says(replace(start, student=student))

    def _one_bit(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The student with signs for weights, taught once more so."""
        source, packed = self.folder / f"student-{seed}", self.folder / f"signs-{seed}"
        if not (packed / "config.json").exists():
            quantize_student(source, packed, self.lesson)
        out = self.folder / f"one-bit-{seed}"
        if not (out / "distillation.json").exists():
            teaching = self._teaching(seed, self.mix, self.plan.bits_epochs)
            train(self.opened, None, str(packed), teaching, out, overwrite=True, progress=self.progress)
        return self._student_says(load(self.opened, str(out)))

    def _student_says(self, start: Any) -> tuple[np.ndarray, np.ndarray]:
        valid, test = (self._says(start.student, start.rows(part)) for part in (self.valid, self.opened.test))
        return valid, test

    def _says(self, model: Any, data: TaskData) -> np.ndarray:
        """P(yes) of every row, float64."""
        return _yes(take_said(model, data, batch_size=64, progress=self.progress))

    def _seeds(self, name: str) -> int:
        return self.plan.seeds.get(name, 1 if name in BASELINES else 0)

    def _path(self, name: str, seed: int) -> Path:
        return self.folder / "answers" / f"{name.replace(' ', '-')}.{seed}.npz"


def quantize_student(source: Path, out: Path, lesson: Lesson) -> None:
    """Pack a student's linears to signs, calibrated on its own rows; its map of tokens goes with it."""
    rows = lesson.parts["train"].rows(slice(0, CALIBRATION_ROWS))
    student = load_student(source)
    config = QepConfig(method="sign", num_samples=len(rows), batch_size=64)
    calibration = load_calibration(dict(rows.inputs), None, num_samples=len(rows), seq_len=1, seed=0)
    quantize_and_save(
        student,
        lesson.start.processor,
        config,
        out,
        base_model=source.name,
        base_folder=source,
        calibration=calibration,
        overwrite=True,
    )
    lesson.start.vocabulary.save(out)


def _yes(said: Said) -> np.ndarray:
    """P(yes) of every row, float64."""
    return said.log_p.double().softmax(-1)[:, 1].numpy()


def _prompt_name(number: int) -> str:
    return f"teacher_prompt{f'-{number}' if number else ''}.txt"
