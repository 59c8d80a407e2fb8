"""Everything a card is made of, read and checked before a word is written.

A record of other weights, a changed file or a missing measurement stops here: what is rendered is true of the folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_qep.engine.headers import MANIFEST, read_json
from hf_qep.errors import CardError
from hf_qep.evaluation.divergence import TextScore
from hf_qep.evaluation.record import EvalRecord
from hf_qep.evaluation.samples import Samples
from hf_qep.files import sha256
from hf_qep.hub.allowed import DISTILLATION, LOADER, kind_of, list_files
from hf_qep.hub.base import BaseFacts
from hf_qep.hub.cards.baselines import Baseline, read_baselines
from hf_qep.hub.cards.escape import is_repo_id
from hf_qep.hub.cards.manifest import Manifest
from hf_qep.hub.licences import LicenceDecision, decide
from hf_qep.hub.preflight import RECORD, SAMPLES, LocalFile, record_problems
from hf_qep.hub.remote import HubRefusal, Remote
from hf_qep.hub.student_folder import CARD_COMMAND
from hf_qep.progress import SILENT, Progress


@dataclass(frozen=True)
class CardOptions:
    """What only a person can know."""

    repo_id: str | None = None
    """OWNER/NAME under which it will be published; None: the folder's name is shown"""
    quantized_by: str | None = None
    """account that made it; None: the owner in `repo_id`"""
    base_model: str | None = None
    """Hub id of the original, where the manifest knows only a folder's name"""
    base_card: Path | None = None
    """README.md of the original; None: it is looked up on the Hub"""
    baseline_records: tuple[Path, ...] = ()
    """records of other methods on the same original and text"""


@dataclass(frozen=True)
class CardFacts:
    """What is known of one checkpoint."""

    name: str
    options: CardOptions
    record: EvalRecord
    made: Manifest
    config: dict[str, Any]
    base: BaseFacts
    base_id: str | None
    """Hub id of the original, None if it has none"""
    base_seen: bool
    """whether the Hub was asked and knows it"""
    files: tuple[LocalFile, ...]
    samples: Samples | None = None
    baselines: tuple[Baseline, ...] = ()
    plot: str | None = None
    """name of the image of bits per layer; None: it was not drawn"""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """what the user should know about how these facts were found"""

    @property
    def text(self) -> TextScore | None:
        """Language-model scores."""
        return self.record.text

    @property
    def title(self) -> str:
        """Name of the repository, or of the folder."""
        return self.options.repo_id.partition("/")[2] if self.options.repo_id else self.name

    @property
    def path(self) -> str:
        """What a reader gives to from_pretrained."""
        return self.options.repo_id or self.name

    @property
    def maker(self) -> str | None:
        """Who made it."""
        owner = self.options.repo_id.partition("/")[0] if self.options.repo_id else None
        return self.options.quantized_by or owner

    @property
    def base_name(self) -> str:
        """Hub id of the original, or what its folder was called."""
        return self.base_id or self.made.base_model

    @property
    def revision(self) -> str | None:
        """Commit of the original that was quantised."""
        return self.made.revision

    @property
    def licence(self) -> str | None:
        """Licence of the original."""
        return self.base.licence or self.made.licence

    @property
    def decision(self) -> LicenceDecision:
        """What that licence allows."""
        return decide(self.licence)

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.size for file in self.files if file.is_weights)

    @property
    def float_bytes(self) -> int | None:
        """Bytes of the original's weight files, as recorded."""
        return self.record.cost.baseline.file_bytes if self.record.cost else None

    @property
    def is_one_bit(self) -> bool:
        """Whether a budget of one bit per weight was asked for; scales come on top of it."""
        return self.made.recipe.get("bits") == 1.0

    @property
    def has_loader(self) -> bool:
        """Whether the folder carries the loader for machines without this package."""
        return any(file.path == LOADER for file in self.files)


def gather(
    folder: Path, options: CardOptions | None = None, *, remote: Remote | None = None, progress: Progress = SILENT
) -> CardFacts:
    """Read and check a checkpoint folder.

    remote: the Hub to ask about the original; None asks nobody.
    Raises CardError if there is no record, if it was measured on other weights, or if names are impossible;
    CheckpointError for files that cannot be read.
    """
    options = options or CardOptions()
    _check_names(options)
    if not (folder / "config.json").is_file():
        raise CardError(f"{folder.name!r} is no checkpoint of hf_qep; give the folder that hf-qep quantize wrote")
    if not (folder / RECORD).is_file():
        if (folder / DISTILLATION).is_file():
            raise CardError(f"{folder.name!r} is a student, whose card another command writes; run: {CARD_COMMAND}")
        raise CardError(
            f"{folder.name!r} has no {RECORD!r}, and a card states only what was measured; run: hf-qep eval"
        )
    made = Manifest.read(folder)
    files = _files(folder, progress)
    digests = {file.path: file.sha256 for file in files}
    if problems := record_problems(folder, digests):
        raise CardError(problems[0])
    _check_weights(made, files)
    record = EvalRecord.read(folder)
    base_id = _base_id(made, options)
    base, seen, notes = _base(made, base_id, options, remote)
    return CardFacts(
        name=folder.resolve().name,
        options=options,
        record=record,
        made=made,
        config=read_json(folder / "config.json"),
        base=base,
        base_id=base_id,
        base_seen=seen,
        files=files,
        samples=Samples.read(folder) if (folder / SAMPLES).is_file() else None,
        baselines=read_baselines(options.baseline_records, record),
        notes=tuple(notes),
    )


