"""What the original of a quantised model says of itself on its card: the licence and gate that a copy inherits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_qep.errors import CardError

MAX_CARD_BYTES = 4 << 20
"""No card is longer; what is, is not read."""


@dataclass(frozen=True)
class BaseFacts:
    """Facts of the original, as found. None or empty: it says nothing, which is not the same as "nothing applies"."""

    id: str | None = None
    """Hub id, None for a folder"""
    sha: str | None = None
    """commit that was looked at"""
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    gated: Literal["auto", "manual"] | None = None
    languages: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    tags: tuple[str, ...] = ()
    gate_form: dict[str, Any] = field(default_factory=dict)
    """fields `extra_gated_*` of the card, verbatim"""
    library_name: str | None = None

    @classmethod
    def from_hub(cls, api: Any, repo_id: str, revision: str | None = None) -> BaseFacts:
        """Facts of a model on the Hub, at `revision` or its newest commit.

        api: a `huggingface_hub.HfApi`, whose errors pass through.
        """
        info = api.model_info(repo_id, revision=revision)
        data = info.card_data.to_dict() if info.card_data is not None else {}
        found = _of_metadata(data)
        return cls(
            **found
            | {
                "id": info.id,
                "sha": info.sha,
                "gated": info.gated if info.gated in ("auto", "manual") else None,
                "pipeline_tag": found["pipeline_tag"] or _text(info.pipeline_tag),
                "library_name": found["library_name"] or _text(info.library_name),
                "tags": found["tags"] or _texts(info.tags),
            }
        )

    @classmethod
    def from_folder(cls, folder: Path) -> BaseFacts:
        """Facts of the README.md of a folder; none if it has no card. Raises CardError for a card that lies broken."""
        path = folder / "README.md"
        return cls.from_card(path) if path.is_file() else cls()

    @classmethod
    def from_card(cls, path: Path) -> BaseFacts:
        """Facts of a card file. Raises CardError if it cannot be read or its YAML is broken."""
        if not path.is_file():
            raise CardError(f"there is no card {path.name!r}; give the README.md of the original")
        if path.stat().st_size > MAX_CARD_BYTES:
            raise CardError(f"{path.name!r} has {path.stat().st_size} bytes, more than {MAX_CARD_BYTES}; it is no card")
        return cls(**_of_metadata(read_metadata(path.read_text(encoding="utf-8", errors="replace"))))


def read_metadata(text: str) -> dict[str, Any]:
    """The YAML block of a card, {} without one. Raises CardError if it is no YAML or no mapping."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return {}
    try:
        data = yaml.safe_load(block.group(2))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        reason = " ".join(str(error).split())[:200]
        raise CardError(f"the metadata of the card is no YAML ({reason}); mend the block between the --- lines") from (
            error
        )
    if data is not None and not isinstance(data, dict):
        raise CardError(f"the metadata of the card is a {type(data).__name__}, not a list of `name: value`; mend it")
    return data or {}


def _of_metadata(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of BaseFacts that a YAML block gives."""
    return {
        "licence": _text(_first(data.get("license"))),
        "licence_name": _text(data.get("license_name")),
        "licence_link": _text(data.get("license_link")),
        "languages": _texts(data.get("language")),
        "pipeline_tag": _text(data.get("pipeline_tag")),
        "tags": _texts(data.get("tags")),
        "gate_form": {key: value for key, value in data.items() if str(key).startswith("extra_gated_")},
        "library_name": _text(data.get("library_name")),
    }


def _first(value: Any) -> Any:
    """The only member of a list of one; several licences at once are no licence that could be named."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _text(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _texts(value: Any) -> tuple[str, ...]:
    """Names of a list or a single name. YAML reads the language code `no` as false."""
    values = value if isinstance(value, list) else [value]
    return tuple(name for v in values if (name := "no" if v is False else _text(v)))
