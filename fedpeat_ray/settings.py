"""What a configuration is made of: numbers with bounds, dataclasses that are checked, plain values and back."""

from __future__ import annotations

import argparse
import builtins
import collections.abc
import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fedpeat_ray.errors import ConfigError, FedPeatError, one_of


@dataclass(frozen=True)
class Bounds:
    """The least and the greatest value of a number, and how an error says it."""

    low: float
    high: float
    allowed: str


PositiveInt = Annotated[int, Bounds(1, 2**62, "an integer of at least 1")]
NonNegativeInt = Annotated[int, Bounds(0, 2**62, "an integer of at least 0")]
SequenceLength = Annotated[int, Bounds(2, 2**31, "an integer of at least 2")]
Number = Annotated[float, Bounds(-1e300, 1e300, "a finite number")]
Positive = Annotated[float, Bounds(math.ulp(0.0), 1e300, "a finite number above 0")]
NonNegative = Annotated[float, Bounds(0, 1e300, "a finite number of at least 0")]
Share = Annotated[float, Bounds(0, 1, "between 0 and 1")]
Decay = Annotated[float, Bounds(0, 1 - 2**-53, "at least 0 and below 1")]


@dataclass(frozen=True)
class Settings:
    """A part of a configuration. It may be written as a person would: dictionaries for parts of it, lists for tuples,
    strings for paths."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _read(getattr(self, name), hint, name))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _read(value: Any, hint: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_plain(typing.cast(type, hint), dict(value), f"{path}.")
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in typing.get_args(hint):
        return Path(value)
    return value


def check(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first value beyond its bounds, or not of its field's type: from Python, anything
    may come."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for item in dataclasses.fields(config):
        path, value, hint = f"{prefix}{item.name}", getattr(config, item.name), hints[item.name]
        if not _is_a(value, hint):
            raise ConfigError.of(path, value, _in_words(hint))
        if dataclasses.is_dataclass(value):
            check(value, f"{path}.")


def bounds_of(hint: Any) -> Bounds | None:
    """What a field's type says of its numbers."""
    if typing.get_origin(hint) is Annotated:
        return next((fact for fact in hint.__metadata__ if isinstance(fact, Bounds)), None)
    return next(filter(None, map(bounds_of, typing.get_args(hint))), None)


def _is_a(value: object, hint: Any) -> bool:
    match typing.get_origin(hint):
        case typing.Annotated:
            bounds, kind = bounds_of(hint), typing.get_args(hint)[0]
            return _is_a(value, kind) and (bounds is None or bounds.low <= typing.cast(float, value) <= bounds.high)
        case typing.Union | types.UnionType:
            return any(_is_a(value, option) for option in typing.get_args(hint))
        case typing.Literal:
            return isinstance(value, str) and value in typing.get_args(hint)
        case builtins.tuple:
            return isinstance(value, tuple) and all(_is_a(item, typing.get_args(hint)[0]) for item in value)
        case collections.abc.Mapping:
            of_key, of_item = typing.get_args(hint)
            return isinstance(value, Mapping) and all(_is_a(k, of_key) and _is_a(v, of_item) for k, v in value.items())
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _in_words(hint: Any) -> str:
    if bounds := bounds_of(hint):
        return bounds.allowed
    if typing.get_origin(hint) is Literal:
        return ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is Annotated:
        return _in_words(typing.get_args(hint)[0])
    return f"of type {hint.__name__ if isinstance(hint, type) else hint}"


def as_words(word: str, read: Callable[[list[str]], Any], write: Callable[[Any], list[str]]) -> Any:
    """For `Annotated`: a command line says such a value in words that look like `word`. Hints are text until somebody
    asks for them, so tyro is there if it is tyro that asks; nobody else needs this, or has to load tyro."""
    if "tyro" not in sys.modules:
        return None
    from tyro.constructors import PrimitiveConstructorSpec

    def value_of(words: list[str]) -> Any:
        try:
            return read(words)
        except ConfigError as error:
            raise FedPeatError(str(error)) from None  # tyro draws a frame around what is a ValueError

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{word} [{word} ...]]",
        instance_from_str=value_of,
        is_instance=lambda value: True,
        str_from_instance=write,
    )


def get(config: object, path: str) -> Any:
    """The value of a dotted path, e.g. `get(config, "fleet.num_devices")`."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def differences(one: Any, other: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, value in one, value in the other) of every field in which two configurations of a kind differ."""
    for item in dataclasses.fields(one):
        a, b = getattr(one, item.name), getattr(other, item.name)
        if dataclasses.is_dataclass(a):
            yield from differences(a, b, f"{prefix}{item.name}.")
        elif a != b:
            yield f"{prefix}{item.name}", a, b


def directory_to_resume(arguments: list[str]) -> Path | None:
    """What --resume says in a command line that is not parsed yet: the defaults of all other options are that run's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    return parser.parse_known_args(arguments)[0].resume


def to_plain(value: Any) -> Any:
    """Values for JSON: dataclasses and mappings as dictionaries, paths as strings, tuples as lists, infinity "inf"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def of_today(
    values: dict[str, Any], removed: Collection[str], renamed: Mapping[str, str], prefix: str = ""
) -> dict[str, Any]:
    """Plain values of an older version: less those of some dotted paths, and others under the names of today."""
    return {
        renamed.get(path, name): of_today(value, removed, renamed, f"{path}.") if isinstance(value, dict) else value
        for name, value in values.items()
        if (path := f"{prefix}{name}") not in removed
    }


def from_plain(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """The inverse of `to_plain`; what is missing has its default. Raises ConfigError for a field there is not."""
    hints = _hints(cls)
    built = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError.of(f"{prefix}{name}", value, one_of(name, sorted(hints)))
        hint = hints[name]
        value = _read(value, hint, f"{prefix}{name}")
        if float in (typing.get_args(hint) or (hint,)) and isinstance(value, str) and not _is_a(value, hint):
            value = float(value)
        built[name] = value
    return cls(**built)