def _check_names(options: CardOptions) -> None:
    if options.repo_id is not None and not ("/" in options.repo_id and is_repo_id(options.repo_id)):
        raise CardError(f"--repo-id {options.repo_id!r} is no OWNER/NAME of the Hub")
    if options.base_model is not None and not ("/" in options.base_model and is_repo_id(options.base_model)):
        raise CardError(f"--base-model {options.base_model!r} is no OWNER/NAME of the Hub")
    if options.quantized_by is not None and not re.fullmatch(r"[\w.-]{1,96}", options.quantized_by, re.ASCII):
        raise CardError(f"--quantized-by {options.quantized_by!r} is no name of an account on the Hub")


def _files(folder: Path, progress: Progress) -> tuple[LocalFile, ...]:
    """Allowed files with digests, the card and what is drawn for it apart; links are never followed."""
    names = [name for name in list_files(folder)[0] if kind_of(name) not in ("card", "plot", "result")]
    found = []
    with progress.bar("checksums", len(names), "file") as bar:
        for name in names:
            found.append(LocalFile(name, (folder / name).stat().st_size, sha256(folder / name)))
            bar.advance(detail=name)
    return tuple(found)


def _check_weights(made: Manifest, files: Sequence[LocalFile]) -> None:
    """The manifest must be that of these weight files: the card takes the layers from it."""
    listed = made.raw.get("files")
    listed = listed if isinstance(listed, dict) else {}
    wanted = {
        name: entry.get("sha256")
        for name, entry in listed.items()
        if kind_of(name) == "weights" and isinstance(entry, dict)
    }
    if wanted != {file.path: file.sha256 for file in files if file.is_weights}:
        raise CardError(f"{MANIFEST!r} lists other weight files than these; quantise again")


def _base_id(made: Manifest, options: CardOptions) -> str | None:
    """Hub id of the original. Raises CardError if the user and the manifest name different ones."""
    known = made.base_model if "/" in made.base_model and is_repo_id(made.base_model) else None
    if known and options.base_model and known != options.base_model:
        raise CardError(f"--base-model {options.base_model!r} is not what the manifest names, {known!r}; leave it out")
    return options.base_model or known


def _base(
    made: Manifest, base_id: str | None, options: CardOptions, remote: Remote | None
) -> tuple[BaseFacts, bool, list[str]]:
    """(facts of the original, whether the Hub knows it, notes): from the Hub, the given card, the Hub's cache or the
    manifest, the first that is to be had; a given card goes before what the Hub says."""
    given = BaseFacts.from_card(_card_file(options.base_card)) if options.base_card else None
    if base_id is None:
        note = "no Hub id of the original is known, so the Hub will show none; name it with --base-model"
        return given or BaseFacts(licence=made.licence), False, [note]
    if remote is not None:
        try:
            found = remote.call(
                f"look at the original {base_id}", lambda: BaseFacts.from_hub(remote.api, base_id, made.revision)
            )
            return given or found, True, []
        except HubRefusal as error:
            if error.status in (401, 404) and given is None:
                raise CardError(
                    f"the Hub shows no model {base_id!r} ({error}); log in if it is private, or give its card with "
                    "--base-card"
                ) from None
            reason = str(error)
    else:
        reason = "the Hub was not asked"
    note = f"the original {base_id} is unverified: {reason}"
    if given is not None:
        return given, False, [note]
    cached = _cached_card(base_id, made.revision)
    if cached is not None:
        return BaseFacts.from_card(cached), False, [f"{note}; its card was taken from the local cache"]
    gate = "licence comes from the manifest, languages and gate are unknown; give its card with --base-card"
    return BaseFacts(licence=made.licence), False, [f"{note}; the {gate}"]


def _card_file(path: Path) -> Path:
    return path / "README.md" if path.is_dir() else path


def _cached_card(base_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base_id, "README.md", revision=revision)
    return Path(found) if isinstance(found, str) else None
