"""Configurations are frozen dataclasses; their fields are overridden by name from the command line.

>>> import dataclasses
>>> @dataclasses.dataclass(frozen=True)
... class Inner:
...     rate: float = 0.1
>>> @dataclasses.dataclass(frozen=True)
... class Config:
...     width: int = 8
...     inner: Inner = Inner()
>>> override(Config(), ["width=16", "inner.rate=1e-3"])
Config(width=16, inner=Inner(rate=0.001))
>>> from_json(Config, {"width": 4, "inner": {"rate": 0.5}})
Config(width=4, inner=Inner(rate=0.5))
"""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any


def from_json(cls: type, fields: Mapping[str, Any]) -> Any:
    """A (nested) dataclass from the JSON form of `dataclasses.asdict`: lists become tuples again."""
    hints = typing.get_type_hints(cls)
    return cls(**{name: _value_from_json(hints[name], value) for name, value in fields.items()})


def _value_from_json(expected: Any, value: Any) -> Any:
    if isinstance(value, Mapping) and dataclasses.is_dataclass(expected):
        return from_json(expected, value)
    return tuple(_value_from_json(None, item) for item in value) if isinstance(value, list) else value


def override(config: Any, assignments: Sequence[str]) -> Any:
    """Returns a copy of a (nested) dataclass with fields replaced.

    Args:
      config: a frozen dataclass.
      assignments: 'path.to.field=value', values as Python literals or bare strings.

    Returns:
      The new configuration.

    Raises:
      ValueError: for an assignment without '=', an unknown field (with the nearest name), or a value of another type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set takes field=value, got {assignment!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        config = _replace(config, path.split("."), value, path)
    return config


def _replace(config: Any, names: Sequence[str], value: Any, path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(config)}
    if names[0] not in fields:
        near = difflib.get_close_matches(names[0], fields, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"--set {path}: no field '{names[0]}' in {type(config).__name__}{hint} ({', '.join(fields)})")
    current = getattr(config, names[0])
    if len(names) > 1:
        if not dataclasses.is_dataclass(current):
            raise ValueError(f"--set {path}: '{names[0]}' has no fields of its own")
        return dataclasses.replace(config, **{names[0]: _replace(current, names[1:], value, path)})
    expected = typing.get_type_hints(type(config))[names[0]]
    if dataclasses.is_dataclass(expected):
        inner = ", ".join(f"{path}.{field.name}" for field in dataclasses.fields(expected))
        raise ValueError(f"--set {path}: set one of its fields: {inner}")
    if not _fits(value, expected):
        raise ValueError(f"--set {path}: expected {_name(expected)}, such as {_literal(current)}, got {value!r}")
    value = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **{names[0]: float(value) if expected is float else value})


def _fits(value: Any, expected: Any) -> bool:
    """Whether a value has the annotated type; an int is a float, but a bool is neither."""
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(expected))
    if origin is typing.Literal:
        return value in typing.get_args(expected)
    if origin in (tuple, Sequence):
        item = typing.get_args(expected)[0]
        return isinstance(value, tuple | list) and all(_fits(v, item) for v in value)
    if expected is None or expected is types.NoneType:
        return value is None
    if expected in (int, float):
        return isinstance(value, (int, float) if expected is float else int) and not isinstance(value, bool)
    return isinstance(value, expected) if isinstance(expected, type) else True


def _literal(value: Any) -> str:
    """How a value is written after the equals sign."""
    return value if isinstance(value, str) else repr(value)


def _name(expected: Any) -> str:
    return expected.__name__ if isinstance(expected, type) else str(expected)
