"""Weight averaging with a power-function profile (Karras et al., arXiv:2312.02696, Sec. 3.1 and eq. 123-127)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def power_beta(step: int, gamma: float, every: int = 1) -> float:
    """Decay of the average at update ``step`` (1, 2, ...): (1 - every/step)^(gamma + 1); the first update is a copy."""
    return (1.0 - every / step) ** (gamma + 1.0)


class PowerEMA:
    """Average of a module's trainable parameters whose memory is a fixed share of the run, however long the run is.

    gamma = 6.94 keeps a relative width of 0.10 of the steps so far, gamma = 16.97 keeps 0.05. ``device``: where the average is
    kept (None: with the parameters). With ``every`` > 1 it is updated at every so-many-th step only, by the product of the decays of
    the steps between, which telescopes: (1 - every/step)^(gamma + 1).
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        gamma: float = 16.97,
        device: torch.device | str | None = None,
        every: int = 1,
    ):
        self.gamma, self.every = gamma, every
        self.step = 0
        self.average = {name: p.detach().to(device, torch.float32, copy=True) for name, p in params}

    @torch.no_grad()
    def update(self, params: Iterable[tuple[str, Tensor]]) -> None:
        """Call it after each step."""
        self.step += 1
        if self.step % self.every:
            return
        share = 1.0 - power_beta(self.step, self.gamma, self.every)
        for name, p in params:
            average = self.average[name]
            average.lerp_(p.detach().to(average), share)

    @property
    def ready(self) -> bool:
        """Whether there is an average yet."""
        return self.step >= self.every

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, Tensor], step: int) -> None:
        self.step = step
        for name, tensor in self.average.items():
            tensor.copy_(state[name])
