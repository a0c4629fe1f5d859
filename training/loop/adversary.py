"""The multi-class adversarial loss of DMM (arXiv:2504.12364, eq. 11 and 12, Alg. 1).

A discriminator tells 2N classes apart: class i is "painted by teacher i", class N + i "by the student in style i". It looks at
predicted clean latents, noised again, through the frozen base model's encoder; only its head is trained, by its own optimiser:

    D: CE(D(x0_tea), i) + CE(D(x0_stu), N + i)          G: CE(D(x0_stu), i)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...dmm_core.schedule import NoiseSchedule
from ...dmm_core.unet import UNet
from ..seeds import hash_seed


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


def draw_renoise(seed: int, number: int, shape: tuple[int, ...], schedule: NoiseSchedule) -> Renoise:
    """Of batch ``number``: uniform timesteps and fresh noise. Student and teacher get the same, so it tells them not apart."""
    g = torch.Generator().manual_seed(hash_seed(seed, "adversary", number))
    return Renoise(torch.randint(len(schedule), (shape[0],), generator=g), torch.randn(shape, generator=g))


class Adversary:
    """The discriminator's head with its optimiser, and the two losses. ``channels``: of the middle block."""

    def __init__(self, channels: int, num_styles: int, lr: float, seed: int, device: torch.device):
        self.num_styles = num_styles
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash_seed(seed, "discriminator"))
            self.head = Head(channels, num_styles).to(device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=lr)

    @staticmethod
    def features(
        backbone: UNet, x0: Tensor, noise: Renoise, schedule: NoiseSchedule, context: Tensor, y: Tensor | None
    ) -> Tensor:
        """Predicted clean latents (B, C, h, w) -> the frozen backbone's middle features (B, C', h', w'), with gradients to x0."""
        t = noise.t.to(x0.device)
        x_t = schedule.add_noise(x0, noise.eps.to(x0), t)
        dtype = backbone.dtype
        return backbone.middle(x_t.to(dtype), t, context.to(dtype), None if y is None else y.to(dtype))

    def generator_loss(self, features: Tensor, style: Tensor) -> Tensor:
        """G, (B,): -log D(x0_stu)[i]. The head's own weights get no gradient from it. style: (B,) teacher indices."""
        frozen = {name: p.detach() for name, p in self.head.named_parameters()}
        logits = functional_call(self.head, frozen, (features.float(),))
        return F.cross_entropy(logits.float(), style, reduction="none")

    def discriminator_loss(self, student: Tensor, teacher: Tensor, style: Tensor) -> Tensor:
        """D, (B,): -log D(x0_tea)[i] - log D(x0_stu)[N + i]. Nothing but the head gets a gradient from it."""
        real, fake = self.head(torch.cat([teacher, student]).detach().float()).float().chunk(2)
        real_loss = F.cross_entropy(real, style, reduction="none")
        return real_loss + F.cross_entropy(fake, style + self.num_styles, reduction="none")
