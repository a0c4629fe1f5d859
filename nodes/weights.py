"""The weights that a MODEL really paints with, for training: LoRAs and merges folded in, nothing of the host changed."""

from __future__ import annotations

import comfy.lora
import comfy.model_management as mm
import torch
from torch import Tensor

from ..dmm_core.checkpoint import STYLE_KEYS

PREFIX = "diffusion_model."


def unet_weights(patcher, styles: bool = False) -> dict[str, Tensor]:
    """A MODEL's UNet in the LDM key names, on the CPU, in the dtype it is held in; copies, usable for training.

    Computed from the unpatched weights and the MODEL's own patches, so it does not matter which clone of the model is loaded
    right now. styles: with the codebook, MLP and bank of a DMM model, which are left out otherwise.
    """
    weights = {}
    for key, (first, *patches) in patcher.get_key_patches(PREFIX).items():
        mm.throw_exception_if_processing_interrupted()
        name = key.removeprefix(PREFIX)
        if not styles and name.startswith(STYLE_KEYS):
            continue
        weight, convert = first
        if patches:
            changed = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
            changed = comfy.lora.calculate_weight(patches, changed, key)
            weight = changed.to(weight.dtype)
        # A clone made outside of inference mode is a normal tensor, which autograd accepts.
        weights[name] = weight.detach().to("cpu").clone()
    return weights
