"""Style files: codebook, MLP, bank and metadata of a DMM model without its UNet. They go back onto their UNet (``recombine``), or as an
add-on onto any other of that architecture, in ComfyUI."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dmm_core.bank import check_alone
from ...dmm_core.checkpoint import GUESS, MAX_STYLES, STYLE_KEYS, Checkpoint, check_finite_styles, count_styles
from ...dmm_core.metadata import StyleInfo, check_styles, default_styles, read_metadata, write_metadata
from ...dmm_core.style import CODEBOOK, mlp_name
from ...dmm_core.unet import unet_config_from_state_dict
from ...dmm_core.weights_file import read_keys, read_weights, write_weights
from .hashing import weights_sha256
from .model_files import ZERO_SNR, load_any

UNET_DIGEST = "dmm.unet_sha256"
UNET_FINGERPRINT = "dmm.unet_fingerprint"
"""Metadata: for which UNet the styles were made, by ``unet_digest`` and ``unet_fingerprint``."""
SDXL_MLP = mlp_name(pooled=True)
ONLY_ITS_OWN = (
    "these styles are for the model that they were taken from and its own weights, which are not in the file; styles for any copy of a "
    "base come from a merge centred at the base"
)
SAMPLED = 1024
"""Values of each weight that a fingerprint looks at."""


class MadeFor(NamedTuple):
    """The UNet that styles were made for: its ``unet_digest`` and ``unet_fingerprint``, "" for what a file does not say."""

    sha256: str = ""
    fingerprint: str = ""


@dataclass
class StyleFile:
    """weights: keys as in a UNet without prefix; made_for: the UNet that learned the styles."""

    weights: dict[str, Tensor]
    styles: list[StyleInfo]
    recipe: dict[str, Any]
    metadata: dict[str, str]
    prediction: str | None
    zero_snr: bool
    made_for: MadeFor


def is_style_file(path: str | os.PathLike) -> bool:
    """Whether a file holds a codebook and no UNet. Raises ValueError for what is no safetensors file; folders:
    False."""
    if Path(path).is_dir():
        return False
    keys = read_keys(path)
    return bool(keys) and all(key.startswith(STYLE_KEYS) for key in keys)


def read_style_file(path: str | os.PathLike, header_only: bool = False) -> StyleFile:
    """Read a style file; with ``header_only`` the tensors are on the meta device. Raises ValueError naming a file that
    is none."""
    weights, metadata = read_weights(path, *([lambda key, shape: False] if header_only else []))
    made_for = MadeFor(metadata.pop(UNET_DIGEST, ""), metadata.pop(UNET_FINGERPRINT, ""))
    zero_snr = metadata.pop(ZERO_SNR, None) == "true"
    try:
        codebook = weights.get(f"{CODEBOOK}.weight")
        if codebook is None or codebook.ndim != 2 or not 0 < codebook.shape[0] <= MAX_STYLES:
            raise ValueError(f"no codebook '{CODEBOOK}.weight' [styles, width] of 1 to {MAX_STYLES} styles in it")
        odd = next((key for key, tensor in weights.items() if not tensor.is_floating_point()), None)
        if odd is not None:
            raise ValueError(f"weight '{odd}' is {weights[odd].dtype}, not of floating point")
        _check_sound(weights)
        styles, recipe, prediction, rest = read_metadata(metadata, codebook.shape[0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return StyleFile(weights, styles, recipe, rest, prediction, zero_snr, made_for)


def _check_sound(side: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless codebook, MLP and bank are complete and fit together."""
    width = side[f"{CODEBOOK}.weight"].shape[1]
    check_finite_styles(side)
    try:
        count_styles({**side, "time_embed.2.weight": torch.empty(width, width, device="meta")})
        check_alone(side, side[f"{CODEBOOK}.weight"].shape[0])
    except ValueError as error:
        raise ValueError(f"damaged: {error}") from error


def save_style(
    path: str | os.PathLike,
    checkpoint: Checkpoint,
    made_for: MadeFor | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Codebook, MLP, bank and metadata of a DMM checkpoint. made_for: whom they belong to, if not to the checkpoint's UNet. extra: more
    metadata, such as the workflow. Raises ValueError for a checkpoint without styles."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a style file's name must end in .safetensors")
    if not checkpoint.num_styles:
        raise ValueError(f"{path} was not saved: the model has no styles")
    side, plain = split(checkpoint.unet)
    made_for = made_for or MadeFor(weights_sha256(plain), unet_fingerprint(plain))
    said = {key: value for key, value in zip((UNET_DIGEST, UNET_FINGERPRINT), made_for) if value}
    write_weights(path, side, dict(extra or {}) | file_metadata(path, checkpoint) | said)


