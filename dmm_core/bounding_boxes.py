"""Boxes in pixels, as the host's BOUNDING_BOX wires carry them, and as boxes in shares of the picture they were drawn on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .region_list import shown
from .regions import Box


def read_boxes(value: object, height: int, width: int) -> list[Box]:
    """The boxes of a picture of height x width pixels, in their order.

    value: {"x", "y", "width", "height"}, a list of them, or a list of such lists, one per picture, of which the first counts: the
    forms that the host's nodes give. Boxes of no size and boxes outside of the picture are left out: detectors give such, too.
    Raises ValueError, with the value, for anything else.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"bboxes are {shown(value)}: connect bounding boxes, as from Create Bounding Boxes")
    if value and isinstance(value[0], list | tuple):
        value = value[0]
    boxes = []
    for number, entry in enumerate(value, 1):
        x, y, w, h = (_pixels(number, entry, key) for key in ("x", "y", "width", "height"))
        if w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0:
            boxes.append(Box(x / width, y / height, w / width, h / height))
    return boxes


def _pixels(number: int, entry: object, key: str) -> float:
    value = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"bounding box {number} is {shown(entry)}: it must have {key}, in pixels")
    return float(value)


def covered(boxes: Sequence[Box], height: int, width: int) -> Tensor:
    """1 in any of the boxes and 0 elsewhere -> a mask (height, width)."""
    mask = torch.zeros(height, width)
    for box in boxes:
        h, w, top, left = box.area(height, width)
        mask[top : top + h, left : left + w] = 1
    return mask
