"""Reads and writes checkpoints: one safetensors file with UNet, styles, and text encoder and VAE where it has them.

The layout is the single file that ComfyUI users know. A DMM UNet (Song et al., arXiv:2504.12364) has two more modules:
the codebook ``model_embedding`` [N, D] and the style MLP. Style names, the recipe and so on are metadata.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bank import BANK, bank_config
from .ema_keys import UNET_PART, from_ema, only_ema
from .heads import HEADS, METADATA, foreign_heads, heads_by_level, is_released, read_heads, written_heads
from .metadata import (
    StyleInfo,
    check_styles,
    default_styles,
    modelspec_prediction,
    read_metadata,
    said_clip_skip,
    trainer_prediction,
    write_metadata,
)
from .scaled_fp8 import dequantised, is_mark
from .style import CODEBOOK, MLP_NAMES
from .unet import UNetConfig, unet_config_from_state_dict
from .vocabulary import IDS, NUM_TOKENS, compact_vocabulary, expand_vocabulary
from .weights_file import not_finite, read_weights, write_weights

logger = logging.getLogger(__name__)

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.")
STYLE_KEYS = tuple(f"{name}." for name in (CODEBOOK, *MLP_NAMES, BANK))
"""Of the weights that a plain UNet does not have."""
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
"""Empty tensors by which ComfyUI marks v-prediction and a noise schedule rescaled to end in pure noise."""

CLIP_SKIP = "dmm.clip_skip"
"""Metadata key: the clip skip with which the model reads its prompts, where it is not its family's."""
GUESS = "a guess"
"""``Checkpoint.prediction_from`` and ``heads_from`` where nothing in the file says it."""

MAX_STYLES = 4096
"""A bound for untrusted files: every style gets a name, and all names are compared with each other."""

_SD2_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_DECISIVE = (
    _SD2_BIAS,
    UNET_PREFIX + _SD2_BIAS,
    "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
    UNET_PART + _SD2_BIAS.replace(".", ""),
    IDS,
)
"""The few tensors whose values decide how the rest is read; the bias in all its names, diffusers' and that of averaged weights included."""


@dataclass
class Checkpoint:
    """The content of a file; tensors keep the file's dtypes.

    unet: keys without prefix, styles included; text: keys as in the file (``cond_stage_model.*`` or ``conditioner.*``);
    vae: keys without ``first_stage_model.``; other: every tensor that is none of these, keys as in the file;
    styles: one per style of the weights; recipe: how it was made; metadata: all other metadata, verbatim;
    prediction: "eps" or "v"; zero_snr: the model was trained on the schedule that ends in pure noise; scaled_fp8: number of weights that
    the file keeps as float8 with a scale (they are in half precision here); prediction_from: what said the prediction, in words, GUESS,
    or "" for what was not read from a file; overruled: that these two are not what the file alone says; clip_skip: 1 reads the text
    encoder's last layer, 2 the one before it, None is what the model family was trained with; heads: attention heads of each level of the
    UNet, () where nothing says them; heads_from: what said them, in words, GUESS, or "" for a released model's sizes and our own files.
    """

    unet: dict[str, Tensor]
    text: dict[str, Tensor] = field(default_factory=dict)
    vae: dict[str, Tensor] = field(default_factory=dict)
    styles: list[StyleInfo] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    prediction: str = "eps"
    zero_snr: bool = False
    other: dict[str, Tensor] = field(default_factory=dict)
    scaled_fp8: int = 0
    clip_skip: int | None = None
    prediction_from: str = ""
    overruled: bool = False
    heads: tuple[int, ...] = ()
    heads_from: str = ""

    @property
    def config(self) -> UNetConfig:
        """Every size of the UNet, its attention heads included. Raises ValueError as ``unet_config_from_state_dict`` does."""
        return unet_config_from_state_dict(self.unet, self.heads)

    def encoder(self, base: Checkpoint | None = None) -> tuple[dict[str, Tensor], int | None]:
        """The text encoder that its prompts are read with, ``base``'s where it has none ({} without either), and the clip skip."""
        if self.text or base is None:
            return self.text, self.clip_skip
        return base.text, base.clip_skip if self.clip_skip is None else self.clip_skip

    @property
    def num_styles(self) -> int:
        """N, from the codebook [N, D]; 0 for a model without styles."""
        codebook = self.unet.get(f"{CODEBOOK}.weight")
        return 0 if codebook is None else codebook.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every weight under its key in the file (the token table in full)."""
        unet = {UNET_PREFIX + k: v for k, v in self.unet.items()}
        vae = {VAE_PREFIX + k: v for k, v in self.vae.items()}
        return {**unet, **self.text, **vae, **self.other}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The sizes of ``tensors``."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}


def load_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a DMM checkpoint, or a plain one (0 styles), or a file that holds only such a UNet.

    Raises ValueError naming the file when it is not one, is damaged, or was written by a newer version.
    """
    return read_checkpoint(path, header_only=False)


