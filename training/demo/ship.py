"""From the trained parts of the demo family to the files that users get."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ...dmm_core.files import atomic_write
from ...dmm_core.unet import load_unet
from ..data.demo.family import FIRST, Family
from ..paint.painter import painter
from ..run.student_file import with_pictures
from .judge import SETTINGS

MODELS = Path(__file__).parents[2] / "models"
PICTURED, PICTURED_SEED = "an orange cat", 3
"""What the thumbnails of the student's styles show."""
RECIPE = Path(__file__).parents[1] / "configs" / "demo.yaml"


def files_of(family: Family = FIRST) -> dict[str, str]:
    """Part -> its file under models/, without the ending.

    Teachers are UNets only and share one text encoder and VAE: in the shipped family, which has to stay small, those of the DMM checkpoint;
    in the others those of the base.
    """
    files = {"base": "dmm/demo-base", **{look: f"dmm/demo-teacher-{look}" for look in family.teachers}}
    if family.shipped:
        files |= {"student": "dmm/demo-dmm", "control": "controlnet/demo-outline"}
    else:
        files["scenes"] = "demo-scenes"
    if family.lora:
        files["lora"] = f"loras/demo-{family.lora}"
    files |= {f"lora-{look}": f"loras/demo-{look}" for look in family.more_loras}
    return {**files, "classifier": "demo-classifier"}


def shipped_vae() -> dict[str, Tensor]:
    """The VAE of the shipped family, in float32."""
    return {key: value.float() for key, value in load_checkpoint(MODELS / "dmm" / "demo-dmm.safetensors").vae.items()}


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


def shipped_file(work: Path, part: str, family: Family = FIRST) -> Path:
    """A part as users get it, in ``work``/models: networks in float16. Written when missing or outdated."""
    source = work / f"{part}.safetensors"
    path = work / "models" / f"{files_of(family)[part]}.safetensors"
    if path.exists() and path.stat().st_mtime >= source.stat().st_mtime:
        return path  # a distillation in progress knows its teachers by their hashes
    path.parent.mkdir(parents=True, exist_ok=True)
    if part in family.painted or part == "base":
        title = path.stem.replace("-", " ").removeprefix("demo ")
        whole = part == "base" and not family.shipped
        files = {"text": "text", "vae": "decoder"} if whole else {}
        parts = {key: half(load_file(work / f"{file}.safetensors")) for key, file in files.items()}
        save_checkpoint(path, Checkpoint(unet=half(load_file(source)), **parts, metadata=about(title)))
    elif part == "student":
        save_checkpoint(path, with_thumbnails(load_checkpoint(source), work, family))
    elif part == "control" or part.startswith("lora"):
        save_tensors(path, half(load_file(source)))
    else:  # finished as they are
        with atomic_write(path) as temporary:
            shutil.copyfile(source, temporary)
    return path


def with_thumbnails(student: Checkpoint, work: Path, family: Family) -> Checkpoint:
    """The student with a picture for each style, painted by its teacher: all of one caption and one noise."""
    brush, pictures = painter(student), []
    for style in student.styles:
        teacher = load_unet(load_checkpoint(shipped_file(work, style.name, family)).unet)
        plain = dataclasses.replace(brush, unet=teacher, styles=())
        pictures += plain.pictures(plain.latents([PICTURED], None, PICTURED_SEED, SETTINGS))
    return dataclasses.replace(student, styles=with_pictures(student.styles, pictures))


def publish(work: Path, models: Path, family: Family = FIRST) -> list[Path]:
    """Put the finished files where ComfyUI users expect them, each complete or not at all; returns their paths."""
    finished = [shipped_file(work, part, family) for part in files_of(family)]
    if not family.shipped:
        finished.append(write_config(work / "models" / "demo.yaml", family))
    written = []
    for source in finished:
        path = models / source.relative_to(work / "models")
        if path != source:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                shutil.copyfile(source, temporary)
        written.append(path)
    return written


def write_config(path: Path, family: Family) -> Path:
    """configs/demo.yaml for a family whose files lie beside ``path``: its models and data, the same recipe. Returns the path."""
    config = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    files = {part: f"{name}.safetensors" for part, name in files_of(family).items()}
    config |= {
        "base": files["base"],
        "teachers": [
            {"name": look, "file": files[look], "description": family.looks[look].description, "licence": "Apache-2.0"}
            for look in family.teachers
        ],
        "parts_from": files["base"],
        "output": "../student/demo-dmm.safetensors",
        "run_dir": "../student/run",
        "title": f"comfyui-dmm demo, {family.name} family",
        "data": {"kind": "latents", "file": files["scenes"]},
    }
    text = f"# dmm distill --config {path.name}        (the recipe of training/configs/demo.yaml on the {family.name} family)\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text + yaml.safe_dump(config, sort_keys=False, width=140), encoding="utf-8")
    return path
