"""Teachers that wait in RAM: what a step moves over the bus, and how many of them it has time for.

Counted, not measured. A quarter of a step's arithmetic is the teachers' (a forward, where the student has a forward and a backward of twice
that). While the student trains, the first teachers of the next step are copied, one for each place on the device; with two places the
others are copied while their predecessor computes, with one they are waited for.
"""

from __future__ import annotations

import torch

from ...dmm_core.unet import UNet, UNetConfig

TEACHERS_PART = 0.25
"""Of a step's arithmetic."""
RATE = 0.9
"""Of the rate with all teachers on the device: what ``teachers_in_time`` keeps."""


def weight_bytes(config: UNetConfig, dtype: torch.dtype) -> int:
    """Of one UNet's weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config).parameters()) * dtype.itemsize


def most_moved(models: int | None, waiting: int, rows: int, forwards: int) -> int:
    """The most models that a step copies to the device, of ``waiting`` ones in RAM.

    models: that a step draws (``data.few_teachers``), each of which is copied once; None for all, where each forward copies those that its
    ``rows`` belong to.
    """
    if models is None:
        return forwards * min(waiting, rows)
    return min(models, waiting, rows * forwards)


def wait_seconds(copies: int, copy_seconds: float, step_seconds: float, slots: int) -> float:
    """What a step waits for ``copies`` teachers, each of which is copied in ``copy_seconds``, with ``slots`` places on the device."""
    ahead = min(copies, slots)
    waited = max(0.0, ahead * copy_seconds - (1 - TEACHERS_PART) * step_seconds)
    hidden = TEACHERS_PART * step_seconds / copies if slots > 1 else 0.0
    return waited + (copies - ahead) * max(0.0, copy_seconds - hidden)


def teachers_in_time(
    waiting: int, rows: int, forwards: int, *, copy_seconds: float, step_seconds: float, slots: int
) -> int | None:
    """The most models that a step can draw at ``RATE`` of the rate on the device; None for all, 1 where even that is too slow."""

    def in_time(models: int | None) -> bool:
        copies = most_moved(models, waiting, rows, forwards)
        return step_seconds >= RATE * (step_seconds + wait_seconds(copies, copy_seconds, step_seconds, slots))

    if in_time(None):
        return None
    return next((models for models in range(waiting, 1, -1) if in_time(models)), 1)
