"""One process a run directory: who writes it holds a lock on a file in it, which the system frees when that process
ends, whatever ends it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fedpeat_ray.errors import RunDirError

LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


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
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
