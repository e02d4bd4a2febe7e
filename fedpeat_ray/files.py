"""Files on disk: where caches live, what a file holds, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def user_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/fedpeat_ray`, by default `~/.cache/fedpeat_ray`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpeat_ray"


def file_sha256(path: Path) -> str:
    """Of its content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a hidden path beside `path` to write to; on success it is flushed to disk and moved there.

    The path is this writer's alone, also among processes of several machines. Readers of a directory skip
    names that start with a dot. Folders are made as needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = _hidden_beside(path)
    try:
        yield hidden
        flush(hidden)
        hidden.replace(path)
        flush(path.parent)
    finally:
        hidden.unlink(missing_ok=True)


def sha256_of(values: Iterable[str]) -> str:
    """Of texts in order, each with its length: no two lists of texts share a digest, whatever is in them."""
    sha = hashlib.sha256()
    for value in values:
        encoded = value.encode("utf-8", "replace")
        sha.update(b"%d:" % len(encoded) + encoded)
    return sha.hexdigest()


@contextlib.contextmanager
def written_with_hash(path: Path) -> Iterator[Path]:
    """`written_whole` for caches: the SHA-256 of what was written lies beside it, see `kept_sha256`."""
    with written_whole(path) as part:
        yield part
        digest = file_sha256(part)
    with written_whole(_hash_of(path)) as part:
        part.write_text(digest)


def kept_sha256(path: Path) -> str | None:
    """SHA-256 of a cached file that still holds what `written_with_hash` wrote; None: it has to be made again."""
    if not path.exists() or not _hash_of(path).exists():
        return None
    digest = file_sha256(path)
    return digest if _hash_of(path).read_text() == digest else None


def _hash_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


@contextlib.contextmanager
def written_whole_dir(path: Path) -> Iterator[Path]:
    """The same for a folder, which is there when it is given. An older one in its place goes when the new one is
    complete: between the two there is none, never a mixture."""
    hidden, older = _hidden_beside(path), _hidden_beside(path)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        for part in (*hidden.rglob("*"), hidden):
            flush(part)
        if path.exists():
            path.replace(older)
        hidden.replace(path)
        flush(path.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)


def remove_dir(path: Path) -> None:
    """Remove a folder, if it is there; for readers all of it goes at once."""
    if path.exists():
        shutil.rmtree(path.replace(_hidden_beside(path)))


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that nobody else writes to."""
    for path in folder.glob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk. Some file systems cannot do that for a folder, and need not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _hidden_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
