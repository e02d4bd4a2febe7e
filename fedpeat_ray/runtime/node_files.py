"""What nodes of a cluster lack: files, in pieces, through Ray's object store, and code that they cannot import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import ray
from ray import cloudpickle

from fedpeat_ray.files import file_sha256, written_whole

_PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Sent:
    """A file in the object store."""

    sha256: str
    pieces: tuple[ray.ObjectRef, ...]


def travel_by_value(modules: Sequence[ModuleType]) -> None:
    """From now on, what these modules define travels with what uses it: no other process need import them."""
    for module in modules:
        cloudpickle.register_pickle_by_value(module)


def files_of(train: Callable) -> tuple[Path, ...]:
    """What work reads where it is done, besides the model: `train.files`, if it says so."""
    return tuple(getattr(train, "files", ()))


def send(paths: Sequence[Path], sent: Mapping[Path, Sent]) -> dict[Path, Sent]:
    """The files, if the cluster has several nodes. What was `sent` before is not read again, and stays sent until
    work that reads other files comes."""
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        return {}
    return {path: sent.get(path) or send_file(path) for path in paths or sent}


def send_file(path: Path) -> Sent:
    """One file."""
    with path.open("rb") as file:
        return Sent(file_sha256(path), tuple(map(ray.put, iter(lambda: file.read(_PIECE_BYTES), b""))))


def receive(files: Mapping[Path, Sent], known: dict[Path, str]) -> None:
    """Write those that this node does not have, in the same places; what an earlier run left there is replaced.

    `known`: a process's files that were looked at before, and their SHA-256.
    """
    for path, sent in files.items():
        if known.get(path) == sent.sha256:
            continue
        if not path.exists() or file_sha256(path) != sent.sha256:
            with written_whole(path) as part, part.open("wb") as file:
                for piece in sent.pieces:
                    file.write(ray.get(piece))
        known[path] = sent.sha256
