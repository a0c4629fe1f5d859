"""Reads models as users name them: a checkpoint, its file or folder, or a file with LoRAs."""

from __future__ import annotations

import os

from ...dmm_core.checkpoint import Checkpoint
from ..files.model_files import add_parts, load_any
from .lora_files import patched, split_loras

Model = str | os.PathLike | Checkpoint
"""A checkpoint, or the file or folder it is in, or that one's name with LoRAs (``lora_files``)."""


def as_checkpoint(model: Model, base: Checkpoint | None = None) -> Checkpoint:
    """The model read, with its LoRAs folded in. base: whose text encoder LoRAs change where the model's own file has
    none.

    Raises ValueError naming the file, as ``load_any`` and ``apply_loras`` do.
    """
    if isinstance(model, Checkpoint):
        return model
    file, loras = split_loras(model)
    return patched(load_any(file), loras, base)


def base_with_parts(base: Model, parts_from: Model | None) -> Checkpoint:
    """The base model, with text encoder and VAE of ``parts_from`` where it has none. Raises ValueError without a text
    encoder."""
    base = as_checkpoint(base)
    if parts_from is not None:
        base = add_parts(base, as_checkpoint(parts_from))
    if not base.text:
        raise ValueError(
            "the base model has no text encoder: name a full checkpoint to take it from (parts_from, --parts-from)"
        )
    return base
