"""A run's student as a DMM checkpoint, and as files."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...dmm_core.checkpoint import Checkpoint, save_checkpoint
from ...dmm_core.metadata import StyleInfo, check_new_text, check_styles, write_metadata
from ..files.checksums import write_checked
from ..loop.adapters import attached, lora_state_dict
from ..loop.few_steps import FEW_STEPS
from ..loop.trainer import Trainer
from ..paint.thumbnails import thumbnail_uri


def student_checkpoint(
    run: Trainer,
    base: Checkpoint,
    title: str,
    *,
    dtype: torch.dtype | None = None,
    averaged: bool = True,
    pictures: Sequence[Image.Image] = (),
) -> Checkpoint:
    """The student as a DMM checkpoint with the base's text encoder and VAE, style names and recipe.

    dtype: of the UNet's weights, None for float32. pictures: of the first styles, their thumbnails where they have none.
    """
    weights = run.student_weights(averaged)
    return Checkpoint(
        unet={k: v.to(dtype or v.dtype) for k, v in weights.items()},
        text=base.text,
        vae=base.vae,
        styles=with_pictures(run.kind.styles(run.teachers), pictures),
        recipe=recipe_of(run, base),
        metadata={"modelspec.title": title},
        prediction=run.base.prediction,
        zero_snr=run.base.zero_snr,
        clip_skip=base.clip_skip,
        heads=run.base.unet.config.num_heads,
    )


def with_pictures(styles: Sequence[StyleInfo], pictures: Sequence[Image.Image]) -> list[StyleInfo]:
    """The styles, the first of them with these pictures as their thumbnails; one that has a thumbnail keeps it."""
    new = list(styles)
    for i, (style, picture) in enumerate(zip(styles, pictures)):
        if not style.thumbnail:
            new[i] = dataclasses.replace(style, thumbnail=thumbnail_uri(picture))
    return new


def recipe_of(run: Trainer, base: Checkpoint) -> dict[str, Any]:
    """How the student was made, up to now."""
    recipe = {
        "train": json.loads(json.dumps(dataclasses.asdict(run.config))),
        "steps_done": run.step,
        "samples_seen": run.step * run.config.batch_size * run.config.accumulate,
        "base": {"file": run.base.file, "sha256": run.base.sha256},
        "data": {"count": len(run.data), "sha256": run.data.fingerprint()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    changes = run.kind.recipe_changes(run.teachers)
    if changes or base.styles:  # what was learnt now, and how the model came to what it knew before
        recipe |= changes or {}
        before = {k: v for k, v in base.recipe.items() if k != "history"}
        recipe["history"] = [*base.recipe.get("history", []), {"styles": [s.name for s in base.styles], **before}]
    return recipe


def check_storable(run: Trainer, base: Checkpoint, title: str) -> None:
    """Raise ValueError now for what could not be written when the run is done: descriptions of styles, and the recipe."""
    styles = run.kind.styles(run.teachers)
    check_styles(styles, len(styles))
    check_new_text("title", title)
    rest = {"modelspec.title": title}
    write_metadata(
        styles, recipe_of(run, base), run.base.prediction, rest=rest, config=run.student.unet.config, title=title
    )


def raw_file(path: Path) -> Path:
    """Where a run whose weights are averaged puts the raw ones."""
    return path.with_name(f"{path.stem}-raw.safetensors")


def lora_file(path: Path) -> Path:
    """Where a few-step run puts the LoRA that does the same to the model it was made from."""
    return path.with_name(f"{path.stem}-lora.safetensors")


def save_lora(run: Trainer, path: Path, title: str) -> bool:
    """What adapters have learnt, averaged where there is an average, as a LoRA for the run's base, which ComfyUI's Load LoRA takes; False
    where nothing was learnt in adapters. In half precision and kohya's keys; the file says which model it is for, and with which sampler,
    steps and cfg it paints."""
    with run.student.averaged() as unet:
        weights = lora_state_dict(unet, attached(unet), run.config.lora_rank, run.config.lora_rank)
    if not weights or not run.ranks.is_main:
        return bool(weights)
    said = {
        "modelspec.title": title,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(run.config.lora_rank),
        "dmm.few_steps": json.dumps(
            {
                "base": run.base.file,
                "base_sha256": run.base.sha256,
                "steps_done": run.step,
                **(run.kind.recipe_changes(run.teachers) or {}).get(FEW_STEPS, {}),
            }
        ),
    }
    write_checked(path, {key: value.half() for key, value in weights.items()}, said)
    return True


def save_student(
    run: Trainer, base: Checkpoint, path: Path, title: str, *, pictures: Sequence[Image.Image] = ()
) -> None:
    """The student as a file in half precision, and its raw weights beside it where there is an average. Of several processes the first
    one writes; where the student is shared out, this is for all of them together. pictures: as in ``student_checkpoint``."""
    main = run.ranks.is_main
    if not main and not run.student.sharded:
        return
    checkpoint = student_checkpoint(run, base, title, dtype=torch.float16, pictures=pictures)
    if main:
        save_checkpoint(path, checkpoint)
    if run.student.ema and run.student.ema.ready:
        raw = student_checkpoint(run, base, f"{title} (raw)", dtype=torch.float16, averaged=False, pictures=pictures)
        if main:
            save_checkpoint(raw_file(path), raw)
