"""The two models: found, checked, loaded; or the sentence that says why not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import texts
import torch
import transformers
from settings import Settings

from hf_qep.engine.headers import check_links, read_headers
from hf_qep.engine.source import (
    licence_of,
    load_float_model,
    load_quantized,
    original_of,
    resolve_model,
    snapshot_revision,
)
from hf_qep.errors import CheckpointError, QepError
from hf_qep.evaluation.memory import weight_bytes
from hf_qep.evaluation.record import EvalRecord
from hf_qep.evaluation.samples import Samples
from hf_qep.files import sha256

WORKING_ROOM = 1.2
"""Memory a model takes while it runs, in units of its weights; caches and activations of one short text."""
ZERO_GPU_BYTES = 48_000_000_000
"""Memory of the slice of an accelerator that ZeroGPU lends; it can only be asked while it is lent."""


@dataclass(frozen=True)
class Loaded:
    """A model that can write. name: as shown. positions: longest text it takes, None if unlimited. licence: as its card
    names it, None if it names none."""

    lane: str
    name: str
    revision: str | None
    model: Any
    tokenizer: Any
    weight_bytes: int
    max_input_tokens: int
    positions: int | None
    licence: str | None = None

    @property
    def dtype(self) -> str:
        """Of what is not packed."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def pad_token_id(self) -> int | None:
        """Silences a warning of `generate`; with one text at a time nothing is padded."""
        found = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if found is None else found


class Models:
    """What the page works with. Nothing here raises for a model that cannot be had: the page says so instead.

    mode: live, recorded or off, of the original. problem, original_note: why a lane does not run, for the visitor.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = _device(settings.device)
        self.one_bit: Loaded | None = None
        self.original: Loaded | None = None
        self.mode = "off"
        self.problem = self.original_note = self.scores_note = self.samples_note = ""
        self.record: EvalRecord | None = None
        self.samples: Samples | None = None
        self.base = (settings.base_id, settings.base_revision or None)
        self._load()

    @property
    def tokenizer(self) -> Any:
        """Of the 1-bit model, None if it could not be loaded."""
        return self.one_bit.tokenizer if self.one_bit else None

    @property
    def recording_note(self) -> str:
        """What a recorded text is, for whoever reads it."""
        samples = self.samples
        if samples is None:
            return ""
        machine = samples.environment.accelerator or samples.environment.processor or samples.environment.platform
        versions = samples.environment.versions
        return (
            f"Recorded, not run now: {samples.baseline.name} on {samples.created[:10]}, {machine}, transformers "
            f"{versions.get('transformers') or 'unknown'}, at most {samples.max_new_tokens} tokens."
        )

    def recording(self, prompt: str) -> str | None:
        """What the original wrote for this prompt when it was recorded."""
        items = self.samples.items if self.samples else ()
        return next((item.baseline for item in items if item.prompt.strip() == prompt.strip()), None)

    def _load(self) -> None:
        name = self.settings.model_id
        if not name:
            self.problem = texts.NO_MODEL
            return
        try:
            folder = resolve_model(name, self.settings.model_revision or None)
            self.one_bit = self._loaded("one_bit", name, folder, *_load_packed(folder, self._dtype()))
        except Exception as error:  # whatever it is, the page stands and tells it
            self.problem = explain(error, shown_name(name))
            return
        self._read_papers(folder)
        try:
            self._load_original(folder)
        except Exception as error:
            self.original_note = explain(error, shown_name(self.base[0]))
            self._fall_back()

    def _read_papers(self, folder: Path) -> None:
        """Record and recorded outputs, if they are about the weights that were loaded."""
        digests = weight_digests(folder)
        try:
            record = EvalRecord.read(folder)
            self.record = record if record.subject.sha256 == digests else None
            self.scores_note = "" if self.record else texts.OTHER_WEIGHTS.format(what="evaluation record")
        except QepError as error:
            self.scores_note = str(error)
        try:
            samples = Samples.read(folder)
            self.samples = samples if samples.subject.sha256 == digests else None
            self.samples_note = "" if self.samples else texts.OTHER_WEIGHTS.format(what="file of recorded outputs")
        except QepError:
            self.samples_note = texts.NOT_RECORDED_AT_ALL

    def _load_original(self, folder: Path) -> None:
        wanted = self.settings.original
        if wanted == "off":
            self.original_note = texts.TURNED_OFF
            return
        if wanted == "recorded":
            self._fall_back()
            return
        self.base = self.base if self.base[0] else original_of(folder) or ("", None)
        if not self.base[0]:
            self.original_note = texts.NO_BASE
            self._fall_back()
            return
        if wanted == "auto" and (reason := self._does_not_fit()):
            self.original_note = reason
            self._fall_back()
            return
        base_folder = resolve_model(*self.base)
        model, tokenizer = load_float_model(base_folder, self._dtype() or "auto")
        self.original = self._loaded("original", self.base[0], base_folder, model, tokenizer)
        self.mode = "live"

    def _fall_back(self) -> None:
        """Recorded outputs if there are some."""
        if self.samples is not None and self.samples.items:
            self.mode = "recorded"
        else:
            said = (self.original_note, self.samples_note or texts.NOT_RECORDED_AT_ALL)
            self.original_note = " ".join(sentence for sentence in said if sentence)

    def _does_not_fit(self) -> str:
        """Why the original must stay away, empty if it may come."""
        stored, free = stored_bytes(*self.base), free_bytes(self.device)
        widened = 2 if self.settings.dtype == "float32" else 1
        needed = int(stored * widened * WORKING_ROOM)
        if free is None or needed <= free:
            return ""
        return texts.NO_ROOM.format(needed=human_bytes(needed), free=human_bytes(free))

    def _dtype(self) -> torch.dtype | None:
        return None if self.settings.dtype == "auto" else getattr(torch, self.settings.dtype)

    def _loaded(self, lane: str, name: str, folder: Path, model: Any, tokenizer: Any) -> Loaded:
        if tokenizer is None or not hasattr(tokenizer, "decode"):
            raise CheckpointError(f"{shown_name(name)!r} has no tokenizer; add its files to the folder")
        if not model.can_generate():
            raise CheckpointError(f"{shown_name(name)!r} does not write text; this page compares language models")
        model = model.to(self.device).eval()
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        revision = snapshot_revision(folder)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        limit = self.settings.max_input_tokens
        size, licence = weight_bytes(model), licence_of(folder)
        return Loaded(lane, shown_name(name), revision, model, tokenizer, size, limit, positions, licence)


def _device(wanted: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)


def _load_packed(folder: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    check_links(folder)
    read_headers(folder)  # an index can name files outside the folder, and transformers would follow it
    model = load_quantized(folder, dtype=dtype)
    return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def weight_digests(folder: Path) -> dict[str, str]:
    """Weight file -> sha256. The Hub cache calls large files by it, so those are not read again."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored = path.resolve()
        known = stored.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", stored.name)
        found[path.name] = stored.name if known else sha256(path)
    return found


