"""Sliding-window perplexity: every token of the text is scored once, with the longest context the window allows.

A stream of tokens x_0 .. x_{L-1} is cut into windows of `window` input positions.  The first window scores everything
it can, each later one scores `stride` new tokens, so a token (after the first window) is predicted from at least
`window - stride` and at most `window` tokens.  With stride = window the windows are disjoint blocks.

Beginning of text (`bos`):
  "window"    BOS is put before every window and takes one of its positions; x_0 is scored. For models that were
              trained to always see BOS (Gemma, Command, Llama 2/3).
  "document"  BOS stands in the stream before each text; it is context and is never scored.
  "none"      no BOS; x_0 has no context and is not scored.
  "auto"      "window" if the tokenizer puts BOS first by itself, else "none".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from hf_qep.errors import CalibrationError, ConfigError, NonFiniteError
from hf_qep.evaluation.estimates import Estimate, ratio
from hf_qep.progress import SILENT, Progress

Bos = Literal["auto", "window", "document", "none"]
UNSCORED = -100
ROWS_AT_ONCE = 256  # positions in float32 at a time: 256 MB per model at a vocabulary of 256k


@dataclass(frozen=True)
class TokenStream:
    """Held-out text as one sequence of tokens."""

    ids: Tensor
    """(L,) int64"""
    scored: Tensor
    """(L,) bool: tokens of the text, as opposed to BOS"""
    token_bytes: Tensor | None
    """(L,) int64 UTF-8 bytes each token stands for; None if the tokenizer reports no offsets"""
    prefix: int | None
    """id put before every window, or None"""
    bos: Bos
    documents: int
    separator: str | None


@dataclass(frozen=True)
class LanguageScore:
    """How well one model predicts a text."""

    nll: Annotated[Estimate, "mean negative log-likelihood per scored token, nats"]
    perplexity: Annotated[Estimate | None, "exp(nll) per token; stderr by the delta method over windows"]
    bits_per_byte: Annotated[Estimate | None, "comparable between tokenizers; null if token offsets are unknown"]


def text_digest(texts: Sequence[str]) -> str:
    """sha256 of documents as UTF-8 with a zero byte between them, by which a text is known again under any name."""
    # Half of a surrogate pair is no UTF-8, but a JSON file can hold one.
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def token_stream(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    bos: Bos = "auto",
    separator: str = "\n\n",
    max_tokens: int | None = None,
) -> TokenStream:
    """Tokenise `texts` without special tokens and lay them end to end.

    Texts are joined by `separator` before they are tokenised, except with bos="document", where BOS separates them.
    max_tokens: cut the stream after so many tokens.
    Raises CalibrationError if there is no text, ConfigError if BOS is asked of a tokenizer that has none.
    """
    texts = [t for t in texts if t]
    if not texts:
        raise CalibrationError("the evaluation text is empty; give at least one text of a few hundred words")
    mode = _resolve_bos(tokenizer, bos)
    pieces = texts if mode == "document" else [separator.join(texts)]
    ids: list[int] = []
    scored: list[bool] = []
    sizes: list[int] = []
    for piece in pieces:
        piece_ids, piece_bytes = _encode(tokenizer, piece)
        if mode == "document":
            ids.append(tokenizer.bos_token_id)
            scored.append(False)
            sizes.append(0)
        ids += piece_ids
        scored += [True] * len(piece_ids)
        sizes += piece_bytes or [0] * len(piece_ids)
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    if len(ids) < 2:
        raise CalibrationError(f"the evaluation text has {len(ids)} token(s); at least 2 are needed")
    return TokenStream(
        ids=torch.tensor(ids[:max_tokens]),
        scored=torch.tensor(scored[:max_tokens]),
        token_bytes=torch.tensor(sizes[:max_tokens]) if any(sizes) else None,
        prefix=tokenizer.bos_token_id if mode == "window" else None,
        bos=mode,
        documents=len(texts),
        separator=None if mode == "document" else separator,
    )


def _resolve_bos(tokenizer: Any, bos: Bos) -> Bos:
    if bos == "auto":
        first = tokenizer("a")["input_ids"][:1]
        adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        return "window" if adds_bos else "none"
    if bos not in ("window", "document", "none"):
        raise ConfigError(f"bos={bos!r} is not known; choose auto, window, document or none")
    if bos != "none" and tokenizer.bos_token_id is None:
        raise ConfigError(f"bos={bos!r} needs a tokenizer with a BOS token and this one has none; use bos='none'")
    return bos


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int] | None]:
    """Ids of `text` and the UTF-8 bytes behind each: those from the end of the token before it to its own end."""
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    sizes: list[int] = []
    reached = 0
    for _, end in encoded["offset_mapping"]:
        end = max(end, reached)  # the bytes of one character may be spread over several tokens with equal offsets
        sizes.append(len(text[reached:end].encode("utf-8", "surrogatepass")))
        reached = end
    return encoded["input_ids"], sizes


def check_window(model: nn.Module, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride to use: by default min(2048, longest input of the model) and half of it.

    Raises ConfigError if the window is longer than the model allows or the stride is not in 1..window.
    """
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text_config, "max_position_embeddings", None) or 2048
    window = min(2048, longest) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= longest:
        raise ConfigError(f"window={window} is outside 2..{longest}, the longest input of this model")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride={stride} is outside 1..{window} (the window); choose one inside")
    return window, stride


