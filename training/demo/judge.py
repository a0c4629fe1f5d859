"""Do pictures show what their captions say? Judged by the classifier that was trained on rendered scenes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...dmm_core.vae import SCALE_SD
from ..paint import Painter, Settings
from .classifier import Classifier, classify
from .scenes import sample_scene


@dataclass
class Verdict:
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
    style: Tensor | None = None,
    count: int = 200,
    seed: int = 0,
    settings: Settings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Paint ``count`` random captions (one seed per 25) and ask the classifier. style: (1, N+1) or None."""
    settings = settings or Settings(steps=16, cfg=4.0, width=128, height=128)
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    right = {"shape": [], "colour": [], "look": []}
    for start in range(0, count, 25):
        part = scenes[start : start + 25]
        latents = painter.latents([s.caption for s in part], style, seed + start, settings)
        answers = classify(classifier, painter.vae.decode(latents / SCALE_SD).clamp(-1, 1))
        for question, hits in right.items():
            names = classifier.classes[question]
            said = [names[i] for i in answers[question].argmax(1).tolist()]
            truth = [look if question == "look" else getattr(s, question) for s in part]
            hits += [a == b for a, b in zip(said, truth)]
        if progress:
            progress(len(right["look"]), count)
    both = [a and b for a, b in zip(right["shape"], right["colour"])]
    return Verdict(count, *(float(np.mean(hits)) for hits in (right["shape"], right["colour"], both, right["look"])))