def stored_bytes(name: str, revision: str | None) -> int:
    """Bytes of the weight files of a folder or a repository; nothing is downloaded."""
    folder = Path(name)
    if folder.is_dir():
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    from huggingface_hub import HfApi

    files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
    weights = [f.size or 0 for f in files if re.fullmatch(r"model[\w.-]*\.safetensors", f.rfilename)]
    if not weights:
        raise CheckpointError(f"{name!r} has no weights in safetensors files; choose another original")
    return sum(weights)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a model may still take; None if it cannot be told."""
    if device.type == "cuda":
        return ZERO_GPU_BYTES if os.environ.get("SPACES_ZERO_GPU") else torch.cuda.mem_get_info(device)[0]
    free = list(_free_memory())
    return min(free) if free else None


def _free_memory(root: Path = Path("/")) -> Iterator[int]:
    """What the machine has, and what the limit of the container leaves."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"))
    if found:
        yield int(found[1]) * 1024
    limit, used = (_read(root / "sys/fs/cgroup" / name) for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        yield max(0, int(limit) - int(used))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def shown_name(name: str) -> str:
    """A Hub id as it is; of a folder only its last part."""
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).is_dir() else Path(name).name


def human_bytes(count: int) -> str:
    """Decimal units, as file sizes on the Hub are shown."""
    size, unit = float(count), "B"
    for following in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, following
    return f"{count} B" if unit == "B" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


def explain(error: BaseException, name: str) -> str:
    """What happened and what helps, in one or two sentences; no traceback, no token."""
    from huggingface_hub import errors

    chain = list(_chain(error))
    if any(isinstance(e, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(e) for e in chain):
        return texts.OUT_OF_MEMORY
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return (
            f"{name!r} is gated. Ask for access on its page, and set the secret HF_TOKEN to a token that may read it."
        )
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return f"{name!r} has no such revision. Check MODEL_REVISION, BASE_REVISION and SPECIALISTS."
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return (
            f"{name!r} does not exist, or it is private. Check the name, or set the secret HF_TOKEN to a token that "
            "may read it."
        )
    if any(isinstance(e, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError) for e in chain):
        return f"{name!r} is not on this machine, and the Hub cannot be reached."
    said = " ".join(str(error).split())[:400] or type(error).__name__
    sentence = re.sub(r"\bhf_\w{8,}", "[token]", said)
    return sentence[:1].upper() + sentence[1:] + ("" if sentence.endswith(".") else ".")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__
