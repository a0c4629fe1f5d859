"""Converts model files from one layout into another, every weight bit for bit, for ``dmm convert``.

``model_files`` reads every layout, ``style_file`` the styles alone; all of them become a ``Checkpoint`` on the way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...dmm_core.checkpoint import CLIP_SKIP, Checkpoint, save_checkpoint
from ...dmm_core.diffusers_layout import unet_config_to_diffusers, unet_to_diffusers
from ...dmm_core.files import atomic_write
from ...dmm_core.heads import written_heads
from ...dmm_core.metadata import architecture
from ...dmm_core.weights_file import check_writable, refusal_explained, storable
from .model_files import CONFIG, WEIGHTS, add_parts, load_any
from .model_settings import guesses, split_settings, told
from .outputs import check_output
from .style_file import ONLY_ITS_OWN, centred_at_base, file_metadata, is_style_file, recombine, save_style


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    *,
    parts_from: str | os.PathLike | None = None,
    onto: str | os.PathLike | None = None,
    half: bool = False,
) -> list[str]:
    """Write ``source`` as ``to``: "single" or "style" (a file), or "diffusers" (a UNet folder).

    parts_from: full model to take a missing text encoder or VAE from; onto: the model whose UNet gets the styles of
    ``source``, a style file; half: float32 weights as float16. Returns what the user should know, in sentences.
    Raises ValueError naming the file; what was at ``target`` before is then untouched.
    """
    inputs = [split_settings(file)[0] for file in (source, parts_from, onto) if file is not None]
    check_output(Path(target) / WEIGHTS if to == "diffusers" and not Path(target).is_file() else target, inputs)
    notes: list[str] = []
    if onto is not None:
        checkpoint, notes = recombine(source, onto)
    elif is_style_file(split_settings(source)[0]):
        raise ValueError(f"{source} holds styles without a UNet: name the model that they belong to with --onto")
    else:
        checkpoint = _load(source)
    if parts_from is not None:
        checkpoint = add_parts(checkpoint, _load(parts_from))
    if said := guesses({Path(source).name: checkpoint}):
        notes.append(said)
    if half:
        checkpoint = halved(checkpoint)
    if checkpoint.scaled_fp8 and to != "style":
        notes.append(
            f"{checkpoint.scaled_fp8} weights that were float8 with a scale are written in half precision, without the scale"
        )
    if to == "single":
        save_checkpoint(target, checkpoint)
    elif to == "style":
        save_style(target, checkpoint)
        notes += [] if centred_at_base(checkpoint.recipe) else [ONLY_ITS_OWN]
    elif to == "diffusers":
        save_diffusers(target, checkpoint)
        notes += _left_out(checkpoint)
    else:
        raise ValueError(f"cannot convert to {to!r}: expected single, style or diffusers")
    return notes


def _load(text: str | os.PathLike) -> Checkpoint:
    """A model as the command line names it, with settings behind its file."""
    file, settings = split_settings(text)
    return told(load_any(file), settings)


def halved(checkpoint: Checkpoint) -> Checkpoint:
    """float32 and float64 weights as float16; weights of 16 bits or less, and integers, as they are."""

    def half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.half() if v.dtype in (torch.float32, torch.float64) else v for k, v in weights.items()}

    return replace(checkpoint, unet=half(checkpoint.unet), text=half(checkpoint.text), vae=half(checkpoint.vae))


def save_diffusers(folder: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """A UNet folder: the weights, their metadata inside, and config.json. The folder is made where it is missing.

    Raises ValueError for a UNet that diffusers cannot describe; files that were there before are then untouched.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: the diffusers layout needs a folder")
    if not folder.parent.is_dir():
        raise ValueError(f"the folder of {folder} does not exist: create it first")
    try:
        unet = unet_to_diffusers(checkpoint.unet)
        config = checkpoint.config
        resolution = architecture(config, checkpoint.prediction)[1]
        described = unet_config_to_diffusers(config, int(resolution.split("x")[0]) // 8 if resolution else None)
    except ValueError as error:
        raise ValueError(f"{folder} was not saved: {error}") from error
    metadata = file_metadata(folder, checkpoint)
    if checkpoint.clip_skip:
        metadata[CLIP_SKIP] = str(checkpoint.clip_skip)
    metadata |= written_heads(config)
    check_writable(folder, unet, metadata)
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        # Both are complete before either takes its place.
        with (
            refusal_explained(folder),
            atomic_write(folder / WEIGHTS) as weights,
            atomic_write(folder / CONFIG) as text,
        ):
            save_file(storable(unet), weights, metadata=metadata)
            text.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _left_out(checkpoint: Checkpoint) -> list[str]:
    """What a UNet folder does not hold of a checkpoint, as a sentence for the user; none where it holds everything."""
    contents = {"text encoder": checkpoint.text, "VAE": checkpoint.vae, "other tensors": checkpoint.other}
    left = [name for name, weights in contents.items() if weights]
    if not left:
        return []
    return [f"left out of the UNet folder: {', '.join(left)}; on the way back, --parts-from takes them from the source"]
