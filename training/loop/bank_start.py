"""Where a student starts that goes on from a model with a style bank: as that model, with more styles or fewer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...dmm_core.bank import bank_config, bank_masses
from ...dmm_core.bank_drop import has_style_rows, moves, recentred, what_is_told
from ...dmm_core.bank_grow import grown_unet, growth_of
from ...dmm_core.checkpoint import STYLE_KEYS
from ...dmm_core.style import CODEBOOK
from ...dmm_core.unet import UNet
from ..config import TrainConfig
from ..seeds import hash_seed
from ..teachers.teacher import Teacher

FILE_ITEMSIZE = 2
"""Bytes of a number in a student's file, which is in half precision: what MB of a budget mean."""


@torch.no_grad()
def bank_start(base: UNet, teachers: Sequence[Teacher], config: TrainConfig) -> dict[str, Tensor]:
    """The weights, float32, of a student with a style for each teacher, in their order.

    A teacher that is a style of ``base`` (or its painting without one) has that style's code and cores. The others are taken in as without
    training (``bank_grow``), within ``config.growth``, and come last. Where the base has styles that no teacher stands for, W moves to the
    mean of those that stay if it would tell of them (``bank_drop``); centred at its own base (``Teacher.at_base``), it stays there. Raises
    ValueError for a growth that is too small.
    """
    own = [teacher for teacher in teachers if teacher.unet is base]
    new = [teacher for teacher in teachers if teacher.unet is not base]
    if list(teachers[: len(own)]) != own:
        raise ValueError("the teachers of new styles come after the styles that the model has")
    weights = {key: value.float() for key, value in base_around(base, own).items()}
    styles = base.config.num_styles
    rows = torch.cat([style for teacher in own if (style := teacher.style_row) is not None])  # (n, N+1)
    codes = torch.randn(
        len(own), base.config.embed_dim, generator=torch.Generator().manual_seed(hash_seed(config.seed, "style"))
    )
    for row, teacher in enumerate(own):
        if isinstance(teacher.style, int):
            codes[row] = weights[f"{CODEBOOK}.weight"][teacher.style]
    for key, value in weights.items():
        if has_style_rows(key) and key != f"{CODEBOOK}.weight":
            weights[key] = torch.cat([bank_masses(rows, len(value)) @ value, value[styles:]])
    weights[f"{CODEBOOK}.weight"] = codes
    return grown(weights, new, config) if new else weights


def base_around(base: UNet, own: Sequence[Teacher]) -> dict[str, Tensor]:
    """The base's weights around the mean of the styles that ``own`` stand for, where that is wanted: not where W is a model of its own."""
    weights = base.state_dict()
    if any(teacher.at_base for teacher in own):
        return weights
    stay, gone = staying(base.config.num_styles, own)
    return recentred(weights, stay) if gone and stay and moves(what_is_told(weights, gone)) else weights


def staying(styles: int, own: Sequence[Teacher]) -> tuple[list[int], list[int]]:
    """Which of N styles the teachers stand for, and which they do not."""
    stay = {teacher.style for teacher in own if isinstance(teacher.style, int)}
    return sorted(stay), [i for i in range(styles) if i not in stay]


def grown(weights: dict[str, Tensor], new: Sequence[Teacher], config: TrainConfig) -> dict[str, Tensor]:
    """The weights with a style more for each of the ``new`` teachers."""
    shapes = {key: tuple(value.shape) for key, value in weights.items() if not key.startswith(STYLE_KEYS)}
    bank = bank_config(weights, len(weights[f"{CODEBOOK}.weight"]))
    assert bank is not None
    rank = growth_of(config.growth, shapes, bank, new=len(new), itemsize=FILE_ITEMSIZE).rank
    return grown_unet(weights, [teacher.unet.state_dict() for teacher in new], rank, shapes=shapes)
