"""What a teacher says about rows of a task, asked now or long ago.

A language model says something at every answer, a classifier about every row, a detector at every query. What is kept
are log-probabilities, so nothing here depends on the temperature or the loss that a student is trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hf_qep.algorithms.distillation import NORM_EPS, TopClasses, top_classes
from hf_qep.distill.samples import CAUSAL_LM, EMBEDDING, IGNORED, TaskData, shifted
from hf_qep.progress import SILENT, Progress


@dataclass(frozen=True)
class Said:
    """What a teacher said about some rows; what it does not say is None.

    log_p: (answers, k), (rows, classes) or (rows, queries, classes), float16, index: the classes if not all are kept.
    counts: (rows,) int64, answers of each row of a language model. embedding: (rows, width) float32. boxes: (rows,
    queries, 4) float32. hidden: the last hidden state (rows, tokens, width) float16, each token with mean square 1.
    layers: all hidden states, from a teacher that is asked now.
    """

    log_p: Tensor | None = None
    index: Tensor | None = None
    counts: Tensor | None = None
    embedding: Tensor | None = None
    boxes: Tensor | None = None
    hidden: Tensor | None = None
    layers: tuple[Tensor, ...] | None = None

    @property
    def classes(self) -> TopClasses | None:
        """Log-probabilities with the classes that they belong to."""
        return None if self.log_p is None else TopClasses(self.index, self.log_p)

    def __len__(self) -> int:
        """Rows."""
        return len(next(t for t in (self.counts, self.log_p, self.embedding, self.hidden) if t is not None))

    def tensors(self) -> dict[str, Tensor]:
        """What can be written down, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Said:
        """The same with a function of name and tensor applied to all that can be written down."""
        return Said(**{name: function(name, tensor) for name, tensor in self.tensors().items()})

    def rows(self, which: Tensor) -> Said:
        """What was said about some rows, numbers (n,) int64, in their order."""
        which = which.cpu()
        answers = which if self.counts is None else _entries(self.counts, which)
        return self.map(lambda name, tensor: tensor[answers if name in ("log_p", "index") else which])

    def to(self, device: torch.device | str) -> Said:
        """The same on another device."""
        return self.map(lambda _, tensor: tensor.to(device))

    @classmethod
    def joined(cls, parts: Sequence[Said]) -> Said:
        """What was said about the rows of all parts."""
        return parts[0].map(lambda name, _: torch.cat([getattr(part, name) for part in parts]))


@dataclass
class LiveTeacher:
    """A teacher that is asked for every batch.

    model: in eval mode. task, answers: as in TaskData. k: classes to keep per answer, None for all. keep_ids: its token
    ids (vocabulary of the student,) int64 where the student has only some of them; batches then hold the student's
    ids, and what it says is the distribution over those, given that it is one of them. hidden: also say hidden states.
    """

    model: Any
    task: str
    answers: tuple[int, ...] | None = None
    k: int | None = None
    keep_ids: Tensor | None = None
    hidden: bool = False

    @torch.no_grad()
    def says(self, batch: Mapping[str, Any]) -> Said:
        """What it says about a batch: forward keyword arguments, with labels where there are any."""
        inputs = forward_inputs(batch)
        keep = None if self.keep_ids is None else self.keep_ids.to(inputs["input_ids"].device)
        if keep is not None:
            inputs["input_ids"] = keep[inputs["input_ids"]]
        output = self.model(**inputs, **({"output_hidden_states": True} if self.hidden else {}))
        layers = hidden_states(output) if self.hidden else None
        last = None if layers is None else normalised(layers[-1]).half()
        if self.task == EMBEDDING:
            return Said(embedding=embedding_of(output).float(), hidden=last, layers=layers)
        logits, labels, counts = output.logits, batch.get("labels"), None
        logits = logits if keep is None else logits[..., keep]
        if self.task == CAUSAL_LM:
            mask = answer_mask(batch, self.answers is not None)
            logits, labels = answer_logits(logits, mask, self.answers), answer_labels(batch, mask, self.answers)
            counts = mask.sum(1)
        known = labels if isinstance(labels, Tensor) else None
        said = top_classes(logits, self.k or logits.shape[-1], known)
        return Said(said.log_p, said.index, counts, None, getattr(output, "pred_boxes", None), last, layers)


def take_said(model: Any, data: TaskData, *, batch_size: int = 32, progress: Progress = SILENT, **options: Any) -> Said:
    """Ask a model, as it is but in eval mode, about all rows; the answers lie on the CPU. options: of LiveTeacher."""
    teacher, before = LiveTeacher(model, data.task, data.answers, **options), model.training
    model.eval()
    parts = []
    with progress.bar("asking the teacher", len(data), "row") as bar:
        for batch in data.batches(batch_size, model.device):
            parts.append(teacher.says(batch).to("cpu"))
            bar.advance(len(next(iter(batch.values()))))
    model.train(before)
    return Said.joined(parts)


def forward_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch goes into a model that computes no loss."""
    return {name: value for name, value in batch.items() if name not in ("labels", "row", "rationales")}


def answer_mask(batch: Mapping[str, Any], classifies: bool) -> Tensor:
    """Bool (rows, tokens): where a language model's output is an answer; never in rows that are rationales.

    Without labels a model that classifies answers at the last token that the attention mask keeps, any other one at
    every such token that has a successor.
    """
    if isinstance(batch.get("labels"), Tensor):
        mask = shifted(batch["labels"]) != IGNORED
    else:
        seen = batch.get("attention_mask")
        seen = torch.ones_like(batch["input_ids"]) if seen is None else seen
        later = seen.flip(1).cumsum(1).flip(1)  # tokens that are seen from here on
        mask = seen.bool() & ((later == 1) if classifies else (later > 1))
    told = batch.get("rationales")
    return mask if told is None else mask & ~told.unsqueeze(1)


def answer_logits(logits: Tensor, mask: Tensor, answers: tuple[int, ...] | None) -> Tensor:
    """Logits (answers, classes) of a language model's (rows, tokens, vocabulary)."""
    logits = logits[mask]
    return logits if answers is None else logits[:, torch.tensor(answers, device=logits.device)]


def answer_labels(batch: Mapping[str, Any], mask: Tensor, answers: tuple[int, ...] | None) -> Tensor | None:
    """The right class of each answer, (answers,) int64, or None where the batch has no labels."""
    if not isinstance(batch.get("labels"), Tensor):
        return None
    labels = shifted(batch["labels"])[mask]
    if answers is None:
        return labels
    return (labels.unsqueeze(1) == torch.tensor(answers, device=labels.device)).int().argmax(1)


def hidden_states(output: Any) -> tuple[Tensor, ...]:
    """Hidden states of all layers, a detector's decoder's, each (rows, tokens, width)."""
    found = getattr(output, "decoder_hidden_states", None)
    return output.hidden_states if found is None else found


def embedding_of(output: Any) -> Tensor:
    """The embedding of each row, (rows, width): projected, else pooled, else the first token's."""
    for name in ("image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name).flatten(1)
    return output.last_hidden_state[:, 0]


def normalised(hidden: Tensor) -> Tensor:
    """Every token divided by the root of its mean square, float32."""
    hidden = hidden.float()
    return hidden * (hidden.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()


def _entries(counts: Tensor, rows: Tensor) -> Tensor:
    """Places of the answers of some rows among all answers."""
    chosen = counts[rows]
    starts = (counts.cumsum(0) - counts)[rows] - (chosen.cumsum(0) - chosen)
    return torch.arange(int(chosen.sum())) + starts.repeat_interleave(chosen)
