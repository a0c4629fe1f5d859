"""The weights that a MODEL really paints with, for training: LoRAs and merges folded in, nothing of the host changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import comfy.lora
import comfy.model_management as mm
import torch
from torch import Tensor

from ..dmm_core.checkpoint import STYLE_KEYS
from .folded import PREFIX, unfolded
from .style_patch import KEY


class HostWeights(Mapping[str, Tensor]):
    """A MODEL's UNet in the LDM key names, on the CPU, in the dtype it is held in. Each weight is computed when it is asked for, and is a
    copy that is usable for training.

    Computed from the unpatched weights and the MODEL's own patches, so it does not matter which clone of the model is loaded
    right now; a style that was folded into them is left out. styles: with the codebook, MLP and bank of a DMM model or an add-on, which
    are left out otherwise.
    """

    def __init__(self, patcher, styles: bool = False):
        patcher = unfolded(patcher)
        held = {key.removeprefix(PREFIX): patches for key, patches in patcher.get_key_patches(PREFIX).items()}
        for added in patcher.get_additional_models_with_key(KEY):
            held |= added.get_key_patches()
        self.held = {key: patches for key, patches in held.items() if styles or not key.startswith(STYLE_KEYS)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights, without computing them."""
        return {key: tuple(weight.shape) for key, ((weight, _), *_) in self.held.items()}

    def __getitem__(self, key: str) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        (weight, convert), *patches = self.held[key]
        if patches:
            changed = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
            changed = comfy.lora.calculate_weight(patches, changed, PREFIX + key)
            weight = changed.to(weight.dtype)
        # A clone made outside of inference mode is a normal tensor, which autograd accepts.
        return weight.detach().to("cpu").clone()

    def __contains__(self, key: object) -> bool:
        return key in self.held  # a Mapping's own would compute the weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def unet_weights(patcher, styles: bool = False) -> dict[str, Tensor]:
    """All of ``HostWeights`` at once."""
    return dict(HostWeights(patcher, styles))
