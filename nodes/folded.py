"""A style that is in a MODEL's weights, as patches like a LoRA's, and how to tell them from all others."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ..dmm_core.bank import bank_masses, banked_layers, layer_change_parts, layer_parts
from ..dmm_core.style_value import style_rows
from . import style_patch

PREFIX = "diffusion_model."


class FoldedStyle(LoRAAdapter):
    """What a bank adds to one weight, as the host's LoRA of it. Made as its other adapters are, from (keys, weights): where the host
    prefetches patches, it makes copies of an adapter from these two."""

    @classmethod
    def of(cls, up: Tensor, down: Tensor) -> FoldedStyle:
        """up (out, R), down (R, in, ...)."""
        return cls(set(), (up, down, None, None, None, None))


def with_folded(patcher, weights: Mapping[str, Tensor]):
    """A clone of a MODEL that has its style in its weights; without a bank an unchanged one. weights: its UNet's, bank included.

    Raises ValueError for a style that changes over the steps or between the pictures of a batch.
    """
    patcher = unfolded(patcher)
    style, known = style_patch.chosen_style(patcher), style_patch.known_styles(patcher)
    row = style_rows(style, known)
    if style.changes or len(row) > 1:
        raise ValueError(
            f"'{style}' changes over the steps or between pictures: only one fixed style can go into the weights"
        )
    names = banked_layers(weights)
    if not names:
        return patcher
    masses, patches = torch.zeros(0), {}
    for name in names:
        parts = layer_parts(weights, name)
        masses = bank_masses(row, len(parts["cores"]))[0]
        up, down, bias = layer_change_parts(parts, masses)
        patches[f"{PREFIX}{name}.weight"] = FoldedStyle.of(up, down)
        if bias is not None:
            patches[f"{PREFIX}{name}.bias"] = FoldedStyle.of(bias[:, None], torch.ones(1, 1))
    taken = patcher.add_patches(patches)
    if missing := sorted(patches.keys() - set(taken)):
        raise RuntimeError(f"the host did not take the style of {', '.join(missing[:4])}")
    style_patch.set_folded(patcher, style_patch.Folded(style, tuple(masses.tolist())))
    return patcher


def unfolded(patcher):
    """A clone of a MODEL without a style in its weights."""
    patcher = patcher.clone()
    kept = {key: [p for p in many if not isinstance(p[1], FoldedStyle)] for key, many in patcher.patches.items()}
    if kept != patcher.patches:
        patcher.patches = {key: many for key, many in kept.items() if many}
        patcher.patches_uuid = uuid.uuid4()
    if style_patch.has_styles(patcher):
        style_patch.set_folded(patcher, None)
    return patcher
