"""Do pictures show what their captions say? Judged by the classifier that was trained on rendered scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...dmm_core.checkpoint import load_checkpoint
from ...dmm_core.unet import load_unet
from ...dmm_core.vae import SCALE_SD
from ..data.demo.family import FIRST, Family
from ..data.demo.scenes import Scene
from ..paint.painter import Painter, Settings, painter
from .classifier import Classifier, classify, load_classifier

SETTINGS = Settings(steps=12, cfg=4.0, width=128, height=128)


@dataclass
class Accuracy:
    """Shares of ``count`` pictures: shape right, colour right, both right, and painted in the look ``look``."""

    count: int
    shape: float
    colour: float
    both: float
    look: float


@torch.no_grad()
def judge(
    painter: Painter,
    classifier: Classifier,
    look: str,
    *,
    style: Tensor | None = None,
    count: int = 200,
    seed: int = 0,
    settings: Settings = SETTINGS,
    family: Family = FIRST,
) -> Accuracy:
    """Paint ``count`` random captions (one seed per 25) and ask the classifier. style: (1, N+1) or None."""
    rng = np.random.default_rng(seed + family.seed)
    scenes = [family.sample_scene(rng) for _ in range(count)]
    right = {"shape": [], "colour": [], "look": []}
    for start in range(0, count, 25):
        part = scenes[start : start + 25]
        latents = painter.latents([s.caption for s in part], style, seed + start, settings)
        found = answered_right(classifier, painter.vae.decode(latents / SCALE_SD), part, look)
        for question, hits in right.items():
            hits += found[question]
    both = [a and b for a, b in zip(right["shape"], right["colour"])]
    return Accuracy(count, *(float(np.mean(hits)) for hits in (right["shape"], right["colour"], both, right["look"])))


def answered_right(classifier: Classifier, pixels: Tensor, scenes: Sequence[Scene], look: str) -> dict[str, list[bool]]:
    """Whether pictures (B, 3, H, W) in about -1..1 show the "shape" and the "colour" of their scenes, and are painted in the "look"."""
    answers, right = classify(classifier, pixels.clamp(-1, 1)), {}
    for question in ("shape", "colour", "look"):
        names = classifier.classes[question]
        said = [names[i] for i in answers[question].argmax(1).tolist()]
        truth = [look if question == "look" else getattr(scene, question) for scene in scenes]
        right[question] = [a == b for a, b in zip(said, truth)]
    return right


def whole_file(models: Path, family: Family) -> Path:
    """The file of a family that holds the text encoder and the VAE too."""
    return models / "dmm" / f"demo-{'dmm' if family.shipped else 'base'}.safetensors"


def audit(models: Path, count: int = 200, family: Family = FIRST) -> str:
    """Base, teachers and, in the shipped family, the DMM student in each style of the family in ``models`` -> a Markdown table."""
    classifier = load_classifier(models / "demo-classifier.safetensors")
    whole = painter(load_checkpoint(whole_file(models, family)))

    def row(name: str, brush: Painter, look: str, style: Tensor | None = None) -> str:
        accuracy = judge(brush, classifier, look, style=style, count=count, family=family)
        shares = (accuracy.shape, accuracy.colour, accuracy.both, accuracy.look)
        return f"| {name} | " + " | ".join(f"{100 * share:.1f}%" for share in shares) + " |"

    def plain(file: str) -> Painter:
        return replace(whole, unet=load_unet(load_checkpoint(models / "dmm" / f"demo-{file}.safetensors").unet))

    lines = [f"| {count} pictures of | object | colour | both | look |", "| --- | --- | --- | --- | --- |"]
    lines.append(row("base", plain("base"), family.base))
    lines += [row(f"teacher {look}", plain(f"teacher-{look}"), look) for look in family.teachers]
    lines += [row(f"DMM, {look}", whole, look, whole.style_row(look)) for look in whole.styles]
    return "\n".join(lines)
