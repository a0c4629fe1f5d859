"""Atomic writing of files, and their SHA-256."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO
from pathlib import Path

from safetensors import SafetensorError

ABANDONED = 24 * 3600
"""Seconds after which a write on another machine that has stopped counts as killed."""
_SCRATCH = re.compile(r"\.dmm-(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,10})-[0-9a-f]{16}\.tmp")
_ours: set[str] = set()
"""Names of the writes that go on in this process."""


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` to write to; it takes the place of ``path`` only if the block succeeds.

    The data are on disk before the rename (fsync): a crash, a full disk or an interrupt leaves what was there before.
    What a killed write left in this folder is removed first.
    Links are followed. Raises ValueError when ``path`` is a folder or lies in a folder that does not exist; an OSError or
    SafetensorError of the block or of the disk becomes an OSError that names ``path``.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"{path} is a folder: give a file name")
    if not target.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist: create it first")
    remove_abandoned(target.parent)
    # In a folder of its own: safetensors writes one more file beside it, which a kill would leave under a name that tells nothing.
    scratch = target.with_name(f".dmm-{_machine()}-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    temporary = scratch / "content.tmp"
    try:
        scratch.mkdir()
        _ours.add(scratch.name)
        temporary.touch(exist_ok=False)
        # safetensors replaces the file by one that only its owner may read; give back the user's own default.
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except SafetensorError as error:
        raise _named(error, path) from error
    except OSError as error:
        if error.filename is not None and str(error.filename) not in (str(temporary), str(scratch)) or not error.errno:
            raise  # of another file, or in words of its own
        raise _named(error, path) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _ours.discard(scratch.name)
    if os.name == "posix":  # the rename itself must survive a power cut too; Windows cannot open folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writes have left behind in a folder: those of processes of this machine that are gone, and those of other machines
    (a shared disk) that nothing has been written to for a day. What cannot be removed is left."""
    for scratch in folder.glob(".dmm-*.tmp"):
        match = _SCRATCH.fullmatch(scratch.name)
        if match is None or scratch.name in _ours:
            continue
        here = match["machine"] == _machine()
        try:
            newest = max(path.stat().st_mtime for path in (scratch, *scratch.iterdir()))
        except OSError:  # another process removed it at the same time, or it is no folder
            continue
        if (here and not _is_alive(int(match["process"]))) or newest < time.time() - ABANDONED:
            shutil.rmtree(scratch, ignore_errors=True)


def _is_alive(process: int) -> bool:
    """Whether a process of this machine still runs; True where that cannot be asked. Not for names of this process' own writes."""
    if process == os.getpid():
        return False  # one that had this number before, as in a container that was started again
    if os.name != "posix":  # signal 0 would end the process there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@functools.cache
def _machine() -> str:
    """This machine, and this container where processes are counted by container, in letters for a file name."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _named(error: OSError | SafetensorError, path: str | os.PathLike) -> OSError:
    """The error of a write as Python's own kind for it, with the file's name."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, str(path))
    number = re.search(r"os error (\d+)", str(error))  # so the Rust library ends what the system says
    return (
        OSError(int(number[1]), os.strerror(int(number[1])), str(path))
        if number
        else OSError(EIO, str(error), str(path))
    )


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file as 64 lower-case hexadecimal digits, by which recipes and style lists identify a teacher."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
