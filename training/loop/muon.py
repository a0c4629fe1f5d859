"""Muon for the network's matrices and convolutions, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration; as in torch.optim.Muon."""
RMS = 0.2
"""An update's root mean square is about this times the learning rate, as AdamW's is (arXiv:2502.16982, eq. 4)."""
SMALLEST = 8
"""The fewest rows or columns of a matrix: with fewer, its directions are not worth being made equal (a UNet's last layer)."""


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether Muon learns a weight of this shape; a convolution (out, in, h, w) is a matrix (out, in * h * w)."""
    return len(shape) >= 2 and min(shape[0], torch.Size(shape[1:]).numel()) >= SMALLEST


def orthogonal(update: Tensor) -> Tensor:
    """The nearest matrix with singular values near 1, by a Newton-Schulz iteration in bfloat16: (m, n) -> (m, n) bfloat16."""
    a, b, c = COEFFICIENTS
    x = update.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """Parameters of groups with ``"muon": True`` follow their orthogonalised momentum (Jordan et al. 2024), the others AdamW.

    Each matrix keeps one moment in place of AdamW's two. Weight decay is decoupled in both.
    """

    def __init__(self, groups: Sequence[dict], **settings: Any):
        super().__init__([{"muon": False, **group} for group in groups], fused=False, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # one of torch's overloads
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        mine = [(group, p, p.grad) for group in self.param_groups if group["muon"] for p in group["params"]]
        mine = [(group, p, grad) for group, p, grad in mine if grad is not None]
        for _, p, _ in mine:
            p.grad = None  # which AdamW passes over
        try:
            super().step()
        finally:
            for _, p, grad in mine:
                p.grad = grad
        for group, p, grad in mine:
            self._move(group, p, grad)
        return loss

    def _move(self, group: dict, p: nn.Parameter, grad: Tensor) -> None:
        state = self.state[p]
        if not state:
            state["step"], state["momentum_buffer"] = torch.zeros(()), torch.zeros_like(p)
        state["step"] += 1
        momentum = state["momentum_buffer"].lerp_(grad, 1 - MOMENTUM)
        update = grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
        rate = group["lr"] * RMS * max(update.shape) ** 0.5
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(orthogonal(update).view(p.shape).to(p.dtype), alpha=-rate)


def split(groups: Sequence[dict]) -> list[dict]:
    """Groups of an optimiser -> the same with the matrices of each apart, but for those of the style side (``"style": True``)."""
    parts = []
    for group in groups:
        is_mine = [is_matrix(p.shape) and not group.get("style") for p in group["params"]]
        matrices, others = ([p for p, own in zip(group["params"], is_mine) if own == muon] for muon in (True, False))
        parts += [{**group, "params": params, "muon": muon} for params, muon in ((matrices, True), (others, False))]
    return [group for group in parts if group["params"]]
