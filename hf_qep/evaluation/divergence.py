"""How far the quantised language model's predictions are from the float model's, token by token.

KL(float || quantised) = sum_v p(v) (log p(v) - log q(v)) over the full vocabulary, in nats, from float32 log-softmax;
top-1 agreement = how often both put the same token first.  Both models see each batch one after the other and only
sums per window are kept, so the cost in memory does not grow with the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from hf_qep.errors import ConfigError
from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.perplexity import (
    LanguageScore,
    Tally,
    TokenStream,
    check_window,
    count_windows,
    scored_logits,
    token_nll,
    window_batches,
)
from hf_qep.progress import SILENT, Progress


@dataclass(frozen=True)
class TextScore:
    """Both models on the same tokens of the same text."""

    baseline: Annotated[LanguageScore, "the float model"]
    subject: Annotated[LanguageScore, "the quantised model"]
    kl: Annotated[Estimate, "KL(float || quantised) per token, nats"]
    top1_agreement: Annotated[Estimate, "share of tokens for which both models rank the same token first"]
    windows: Annotated[int, "number of windows"]
    window: Annotated[int, "input positions per window"]
    stride: Annotated[int, "new tokens scored per window after the first"]
    bos: Annotated[str, "beginning-of-text rule: window, document or none"]
    separator: Annotated[str | None, "text between documents; null with bos = document"]
    documents: Annotated[int, "texts the stream was made of (the last ones may be cut off)"]
    scored_bytes: Annotated[int | None, "UTF-8 bytes behind the scored tokens"]
    source: Annotated[str | None, "what the text is, as given by the user"] = None
    text_sha256: Annotated[
        str | None, "sha256 of all documents as UTF-8, a zero byte between them; null in records of schema version 1"
    ] = None


def compare_language_models(
    float_model: nn.Module,
    quantized_model: nn.Module,
    stream: TokenStream,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    source: str | None = None,
    text_sha256: str | None = None,
    progress: Progress = SILENT,
) -> TextScore:
    """Perplexity of both models, KL and top-1 agreement, in one pass over `stream`.

    source, text_sha256: what the text is, and its `text_digest`, for the record. The two may live on different devices.
    Raises ConfigError if their vocabularies differ.
    """
    window, stride = check_window(float_model, window, stride)
    tally = Tally()
    windows = count_windows(stream, window, stride)
    with progress.bar("float against quantised", windows, "window") as bar:
        for inputs, targets, sizes in window_batches(stream, window, stride, batch_size):
            tally.open(targets, sizes)
            float_pieces = scored_logits(float_model, inputs, targets)
            pieces = zip(float_pieces, scored_logits(quantized_model, inputs, targets), strict=True)
            for (row, target, float_logits), (_, _, quantized_logits) in pieces:
                tally.add(row, _compare_logits(float_logits, quantized_logits, target))
            bar.advance(len(inputs))
    has_bytes = stream.token_bytes is not None
    return TextScore(
        baseline=tally.language_score("baseline nll", with_bytes=has_bytes),
        subject=tally.language_score("quantised nll", with_bytes=has_bytes),
        kl=tally.mean("KL"),
        top1_agreement=tally.mean("top-1 agreement"),
        windows=windows,
        window=window,
        stride=stride,
        bos=stream.bos,
        separator=stream.separator,
        documents=stream.documents,
        scored_bytes=tally.scored_bytes if has_bytes else None,
        source=source,
        text_sha256=text_sha256,
    )


def _compare_logits(float_logits: Tensor, quantized_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Per-token quantities (k,) from two (k, vocabulary) tensors of logits."""
    if float_logits.shape != quantized_logits.shape:
        raise ConfigError(
            f"the models have vocabularies of {float_logits.shape[-1]} and {quantized_logits.shape[-1]} tokens; "
            "compare a model with its own baseline"
        )
    log_p = torch.log_softmax(float_logits.to(quantized_logits.device).float(), -1)
    log_q = torch.log_softmax(quantized_logits.float(), -1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # a token masked to -inf in both models contributes nothing
    return {
        "baseline nll": token_nll(log_p, target),
        "quantised nll": token_nll(log_q, target),
        "KL": terms.sum(-1),
        "top-1 agreement": (log_p.argmax(-1) == log_q.argmax(-1)).float(),
    }
