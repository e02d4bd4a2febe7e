"""Every error the engine raises on purpose.

FedPeatError
├── ConfigError      a setting is wrong; says its name, its value and what is allowed
├── DataError        text, columns or cached data cannot be used
├── ModelError       a model cannot be loaded or is not of a supported kind
├── RunDirError      a run directory cannot be written, resumed or read
├── HostLostError    a client batch ended two hosts; names its devices
├── DriverLostError  a rank of the sharded foundation is gone; the run can be resumed
└── RunFailedError   a run came to its end without a result; what it wrote down stays
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any


class FedPeatError(Exception):
    """Base class; the command line prints its message as one line and exits with 2."""


class ConfigError(FedPeatError, ValueError):
    """A setting is wrong. Build it with `ConfigError.of` so that it is always complete."""

    @classmethod
    def of(cls, field: str, value: object, allowed: str) -> "ConfigError":
        return cls(f"{field} = {value!r} is not allowed: {allowed}")


class DataError(FedPeatError):
    """Text, columns or cached data cannot be used."""


class ModelError(FedPeatError):
    """A model cannot be loaded, or is not of a supported kind."""


class RunDirError(FedPeatError):
    """A run directory cannot be written, resumed or read."""


class HostLostError(FedPeatError):
    """A client batch ended two hosts one after the other; the message names its devices."""


class DriverLostError(FedPeatError):
    """A process that holds a shard of the foundation is gone, and the others were ended with it."""


class RunFailedError(FedPeatError):
    """A run came to its end without a result; what it wrote down stays. `summary` is what would have been returned."""

    def __init__(self, message: str, summary: Mapping[str, Any]):
        super().__init__(message)
        self.summary = summary


def one_of(word: str, known: Collection[str], more: str = "") -> str:
    """What an error says is allowed: these words, and the one that was perhaps meant."""
    near = difflib.get_close_matches(word, known, 1)
    return f"one of {', '.join(known)}{more}" + "".join(f"; did you mean {meant}?" for meant in near)
