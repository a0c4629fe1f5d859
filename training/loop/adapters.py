"""Low-rank adapters (Hu et al., arXiv:2106.09685) of a UNet: trained, folded into its weights, saved in kohya's key style."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """weight -> weight + (alpha / rank) * up @ down, for Linear (o, i) and Conv2d (o, i, k, k) weights.

    The sum has the adapter's dtype, float32: a weight in half precision would swallow small changes.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator | None = None):
        super().__init__()
        fan_in = weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, fan_in, generator=generator) / math.sqrt(fan_in))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return self.added(weight, self.up, self.down)

    def added(self, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return weight + (self.scale * (up @ down)).view_as(weight)


def add_lora(unet: nn.Module, rank: int, alpha: float, generator: torch.Generator | None = None) -> dict[str, LowRank]:
    """Attach adapters to every Linear and Conv2d inside the numbered blocks, in place: module name -> adapter."""
    adapters = {}
    for name, module in list(unet.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.startswith(
            ("input_blocks", "middle_block", "output_blocks")
        ):
            adapters[name] = LowRank(module.weight, rank, alpha, generator)
            # unsafe: the dtype may change. In float32 it does not.
            parametrize.register_parametrization(module, "weight", adapters[name], unsafe=True)
    return adapters


def attached(unet: nn.Module) -> dict[str, LowRank]:
    """The adapters of a UNet: module name -> adapter; none where it has none."""
    return {
        name.removesuffix(".parametrizations.weight.0"): module
        for name, module in unet.named_modules()
        if isinstance(module, LowRank)
    }


def folded_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    """The state dict that the module would have without adapters: they are added to the weights."""
    return folded(unet, unet.state_dict())


def folded(unet: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for another state dict of this module's keys."""
    out = {k: v for k, v in state.items() if ".parametrizations." not in k}
    for name, module in unet.named_modules():
        for key, adapters in getattr(module, "parametrizations", {}).items():
            place = f"{name}.parametrizations.{key}"
            weight = state[f"{place}.original"]
            for i, adapter in enumerate(adapters):
                weight = adapter.added(weight, state[f"{place}.{i}.up"], state[f"{place}.{i}.down"])
            out[f"{name}.{key}"] = weight
    return {key: value.detach() for key, value in out.items()}


def lora_state_dict(unet: nn.Module, adapters: dict[str, LowRank], rank: int, alpha: float) -> dict[str, Tensor]:
    """Adapters in kohya's layout: lora_down (rank, i, k, k), lora_up (o, rank, 1, 1), alpha."""
    out = {}
    for name, adapter in adapters.items():
        weight = cast(Tensor, unet.get_submodule(name).weight)
        key = "lora_unet_" + name.replace(".", "_")
        tail = weight.shape[1:]
        out[f"{key}.lora_down.weight"] = adapter.down.detach().reshape(rank, *tail).contiguous()
        ones = (1,) * (weight.ndim - 2)
        out[f"{key}.lora_up.weight"] = adapter.up.detach().reshape(weight.shape[0], rank, *ones).contiguous()
        out[f"{key}.alpha"] = torch.tensor(float(alpha))
    return out
