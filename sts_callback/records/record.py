"""Frozen records that can be written as strict JSON and read back.

NaN means that a number could not be measured; it is written as null. Unknown keys and other schema versions are refused. A field
with a default may be missing: older files do not have it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

SCHEMA_VERSION = 1
R = TypeVar("R", bound="Record")


@dataclass(frozen=True)
class StoredAs:
    """Used in a field's annotation to give its key in JSON. A renamed field keeps its old key."""

    key: str


@dataclass(frozen=True)
class Record:
    """A record that can be written as JSON and read back."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that strict JSON can hold, with the schema version."""
        return {"schema_version": SCHEMA_VERSION, **_plain(self)}

    @classmethod
    def from_dict(cls: type[R], content: Mapping[str, Any]) -> R:
        """Read the result of `to_dict`.

        Raises:
            ValueError: if the schema version differs, or keys are unknown or missing.

        """
        fields = dict(content)
        version = fields.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version: got {version!r}; this version reads {SCHEMA_VERSION}.")
        made: R = _typed(fields, cls)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling, by which processes exchange records: read-only mappings cannot be pickled."""
        return type(self).from_dict, (self.to_dict(),)

    def to_json(self) -> str:
        """Convert to one line of strict JSON with the schema version."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls: type[R], text: str) -> R:
        """Read the result of `to_json`. Raises as `from_dict` does."""
        return cls.from_dict(json.loads(text))


def has_default(field: dataclasses.Field[Any]) -> bool:
    """Whether a field may be missing."""
    return not (field.default is field.default_factory is dataclasses.MISSING)


def _keys(kind: type) -> dict[str, str]:
    """The JSON key of each field, by field name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    notes = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: next((note.key for note in found if isinstance(note, StoredAs)), name) for name, found in notes.items()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {key: _plain(getattr(value, name)) for name, key in _keys(type(value)).items()}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _typed(value: Any, kind: Any) -> Any:
    """Convert plain JSON to the type that the annotation `kind` names."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints, keys = typing.get_type_hints(kind), _keys(kind)
        optional = {keys[f.name] for f in dataclasses.fields(kind) if has_default(f)}
        if different := (set(value) ^ set(keys.values())) - (optional - set(value)):
            raise ValueError(f"{kind.__name__}: keys differ: {sorted(different)}.")
        return kind(**{name: _typed(value[key], hints[name]) for name, key in keys.items() if key in value})
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:  # a record that may not be there
            return None
        if isinstance(value, str) and str in arguments:  # a number, or a text
            return value
        return _typed(value, next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_typed(item, hint) for item, hint in zip(value, inner, strict=True))
    if origin in (Mapping, typing.get_origin(Mapping[str, int])):
        return types.MappingProxyType({name: _typed(item, arguments[1]) for name, item in value.items()})
    if kind is float:
        return float("nan") if value is None else float(value)
    return value
