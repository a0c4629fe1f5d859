"""Reads models as users name them: a checkpoint, its file or folder, or a file with LoRAs."""

from __future__ import annotations

import os
from dataclasses import replace

from ...dmm_core.checkpoint import Checkpoint
from ..config import LoraSpec, ModelSettings
from ..files.model_files import add_parts, load_any
from ..files.model_settings import split_settings, told
from .lora_files import patched, split_loras

Model = str | os.PathLike | Checkpoint
"""A checkpoint, or the file or folder it is in, or that one's name with LoRAs (``lora_files``) and settings (``files.model_settings``)."""


def as_checkpoint(model: Model, base: Checkpoint | None = None) -> Checkpoint:
    """The model read, with its LoRAs folded in. base: whose text encoder LoRAs change where the model's own file has
    none.

    Raises ValueError naming the file, as ``load_any`` and ``apply_loras`` do.
    """
    if isinstance(model, Checkpoint):
        return model
    file, loras, settings = split_model(model)
    return with_loras_and_settings(load_any(file), loras, settings, base)


def split_model(text: str | os.PathLike) -> tuple[str, list[LoraSpec], ModelSettings]:
    """ "a.safetensors+b.safetensors:0.8,clip_skip=2" -> (file, LoRAs, settings). Raises ValueError for what is none."""
    rest, settings = split_settings(text)
    return *split_loras(rest), settings


def with_loras_and_settings(
    checkpoint: Checkpoint, loras: list[LoraSpec], settings: ModelSettings, base: Checkpoint | None = None
) -> Checkpoint:
    """A checkpoint that was read, as a user describes it. base: as of ``as_checkpoint``."""
    checkpoint = told(checkpoint, settings)
    return replace(patched(checkpoint, loras, base), clip_skip=checkpoint.encoder(base)[1])


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
