"""A quantised model against its float original: everything that is measured, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_qep.accounting import bits_report
from hf_qep.errors import ArchitectureError, CalibrationError
from hf_qep.evaluation.divergence import TextScore, compare_language_models
from hf_qep.evaluation.embeddings import EmbeddingScore, compare_encoders
from hf_qep.evaluation.environment import describe_environment, describe_model
from hf_qep.evaluation.memory import peak_bytes, weight_bytes
from hf_qep.evaluation.perplexity import Bos, text_digest, token_stream
from hf_qep.evaluation.record import Bits, Cost, EvalRecord, PairCost
from hf_qep.evaluation.speed import Speed, SpeedOptions, compare_speed, generates_text, time_once
from hf_qep.evaluation.tasks import Answers, Task, TaskResult, answer_tasks, compare_answers
from hf_qep.progress import SILENT, Progress


@dataclass(frozen=True)
class EvalOptions:
    """How to measure."""

    window: int | None = None
    """input positions per window; None: min(2048, longest input of the model)"""
    stride: int | None = None
    """new tokens scored per window; None: half the window"""
    bos: Bos = "auto"
    """beginning-of-text rule, see hf_qep.evaluation.perplexity"""
    separator: str = "\n\n"
    """joins the texts"""
    max_tokens: int | None = None
    """use the first so many tokens of the text; a beginning can be much easier than the whole"""
    batch_size: int = 4
    """windows, sentences or prompts per forward pass"""
    limit: int | None = None
    """items per task"""
    num_fewshot: int = 0
    """solved examples before each question; local task files allow 0 only"""
    seed: int = 0
    """draws the items when `limit` cuts a task"""
    speed: SpeedOptions | None = None
    """what to time; None: speed and peak memory are not measured"""


def evaluate_pair(
    float_model: nn.Module,
    quantized_model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | None,
    *,
    tasks: Sequence[Task] = (),
    options: EvalOptions | None = None,
    source: str | None = None,
    subject_name: str | None = None,
    baseline_name: str | None = None,
    subject_folder: Path | None = None,
    baseline_folder: Path | None = None,
    command: str | None = None,
    progress: Progress = SILENT,
) -> EvalRecord:
    """Measure `quantized_model` against `float_model` and return the record.

    texts: held-out documents; None leaves the text metrics null. tasks: from `find_tasks`. source: what to call the
    text in the record. *_folder: where the weight files are, for their bytes and digests.
    Raises CalibrationError for empty text, ConfigError for impossible options, NonFiniteError for a broken model.
    """
    options = options or EvalOptions()
    float_model.eval()
    quantized_model.eval()
    text, embeddings = None, None
    tokenizer = getattr(tokenizer, "tokenizer", None) or tokenizer
    if texts is not None:
        measured = compare_on_text(
            float_model, quantized_model, tokenizer, texts, options=options, source=source, progress=progress
        )
        text, embeddings = (measured, None) if isinstance(measured, TextScore) else (None, measured)
    results = compare_on_tasks(float_model, quantized_model, tokenizer, tasks, options=options, progress=progress)
    bits = bits_report(quantized_model, subject_folder)
    return EvalRecord(
        subject=describe_model(quantized_model, name=subject_name, folder=subject_folder),
        baseline=describe_model(float_model, name=baseline_name, folder=baseline_folder),
        environment=describe_environment(quantized_model),
        bits=Bits(bits["bits_linear"], bits["bits_model"], _file_bits(bits)),
        command=command,
        seeds={"tasks": options.seed},
        text=text,
        embeddings=embeddings,
        tasks=results,
        cost=_cost((float_model, quantized_model), (baseline_folder, subject_folder), tokenizer, texts, options.speed),
        notes=_notes(bits, text, options),
    )


def compare_on_text(
    float_model: nn.Module,
    quantized_model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    options: EvalOptions | None = None,
    source: str | None = None,
    progress: Progress = SILENT,
) -> TextScore | EmbeddingScore:
    """Perplexity, KL and top-1 agreement for decoder-only language models; for all others the distance of embeddings.

    Encoders embed sentences: every non-empty line of `texts` is one.
    Raises CalibrationError without a tokenizer, ArchitectureError for models that read no text.
    """
    options = options or EvalOptions()
    tokenizer = _checked_tokenizer(float_model, tokenizer)
    if not generates_text(float_model):
        return compare_encoders(
            float_model,
            quantized_model,
            tokenizer,
            [line for text in texts for line in text.splitlines()],
            max_length=min(options.window or 128, _longest_sentence(tokenizer)),
            batch_size=options.batch_size,
            source=source,
            progress=progress,
        )
    stream = token_stream(tokenizer, texts, bos=options.bos, separator=options.separator, max_tokens=options.max_tokens)
    return compare_language_models(
        float_model,
        quantized_model,
        stream,
        window=options.window,
        stride=options.stride,
        batch_size=options.batch_size,
        source=source,
        text_sha256=text_digest(texts),
        progress=progress,
    )


def compare_on_tasks(
    float_model: nn.Module,
    quantized_model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    options: EvalOptions | None = None,
    baseline_answers: dict[str, Answers] | None = None,
    progress: Progress = SILENT,
) -> tuple[TaskResult, ...]:
    """Task scores of both models. baseline_answers: the float model's, where they are known already."""
    options = options or EvalOptions()

    def answer(model: nn.Module) -> dict[str, Answers]:
        return answer_tasks(
            model,
            tokenizer,
            tasks,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            seed=options.seed,
            progress=progress,
        )

    theirs = answer(float_model) if baseline_answers is None else baseline_answers
    return compare_answers(tasks, theirs, answer(quantized_model), num_fewshot=options.num_fewshot, seed=options.seed)


