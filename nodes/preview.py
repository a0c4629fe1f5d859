"""The face of a training on its node: progress, words, and pictures decoded by the host's VAE."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from PIL import Image

from ..dmm_core.checkpoint import read_info
from ..dmm_core.vae import latent_scale
from ..training.data.buckets import default_resolution
from ..training.loop.few_steps import FEW_STEPS
from ..training.loop.metrics import Metrics
from ..training.loop.trainer import Trainer
from ..training.paint.images import to_pictures
from ..training.run.watch.pictures import Decoder
from ..training.run.watch.progress import Progress
from . import paths

LARGEST = 1024
"""Pixels of the longer side of what is sent to the browser."""
PAUSE_BETWEEN_TEXTS = 0.25
"""Seconds; small models make many steps a second."""


class Words:
    """Text on a node that changes often: at most every ``PAUSE_BETWEEN_TEXTS`` seconds, and the last one in any case."""

    def __init__(self, node_id):
        self.node_id, self.spoke = node_id, 0.0

    def show(self, text: str, last: bool) -> None:
        now = time.monotonic()
        if now - self.spoke > PAUSE_BETWEEN_TEXTS or last:
            self.spoke = now
            send_text(text, self.node_id)


def progress_on(node_id) -> Callable[[int, int, str], None]:
    """Progress of long work as text and bar on a node; answers the host's cancel."""
    words, bars = Words(node_id), {}

    def progress(done: int, total: int, what: str) -> None:
        mm.throw_exception_if_processing_interrupted()
        if total not in bars:
            bars.clear()
            bars[total] = comfy.utils.ProgressBar(total, node_id=node_id)
        bars[total].update_absolute(done, total)
        words.show(f"{what}: {done} of {total}", last=done == total)

    return progress


class Screen:
    def __init__(self, run: Trainer, progress: Progress, node_id):
        self.run, self.progress, self.node_id = run, progress, node_id
        self.bar = comfy.utils.ProgressBar(run.config.all_steps, node_id=node_id)
        self.words = Words(node_id)

    def show_step(self, metrics: Metrics) -> None:
        self.bar.update_absolute(metrics.step, metrics.steps)
        self.words.show(self.progress.text(), last=metrics.step == metrics.steps)

    def show_pause(self) -> None:
        send_text(f"paused at {self.progress.text()}", self.node_id)

    def show_picture(self, image: Image.Image) -> None:
        self.bar.update_absolute(self.run.step, self.run.config.all_steps, ("JPEG", image, LARGEST))


def host_decoder(run: Trainer, vae) -> Decoder:
    """Decodes one picture at a time: a training leaves little room on the device."""
    scale = latent_scale(run.base.unet.config)
    return lambda latents: decoded(vae, latents, scale)


def decoded(vae, latents: torch.Tensor, scale: float) -> list[Image.Image]:
    """Latents (B, C, h, w), scaled, -> B pictures by the host's VAE, one at a time."""
    return to_pictures(torch.cat([vae.decode(latent[None].float().cpu() / scale) for latent in latents]))


def send_text(text: str, node_id) -> None:
    from server import PromptServer

    instance = getattr(PromptServer, "instance", None)  # absent when the host runs without its server
    if instance is not None and node_id is not None:
        instance.send_progress_text(text, node_id)


def told_with_file(text: str, path: Path) -> dict[str, list]:
    """What a node that has saved a DMM model shows (its ``ui``): the text, and what the page needs for a graph that paints with the file at
    ``path`` (web/js/new_quickstart.js): its name for Load DMM Model, a style, the pixels a side that such models paint well, and
    of a few-step model with which sampler, steps and cfg."""
    info = read_info(path)
    saved: dict[str, Any] = {
        "file": os.path.relpath(path, paths.output_folder()),
        "style": info.styles[0].name if info.styles else "none",
        "side": default_resolution(info.config, info.prediction),
    }
    if few := info.recipe.get(FEW_STEPS):
        saved["few_steps"] = few
    return {"text": [text], "saved": [saved]}