def recombine(style_path: str | os.PathLike, onto: str | os.PathLike) -> tuple[Checkpoint, list[str]]:
    """The model ``onto`` with the styles, names, recipe and metadata of a style file, and remarks for the user.

    Raises ValueError when the files' widths do not fit.
    """
    if not is_style_file(style_path):
        raise ValueError(f"{style_path} is not a file of styles alone (dmm convert --to style makes them)")
    base, file = load_any(onto), read_style_file(style_path)
    _, plain = split(base.unet)
    try:
        check_fits(plain, file.weights)
    except ValueError as error:
        raise ValueError(f"{style_path} does not fit onto {onto}: {error}") from error
    same = bool(file.made_for.sha256) and file.made_for.sha256 == unet_digest(plain)
    if file.prediction and file.prediction != base.prediction and base.prediction_from != GUESS and not same:
        raise ValueError(
            f"{style_path} holds styles of a model that predicts {file.prediction}, and {onto} predicts {base.prediction}: they do not fit"
        )
    combined = replace(
        base,
        unet=plain | file.weights,
        styles=file.styles,
        recipe=file.recipe,
        metadata=file.metadata,
        prediction=file.prediction or base.prediction,
        zero_snr=file.zero_snr or base.zero_snr,
    )
    remarks = []
    if file.made_for.sha256 and not same:
        remarks.append(f"{onto} is not the UNet that {style_path} was made with, or not in the same precision")
    if base.styles and not same:
        names = ", ".join(style.name for style in base.styles)
        remarks.append(f"the styles that {onto} had ({names}) are not in the result")
    return combined, remarks


def centred_at_base(recipe: Mapping[str, Any]) -> bool:
    """Whether a model's own weights are the base's bit for bit, so that its styles go onto any copy of that: a merge with that centre,
    which may have got or lost styles since, but was never trained."""
    history = recipe.get("history")
    for step in [recipe, *(reversed(history) if isinstance(history, list) else [])]:
        made = step.get("merge") if isinstance(step, dict) else None
        if isinstance(made, dict):
            return made.get("centre") == "base"
        if not isinstance(step, dict) or not (
            isinstance(step.get("growth"), dict) or step.get("deleted") == {"mean moved": False}
        ):
            return False
    return False


def check_fits(plain: Mapping[str, Tensor], side: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the weights of a style side have the sizes of a UNet without styles. Only sizes are read, so tensors may be
    on the meta device."""
    pooled = bool(unet_config_from_state_dict(plain).adm_channels)
    if pooled != any(key.startswith(f"{SDXL_MLP}.") for key in side):
        raise ValueError("one of the two is an SDXL model and the other is not")
    check_finite_styles(side)
    count_styles({**plain, **side})


def unet_digest(unet: Mapping[str, Tensor]) -> str:
    """sha256 of a UNet's tensors without its style side, in the dtypes they have; the same in every layout."""
    return weights_sha256(split(unet)[1])


def unet_fingerprint(plain: Mapping[str, Tensor]) -> str:
    """sha256 of the names, the shapes and some values of a UNet without a style side, rounded to float16: one for a file and what is in
    memory of it in another precision, and quick where ``unet_digest`` reads all."""
    digest = hashlib.sha256()
    for key in sorted(plain):
        values = plain[key].detach().flatten()
        values = values[:: -(-len(values) // SAMPLED)].to("cpu").to(torch.float16)
        digest.update(repr((key, tuple(plain[key].shape))).encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def style_digest(unet: Mapping[str, Tensor]) -> str:
    """sha256 of the style side alone, in the dtypes it has; the same in every layout."""
    return weights_sha256(split(unet)[0])


def split(unet: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(style side, all else) of a UNet."""
    style = {k: v for k, v in unet.items() if k.startswith(STYLE_KEYS)}
    return style, {k: v for k, v in unet.items() if k not in style}


def file_metadata(path: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Metadata as ``save_checkpoint`` writes them, and ``ZERO_SNR`` instead of its tensor. Raises ValueError for what
    cannot be stored."""
    try:
        styles = checkpoint.styles or default_styles(checkpoint.num_styles)
        check_styles(styles, checkpoint.num_styles)
        config = checkpoint.config
        rest = {**checkpoint.metadata, **({ZERO_SNR: "true"} if checkpoint.zero_snr else {})}
        return write_metadata(
            styles, checkpoint.recipe, checkpoint.prediction, rest=rest, config=config, title=path.stem
        )
    except ValueError as error:
        raise ValueError(f"{path} was not saved: {error}") from error
