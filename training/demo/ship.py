"""From the trained parts of the demo family to the files that users get."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint, save_checkpoint
from ...dmm_core.files import atomic_write
from ..data.demo.looks import TEACHER_LOOKS

SHIPPED = {
    "base": "dmm/demo-base",
    **{look: f"dmm/demo-teacher-{look}" for look in TEACHER_LOOKS},
    "student": "dmm/demo-dmm",
    "control": "controlnet/demo-outline",
    "lora": "loras/demo-frame",
    "classifier": "demo-classifier",
}
"""part -> its file under models/, without the ending.

Base and teachers are UNets only and share the text encoder and VAE of the DMM checkpoint: the family has to stay small.
"""


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_write(path) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary)


def about(name: str) -> dict[str, str]:
    fields = {
        "title": f"comfyui-dmm demo: {name}",
        "license": "Apache-2.0",
        "author": "comfyui-dmm",
        "resolution": "128x128",
    }
    return {f"modelspec.{key}": value for key, value in fields.items()}


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


def shipped_file(work: Path, part: str) -> Path:
    """A part as users get it, in ``work``/models: UNets, ControlNet and LoRA in float16. Written when missing or outdated."""
    source = work / f"{part}.safetensors"
    path = work / "models" / f"{SHIPPED[part]}.safetensors"
    if path.exists() and path.stat().st_mtime >= source.stat().st_mtime:
        return path  # a distillation in progress knows its teachers by their hashes
    path.parent.mkdir(parents=True, exist_ok=True)
    if part == "base" or part in TEACHER_LOOKS:
        title = path.stem.replace("-", " ").removeprefix("demo ")
        save_checkpoint(path, Checkpoint(unet=half(load_file(source)), metadata=about(title)))
    elif part in ("control", "lora"):
        save_tensors(path, half(load_file(source)))
    else:  # finished as they are
        with atomic_write(path) as temporary:
            shutil.copyfile(source, temporary)
    return path


def publish(work: Path, models: Path) -> list[Path]:
    """Put the finished files where ComfyUI users expect them, each complete or not at all; returns their paths."""
    finished = [shipped_file(work, part) for part in SHIPPED]
    written = []
    for source in finished:
        path = models / source.relative_to(work / "models")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            shutil.copyfile(source, temporary)
        written.append(path)
    return written
