"""The arithmetic of a run: what autocast computes in."""

from __future__ import annotations

import contextlib

import torch

from ..config import TrainConfig

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which forwards compute in ``config.precision``; weights stay as they are."""
    if config.precision not in HALF:
        return contextlib.nullcontext()
    # Its copies of the weights would outlive the blocks that are recomputed to save memory.
    cache = not config.gradient_checkpointing
    return torch.autocast(device.type, HALF[config.precision], cache_enabled=cache)
