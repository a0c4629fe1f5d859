"""What is measured and how, checked before anything is painted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...dmm_core.sampling import SAMPLERS, SCHEDULERS
from ...dmm_core.unet import UNetConfig
from ..data.buckets import default_resolution
from ..data.rollout_paths import PRECISIONS
from ..fields import check_fields, setting
from .distances import check_count
from .features import FeatureNet

METRICS = ("fid", "kid", "pair", "eps", "own")
"""Distances of features; PAIR; eps agreement; the student as its own classifier."""
OF_FEATURES = ("fid", "kid")
SECOND_BATCH = 2**31
"""The seeds of the teachers' second batch begin so much higher. torch's CPU generator knows 32 bits of a seed only: 2**32 would be 0."""
TIMESTEPS = 1000


@dataclass(frozen=True)
class EvaluationSettings:
    """Picture k of a style and batch shows prompt k, from noise of seed ``seed + k``, as ComfyUI's KSampler draws it."""

    count: int = setting(256, "Pictures a style; FID needs more than its features are.", unit="pictures", low=2)
    seed: int = setting(0, "Of all noise.", low=0, high=2**63 - 1)
    width: int = setting(512, "Of the pictures.", unit="pixels", low=1)
    height: int = setting(512, "Of the pictures.", unit="pixels", low=1)
    steps: int = setting(25, "Sampling steps.", unit="steps", low=1, high=TIMESTEPS)
    cfg: float = setting(7.0, "Guidance.")
    sampler: str = setting("dpmpp_2m", "Sampler, as ComfyUI's KSampler has it.", choices=tuple(SAMPLERS))
    scheduler: str = setting("karras", "Noise levels, as ComfyUI's KSampler has them.", choices=tuple(SCHEDULERS))
    metrics: tuple[str, ...] = setting(METRICS, "What is measured.", expected=f"some of {', '.join(METRICS)}")
    project: int = setting(0, "Compare only so many directions of the features; 0: all.", unit="directions", low=0)
    resamples: int = setting(
        -1, "Of the bootstrap; -1: 200, or 20 where a matrix is expensive (more than 512 features).", low=-1
    )
    bins: int = setting(10, "Of the timesteps, for the eps agreement.", unit="bins", low=1, high=TIMESTEPS)
    bin_samples: int = setting(16, "Samples of each bin and style.", unit="samples", low=1)
    own_pictures: int = setting(16, "Pictures of each teacher that the student sorts.", unit="pictures", low=1)
    own_draws: int = setting(32, "Draws of timestep and noise by which it judges each of them.", unit="draws", low=2)
    batch_size: int = setting(0, "Pictures at a time; 0: what fits.", unit="pictures", low=0)
    precision: str = setting(
        "auto", "Of the UNets; auto: fp16 on a GPU, fp32 elsewhere.", choices=("auto", *PRECISIONS)
    )

    def check(self, multiple: int, features: FeatureNet | None) -> None:
        """Raises ValueError naming what makes no sense. multiple: of pixels, that the models' sizes must be of."""
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise ValueError(f"unknown metrics {', '.join(unknown) or '(none)'}: choose from {', '.join(METRICS)}")
        check_fields(self)
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < multiple or value % multiple:
                raise ValueError(f"{name} is {value}: for these models it must be a multiple of {multiple}")
        wanted = [name for name in OF_FEATURES if name in self.metrics]
        if not wanted:
            return
        if features is None:
            raise ValueError(
                f"{', '.join(wanted)} need a feature network: name its file, or leave them out of the metrics"
            )
        if self.project > features.size:
            raise ValueError(f"project is {self.project}: the network has {features.size} features")
        if "fid" in wanted:
            check_count(self.count, self.project or features.size)

    def dtype(self, device: torch.device) -> torch.dtype:
        return usual_dtype(device) if self.precision == "auto" else PRECISIONS[self.precision]

    @property
    def painting(self) -> tuple:
        """What a picture depends on, besides models and prompts."""
        return (self.seed, self.width, self.height, self.steps, self.cfg, self.sampler, self.scheduler)


def usual_dtype(device: torch.device) -> torch.dtype:
    """Of UNets that only predict."""
    return torch.float32 if device.type == "cpu" else torch.float16


def usual_settings(config: UNetConfig, prediction: str, device: torch.device) -> dict:
    """Size, steps and guidance for a family of models and a machine: the paper's, 15 steps without a GPU, the demo family's 12."""
    side = default_resolution(config, prediction)
    if config.model_channels < 320:
        steps, cfg = 12, 4.0
    else:
        steps, cfg = (15 if device.type == "cpu" else 25), 7.0
    return {"width": side, "height": side, "steps": steps, "cfg": cfg}
