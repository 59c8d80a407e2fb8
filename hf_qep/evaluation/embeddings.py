"""How far a quantised encoder's sentence embeddings are from the float encoder's.

For models without a next-token head (MiniLM, BERT, classifiers). An embedding is the mean of the last hidden states
over the tokens of the sentence (attention mask 1), special tokens included, as sentence-transformers does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from hf_qep.errors import ArchitectureError, CalibrationError, NonFiniteError
from hf_qep.evaluation.estimates import Estimate, mean
from hf_qep.progress import SILENT, Progress


@dataclass(frozen=True)
class EmbeddingScore:
    """Both encoders on the same sentences."""

    cosine_distance: Annotated[Estimate, "mean over sentences of 1 - cosine(float, quantised)"]
    neighbour_overlap: Annotated[Estimate | None, "mean share of the k nearest neighbours that both models agree on"]
    neighbours: Annotated[int | None, "k of neighbour_overlap; its chance level is k / (sentences - 1)"]
    sentences: Annotated[int, "number of sentences"]
    max_length: Annotated[int, "longest sentence in tokens; longer ones are cut"]
    source: Annotated[str | None, "what the text is, as given by the user"] = None


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(batch, hidden) float32 mean-pooled embeddings; `batch` holds input_ids and attention_mask (batch, positions)."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    with torch.inference_mode():
        hidden = getattr(encoder(**batch), "last_hidden_state", None)
    if hidden is None:
        raise ArchitectureError(f"{type(model).__name__} returns no last_hidden_state; it is no encoder")
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return (hidden.float() * mask).sum(1) / mask.sum(1).clamp_min(1)


def compare_encoders(
    float_model: nn.Module,
    quantized_model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    neighbours: int = 10,
    batch_size: int = 16,
    source: str | None = None,
    progress: Progress = SILENT,
) -> EmbeddingScore:
    """1 - cosine and neighbour overlap over `texts`, one embedding per text.

    The neighbours of a text are searched among the other texts; the overlap is left out when there are not more than
    `neighbours` of those. Its standard error treats texts as independent although they share the set they search.
    """
    texts = [t for t in texts if t.strip()]
    if not texts:
        raise CalibrationError("the evaluation text is empty; give at least a few sentences")
    ours, theirs = [], []
    with progress.bar("float against quantised", len(texts), "text") as bar:
        for start in range(0, len(texts), batch_size):
            chunk = list(texts[start : start + batch_size])
            batch = tokenizer(chunk, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            theirs.append(embed(float_model, dict(batch)).cpu())
            ours.append(embed(quantized_model, dict(batch)).cpu())
            bar.advance(len(chunk))
    f, q = (nn.functional.normalize(torch.cat(x).double(), dim=-1) for x in (theirs, ours))
    if not (torch.isfinite(f).all() and torch.isfinite(q).all()):
        raise NonFiniteError("an embedding is NaN or infinite; one of the two models is broken")
    overlap = neighbour_overlap(f, q, neighbours) if len(texts) > neighbours + 1 else None
    return EmbeddingScore(
        cosine_distance=mean((1 - (f * q).sum(-1)).clamp_min(0).numpy()),
        neighbour_overlap=overlap,
        neighbours=neighbours if overlap else None,
        sentences=len(texts),
        max_length=max_length,
        source=source,
    )


def neighbour_overlap(first: Tensor, second: Tensor, k: int) -> Estimate:
    """Mean share of the k nearest neighbours by cosine common to both; inputs (n, hidden) of unit length, n > k + 1."""

    def nearest(x: Tensor) -> Tensor:
        similarity = (x @ x.T).fill_diagonal_(-torch.inf)
        chosen = similarity.topk(k, dim=-1).indices
        return torch.zeros(similarity.shape, dtype=torch.bool).scatter_(1, chosen, True)

    common = (nearest(first) & nearest(second)).sum(-1)
    return mean((common / k).numpy())
