"""A dataclass that is a JSON file of its own: `schema` and `schema_version` first, checked when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from hf_qep.errors import CheckpointError, FormatVersionError
from hf_qep.evaluation import schema
from hf_qep.files import write_text_aside


class JsonFile:
    """Reading and writing, for a frozen dataclass with the fields `schema` and `schema_version`, whose defaults say
    what kind of file it is and which version is written.

    A subclass sets `file_name`, its name inside a checkpoint, and `what`, its name in messages.
    """

    file_name = ""
    what = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `schema` and `schema_version` come first."""
        values = schema.to_json(self)
        return {"schema": values.pop("schema"), "schema_version": values.pop("schema_version"), **values}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Validate and build. Raises FormatVersionError for a newer schema, CheckpointError for anything malformed."""
        kind, newest = cls.schema, cls.schema_version  # type: ignore[attr-defined]  # defaults of the fields
        if not isinstance(values, dict) or values.get("schema") != kind:
            raise CheckpointError(f"this is no {cls.what}: its `schema` is not {kind!r}")
        version = values.get("schema_version")
        if isinstance(version, int) and version > newest:
            raise FormatVersionError(
                f"this {cls.what} has schema version {version} and this hf_qep reads up to {newest}; "
                "run: pip install --upgrade hf-qep"
            )
        try:
            return schema.from_json(cls, values)
        except schema.SchemaError as error:
            raise CheckpointError(f"the {cls.what} is malformed: {error}") from error

    def write(self, path: Path) -> Path:
        """Write to the file `path`, or to `file_name` in the folder `path`, in one step; returns the file."""
        path = path / self.file_name if path.is_dir() else path
        write_text_aside(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file, or that of a folder. Raises CheckpointError or FormatVersionError."""
        path = path / cls.file_name if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"there is no {cls.what} {path.name!r}; run: hf-qep eval") from error
        except ValueError as error:
            raise CheckpointError(f"the {cls.what} {path.name!r} is not JSON: {error}") from error
        return cls.from_dict(values)