def read_info(path: str | os.PathLike) -> Checkpoint:
    """As ``load_checkpoint``, but every tensor is on the meta device: sizes and dtypes without values."""
    return on_meta(read_checkpoint(path, header_only=True))


def is_decisive(key: str, shape: tuple[int, ...]) -> bool:
    """Whether the values of this tensor are needed to tell what a file is; never for a large tensor."""
    return (key in _DECISIVE and len(shape) == 1 and shape[0] <= NUM_TOKENS) or is_mark(key, shape)


def on_meta(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with every tensor on the meta device: sizes and dtypes without values (in place)."""
    for weights in (checkpoint.unet, checkpoint.text, checkpoint.vae, checkpoint.other):
        weights.update({key: tensor.to("meta") for key, tensor in weights.items()})
    return checkpoint


def save_checkpoint(path: str | os.PathLike, checkpoint: Checkpoint, extra: Mapping[str, str] | None = None) -> None:
    """Write a ``.safetensors`` file, completely or not at all; ``checkpoint`` is left as it is.

    extra: more metadata, such as the workflow. Raises ValueError for what must not be saved (NaN, style names that do
    not fit), OSError when the disk refuses; in both cases a file that was there before is untouched.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a checkpoint's file name must end in .safetensors")
    try:
        num_styles = count_styles(checkpoint.unet)
        styles = checkpoint.styles or default_styles(num_styles)
        check_styles(styles, num_styles)
        if checkpoint.prediction not in ("eps", "v"):
            raise ValueError(f"the prediction is {checkpoint.prediction!r}, expected 'eps' or 'v'")
        config = checkpoint.config
        said = {CLIP_SKIP: str(checkpoint.clip_skip)} if checkpoint.clip_skip else {}
        rest = {**checkpoint.metadata, **(extra or {}), **said, **written_heads(config)}
        metadata = write_metadata(
            styles, checkpoint.recipe, checkpoint.prediction, rest=rest, config=config, title=path.stem
        )
        tensors = checkpoint.tensors
        marks = {V_MARK: checkpoint.prediction == "v", ZERO_SNR_MARK: checkpoint.zero_snr}
        tensors.update({key: torch.empty(0) for key, on in marks.items() if on})
        tensors = compact_vocabulary(tensors)
    except ValueError as error:
        raise ValueError(f"{path} was not saved: {error}") from error
    write_weights(path, tensors, metadata)


def read_checkpoint(path: str | os.PathLike, header_only: bool) -> Checkpoint:
    """As ``load_checkpoint``; with ``header_only`` all but the few tensors of ``is_decisive`` are on the meta
    device."""
    tensors, metadata = read_weights(path, *([is_decisive] if header_only else []))
    try:
        tensors, metadata, scaled = dequantised(tensors, metadata)
        return replace(assemble(tensors, metadata), scaled_fp8=scaled)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def assemble(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    """A ``Checkpoint`` from a file's tensors, which are taken out of ``tensors``. A file with only an averaged UNet (EMA) has that as
    its UNet. Raises ValueError when they are none."""
    edm = [key for key in tensors if key in ("edm_mean", "edm_std") or key.startswith("edm_vpred.")]
    if edm:
        raise ValueError(f"this is an EDM model (key '{edm[0]}'); only eps- and v-prediction models are supported")
    if only_ema(tensors):
        tensors = from_ema(tensors, UNET_PREFIX)
    v_mark = tensors.pop(V_MARK, None) is not None
    zero_snr = tensors.pop(ZERO_SNR_MARK, None) is not None
    text = {k: tensors.pop(k) for k in list(tensors) if k.startswith(TEXT_PREFIXES)}
    vae = {k.removeprefix(VAE_PREFIX): tensors.pop(k) for k in list(tensors) if k.startswith(VAE_PREFIX)}
    unet, other = tensors, {}
    if any(k.startswith(UNET_PREFIX) for k in tensors):
        unet = {k.removeprefix(UNET_PREFIX): v for k, v in tensors.items() if k.startswith(UNET_PREFIX)}
        other = {k: v for k, v in tensors.items() if not k.startswith(UNET_PREFIX)}
    if "input_blocks.0.0.weight" not in unet or "out.2.weight" not in unet:
        raise ValueError(f"no Stable Diffusion UNet in it: {_lookalike([*unet, *vae, *text])}")
    odd = next((key for key, tensor in unet.items() if not tensor.is_floating_point()), None)
    if odd is not None:
        dtype = str(unet[odd].dtype).removeprefix("torch.")
        raise ValueError(f"weight '{odd}' of the UNet is {dtype}: get the model in half precision, not a quantised one")
    check_finite_styles(unet)
    num_styles = count_styles(unet)
    config = unet_config_from_state_dict(unet)  # refuses what is none
    styles, recipe, prediction, rest = read_metadata(metadata, num_styles)
    heads, heads_from = _heads(rest, config, ours="dmm.format" in metadata)
    sources = (
        ("dmm.prediction", prediction),
        (f"its tensor '{V_MARK}'", "v" if v_mark else None),
        ("modelspec", modelspec_prediction(rest)),
        ("ss_v_parameterization", trainer_prediction(rest)),
        (GUESS, _sd2_prediction(unet)),
    )
    told_by, prediction = next((what, said) for what, said in sources if said)
    zero_snr = zero_snr or rest.get("ss_zero_terminal_snr", "").strip().lower() == "true"
    clip_skip = _clip_skip(rest.pop(CLIP_SKIP, None)) or said_clip_skip(rest)
    return Checkpoint(
        unet, expand_vocabulary(text), vae, styles, recipe, rest, prediction,
        zero_snr=zero_snr, other=other, clip_skip=clip_skip, prediction_from=told_by,
        heads=heads, heads_from=heads_from,
    )  # fmt: skip


def _heads(rest: dict[str, str], config: UNetConfig, ours: bool) -> tuple[tuple[int, ...], str]:
    """Attention heads by the metadata, whose ``HEADS`` is taken out of ``rest``, and what said them. ours: this pack wrote the file, with
    the usual heads where it says no others."""
    if (said := rest.pop(HEADS, None)) is not None:
        return read_heads(said, config), HEADS
    if ours or is_released(config):
        return (), ""
    try:
        if heads := heads_by_level(config, foreign_heads(rest)):
            return heads, METADATA
    except ValueError as error:
        logger.warning("attention heads in the file's metadata are not looked at: %s", error)
    return (), GUESS


def _clip_skip(said: str | None) -> int | None:
    if said is not None and not re.fullmatch(r"[1-9][0-9]?", said):
        raise ValueError(f"metadata '{CLIP_SKIP}' is {said[:40]!r}, expected a number from 1: the file is damaged")
    return int(said) if said else None


def check_finite_styles(unet: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the key, for NaN or infinity in what was read of a style side: it would paint black. Tensors on the meta
    device are passed over."""
    read = {key: tensor for key, tensor in unet.items() if key.startswith(STYLE_KEYS) and not tensor.is_meta}
    if (key := not_finite(read)) is not None:
        raise ValueError(f"style weight '{key}' holds NaN or infinity: the file is damaged")


def count_styles(unet: Mapping[str, Tensor]) -> int:
    """N, after checking that codebook and MLP are complete and as wide as the time embedding, and that a style bank fits the UNet's layers;
    0 without styles."""
    style = {key: tensor for key, tensor in unet.items() if key.startswith(STYLE_KEYS)}
    banked = [key for key in style if key.startswith(f"{BANK}.")]
    if not style:
        return 0
    for key in banked:
        style.pop(key)
    mlps = [name for name in MLP_NAMES if any(key.startswith(f"{name}.") for key in style)]
    if len(mlps) > 1:
        raise ValueError(f"two style MLPs ({', '.join(mlps)}), expected one (SDXL's own add_embedding is label_emb)")
    time_embed = unet.get("time_embed.2.weight")
    codebook = style.get(f"{CODEBOOK}.weight")
    if (
        time_embed is None
        or codebook is None
        or any(weight.ndim != 2 or not all(weight.shape) for weight in (time_embed, codebook))
    ):
        raise ValueError(f"style weights without a codebook '{CODEBOOK}.weight' [styles, width], or without time_embed")
    if codebook.shape[0] > MAX_STYLES:
        raise ValueError(f"the codebook declares {codebook.shape[0]} styles, at most {MAX_STYLES} are read")
    dim, mlp = time_embed.shape[0], (mlps or MLP_NAMES)[0]
    wanted: dict[str, tuple[int, ...]] = {f"{CODEBOOK}.weight": (codebook.shape[0], dim)}
    for linear in (f"{mlp}.linear_1", f"{mlp}.linear_2"):
        wanted |= {f"{linear}.weight": (dim, dim), f"{linear}.bias": (dim,)}
    if wanted.keys() != style.keys():
        missing, unexpected = sorted(wanted.keys() - style.keys()), sorted(style.keys() - wanted.keys())
        raise ValueError(f"incomplete style weights: missing {missing}, unexpected {unexpected[:8]}")
    for key, shape in wanted.items():
        if tuple(style[key].shape) != shape:
            raise ValueError(
                f"style weight '{key}' has shape {tuple(style[key].shape)}, expected {shape} "
                f"for a time embedding of width {dim}"
            )
    if banked and "input_blocks.0.0.weight" in unet:  # a file of styles alone has no layers to compare the bank with
        bank_config(unet, codebook.shape[0])
    return codebook.shape[0]


def _sd2_prediction(unet: Mapping[str, Tensor]) -> str:
    """SD2's two releases differ only in their weights; ComfyUI tells them by the spread of one bias, and so must we."""
    bias, key = unet.get(_SD2_BIAS), _SD2_BIAS.replace("norm1.bias", "attn2.to_k.weight")
    if (
        bias is None
        or key not in unet
        or unet[key].shape[-1:] != (1024,)
        or unet["input_blocks.0.0.weight"].shape[1] != 4
    ):
        return "eps"
    if bias.is_meta or bias.ndim != 1:  # of no size that a UNet has
        return "eps"
    return "v" if bias.float().std(unbiased=False) > 0.09 else "eps"


_LOOKALIKES = {
    "control_model.": "it looks like a ControlNet",
    "controlnet_": "it looks like a ControlNet",
    "zero_convs.": "it looks like a ControlNet",
    "lora": "it looks like a LoRA",
    "down_blocks.": "it is in the diffusers layout; convert it to a single-file checkpoint first (dmm convert)",
    "double_blocks.": "it looks like a model of another architecture",
    "joint_blocks.": "it looks like a model of another architecture",
    "text_model.": "it looks like a text encoder",
    "decoder.": "it looks like a VAE",
    "model_embedding.": "it holds styles without a UNet; put them onto their model first (dmm convert --onto)",
}


def _lookalike(keys: Iterable[str]) -> str:
    """A guess at what a file with these keys is, for an error message."""
    keys = list(keys)
    for piece, guess in _LOOKALIKES.items():
        if any(piece in key for key in keys):
            return guess
    return "choose a Stable Diffusion 1.x, 2.x or XL checkpoint"
