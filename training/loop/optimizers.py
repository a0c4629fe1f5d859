"""The student's optimisers, their learning rate, and their state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...dmm_core.unet import UNet
from ..config import TrainConfig
from ..parallel.sharding import distribute_like, gather_to_main
from .muon import MuonAdamW, split


def parameter_groups(student: UNet, config: TrainConfig) -> list[dict]:
    """For an optimiser: the network; the style bank, whose matrices are no layers' (``muon``); and the style side with its own ``scale``
    of the learning rate."""
    style, bank = ({id(p) for p in side} for side in (student.style_parameters(), student.bank_parameters()))
    named = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in named if id(p) not in style | bank], "scale": 1.0, "style": False},
        {"params": [p for p in named if id(p) in bank], "scale": 1.0, "style": True},
        {"params": [p for p in named if id(p) in style], "scale": config.style_lr_scale, "style": True},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the step that follows ``step`` finished ones: linear warm-up, then the schedule, then the final stage's own."""
    c = config
    if c.final_steps and step >= c.steps:
        return c.final_lr or c.lr
    warmup = round(c.warmup * c.steps) if c.warmup < 1 else c.warmup
    if step < warmup:
        return c.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, c.steps - warmup)
    if c.lr_schedule == "cosine":
        return c.lr * 0.5 * (1 + math.cos(math.pi * done))
    return c.lr * (1 - done) if c.lr_schedule == "linear" else c.lr


def make_optimizer(groups: Sequence[dict], config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """ "adamw"; "adamw8bit": its moments in 8 bits (arXiv:2110.02861), needs bitsandbytes; "adafactor": one factored second moment
    and no first one (arXiv:1804.04235), with learning rates of AdamW's kind; "muon": see ``muon.MuonAdamW``. Raises ValueError when a
    package is missing.
    """
    c = config
    if c.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                "optimizer is 'adamw8bit', which needs the package bitsandbytes (pip install bitsandbytes): install it, or "
                "choose adafactor, which saves as much memory without it"
            ) from error
        return AdamW8bit(groups, lr=c.lr, betas=(c.betas[0], c.betas[1]), weight_decay=c.weight_decay)
    if c.optimizer == "adafactor":
        try:
            from transformers.optimization import Adafactor
        except ImportError as error:
            raise ValueError("optimizer is 'adafactor', which needs the package transformers: install it") from error
        return Adafactor(
            groups, lr=c.lr, weight_decay=c.weight_decay, scale_parameter=False, relative_step=False, warmup_init=False
        )
    if c.optimizer == "muon":
        return MuonAdamW(split(groups), lr=c.lr, betas=(c.betas[0], c.betas[1]), weight_decay=c.weight_decay)
    fused = device.type in ("cuda", "cpu")  # on a CPU a sixth of a step's time at SD 1.5's size, in batches of two
    return torch.optim.AdamW(groups, lr=c.lr, betas=(c.betas[0], c.betas[1]), weight_decay=c.weight_decay, fused=fused)


# torch's own get/set_optimizer_state_dict (torch.distributed.checkpoint.state_dict, 2.11) were measured against the next two functions: the
# same bits for AdamW, Adafactor and Muon, alone, with DDP and FSDP2. But bitsandbytes' AdamW8bit nests its tensors in a dict, which it
# loads wrongly without saying so; loading takes a set of gradients' memory; and run states written so far would need these all the same.


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], is_main: bool = True
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """({"<parameter>|<key>": tensor}, {parameter: {key: number}}): all that the optimiser remembers of its parameters. Of shared-out
    ones (for all processes together) it is whole where it ``is_main``."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict] = {}
    seen: set[int] = set()
    for name, p in named.items():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                value = gather_to_main(value, is_main)
                # bitsandbytes gives all parameters one table of its 256 levels; safetensors refuses tensors that share memory.
                shared = value.data_ptr() in seen
                seen.add(value.data_ptr())
                tensors[f"{name}|{key}"] = value.detach().clone() if shared else value.detach()
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Mapping],
) -> None:
    """Give a fresh optimiser the state that ``optimizer_tensors`` took from another."""
    states: dict[str, dict] = {name: dict(numbers.get(name, {})) for name in named}
    for place, tensor in tensors.items():
        name, key = place.rsplit("|", 1)
        states[name][key] = distribute_like(tensor, named[name]) if tensor.shape == named[name].shape else tensor
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    index = {name: order.index(id(p)) for name, p in named.items()}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(
        {"state": {index[name]: state for name, state in states.items() if state}, "param_groups": groups}
    )
