"""Atomic writing of files, and their SHA-256."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` to write to; it takes the place of ``path`` only if the block succeeds.

    The data are on disk before the rename (fsync): a crash, a full disk or an interrupt leaves what was there before.
    Links are followed. Raises ValueError when ``path`` is a folder or lies in a folder that does not exist; an OSError or
    SafetensorError of the block or of the disk becomes an OSError that names ``path``.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"{path} is a folder: give a file name")
    if not target.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist: create it first")
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
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
        if error.filename is not None and str(error.filename) != str(temporary) or not error.errno:
            raise  # of another file, or in words of its own
        raise _named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must survive a power cut too; Windows cannot open folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
