"""One process a run directory: who writes it holds a lock on a file in it, which the system frees when that process
ends, whatever ends it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fedpeat_ray.errors import RunDirError

LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_TRIES, _PAUSE_S = 5, 0.02  # whoever asks `is_held` has the lock for a moment


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[bool]:
    """Hold a directory, which is made if there is none; gives False where the file system has no locks.

    Raises RunDirError if another process holds it, naming that process, or if nothing can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as error:
        raise RunDirError(f"{directory} cannot be written: {error.strerror}") from error
    with file:  # closing it gives the lock back; processes that this one starts do not inherit it
        has_locks = True
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):  # NFS says the latter
            holder = file.read().strip() or "that has just begun"
            raise RunDirError(f"{directory} is being written by process {holder}: wait until it ends") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise RunDirError(f"{directory / LOCK} cannot be locked: {error.strerror}") from error
            has_locks = False
        file.truncate()
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield has_locks


def is_held(directory: Path) -> bool | None:
    """Whether a process writes a run; None if that cannot be known, on a file system without locks for example.
    Nothing is written, and a writer that begins at this moment is not refused."""
    try:
        file = (directory / LOCK).open("rb")
    except FileNotFoundError:
        return False
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            return None
    return False


def _lock(file: IO[str]) -> None:
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if not left:
                raise
            time.sleep(_PAUSE_S)
