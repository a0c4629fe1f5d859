"""What the commands of the evaluation share: reading models, prompts and settings, and the message after an interruption."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.unet import UNetConfig, load_unet
from ...dmm_core.vae import latent_scale, load_vae
from ..data.text_states import TextStates
from ..evaluation.features import PixelDecoder
from ..evaluation.model_ref import ModelRef, PromptStates
from ..evaluation.settings import usual_settings
from ..files.hashing import repr_sha256, unet_hash, weights_hash
from ..text import encoder_key
from .progress_bar import ProgressBar

if TYPE_CHECKING:
    from ..data.demo.family import Family

DEMO_PROMPTS, DEMO_SEED = 64, 7_000_000
"""How many captions the demo family is evaluated with, and the seed of their scenes, which no training uses."""


@contextlib.contextmanager
def going_on(folder: Path) -> Iterator[tuple[Path, ProgressBar]]:
    """(where parts are kept, a progress bar); says that the parts stay when the block is interrupted."""
    parts, bar = folder / "parts", ProgressBar()
    try:
        yield parts, bar
    except KeyboardInterrupt:
        print(f"what is painted stays in {parts}: the same command goes on from there", file=sys.stderr)
        raise
    finally:
        bar.close()


def is_small(config: UNetConfig) -> bool:
    """Whether a model is of the demo family's size; that family has prompts and a feature network of its own."""
    return config.model_channels < 320


def prompts_of(file: str | None, config: UNetConfig) -> list[str]:
    """The empty prompt and those of a text file, one a line. Without a file the demo family has its own prompts; for other models this
    raises ValueError."""
    from ..data.image_folder import read_caption_file

    if file:
        return ["", *read_caption_file(file)]
    if is_small(config):
        return ["", *demo_prompts(DEMO_PROMPTS)]
    raise ValueError("no prompts: name a text file with a prompt a line (--prompts)")


def painting(
    args: argparse.Namespace, names: Sequence[str], student: Checkpoint, device: torch.device
) -> dict[str, Any]:
    """Fields of EvaluationSettings: the usual size, steps and cfg for this model and device, replaced by --size, --steps and --cfg where
    given, and the options ``names``."""
    usual = usual_settings(student.config, student.prediction, device)
    given = {name: getattr(args, name) for name in ("steps", "cfg") if getattr(args, name) is not None}
    if args.size:
        given["width"], given["height"] = args.size
    return {**usual, **given, **{name: getattr(args, name) for name in names}}


def demo_prompts(count: int, family: Family | None = None) -> list[str]:
    """``count`` different captions of a demo family's scenes (the shipped one's), always the same."""
    import numpy as np

    from ..data.demo.family import FIRST

    family = family or FIRST
    rng = np.random.default_rng(DEMO_SEED + family.seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[family.sample_scene(rng).caption] = None
    return list(found)


def model_ref(
    name: str,
    checkpoint: Checkpoint,
    student: Checkpoint,
    text: TextStates,
    *,
    file: str = "",
    keep: bool = False,
    styled: bool = False,
) -> ModelRef:
    """A model of the evaluation, from a checkpoint that was read to check it.

    Without a text encoder of its own it uses the student's. keep: its weights stay in memory; else they are dropped here, and ``file`` is
    read again when the model is needed, so that one teacher is in memory at a time. styled: it may be a DMM model, for which this
    otherwise raises ValueError.
    """
    from ..teachers.models import as_checkpoint
    from ..teachers.teacher import Teacher

    config = checkpoint.config
    if not (keep or styled) and config.num_styles:
        raise ValueError(f"'{name}' is itself a DMM model with {config.num_styles} styles: use a plain checkpoint")
    encoder, clip_skip = checkpoint.encoder(student)
    states, named = text.of(encoder, clip_skip=clip_skip), encoder_key(encoder, clip_skip)
    key = repr_sha256(unet_hash(checkpoint), named, checkpoint.prediction, checkpoint.zero_snr)
    prediction, zero_snr = checkpoint.prediction, checkpoint.zero_snr
    held = checkpoint if keep else None

    def open_it() -> Teacher:
        weights = (held or as_checkpoint(file, student)).unet
        unet = load_unet(weights, dtype=None, copy=held is not None, heads=config.num_heads)
        return Teacher(name, unet, *states, prediction, zero_snr)

    words = PromptStates(named, *states)
    return ModelRef(name, key, open_it, config, zero_snr, prediction, words)


def vae_decoder(checkpoint: Checkpoint, config: UNetConfig, device: torch.device) -> PixelDecoder:
    """The checkpoint's own VAE, on the device. Raises ValueError for a checkpoint without one."""
    if not checkpoint.vae:
        raise ValueError(
            "no VAE to look at pictures with: name a full checkpoint (--parts-from), or leave out fid and kid"
        )
    vae, scale = load_vae(checkpoint.vae).to(device).eval(), latent_scale(config)
    return PixelDecoder(lambda latents: vae.decode(latents / scale), weights_hash(checkpoint.vae))