def window_batches(
    stream: TokenStream, window: int, stride: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (input_ids, targets, target_bytes), each (batch, positions) int64; targets are -100 where not scored.

    All windows have the same length (the last one reaches back instead of being short), so nothing is ever padded.
    """
    rows = list(_windows(stream, window, stride))
    for start in range(0, len(rows), batch_size):
        inputs, targets, sizes = zip(*rows[start : start + batch_size], strict=True)
        yield torch.stack(inputs), torch.stack(targets), torch.stack(sizes)


def count_windows(stream: TokenStream, window: int, stride: int) -> int:
    """Number of windows that cover the stream."""
    first_end = window if stream.prefix is not None else window + 1
    return 1 + max(0, math.ceil((len(stream.ids) - first_end) / stride))


def _windows(stream: TokenStream, window: int, stride: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    length = len(stream.ids)
    has_prefix = stream.prefix is not None
    room = window - 1 if has_prefix else window  # positions left for tokens of the text
    token_bytes = stream.token_bytes if stream.token_bytes is not None else torch.zeros_like(stream.ids)
    begin = 0 if has_prefix else 1  # first target not scored yet
    end = min(length, room + 1)
    while begin < length:
        low = max(0, end - 1 - room)
        inputs = stream.ids[low : end - 1]
        first_target = low + 1
        if has_prefix:
            inputs = torch.cat([torch.tensor([stream.prefix]), inputs])
            first_target = low
        positions = torch.arange(first_target, end)
        keep = (positions >= begin) & stream.scored[positions]
        targets = torch.where(keep, stream.ids[positions], UNSCORED)
        yield inputs, targets, torch.where(keep, token_bytes[positions], 0)
        begin, end = end, min(length, end + stride)


def scored_logits(model: nn.Module, input_ids: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (row, target, logits) pieces of at most ROWS_AT_ONCE scored positions; logits (k, vocabulary) as computed.

    row (k,) is the index of the window inside the batch.
    """
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model(input_ids=input_ids.to(device), use_cache=False).logits
    rows, columns = torch.nonzero(targets != UNSCORED, as_tuple=True)
    for r, c in zip(rows.split(ROWS_AT_ONCE), columns.split(ROWS_AT_ONCE), strict=True):
        yield r, targets[r, c], logits[r.to(logits.device), c.to(logits.device)]


def perplexity(
    model: nn.Module,
    stream: TokenStream,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    progress: Progress = SILENT,
) -> LanguageScore:
    """Score `stream` with a causal language model.

    Raises ConfigError for a bad window or stride, NonFiniteError if a log-likelihood is NaN or infinite.
    """
    window, stride = check_window(model, window, stride)
    tally = Tally()
    with progress.bar("perplexity", count_windows(stream, window, stride), "window") as bar:
        for inputs, targets, sizes in window_batches(stream, window, stride, batch_size):
            tally.open(targets, sizes)
            for row, target, logits in scored_logits(model, inputs, targets):
                tally.add(row, {"nll": token_nll(torch.log_softmax(logits.float(), -1), target)})
            bar.advance(len(inputs))
    return tally.language_score("nll", with_bytes=stream.token_bytes is not None)


def token_nll(log_probabilities: Tensor, target: Tensor) -> Tensor:
    """(k,) negative log-likelihood of each target, nats."""
    return -log_probabilities.gather(-1, target.to(log_probabilities.device)[:, None]).squeeze(-1)


class Tally:
    """Sums per window of per-token quantities, in float64; nothing per token is kept."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._counts: list[Tensor] = []
        self._bytes: list[Tensor] = []

    def open(self, targets: Tensor, sizes: Tensor) -> None:
        """Start a batch of windows."""
        self._counts.append((targets != UNSCORED).sum(1).double())
        self._bytes.append(sizes.sum(1).double())
        for sums in self._sums.values():
            sums.append(torch.zeros(len(targets), dtype=torch.float64))

    def add(self, row: Tensor, values: dict[str, Tensor]) -> None:
        """Add per-token values (k,) of the windows `row` (k,) of the open batch."""
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise NonFiniteError(f"{name} of a token is NaN or infinite in window batch {len(self._counts)}")
            sums = self._sums.setdefault(name, [torch.zeros(len(c), dtype=torch.float64) for c in self._counts])
            sums[-1].index_add_(0, row, value.double().cpu())

    def mean(self, name: str) -> Estimate:
        """Mean per scored token."""
        return ratio(torch.cat(self._sums[name]).numpy(), torch.cat(self._counts).numpy())

    def language_score(self, name: str, *, with_bytes: bool) -> LanguageScore:
        """Perplexity and bits per byte of the summed log-likelihoods called `name`."""
        nll = self.mean(name)
        bits = None
        if with_bytes:
            sums, sizes = torch.cat(self._sums[name]).numpy(), torch.cat(self._bytes).numpy()
            bits = ratio(sums / math.log(2), sizes, n=nll.n)
        return LanguageScore(nll, nll.exponential(), bits)

    @property
    def scored_bytes(self) -> int:
        """UTF-8 bytes behind all scored tokens."""
        return int(torch.cat(self._bytes).sum())
