"""Whether a result could be stored, asked before the work that makes it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ...dmm_core.metadata import unstorable

NAME_BYTES = 255
"""Of a file name, where the file system does not say how long one may be."""
ADDED = 4
"""Bytes by which a name grows on the way: ``-raw``."""


def check_output(path: str | os.PathLike, inputs: Iterable[str | os.PathLike] = (), what: str = "output") -> None:
    """Raise ValueError saying what to do where a file could not be written to ``path``, or would overwrite one of ``inputs``: files, and
    folders of models. Folders that are missing may be made later; nothing is written."""
    target = Path(os.path.realpath(path))
    check_name(target.name, what)
    limit = name_limit(_existing(target.parent)) - ADDED
    check_lengths(target.parent, f"the folder of {what}")
    if (length := len(os.fsencode(target.name))) > limit:
        raise ValueError(f"{what} has a file name of {length} bytes, at most {limit} are possible there: shorten it")
    if target.is_dir():
        raise ValueError(f"{what} is '{path}', a folder: give a file name")
    check_folder(target.parent, f"the folder of {what} '{path}'")
    for given in inputs:
        if overwrites(target, Path(os.path.realpath(given))):
            raise ValueError(f"{what} is '{path}', which belongs to '{given}', one of the inputs: give another name")


def overwrites(target: Path, given: Path) -> bool:
    """Whether a file that is written to ``target`` takes the place of ``given``, or of a file in that folder."""
    if not target.exists():
        return False
    return given in target.parents or (given.exists() and os.path.samefile(target, given))


def check_name(name: str, what: str) -> None:
    """Raise ValueError for a file name with characters that nobody sees."""
    if bad := unstorable(name):
        raise ValueError(f"{what} has the control character {bad!r} in its file name: remove it")


def check_lengths(folder: Path, what: str) -> None:
    """Raise ValueError for a folder with a name in its path that is too long."""
    limit = name_limit(_existing(folder))
    for name in folder.parts:
        if (length := len(os.fsencode(name))) > limit:
            raise ValueError(
                f"{what} has a name of {length} bytes in it ('{name[:20]}...'), at most {limit} are possible there: shorten it"
            )


def check_folder(folder: Path, what: str) -> None:
    """Raise ValueError where nothing can be written to a folder, or it cannot be made; nothing is left there."""
    check_lengths(folder, what)
    place = _existing(folder)
    if not place.is_dir():
        raise ValueError(f"{what} cannot be made: '{place}' is a file")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{what} cannot be written: {error.strerror or error} ('{place}')") from error


def free_bytes(folder: Path) -> int:
    """On the disk of a folder, which may be made later, or be a link that leads nowhere."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(place).free


def _existing(folder: Path) -> Path:
    """The nearest place that is there."""
    return next(place for place in (folder, *folder.parents) if os.path.lexists(place))


def name_limit(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows has no pathconf
        return NAME_BYTES
