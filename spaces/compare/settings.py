"""What the Space is told from outside: environment variables first, then `settings.json` beside this file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ORIGINAL = ("auto", "live", "recorded", "off")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SETTINGS_FILE = Path(__file__).resolve().parent / "settings.json"


class SettingsError(ValueError):
    """A variable holds something that cannot be used; the message names it, its value and what is allowed."""


@dataclass(frozen=True)
class Settings:
    """All variables; the name of a variable is that of its field in capitals."""

    model_id: str = ""
    """Hub id or folder of the quantised model; empty: the page says that none is set"""
    model_revision: str = ""
    base_id: str = ""
    """Hub id or folder of the original; empty: what the manifest of the quantised model names"""
    base_revision: str = ""
    original: str = "auto"
    """live: both models run; recorded: outputs recorded earlier; off: none; auto: live if it fits into memory"""
    device: str = "auto"
    dtype: str = "auto"
    """dtype of what is not packed; auto: as stored"""
    max_new_tokens: int = 512
    """upper end of the slider"""
    max_input_tokens: int = 2048
    """longer prompts lose their beginning"""
    max_chars: int = 8000
    """longer prompts are cut before they are tokenised"""
    specialists: str = ""
    """Hub ids, with a revision after @, or folders of specialists, divided by commas"""
    queue_size: int = 16
    """visitors who may wait"""

    @property
    def default_new_tokens(self) -> int:
        """Where the slider stands at first."""
        return min(128, self.max_new_tokens)


_LIMITS = {"max_new_tokens": 8192, "max_input_tokens": 131_072, "max_chars": 1_000_000, "queue_size": 256}
_CHOICES = {"original": ORIGINAL, "device": DEVICES, "dtype": DTYPES}


def read_settings(environment: Mapping[str, str] | None = None, file: Path = SETTINGS_FILE) -> Settings:
    """Settings of this process. Raises SettingsError."""
    environment = os.environ if environment is None else environment
    stored = _stored(file)
    values: dict[str, str | int] = {}
    for field, default in vars(Settings()).items():
        name = field.upper()
        text = str(environment.get(name) or stored.get(name) or "").strip()
        if text:
            values[field] = _number(name, text, _LIMITS[field]) if isinstance(default, int) else text
    for field, allowed in _CHOICES.items():
        if values.get(field, allowed[0]) not in allowed:
            raise SettingsError(f"{field.upper()}={values[field]!r} is not known; use one of {', '.join(allowed)}")
    return Settings(**values)


def _stored(file: Path) -> dict[str, object]:
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{file.name} is not JSON: {error}") from error
    known = {name.upper() for name in vars(Settings())}
    if not isinstance(stored, dict) or set(stored) - known:
        raise SettingsError(f"{file.name} must be an object whose keys are among {', '.join(sorted(known))}")
    return stored


def _number(name: str, text: str, limit: int) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= limit:
        raise SettingsError(f"{name}={text!r} must be a whole number from 1 to {limit}")
    return int(text)
