"""Where a student starts, and which of its parameters learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...dmm_core.style import CODEBOOK
from ...dmm_core.unet import UNet, UNetConfig, init_style
from ..config import TrainConfig
from ..seeds import hash_seed
from ..teachers.teacher import Teacher, soup
from .adapters import add_lora


def new_student(base: UNet, teachers: Sequence[Teacher], config: TrainConfig) -> UNet:
    """A UNet with a style per teacher, on the CPU, what learns in float32; its start follows from config and seed alone.

    Where ``base`` is a DMM model, a teacher that is one of its styles begins with that style's code, and every other one with a
    random code; network and style MLP are the base's. Raises ValueError for init "soup" then: the soup would lose what it knows.
    """
    grown = base.config.num_styles > 0
    if grown and config.init != "base":
        raise ValueError(f"init is {config.init!r}: a model that has styles already goes on from itself (init: base)")
    sizes = {**vars(base.config), "num_styles": len(teachers)}
    if sizes["adm_channels"] and not grown:
        sizes["style_mlp"] = "add_embedding2"  # in SDXL's diffusers layout add_embedding is taken
    student = UNet(UNetConfig(**sizes))
    init_style(student, torch.Generator().manual_seed(hash_seed(config.seed, "style")))
    source = soup([t.unet.state_dict() for t in teachers]) if config.init == "soup" else base.state_dict()
    codes = source.pop(f"{CODEBOOK}.weight", None)
    student.load_state_dict(source, strict=False)  # all but what has no source
    for row, teacher in enumerate(teachers):
        if codes is not None and teacher.unet is base and isinstance(teacher.style, int):
            student.model_embedding.weight.data[row] = codes[teacher.style]
    generator = torch.Generator().manual_seed(hash_seed(config.seed, "lora"))
    choose_trained(
        student.float(), config.trainable, lora_rank=config.lora_rank, precision=config.precision, generator=generator
    )
    student.gradient_checkpointing = config.gradient_checkpointing
    return student


def choose_trained(
    student: UNet, trainable: str, *, lora_rank: int, precision: str, generator: torch.Generator | None = None
) -> None:
    """Turn off the gradients of what does not learn, and attach low-rank adapters for "lora" (in place).

    With half-precision arithmetic, frozen matrices are kept in float16, which is what checkpoint files have, so that nothing is lost.
    """
    if trainable == "all":
        return
    style = {id(p) for p in student.style_parameters()}
    for module in student.modules():
        for name, p in module.named_parameters(recurse=False):
            half = precision != "fp32" and id(p) not in style and p.ndim > 1
            value = p.detach().half() if half else p.detach()
            setattr(module, name, nn.Parameter(value, requires_grad=id(p) in style))
    if trainable == "lora":
        add_lora(student, lora_rank, lora_rank, generator)
