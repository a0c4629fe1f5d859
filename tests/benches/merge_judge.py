"""The paper's figures (``dmm evaluate``) of a student of the demo family whose weights a bench holds in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...dmm_core.unet import load_unet
from ...dmm_core.vae import latent_scale, load_vae
from ...training.commands.evaluation_inputs import demo_prompts
from ...training.config_file import load_config
from ...training.evaluation.evaluate import Lineup, evaluate
from ...training.evaluation.features import PixelDecoder, load_features
from ...training.evaluation.model_ref import ModelRef
from ...training.evaluation.settings import EvaluationSettings
from ...training.files.hashing import weights_hash
from ...training.run.load import load_run
from ...training.teachers.teacher import Teacher
from ...training.text import ClipText
from .family_files import FamilyFiles

SEED = 5_000_000
"""Of the pictures' noise; no training uses it."""


def judged(
    weights: Mapping[str, Tensor], parts: Path, count: int, project: int, *, device: torch.device, files: FamilyFiles
) -> dict:
    """EXCESS, LEAK and PAIR with ``count`` pictures a style; the teachers' pictures are kept in ``parts``."""
    loaded = load_run(load_config(files.config), torch.device("cpu"))
    prompts = ["", *demo_prompts(min(count, 64), files.family)]
    contexts = ClipText(loaded.parts.text).encode(prompts)
    refs = [ModelRef.of(dataclasses.replace(teacher, contexts=contexts), len(prompts)) for teacher in loaded.teachers]
    student = ModelRef.of(Teacher("student", load_unet(dict(weights)), contexts), len(prompts))
    vae = load_vae(loaded.parts.vae).to(device)
    scale = latent_scale(loaded.base.unet.config)
    lineup = Lineup(
        student,
        [teacher.name for teacher in loaded.teachers],
        refs,
        prompts,
        decoder=PixelDecoder(lambda latents: vae.decode(latents / scale), weights_hash(loaded.parts.vae)),
        features=load_features(files.features),
    )
    settings = EvaluationSettings(
        count=count, seed=SEED, width=128, height=128, steps=12, cfg=4.0, metrics=("fid", "pair"), project=project, resamples=0
    )  # fmt: skip
    result = evaluate(lineup, settings, folder=parts, device=device)
    return {
        "excess": result.fid.excess.value,
        "leak": result.fid.leak.value,
        "pair": result.pair.mean.value,
        "pair worst": result.pair.own[result.pair.worst].value,
        "m": result.fid.m,
        "floor": result.fid.floor,
    }
