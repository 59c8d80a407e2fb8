"""Load a checkpoint as a reader would and measure a part of its record again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hf_qep.accounting import bits_report
from hf_qep.engine.headers import read_headers, read_json
from hf_qep.engine.source import check_limits, load_float_model, load_processor, model_class
from hf_qep.errors import CheckpointError, NonFiniteError
from hf_qep.evaluation.divergence import TextScore, compare_language_models
from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.perplexity import LanguageScore, TokenStream, perplexity, text_digest, token_stream
from hf_qep.evaluation.record import EvalRecord
from hf_qep.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FindText = Callable[[str | None], Sequence[str] | None]
"""Name of the recorded text -> its documents, or None."""

PERPLEXITY_TOLERANCE = 0.01
"""Relative, when all recorded tokens are measured again: other machines round otherwise."""
KL_TOLERANCE, AGREEMENT_TOLERANCE = 0.05, 0.01
"""Relative, and absolute."""
LEAST_BITS = 0.1
"""No format stores fewer bits per weight."""
STANDARD_ERRORS = 4.0
"""When only a part is measured, the recorded value must lie within so many standard errors of the difference."""


@dataclass(frozen=True)
class SampleOptions:
    """How much to measure again, and where."""

    tokens: int = 8192
    """at most so many tokens of the recorded text; 0: measure nothing again"""
    baseline: Path | None = None
    """folder of the float model, for KL and agreement"""
    device: str = "cpu"
    batch_size: int = 4
    progress: Progress = SILENT


@dataclass(frozen=True)
class Measured:
    """One number of the record beside the one measured now. allowed: largest difference that passes."""

    name: str
    recorded: float
    found: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the two are close enough."""
        return abs(self.recorded - self.found) <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "agrees": self.agrees}


class Report(Protocol):
    """Where the outcome goes."""

    differs: list[str]
    unchecked: list[str]
    measured: list[Measured]

    def note(self, what: str, problems: list[str]) -> None:
        """File the outcome of one check."""


def remeasure(folder: Path, report: Report, find_text: FindText, options: SampleOptions) -> None:
    """Load `folder`, compare bits, then perplexity (and KL, with a baseline) on the recorded text."""
    record = EvalRecord.read(folder)
    model = load_checkpoint(folder, record.subject.dtype, options.device)
    report.note("it loads through from_pretrained, with no weight missing or left over", [])
    _compare_bits(model, folder, record, report)
    if record.tasks:
        names = ", ".join(task.name for task in record.tasks)
        report.unchecked.append(f"tasks are not answered again: {names}; run: hf-qep eval")
    if record.embeddings is not None:
        report.unchecked.append("sentence embeddings are not measured again; run: hf-qep eval")
    if record.text is not None and options.tokens:
        _compare_text(model, folder, record.text, report, find_text, options)
    elif record.text is not None:
        report.unchecked.append("perplexity was not measured again, as asked")


