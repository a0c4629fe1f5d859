"""The weights that a MODEL really paints with, for training: LoRAs and merges folded in, nothing of the host changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ..dmm_core.checkpoint import STYLE_KEYS
from ..dmm_core.scaled_fp8 import LAYER_MARK, in_half
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
        held = {key.removeprefix(PREFIX): patches for key, patches in key_patches(patcher, PREFIX).items()}
        for added in patcher.get_additional_models_with_key(KEY):
            held |= added.get_key_patches()
        self.held = {key: patches for key, patches in held.items() if styles or not key.startswith(STYLE_KEYS)}

    @property
    def quantised(self) -> bool:
        """Whether the host holds some of the weights as small numbers with a scale."""
        return any(isinstance(weight, QuantizedTensor) for ((weight, _), *_) in self.held.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights, without computing them."""
        return {key: tuple(weight.shape) for key, ((weight, _), *_) in self.held.items()}

    def __getitem__(self, key: str) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        (weight, convert), *patches = self.held[key]
        quantised = isinstance(weight, QuantizedTensor)
        weight = numbers(weight)
        if patches:
            changed = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
            changed = comfy.lora.calculate_weight(patches, changed, PREFIX + key)
            weight = in_half(changed) if quantised else changed.to(weight.dtype)
        # A clone made outside of inference mode is a normal tensor, which autograd accepts.
        return weight.detach().to("cpu").clone()

    def __contains__(self, key: object) -> bool:
        return key in self.held  # a Mapping's own would compute the weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def key_patches(patcher, prefix: str) -> dict[str, list]:
    """The host's ``get_key_patches``, which stops at the scales and marks of quantised layers: they are no weights and are left out."""
    keys = patcher.model_state_dict(prefix)
    layers = {key.removesuffix(LAYER_MARK) for key in keys if key.endswith(LAYER_MARK)}
    if not layers:
        return patcher.get_key_patches(prefix)
    held = {}
    for key in keys:
        layer, _, name = key.rpartition(".")
        if layer in layers and name not in ("weight", "bias"):
            continue
        weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
        if (backup := patcher.backup.get(key)) is not None:
            weight = backup.weight
        if (backup := patcher.hook_backup.get(key)) is not None:
            weight = backup[0]
        held[key] = [(weight, convert or (lambda weight, **_: weight)), *patcher.patches.get(key, [])]
    return held


def numbers(weight: Tensor) -> Tensor:
    """A weight as the host holds it; a quantised one times its scale, in half precision, as the same weight is read from a file."""
    if isinstance(weight, QuantizedTensor):
        return in_half(weight.to("cpu", torch.float32).dequantize())
    return weight


def unet_weights(patcher, styles: bool = False) -> dict[str, Tensor]:
    """All of ``HostWeights`` at once."""
    return dict(HostWeights(patcher, styles))
