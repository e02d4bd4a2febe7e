"""Command lines: flags that there are not are told from those that may be meant, before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import tyro

from fedpeat_ray.errors import ConfigError

USUAL = {
    "lr": "local.learning-rate",
    "model": "foundation.name",
    "model-name": "foundation.name",
    "model-name-or-path": "foundation.name",
    "dataset": "data.name",
    "dataset-name": "data.name",
    "num-rounds": "rounds",
    "num-clients": "fleet.num-devices",
    "clients": "fleet.num-devices",
    "clients-per-round": "cohort-size",
    "local-epochs": "local.epochs",
    "output-dir": "out",
    "r": "lora.rank",
    "lora-r": "lora.rank",
    "lora-alpha": "lora.alpha",
    "target-modules": "lora.targets",
    "max-length": "local.sequence-length",
    "dirichlet-alpha": "data.partition.alpha",
}
"""What settings are called elsewhere."""
_NEAR = 0.7  # of difflib's ratio: one slip of the keyboard, not another word


def parsed(kind: Any, arguments: Sequence[str], **options: Any) -> Any:
    """What tyro makes of a command line: a configuration, or what a function gives. A reader of the help may have seen
    enough (`--help | head`)."""
    try:
        return tyro.cli(kind, args=arguments, **options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere at exit
        raise SystemExit(0) from None


def check_flags(arguments: Sequence[str], known: Collection[str]) -> None:
    """Raise ConfigError for the first flag that is not known, naming those that may be meant."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("_", "-")
        if argument.startswith("--") and name not in known and name not in ("", "help"):
            near = " or ".join(f"--{each}" for each in meant(name, known))
            raise ConfigError(f"there is no --{name}: {f'did you mean {near}?' if near else '--help has all settings'}")


def meant(name: str, known: Collection[str]) -> list[str]:
    """Flags that a wrong name may stand for, the likeliest first: what others call so, its last part, or nearly it."""
    last = {flag: flag.rpartition(".")[2] for flag in known}
    own = [USUAL[name]] if USUAL.get(name) in known else []
    own += sorted((flag for flag in known if last[flag] == name.rpartition(".")[2]), key=_common_first)
    near = difflib.get_close_matches(name, known, cutoff=_NEAR)
    near += [flag for flag in known if difflib.get_close_matches(name, [last[flag]], cutoff=_NEAR)]
    return [*dict.fromkeys(own or near)][:3]


def flags(kind: type, prefix: str = "") -> Iterator[str]:
    """All flags of a configuration, without the dashes before."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        name = item.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[item.name]):
            yield from flags(typing.cast(type, hints[item.name]), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
            if hints[item.name] is bool:
                yield f"{prefix}no-{name}"


def _common_first(flag: str) -> tuple[int, str]:
    parts = ("local", "lora", "fleet", "data", "foundation")
    part = flag.partition(".")[0]
    return (parts.index(part) if part in parts else len(parts), flag)