def load_checkpoint(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    """The packed model of `folder` by transformers' own class, no code of the checkpoint run.

    Raises CheckpointError if a weight is missing, left over or of another shape, or the config describes far more than
    the files hold.
    """
    from transformers import AutoConfig

    tensors = read_headers(folder)
    check_limits(read_json(folder / "config.json"), len(tensors))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_extent(config, sum(entry.bytes for entry in tensors.values()))
        model, info = model_class(config).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=dtype,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except Exception as error:  # whatever files that lie make a model class raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"from_pretrained refuses it: {reason}") from error
    wrong = {
        key: sorted(map(str, info.get(key) or [])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    said = [f"{key.removesuffix('_keys')}: {', '.join(names[:5])}" for key, names in wrong.items() if names]
    if said:
        raise CheckpointError(f"its weights do not fit the model ({'; '.join(said)})")
    return model.eval().to(device)


def _check_extent(config: PreTrainedConfig, stored_bytes: int) -> None:
    """Weights that are in no file would be allocated all the same."""
    kind = model_class(config)
    with torch.device("meta"):
        build = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
        described = sum(parameter.numel() for parameter in build(config).parameters())
    if described * LEAST_BITS > 8 * stored_bytes:
        raise CheckpointError(
            f"config.json describes {described} weights, but the files have {stored_bytes} bytes; they do not belong "
            "together"
        )


def _compare_bits(model: PreTrainedModel, folder: Path, record: EvalRecord, report: Report) -> None:
    bits = bits_report(model, folder)
    found = {
        "bits per weight, quantised linears": (record.bits.linear, bits["bits_linear"]),
        "bits per weight, whole model": (record.bits.model, bits["bits_model"]),
        "bits per weight, files": (record.bits.file, 8 * bits["file_bytes"] / bits["model_weights"]),
    }
    for name, (recorded, counted) in found.items():
        if recorded is not None and counted is not None:
            _add(report, Measured(name, recorded, counted, 1e-6 * abs(recorded)))


def _compare_text(
    model: PreTrainedModel, folder: Path, score: TextScore, report: Report, find_text: FindText, options: SampleOptions
) -> None:
    tokenizer = load_processor(folder)
    tokenizer = getattr(tokenizer, "tokenizer", None) or tokenizer
    if tokenizer is None:
        raise CheckpointError("the record has a perplexity, but there is no tokenizer")
    stream = _stream_at_hand(tokenizer, find_text(score.source), score, report)
    if stream is None:
        return
    recorded = score.subject.nll.n
    whole = recorded <= options.tokens
    part = stream if whole else _first(stream, options.tokens)
    names = f"all {recorded} tokens" if whole else f"the first {options.tokens} of {recorded} tokens"
    baseline = _load_baseline(options, report)
    try:
        if baseline is None:
            found = perplexity(
                model,
                part,
                window=score.window,
                stride=score.stride,
                batch_size=options.batch_size,
                progress=options.progress,
            )
            pairs = _perplexity_pairs(score.subject, found, whole)
        else:
            both = compare_language_models(
                baseline,
                model,
                part,
                window=score.window,
                stride=score.stride,
                batch_size=options.batch_size,
                progress=options.progress,
            )
            pairs = _perplexity_pairs(score.subject, both.subject, whole) + _divergence_pairs(score, both, whole)
    except NonFiniteError as error:
        report.differs.append(f"the model gives no finite likelihood: {error}")
        return
    for name, recorded_value, found_value, allowed in pairs:
        if allowed is None:
            report.unchecked.append(f"{name} on {names}: too few windows for a standard error; raise --sample-tokens")
        else:
            _add(report, Measured(f"{name} on {names}", recorded_value, found_value, allowed))


def _stream_at_hand(
    tokenizer: Any, texts: Sequence[str] | None, score: TextScore, report: Report
) -> TokenStream | None:
    """The tokens that were scored; None, with the reason in the report, if they cannot be had."""
    not_again = "perplexity was not measured again:"
    if texts is None:
        report.unchecked.append(f"{not_again} the text {score.source!r} is not at hand; give it with --text")
        return None
    other = f"{not_again} the text at hand is not the one that was recorded ({score.source!r}"
    found = text_digest(texts)
    if score.text_sha256 not in (None, found):
        report.unchecked.append(f"{other}, sha256 {str(score.text_sha256)[:12]}...), but one with {found[:12]}...")
        return None
    stream = _recorded_stream(tokenizer, texts, score)
    if stream is None and score.text_sha256 is not None:
        report.differs.append(
            f"the tokenizer makes other tokens of the recorded text than the {score.subject.nll.n} that were scored"
        )
    elif stream is None:
        report.unchecked.append(f"{other}, {score.scored_bytes} bytes in {score.subject.nll.n} tokens)")
    return stream


def _load_baseline(options: SampleOptions, report: Report) -> Any:
    if options.baseline is None:
        report.unchecked.append("KL to the original was not measured again; give the original with --baseline")
        return None
    model, _ = load_float_model(options.baseline, device=options.device)
    return model


Pair = tuple[str, float, float, float | None]


def _perplexity_pairs(recorded: LanguageScore, found: LanguageScore, whole: bool) -> list[Pair]:
    """Perplexity where all was measured; else the log-likelihood, whose errors are even."""
    if whole:
        old, new = math.exp(min(700, recorded.nll.value)), math.exp(min(700, found.nll.value))
        return [("perplexity", old, new, PERPLEXITY_TOLERANCE * old)]
    return [("nats per token", recorded.nll.value, found.nll.value, _spread(recorded.nll, found.nll))]


def _divergence_pairs(recorded: TextScore, found: TextScore, whole: bool) -> list[Pair]:
    kl = KL_TOLERANCE * recorded.kl.value + 1e-6 if whole else _spread(recorded.kl, found.kl)
    same = AGREEMENT_TOLERANCE if whole else _spread(recorded.top1_agreement, found.top1_agreement)
    return [
        ("KL to the original", recorded.kl.value, found.kl.value, kl),
        ("same first choice", recorded.top1_agreement.value, found.top1_agreement.value, same),
    ]


def _spread(one: Estimate, other: Estimate) -> float | None:
    if one.stderr is None or other.stderr is None:
        return None
    return STANDARD_ERRORS * math.hypot(one.stderr, other.stderr)


def _recorded_stream(tokenizer: Any, texts: Sequence[str], score: TextScore) -> TokenStream | None:
    """The tokens that were scored, rebuilt from the text; None if number, bytes or documents show another text."""
    stream = token_stream(tokenizer, texts, bos=score.bos, separator=score.separator or "\n\n")  # type: ignore[arg-type]
    counted = stream.scored.clone()
    if stream.prefix is None:
        counted[0] = False  # has no context, so it is never scored
    ends = torch.nonzero(counted.cumsum(0) == score.subject.nll.n)
    if stream.documents != score.documents or not len(ends):
        return None
    cut = _first(stream, int(ends[0]) + 1)
    if score.scored_bytes is not None and cut.token_bytes is not None:
        scored = int(cut.token_bytes[counted[: len(cut.ids)]].sum())
        return cut if scored == score.scored_bytes else None
    return cut


def _first(stream: TokenStream, tokens: int) -> TokenStream:
    sizes = stream.token_bytes[:tokens] if stream.token_bytes is not None else None
    return TokenStream(
        stream.ids[:tokens],
        stream.scored[:tokens],
        sizes,
        stream.prefix,
        stream.bos,
        stream.documents,
        stream.separator,
    )


def _add(report: Report, measured: Measured) -> None:
    report.measured.append(measured)
    said = (
        f"{measured.name}: recorded {measured.recorded:.6g}, found {measured.found:.6g}, allowed {measured.allowed:.2g}"
    )
    report.note(said, [] if measured.agrees else [said])
