"""Finished pieces of long work, kept as files in a folder, so that interrupted work goes on from them."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from .checksums import read_checked, write_checked

logger = logging.getLogger(__name__)


MADE_FROM = "dmm.made_from"


def read_piece(path: Path, count: int, made_from: str = "") -> dict[str, Tensor] | None:
    """The tensors of a finished piece; None where there is no file, or one that is damaged, has other than ``count`` rows in a tensor, or
    was made from something else (``write_piece``)."""
    if not path.exists():
        return None
    try:
        tensors, said = read_checked(path)
    except (ValueError, OSError) as error:
        logger.warning("%s cannot be read (%s): made anew", path.name, error)
        return None
    if said.get(MADE_FROM, "") != made_from:
        logger.warning("%s was made with other settings, models or data: made anew", path.name)
        return None
    return tensors if tensors and all(len(value) == count for value in tensors.values()) else None


def write_piece(path: Path, tensors: dict[str, Tensor], made_from: str = "") -> None:
    """Write a finished piece, completely or not at all; its folder is made where it is missing. made_from: a digest of all that it
    follows from, where its place does not say it. Raises ValueError where there is a file in the place of the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(
            f"'{path.parent}' is a file, and parts of the work are to be kept in a folder there: move it away"
        ) from error
    write_checked(path, tensors, {MADE_FROM: made_from} if made_from else None)
