"""The averaged weights (EMA) that Stable Diffusion's own trainer keeps in its checkpoints, under the keys of the UNet.

It writes the name of a weight without its dots (``ldm/modules/ema.py`` of CompVis' latent-diffusion): ``model.diffusion_model.input_blocks.
0.0.weight`` is ``model_ema.diffusion_modelinput_blocks00weight``. The dots can be put back: a module in a block has one digit, and what
follows begins with a letter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

EMA_PREFIX, UNET_PART = "model_ema.", "model_ema.diffusion_model"

_COUNTERS = ("decay", "num_updates")
_BLOCK = re.compile(r"(?:(input_blocks|output_blocks)(\d{1,2})|(middle_block))(\d)(.*)")
_TRANSFORMER = re.compile(r"transformer_blocks(\d{1,3})(.+)")
_ENDS = ("weight", "bias")
_LAYERS = (
    "in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection", "norm", "proj_in", "proj_out", "op",
    "conv", "time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "out.0", "out.2",
)  # fmt: skip
_INNER = (
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
    *(f"attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
)


def _flat(names: tuple[str, ...]) -> dict[str, str]:
    return {name.replace(".", "") + end: f"{name}.{end}" for name in names for end in _ENDS}


_FLAT_LAYERS, _FLAT_INNER = {**_flat(_LAYERS), **{end: end for end in _ENDS}}, _flat(_INNER)


def ema_key(key: str) -> str | None:
    """The UNet's own key (``input_blocks.0.0.weight``) of a key of its averaged weights; None for what is none of them."""
    if not key.startswith(UNET_PART):
        return None
    name = key.removeprefix(UNET_PART)
    if name.startswith("."):  # written with its dots
        return name[1:]
    begin = ""
    if block := _BLOCK.fullmatch(name):
        begin, name = ".".join(filter(None, block.groups()[:4])) + ".", block[5]
    if inner := _TRANSFORMER.fullmatch(name):
        rest = _FLAT_INNER.get(inner[2])
        return rest and f"{begin}transformer_blocks.{inner[1]}.{rest}"
    rest = _FLAT_LAYERS.get(name)
    return rest and begin + rest


def only_ema(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the only UNet in a file is an averaged one."""
    return any(key.startswith(UNET_PART) for key in tensors) and not any(
        key.startswith(("model.diffusion_model.", "input_blocks.")) for key in tensors
    )


def from_ema(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """``tensors`` with the averaged UNet as the UNet, its keys after ``prefix``. Raises ValueError for a key that is no weight of one."""
    out = {}
    for key, tensor in tensors.items():
        if not key.startswith(EMA_PREFIX):
            out[key] = tensor
        elif (name := ema_key(key)) is not None:
            out[prefix + name] = tensor
        elif key.removeprefix(EMA_PREFIX) not in _COUNTERS:
            raise ValueError(
                f"'{key[:200]}' is no averaged weight (EMA) of Stable Diffusion's UNet: get the model without EMA"
            )
    return out