def _checked_tokenizer(model: nn.Module, tokenizer: Any) -> Any:
    """The tokenizer itself, or that of a processor."""
    reads = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise ArchitectureError(f"{type(model).__name__} reads {reads}, not text; there is no measurement for it yet")
    tokenizer = getattr(tokenizer, "tokenizer", None) or tokenizer
    if tokenizer is None:
        raise CalibrationError("the model has no tokenizer, so it cannot be measured on text; add its tokenizer files")
    return tokenizer


def _longest_sentence(tokenizer: Any) -> int:
    return min(tokenizer.model_max_length, 1 << 20)  # tokenizers without a limit report 1e30


def _file_bits(bits: dict[str, Any]) -> float | None:
    size = bits.get("file_bytes")
    return 8 * size / bits["model_weights"] if size else None


def _cost(
    models: tuple[nn.Module, nn.Module],
    folders: tuple[Path | None, Path | None],
    tokenizer: Any,
    texts: Sequence[str] | None,
    options: SpeedOptions | None,
) -> PairCost:
    sizes = [bits_report(model, folder).get("file_bytes") for model, folder in zip(models, folders, strict=True)]
    if options is None:
        baseline, subject = (Cost(weight_bytes(m), size or None) for m, size in zip(models, sizes, strict=True))
        return PairCost(subject=subject, baseline=baseline)
    prompt = _prompt(tokenizer, texts, options.prompt_tokens)
    speeds: list[Speed] = compare_speed(models, prompt, options)
    costs = [
        Cost(weight_bytes(model), size or None, _peak(model, prompt, options), speed)
        for model, size, speed in zip(models, sizes, speeds, strict=True)
    ]
    return PairCost(subject=costs[1], baseline=costs[0])


def _prompt(tokenizer: Any, texts: Sequence[str] | None, tokens: int) -> Tensor:
    if not texts:
        raise CalibrationError("speed is measured on the evaluation text and there is none; give a text")
    return torch.tensor([tokenizer(texts[0][: 20 * tokens])["input_ids"][:tokens]])


def _peak(model: nn.Module, prompt: Tensor, options: SpeedOptions) -> int | None:
    device = next(model.parameters()).device
    return peak_bytes(lambda: time_once(model, prompt, options.new_tokens), device)


def _notes(bits: dict[str, Any], text: TextScore | None, options: EvalOptions) -> tuple[str, ...]:
    notes = []
    if bits["bits_linear"] is None:
        notes.append("the subject holds no packed weights: this compares two float models")
    if text is not None and options.max_tokens is not None:
        notes.append(
            f"only the first {options.max_tokens} tokens were used; the rest may differ by more than the errors"
        )
    return tuple(notes)
