"""Dataclasses to JSON and back, with types checked on the way in, and their JSON schema.

A record is declared once, as frozen dataclasses whose fields are `Annotated[type, "meaning"]`; the file format, the
validation and the JSON schema all come from that declaration. Understood types: str, int, float, bool, None in a
union, tuple[X, ...], dict[str, X] and dataclasses of these.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

T = TypeVar("T")
_JSON_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


class SchemaError(ValueError):
    """A JSON value does not have the declared shape."""


def to_json(value: Any) -> Any:
    """Plain dicts, lists and scalars; every field is written, unmeasured ones as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[T], value: Any, where: str = "record") -> T:
    """Build `cls` from parsed JSON. Raises SchemaError that names the place, what was found and what is allowed."""
    return _read(cls, value, where)


def json_schema(cls: type) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a dataclass; nested dataclasses become `$defs`."""
    definitions: dict[str, Any] = {}
    top = _schema(cls, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": definitions}


def _fields(cls: Any) -> dict[str, tuple[Any, str | None]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: _unwrap(hints[f.name]) for f in dataclasses.fields(cls)}


def _unwrap(hint: Any) -> tuple[Any, str | None]:
    if get_origin(hint) is Annotated:
        inner, meaning = get_args(hint)[:2]
        return inner, meaning
    return hint, None


def _read(hint: Any, value: Any, where: str) -> Any:
    hint, _ = _unwrap(hint)
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _read_optional(hint, value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise SchemaError(f"{where} is {value!r}; allowed: {', '.join(map(repr, get_args(hint)))}")
        return value
    if origin is tuple:
        _expect(isinstance(value, list), where, value, "a list")
        return tuple(_read(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), where, value, "an object")
        return {key: _read(get_args(hint)[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(hint, value, where)
    return _read_scalar(hint, value, where)


def _read_optional(hint: Any, value: Any, where: str) -> Any:
    if value is None:
        return None
    (inner,) = [arg for arg in get_args(hint) if arg is not types.NoneType]
    return _read(inner, value, where)


def _read_dataclass(cls: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), where, value, "an object")
    fields = _fields(cls)
    required = {f.name for f in dataclasses.fields(cls) if _has_no_default(f)}
    if missing := sorted(required - value.keys()):
        raise SchemaError(f"{where} lacks the field(s) {', '.join(missing)}")
    if unknown := sorted(value.keys() - fields.keys()):
        raise SchemaError(f"{where} has the unknown field(s) {', '.join(unknown)}")
    read = {name: _read(hint, value[name], f"{where}.{name}") for name, (hint, _) in fields.items() if name in value}
    try:
        return cls(**read)
    except ValueError as error:
        raise SchemaError(f"{where}: {error}") from error


def _read_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    _expect(type(value) is hint, where, value, f"of type {_JSON_NAMES[hint]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise SchemaError(f"{where} is {value}; JSON numbers are finite, use null for what was not measured")
    return value


def _expect(holds: bool, where: str, value: Any, wanted: str) -> None:
    if not holds:
        raise SchemaError(f"{where} is {value!r:.80}; it must be {wanted}")


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hint, meaning = _unwrap(hint)
    described = {"description": meaning} if meaning else {}
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(arg, definitions) for arg in get_args(hint)], **described}
    if origin is Literal:
        return {"enum": list(get_args(hint)), **described}
    if origin is tuple:
        return {"type": "array", "items": _schema(get_args(hint)[0], definitions), **described}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(get_args(hint)[1], definitions), **described}
    if dataclasses.is_dataclass(hint):
        return {"$ref": f"#/$defs/{_define(hint, definitions)}", **described}
    return {"type": _JSON_NAMES[hint], **described}


def _define(cls: Any, definitions: dict[str, Any]) -> str:
    if cls.__name__ in definitions:
        return cls.__name__
    definitions[cls.__name__] = {}  # reserves the place, so that the order is that of the declaration
    hints = typing.get_type_hints(cls, include_extras=True)
    definitions[cls.__name__] = {
        "type": "object",
        "description": (cls.__doc__ or "").strip(),
        "properties": {name: _schema(hint, definitions) for name, hint in hints.items()},
        "required": [f.name for f in dataclasses.fields(cls) if _has_no_default(f)],
        "additionalProperties": False,
    }
    return cls.__name__


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
