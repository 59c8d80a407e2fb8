"""The two lanes: one model after the other writes, token by token, and everything about it is measured."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import texts
import torch
from models import Loaded, Models, explain
from prompts import Request, encode
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from hf_qep.evaluation.memory import peak_bytes

REFRESH_S = 0.1
"""Seconds between two updates of the page."""
_turn = threading.Lock()
"""One generation at a time: the seed sets the generator of the whole process."""


@dataclass(frozen=True)
class Lane:
    """One lane at one moment. Numbers are None until they were measured.

    seconds: between the first and the last token. first_token: seconds from the start. peak_bytes: weights and the
    most that was needed besides them. prefix: how many tokens at the beginning equal those of the other lane.
    """

    lane: str
    status: str = "idle"
    text: str = ""
    tokens: int | None = None
    seconds: float | None = None
    first_token: float | None = None
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    notes: tuple[str, ...] = ()
    ids: tuple[int, ...] = field(default=(), repr=False)

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed; the first token, which takes the whole prompt, is not counted."""
        return (self.tokens - 1) / self.seconds if self.tokens and self.tokens > 1 and self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "status": self.status,
            "text": self.text,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "first_token_seconds": self.first_token,
            "weight_bytes": self.weight_bytes,
            "peak_bytes": self.peak_bytes,
            "notes": list(self.notes),
        }


Lanes = tuple[Lane, Lane]
"""(original, 1-bit)"""


def compare(models: Models, request: Request, stopped: Callable[[], bool]) -> Iterator[Lanes]:
    """Both lanes, again and again until both are done; ends early, lanes marked, once `stopped()` is true."""
    original, one_bit = at_rest(models, request)
    for index, loaded in enumerate((models.original, models.one_bit)):
        if loaded is None:
            continue
        for lane in write(loaded, request, stopped):
            original, one_bit = (lane, one_bit) if index == 0 else (original, lane)
            yield original, one_bit
    yield original, one_bit


def at_rest(models: Models, request: Request | None = None) -> Lanes:
    """The lanes before anything runs; with a request, those that will run wait."""
    original = Lane("original", "off", notes=(models.original_note,) if models.original_note else ())
    if models.original is not None:
        original = Lane("original", "waiting" if request else "idle", weight_bytes=models.original.weight_bytes)
    elif models.mode == "recorded":
        original = _recorded(models, request) if request else replace(original, status="idle")
    one_bit = Lane("one_bit", "error", notes=(models.problem,) if models.problem else ())
    if models.one_bit is not None:
        one_bit = Lane("one_bit", "waiting" if request else "idle", weight_bytes=models.one_bit.weight_bytes)
    return original, one_bit


def _recorded(models: Models, request: Request) -> Lane:
    found = models.recording(request.prompt)
    if found is None:
        return Lane("original", "off", notes=(texts.NO_RECORDING,))
    notes = [models.recording_note]
    if request.temperature > 0:
        notes.append(texts.RECORDED_GREEDY)
    return Lane("original", "recorded", text=found, notes=tuple(notes))


def write(loaded: Loaded, request: Request, stopped: Callable[[], bool]) -> Iterator[Lane]:
    """One lane, from waiting to done, stopped or failed. Leaving this generator early ends the generation as well."""
    lane = Lane(loaded.lane, "writing", weight_bytes=loaded.weight_bytes)
    if stopped():
        yield replace(lane, status="stopped", notes=(texts.STOPPED_WAITING,))
        return
    with _turn:
        yield lane
        try:
            run = _Run(loaded, request, stopped)
        except Exception as error:  # a template or tokenizer can fail in many ways
            yield replace(lane, status="error", notes=(explain(error, loaded.name),))
            return
        try:
            run.thread.start()
            for text in run.texts():
                yield run.measured(replace(lane, text=text))
            run.thread.join()
            yield run.finished(lane)
        finally:
            run.cancel()


