"""What is measured and how, checked before anything is painted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...dmm_core.sampling import SAMPLERS, SCHEDULERS, choose
from ...dmm_core.unet import UNetConfig
from ..data.buckets import default_resolution
from ..data.rollout_paths import PRECISIONS
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
    """count: pictures a style and batch; picture k shows prompt k, from noise of seed ``seed + k``, as ComfyUI's KSampler draws it.

    width, height in pixels; steps, cfg, sampler, scheduler as of the KSampler. metrics: of ``METRICS``. project: so many directions of
    the features, 0 for all. resamples: of the bootstrap, -1 for 200, or 20 where a matrix is expensive (more than 512 features).
    bins, bin_samples: of the timesteps, and samples of each bin, for the eps agreement. own_pictures: of each teacher that the student
    sorts; own_draws: (t, eps) that it judges each by. batch_size: pictures at a time, 0 for what fits. precision: of the UNets, "auto"
    for fp16 on a GPU and fp32 on the CPU.
    """

    count: int = 256
    seed: int = 0
    width: int = 512
    height: int = 512
    steps: int = 25
    cfg: float = 7.0
    sampler: str = "dpmpp_2m"
    scheduler: str = "karras"
    metrics: tuple[str, ...] = METRICS
    project: int = 0
    resamples: int = -1
    bins: int = 10
    bin_samples: int = 16
    own_pictures: int = 16
    own_draws: int = 32
    batch_size: int = 0
    precision: str = "auto"

    def check(self, multiple: int, features: FeatureNet | None) -> None:
        """Raises ValueError naming what makes no sense. multiple: of pixels, that the models' sizes must be of."""
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise ValueError(f"unknown metrics {', '.join(unknown) or '(none)'}: choose from {', '.join(METRICS)}")
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"{name} is {value}: expected a whole number from {low}")
        if self.bins > TIMESTEPS:
            raise ValueError(f"bins is {self.bins}: there are {TIMESTEPS} timesteps")
        if self.steps > TIMESTEPS:
            raise ValueError(f"steps is {self.steps}: choose 1 to {TIMESTEPS}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: choose 0 to {2**63 - 1}")
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg is {self.cfg}: expected a number")
        choose(SAMPLERS, "sampler", self.sampler)
        choose(SCHEDULERS, "scheduler", self.scheduler)
        choose({"auto": 0, **PRECISIONS}, "precision", self.precision)
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


_LOWEST = {
    "count": 2, "steps": 1, "project": 0, "resamples": -1, "bins": 1, "bin_samples": 1, "own_pictures": 1, "own_draws": 2,
    "batch_size": 0,
}  # fmt: skip


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
