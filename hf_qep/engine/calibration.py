"""Calibration data: anything a user may give -> input tensors with a fingerprint."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_qep.config import QepConfig
from hf_qep.engine.packing import PackedRows, cut_rows, pack_rows
from hf_qep.engine.self_sampling import sample_rows
from hf_qep.engine.text_sources import apportion, describe_spec, open_sources, read_texts
from hf_qep.errors import CalibrationError

__all__ = ["Calibration", "advise", "calibration_of", "load_calibration", "read_texts"]

ADVISED_TOKENS_PER_INPUT = 4
"""Tokens per input feature of the widest linear below which its Hessian is mostly noise; at 1 it is singular."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Inputs of the model for calibration.

    inputs: argument name -> tensor on the CPU, first dimension N (samples). Text: `input_ids` int64 (N, seq_len).
    description: what it is and where it is from, as json values without folders: sources, num_samples, seq_len, seed,
        tokens, documents.
    fingerprint: sha256 over names, dtypes, shapes and bytes of the tensors.
    tokens: positions a linear sees: N * seq_len for text, N * patches for images.
    """

    inputs: dict[str, Tensor]
    description: dict[str, Any]
    fingerprint: str
    tokens: int

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def batches(self, batch_size: int) -> list[dict[str, Tensor]]:
        """The samples in order, `batch_size` at a time; the last batch may be smaller."""
        return [
            {name: tensor[start : start + batch_size] for name, tensor in self.inputs.items()}
            for start in range(0, len(self), batch_size)
        ]


def load_calibration(
    dataset: Any,
    tokenizer: Any,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    model: PreTrainedModel | None = None,
) -> Calibration:
    """At most `num_samples` samples of `dataset`, for text packed into rows of `seq_len` tokens. Language models
    get them without padding, encoders one text per row with an attention mask.

    dataset:
        None or "self"            text the model writes itself (`self_sampling.py`)
        "file.txt", "data.parquet:column", "data.jsonl#column"     txt, json, jsonl, csv, parquet
        "id", "id:config:split:column"                             a Hub data set, streamed
        "a.txt*0.7,b.jsonl*0.3", [("a.txt", 0.7), ...]             a mix; weights are shares of the rows
        ["text", ...]; [[{"role": ..., "content": ...}], ...]      texts; chats, rendered by the chat template
        int tensor (N, L), list of 1-D tensors or of id lists      token ids; equal lengths are kept as rows,
                                                                   unequal ones are joined and cut to `seq_len`
        float tensor (N, C, H, W)                                  `pixel_values`
        {name: tensor}                                             arguments of the model, first dimension N
    tokenizer: called for texts only; a processor is asked for its tokenizer.
    model: writes the text for "self"; otherwise it only tells vocabulary, longest sequence and patch size.

    With more samples than `num_samples`, a sample of them is drawn by `seed`; with fewer, all are used and a warning
    gives the numbers. `seq_len` above the model's longest sequence is lowered to it with a warning.

    Raises CalibrationError if the data is empty, unreadable, too short for one row or does not fit the model.
    """
    for name, value in (("num_samples", num_samples), ("seq_len", seq_len)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CalibrationError(f"{name} is {value!r}; it must be a whole number above 0")
    tokenizer = getattr(tokenizer, "tokenizer", None) or tokenizer
    if isinstance(dataset, Mapping):
        inputs, sources = _given(dict(dataset)), [{"name": "tensors in memory"}]
    elif isinstance(dataset, Tensor | np.ndarray) or _is_ids(dataset):
        inputs, sources = _unnamed(dataset, seq_len), [{"name": "tensor in memory"}]
    else:
        seq_len = _fitting_length(seq_len, tokenizer, model)
        inputs, sources = _rows(dataset, tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed, model=model)
    inputs = _draw(inputs, num_samples, seed)
    _check_ids(inputs, tokenizer, model)
    return _finish(inputs, sources, asked=num_samples, seed=seed, model=model)


def calibration_of(config: QepConfig, tokenizer: Any, model: PreTrainedModel) -> Calibration:
    """What a recipe asks for, see `load_calibration`. model: to be quantised by it."""
    sizes = {"num_samples": config.num_samples, "seq_len": config.seq_len, "seed": config.seed}
    return load_calibration(config.dataset, tokenizer, model=model, **sizes)


def advise(calibration_tokens: int, widest_input: int) -> str | None:
    """A warning if there are fewer tokens than input features of the widest linear, else None."""
    if calibration_tokens >= widest_input:
        return None
    return (
        f"{calibration_tokens} calibration tokens are fewer than the {widest_input} inputs of the widest linear: its "
        f"Hessian is singular and the result rests on damping; use at least {ADVISED_TOKENS_PER_INPUT * widest_input} "
        "tokens (raise num_samples or seq_len)"
    )


def _rows(
    dataset: Any, tokenizer: Any, *, num_samples: int, seq_len: int, seed: int, model: PreTrainedModel | None
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Token rows (n, seq_len), their mask if any is filled up, and what they were made from."""
    if dataset is None or (isinstance(dataset, str) and dataset == "self"):
        ids = sample_rows(model, tokenizer, num_rows=num_samples, seq_len=seq_len, seed=seed)
        return {"input_ids": ids}, [{"name": "self", "rows": len(ids)}]
    sources = open_sources(dataset)
    if tokenizer is None:
        raise CalibrationError(f"{describe_spec(dataset)} is text, but the model has no tokenizer; pass token ids")
    if "pixel_values" in getattr(tokenizer, "model_input_names", ()):
        raise CalibrationError(
            f"{describe_spec(dataset)} is text, but the model reads images; pass a tensor (N, C, H, W)"
        )
    shares = apportion([weight for _, weight in sources], num_samples)
    packed: list[PackedRows] = []
    for (source, weight), share in zip(sources, shares, strict=True):
        if not share:
            raise CalibrationError(
                f"the weight {weight:.3g} of {source.name!r} gives none of {num_samples} rows; raise it"
            )
        packed.append(pack_rows(source, tokenizer, num_rows=share, seq_len=seq_len, seed=seed))
        if not packed[-1].documents:
            raise CalibrationError(f"{source.name!r} holds no text; give a source with at least one non-empty row")
    ids, mask = torch.cat([rows.ids for rows in packed]), torch.cat([rows.mask for rows in packed])
    if not len(ids):
        raise CalibrationError(
            f"{describe_spec(dataset)} has fewer than {seq_len} tokens, not enough for one row; lower seq_len or give "
            "more text"
        )
    if len(sources) > 1:
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        ids, mask = ids[order], mask[order]
    inputs = {"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask}
    return inputs, [
        {"name": source.name, "weight": weight, "rows": len(rows.ids), "documents": rows.documents}
        for (source, weight), rows in zip(sources, packed, strict=True)
    ]


def _given(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """A dict name -> tensor, checked."""
    if not inputs:
        raise CalibrationError("the dict of calibration tensors is empty; give at least one input of the model")
    for name, value in inputs.items():
        if not isinstance(value, Tensor | np.ndarray) or value.ndim < 1:
            raise CalibrationError(
                f"the calibration input {name!r} is a {type(value).__name__}; give a tensor (N, ...)"
            )
        inputs[name] = tensor = torch.as_tensor(value).detach().cpu()
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CalibrationError(f"the calibration input {name!r} holds NaN or Inf; clean the data first")
    sizes = {name: len(tensor) for name, tensor in inputs.items()}
    if len(set(sizes.values())) > 1:
        raise CalibrationError(f"the calibration inputs differ in their first dimension: {sizes}; make them equal")
    if not min(sizes.values()):
        raise CalibrationError(f"the calibration inputs {sorted(sizes)} hold 0 samples; give at least one")
    return inputs


def _unnamed(data: Any, seq_len: int) -> dict[str, Tensor]:
    """Token ids or images without an argument name."""
    if not isinstance(data, Tensor | np.ndarray):
        return {"input_ids": _join_ids([torch.as_tensor(row).flatten() for row in data], seq_len)}
    tensor = torch.as_tensor(data)
    if tensor.is_floating_point():
        if tensor.ndim != 4:
            raise CalibrationError(
                f"a float calibration tensor of shape {tuple(tensor.shape)} is not (N, C, H, W); pass "
                "{name: tensor} with the model's argument name"
            )
        return _given({"pixel_values": tensor})
    if tensor.ndim not in (1, 2) or tensor.dtype == torch.bool:
        raise CalibrationError(
            f"a calibration tensor of shape {tuple(tensor.shape)} and {tensor.dtype} is not token ids (N, L)"
        )
    ids = tensor if tensor.ndim == 2 else _join_ids([tensor], seq_len)
    return _given({"input_ids": ids.long()})


def _join_ids(rows: list[Tensor], seq_len: int) -> Tensor:
    """Rows of equal length as they are; unequal ones joined and cut to `seq_len`."""
    lengths = {len(row) for row in rows}
    if len(rows) > 1 and len(lengths) == 1 and 0 not in lengths:
        return torch.stack(rows).long()
    cut = list(cut_rows((row.tolist() for row in rows), seq_len))
    if not cut:
        raise CalibrationError(
            f"the calibration ids have {sum(map(len, rows))} tokens, fewer than one row of {seq_len}; lower seq_len"
        )
    return torch.tensor(cut)


def _is_ids(data: Any) -> bool:
    """Whether `data` is a list of 1-D tensors or of lists of token ids."""
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        return False
    return all(
        (isinstance(row, Tensor | np.ndarray) and not torch.as_tensor(row).is_floating_point())
        or (isinstance(row, list) and bool(row) and all(isinstance(i, int) and not isinstance(i, bool) for i in row))
        for row in data
    )


def _draw(inputs: dict[str, Tensor], num_samples: int, seed: int) -> dict[str, Tensor]:
    """At most `num_samples` samples, drawn by `seed`, in stored order."""
    total = len(next(iter(inputs.values())))
    if total <= num_samples:
        return inputs
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:num_samples].sort().values
    return {name: tensor[chosen] for name, tensor in inputs.items()}


def _fitting_length(seq_len: int, tokenizer: Any, model: PreTrainedModel | None) -> int:
    """`seq_len`, or the longest sequence that model and tokenizer take."""
    config = model.config.get_text_config() if model is not None else None
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    longest = min([limit for limit in limits if isinstance(limit, int) and limit > 0], default=seq_len)
    if longest >= seq_len:
        return seq_len
    warnings.warn(f"seq_len {seq_len} is longer than the model's {longest} positions; {longest} is used", stacklevel=4)
    return longest


def _check_ids(inputs: dict[str, Tensor], tokenizer: Any, model: PreTrainedModel | None) -> None:
    ids = inputs.get("input_ids")
    if ids is None:
        return
    if ids.is_floating_point():
        raise CalibrationError(f"input_ids are {ids.dtype}; token ids must be whole numbers")
    if int(ids.min()) < 0:
        raise CalibrationError(f"input_ids hold the negative id {int(ids.min())}; drop labels or padding marks first")
    if model is not None:
        vocabulary = model.get_input_embeddings().num_embeddings
    else:
        vocabulary = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    if vocabulary and int(ids.max()) >= vocabulary:
        raise CalibrationError(
            f"the token id {int(ids.max())} is outside the vocabulary of {vocabulary}; use the tokenizer of this model"
        )


def _finish(
    inputs: dict[str, Tensor], sources: list[dict[str, Any]], *, asked: int, seed: int, model: PreTrainedModel | None
) -> Calibration:
    inputs = {name: tensor.contiguous() for name, tensor in inputs.items()}
    rows, tokens = len(next(iter(inputs.values()))), _count_tokens(inputs, model)
    if rows < asked:
        warnings.warn(
            f"the calibration data gives {rows} of {asked} samples ({tokens} tokens); all of it is used", stacklevel=3
        )
    description = {
        "sources": sources,
        "num_samples": rows,
        "seq_len": inputs["input_ids"].shape[1] if "input_ids" in inputs else None,
        "seed": seed,
        "tokens": tokens,
        "documents": sum(source.get("documents", 0) for source in sources) or None,
    }
    return Calibration(inputs, description, _fingerprint(inputs), tokens)


def _count_tokens(inputs: dict[str, Tensor], model: PreTrainedModel | None) -> int:
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    if "input_ids" in inputs:
        return inputs["input_ids"].numel()
    patch = getattr(model.config, "patch_size", None) if model is not None else None
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim != 4 or not isinstance(patch, int):
        return len(next(iter(inputs.values())))
    return len(pixels) * (pixels.shape[2] // patch) * (pixels.shape[3] // patch)


def _fingerprint(inputs: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(inputs):
        tensor = inputs[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()