class _Run:
    """A generation in a thread of its own, which ends when it is cancelled or `stopped()` is true."""

    def __init__(self, loaded: Loaded, request: Request, stopped: Callable[[], bool]) -> None:
        self.loaded, self.request = loaded, request
        room = loaded.positions - request.max_new_tokens if loaded.positions else loaded.max_input_tokens
        self.prompt = encode(loaded.tokenizer, request, max(1, min(loaded.max_input_tokens, room)))
        self.streamer = _Measured(loaded.tokenizer)
        self.text = ""
        self.extra_bytes: int | None = None
        self.error: Exception | None = None
        self._cancelled = threading.Event()
        self._stopped = stopped
        self.thread = threading.Thread(target=self._generate, name=f"generate-{loaded.lane}", daemon=True)

    def is_stopped(self) -> bool:
        return self._cancelled.is_set() or self._stopped()

    def cancel(self) -> None:
        """Make the thread end and wait for it: at most one token is still written."""
        self._cancelled.set()
        if self.thread.is_alive():
            self.thread.join()

    def texts(self) -> Iterator[str]:
        """The text so far, every REFRESH_S seconds, until the thread has ended."""
        ended = False
        while not ended:
            begin = time.monotonic()
            while not ended and time.monotonic() - begin < REFRESH_S:
                try:
                    part = self.streamer.text_queue.get(timeout=REFRESH_S)
                except queue.Empty:
                    break
                ended = part is self.streamer.stop_signal
                self.text += "" if ended else part
            yield self.text

    def measured(self, lane: Lane) -> Lane:
        """`lane` with the numbers known by now."""
        watch = self.streamer
        first = watch.times[0] - watch.begin if watch.times else None
        seconds = watch.times[-1] - watch.times[0] if len(watch.times) > 1 else None
        return replace(lane, tokens=len(watch.ids), first_token=first, seconds=seconds)

    def finished(self, lane: Lane) -> Lane:
        """The lane at its end."""
        lane = self.measured(replace(lane, text=self.text, ids=tuple(self.streamer.ids)))
        notes = [*self.request.warnings, *([self.prompt.warning] if self.prompt.warning else [])]
        if self.error is not None:
            return replace(lane, status="error", notes=(*notes, explain(self.error, self.loaded.name)))
        peak = None if self.extra_bytes is None else self.loaded.weight_bytes + self.extra_bytes
        return replace(lane, status="stopped" if self.is_stopped() else "done", peak_bytes=peak, notes=tuple(notes))

    def _generate(self) -> None:
        try:
            torch.manual_seed(self.request.seed)
            self.extra_bytes = peak_bytes(self._call, self.loaded.model.device)
        except Exception as error:  # out of memory, a broken model: told to the visitor in the lane
            self.error = error
            self.streamer.end()
        finally:
            self.streamer.text_queue.put(self.streamer.stop_signal)

    def _call(self) -> None:
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.request.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.request.temperature}
        self.streamer.begin = time.perf_counter()
        self.loaded.model.generate(
            **{name: tensor.to(self.loaded.model.device) for name, tensor in self.prompt.inputs.items()},
            max_new_tokens=self.request.max_new_tokens,
            streamer=self.streamer,
            stopping_criteria=StoppingCriteriaList([_Stop(self.is_stopped)]),
            pad_token_id=self.loaded.pad_token_id,
            **sampling,
        )


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._stopped(), dtype=torch.bool, device=input_ids.device)


class _Measured(TextIteratorStreamer):
    """Text pieces, and when each token came. `generate` hands over the prompt first, then one token at a time."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.begin = time.perf_counter()
        self.times: list[float] = []
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not (self.skip_prompt and self.next_tokens_are_prompt):
            self.times.append(time.perf_counter())
            self.ids += value.reshape(-1).tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """The base class also ends the stream here; the thread does, after everything was measured."""
        self.text_queue.put(text)


def equal_tokens(lanes: Lanes) -> int | None:
    """How many tokens at the beginning are the same in both lanes; None unless both were written here."""
    first, second = (lane.ids for lane in lanes)
    if not first or not second:
        return None
    equal = 0
    for mine, theirs in zip(first, second, strict=False):
        if mine != theirs:
            break
        equal += 1
    return equal
