"""Files on disk: where caches live, what a file holds, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


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

    Readers of a directory skip names that start with a dot. Folders are made as needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield hidden
        with hidden.open("rb") as file:
            os.fsync(file.fileno())
        hidden.replace(path)
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
