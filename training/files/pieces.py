"""Finished pieces of long work, kept as files in a folder, so that interrupted work goes on from them."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from .checksums import read_checked, write_checked

logger = logging.getLogger(__name__)


def read_piece(path: Path, count: int) -> dict[str, Tensor] | None:
    """The tensors of a finished piece; None where there is no file, or one that is damaged or has other than ``count``
    rows in a tensor."""
    if not path.exists():
        return None
    try:
        tensors, _ = read_checked(path)
    except (ValueError, OSError) as error:
        logger.warning("%s cannot be read (%s): made anew", path.name, error)
        return None
    return tensors if tensors and all(len(value) == count for value in tensors.values()) else None


def write_piece(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a finished piece, completely or not at all; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checked(path, tensors)
