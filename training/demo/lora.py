"""A tiny LoRA (Hu et al., arXiv:2106.09685) of the demo base, saved in kohya's key style (``lora_unet_*``)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """weight -> weight + (alpha / rank) * up @ down, for Linear (o, i) and Conv2d (o, i, k, k) weights."""

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        fan_in = weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, fan_in) / math.sqrt(fan_in))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down).view_as(weight)


def add_lora(unet: nn.Module, rank: int, alpha: float) -> dict[str, LowRank]:
    """Attach adapters to every Linear and Conv2d inside the numbered blocks, in place: module name -> adapter."""
    adapters = {}
    for name, module in list(unet.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.startswith(
            ("input_blocks", "middle_block", "output_blocks")
        ):
            adapters[name] = LowRank(module.weight, rank, alpha)
            parametrize.register_parametrization(module, "weight", adapters[name])
    return adapters


def lora_state_dict(unet: nn.Module, adapters: dict[str, LowRank], rank: int, alpha: float) -> dict[str, Tensor]:
    """Adapters in kohya's layout: lora_down (rank, i, k, k), lora_up (o, rank, 1, 1), alpha."""
    out = {}
    for name, adapter in adapters.items():
        weight = unet.get_submodule(name).weight
        key = "lora_unet_" + name.replace(".", "_")
        tail = weight.shape[1:]
        out[f"{key}.lora_down.weight"] = adapter.down.detach().reshape(rank, *tail).contiguous()
        ones = (1,) * (weight.ndim - 2)
        out[f"{key}.lora_up.weight"] = adapter.up.detach().reshape(weight.shape[0], rank, *ones).contiguous()
        out[f"{key}.alpha"] = torch.tensor(float(alpha))
    return out
