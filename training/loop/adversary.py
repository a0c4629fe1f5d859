"""The multi-class adversarial loss of DMM (arXiv:2504.12364, eq. 11 and 12, Alg. 1).

A discriminator tells 2N classes apart: class i is "painted by teacher i", class N + i "by the student in style i". It looks at
predicted clean latents, noised again, through the frozen base model's encoder; only its head is trained, by its own optimiser:

    D: CE(D(x0_tea), i) + CE(D(x0_stu), N + i)          G: CE(D(x0_stu), i)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...dmm_core.schedule import NoiseSchedule
from ...dmm_core.unet import UNet
from ..data.batches import Batch
from ..parallel.devices import sent
from ..seeds import hash_seed
from ..teachers.teacher import Teacher


class Head(nn.Sequential):
    """Features of a UNet's middle block (B, C, h, w) -> logits (B, 2N): convolution, GroupNorm and SiLU, twice; mean; linear."""

    def __init__(self, channels: int, num_styles: int):
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(32, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(32, channels),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 2 * num_styles),
        )


@dataclass
class Renoise:
    """What the predicted clean latents are noised with before the discriminator sees them: t (B,), eps (B, C, h, w)."""

    t: Tensor
    eps: Tensor

    def rows(self, rows: Tensor | slice) -> Renoise:
        return Renoise(self.t[rows], self.eps[rows])

    def to(self, device: torch.device) -> Renoise:
        return Renoise(sent(self.t, device), sent(self.eps, device))


def draw_renoise(seed: int, number: int, shape: tuple[int, ...], schedule: NoiseSchedule) -> Renoise:
    """Of batch ``number``: uniform timesteps and fresh noise. Student and teacher get the same, so the noise cannot give them away."""
    g = torch.Generator().manual_seed(hash_seed(seed, "adversary", number))
    return Renoise(torch.randint(len(schedule), (shape[0],), generator=g), torch.randn(shape, generator=g))


@dataclass
class View:
    """How a discriminator (its ``head``) sees the rows of one batch that it judges, all on the device.

    x_t (B, C, h, w), t (B,), context and y: the rows'. noise: what it adds to clean latents. backbone: the frozen base model whose encoder
    it looks through. autocast: makes the context in which that computes.
    """

    head: nn.Module
    backbone: UNet
    schedule: NoiseSchedule
    x_t: Tensor
    t: Tensor
    noise: Renoise
    context: Tensor
    y: Tensor | None
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def x0(self, out: Tensor, prediction: str) -> Tensor:
        """eq. 12: (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), (B, C, h, w), from a prediction of eps or v."""
        return self.schedule.to_x0(out, self.x_t, self.t, prediction)

    def __call__(self, x0: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) -> the backbone's middle features (B, C', h', w') of them, noised; with gradients to x0."""
        with self.autocast():
            x_t = self.schedule.add_noise(x0, self.noise.eps.to(x0), self.noise.t)
            dtype = self.backbone.dtype
            y = None if self.y is None else self.y.to(dtype)
            return self.backbone.middle(x_t.to(dtype), self.noise.t, self.context.to(dtype), y)


@dataclass
class Discriminator:
    """The head, and how it sees a batch: through the frozen ``base`` model's encoder. gradient_checkpointing: of that encoder; autocast:
    makes the context in which it computes. The global random generator stays as it is."""

    base: Teacher
    num_styles: int
    schedule: NoiseSchedule
    seed: int
    device: torch.device
    gradient_checkpointing: bool = False
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def __post_init__(self) -> None:
        sizes = self.base.unet.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash_seed(self.seed, "discriminator"))
            self.head = Head(sizes.channel_mult[-1] * sizes.model_channels, self.num_styles).to(self.device)

    def view(self, batch: Batch, number: int, *, x_t: Tensor, t: Tensor, backbone: UNet) -> View | None:
        """How it sees the rows of batch ``number`` that have a style; None where no row has one.

        x_t (B, C, h, w) and t (B,): of the batch, on the device. backbone: the base's UNet there.
        """
        judged = batch.teacher < self.num_styles
        if not judged.any():
            return None
        noise = draw_renoise(self.seed, number, tuple(batch.global_batch.x_t.shape), self.schedule)
        noise = noise.rows(slice(batch.start, batch.start + len(batch))).rows(judged).to(self.device)
        context, y = self.base.conditioning(batch.caption[judged], x_t.shape[2:], self.device)
        backbone.gradient_checkpointing = self.gradient_checkpointing
        there = sent(judged.nonzero()[:, 0], self.device)
        return View(self.head, backbone, self.schedule, x_t[there], t[there], noise, context, y, self.autocast)


def generator_loss(head: nn.Module, features: Tensor, style: Tensor) -> Tensor:
    """G, (B,): -log D(x0_stu)[i]. The head's own weights get no gradient from it. style: (B,) teacher indices."""
    frozen = {name: p.detach() for name, p in head.named_parameters()}
    logits = functional_call(head, frozen, (features.float(),))
    return F.cross_entropy(logits.float(), style, reduction="none")


def discriminator_loss(head: nn.Module, student: Tensor, teacher: Tensor, style: Tensor) -> Tensor:
    """D, (B,): -log D(x0_tea)[i] - log D(x0_stu)[N + i]. Nothing but the head gets a gradient from it."""
    real, fake = head(torch.cat([teacher, student]).detach().float()).float().chunk(2)
    real_loss = F.cross_entropy(real, style, reduction="none")
    return real_loss + F.cross_entropy(fake, style + real.shape[1] // 2, reduction="none")
