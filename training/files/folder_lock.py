"""A lock on a folder, so that two processes do not write the same files. The operating system lets go of it when its process ends, however
that ends; the file that it is on may then be left, and means nothing by itself."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""In the folder: the file that the lock is on. It says whose it is, for messages."""
FAR = 2**30
"""The byte that is locked on Windows, where what is locked cannot be read."""
REFUSED = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@contextlib.contextmanager
def locked(folder: Path, what: str, instead: str = "choose another folder") -> Iterator[None]:
    """Inside, the folder (made where it is missing, and removed when nothing was put into it) is this process's alone.

    Raises ValueError naming the process that has it, where another one or another thread of this one does; what: the folder's name in it;
    instead: what else to do than to wait or to stop the other.
    On a file system without locks (some network folders) this is said, and nothing is locked.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what} '{folder}' cannot be made: {error.strerror} ('{error.filename}')") from error
    path = folder / LOCK
    file = _taken(path, f"{what} '{folder}'", instead)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # of Windows, which removes no open file
            path.unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):  # they are not empty
            for place in made:
                place.rmdir()


def _taken(path: Path, what: str, instead: str) -> IO[str]:
    """The lock's file, locked."""
    while True:
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, it is open for as long as the lock is held
        except OSError as error:
            raise ValueError(f"{what} cannot be written: {error.strerror}") from error
        try:
            _lock(file)
            if _is_at(path, file):
                _sign(file)
                return file
            file.close()  # its holder has just removed it
        except OSError as error:
            if error.errno in REFUSED:
                holder = _holder(path)
                file.close()
                raise ValueError(
                    f"{what} is in use by {holder}: wait until it has ended or stop it, or {instead}"
                ) from error
            logger.warning("%s cannot be locked (%s): see to it that no other process works there", path.parent, error)
            return file


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> None:
    """Take the lock, or raise OSError at once."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sign(file: IO[str]) -> None:
    """Say whose the lock is; that it cannot be said (a full disk) is no reason not to work."""
    command = " ".join(sys.argv)[:200]
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):
        file.seek(0)
        file.truncate()
        file.write(
            json.dumps({"process": os.getpid(), "machine": socket.gethostname(), "since": now, "command": command})
        )
        file.flush()


def _holder(path: Path) -> str:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return f"process {said['process']} on {said['machine']} since {said['since']} ({said['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
