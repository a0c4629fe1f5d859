"""Reads any model file or folder as a ``Checkpoint``, for every command and node.

The single file (``dmm_core.checkpoint``), diffusers' UNet as a file or a folder (``dmm_core.diffusers_layout``), and
diffusers' pipeline folder with text encoders and VAE. Only safetensors is read, with the bounds of
``dmm_core.weights_file``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...dmm_core.checkpoint import (
    UNET_PREFIX,
    VAE_PREFIX,
    ZERO_SNR_MARK,
    Checkpoint,
    assemble,
    is_decisive,
    on_meta,
    read_checkpoint,
)
from ...dmm_core.diffusers_layout import (
    check_diffusers_config,
    is_diffusers_unet,
    unet_from_diffusers,
    vae_from_diffusers,
)
from ...dmm_core.files import file_sha256
from ...dmm_core.unet import unet_config_from_state_dict
from ...dmm_core.weights_file import read_keys, read_weights
from .clip_layout import to_single_file
from .model_settings import with_yaml

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
"""A diffusers module's folder."""
UNET_FILE = re.compile(r"diffusion_pytorch_model[^/\\]*\.safetensors")
"""Name of a file whose config lies beside it, in any variant (``.fp16``) or part (``-00001-of-00002``)."""
ZERO_SNR = "dmm.zero_snr"
"""Metadata key of diffusers and style files: "true" for a noise schedule that ends in pure noise. Single files have a
tensor for it."""
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
SINGLE, UNET, PIPELINE = "single file", "UNet in diffusers' layout", "pipeline folder of diffusers"
"""The layouts, in words."""

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_CONFIG_LIMIT = 1_000_000  # bytes; real ones have 2000
_MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")


def load_any(path: str | os.PathLike) -> Checkpoint:
    """Read a single file, a diffusers UNet file, its folder, or a diffusers pipeline folder (safetensors only).

    Raises ValueError naming the file. Files without names get "style 0".."style N-1".
    """
    return with_yaml(_read(Path(path), header_only=False), Path(path))


def load_any_info(path: str | os.PathLike) -> Checkpoint:
    """As ``load_any``, but every tensor is on the meta device: sizes and dtypes without values."""
    return with_yaml(on_meta(_read(Path(path), header_only=True)), Path(path))


def layout_of(path: str | os.PathLike) -> str:
    """SINGLE, UNET or PIPELINE, from names alone. Raises ValueError for what is no safetensors file; nothing else is
    checked."""
    path = Path(path)
    if path.is_dir():
        return PIPELINE if (path / "unet").is_dir() else UNET
    return UNET if is_diffusers_unet(read_keys(path)) else SINGLE


def weight_files(path: str | os.PathLike) -> list[Path]:
    """The safetensors files that ``load_any`` reads. Raises ValueError for a folder without any."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    if not (path / "unet").is_dir():
        return _module_files(path)
    return [file for name in _MODULES if (path / name).is_dir() for file in _module_files(path / name)]


def change_stamp(path: str | os.PathLike) -> tuple[tuple[str, int, int], ...]:
    """Names, times and sizes of the files that ``load_any`` reads, which differ once one has changed. Raises OSError
    when one is gone."""
    path = Path(path)
    files = [path]
    if path.suffix == ".safetensors" and (beside := path.with_suffix(".yaml")).is_file():
        files.append(beside)
    if path.is_dir():
        found = [*path.glob("*"), *path.glob("*/*")]
        files += sorted(p for p in found if p.suffix in (".safetensors", ".json") and p.is_file())
    return tuple((str(file), (status := file.stat()).st_mtime_ns, status.st_size) for file in files)


def model_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file; of a folder, that of the lines "<sha256>  <path in the folder>" of its weights' files, as
    sha256sum prints them."""
    path = Path(path)
    if not path.is_dir():
        return file_sha256(path)
    lines = sorted(f"{file_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in weight_files(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def add_parts(checkpoint: Checkpoint, companion: Checkpoint) -> Checkpoint:
    """``checkpoint`` with the text encoder, the VAE and the other tensors of ``companion`` where it has none itself."""
    text, clip_skip = checkpoint.encoder(companion)
    return replace(
        checkpoint,
        text=text,
        clip_skip=clip_skip,
        vae=checkpoint.vae or companion.vae,
        other=checkpoint.other or companion.other,
    )


# --- the layouts ------------------------------------------------------------------------------------------------------


def _read(path: Path, header_only: bool) -> Checkpoint:
    layout = layout_of(path)
    if layout == PIPELINE:
        return _read_pipeline(path, header_only)
    if path.is_dir():
        return _read_unet(path, _module_files(path), header_only)
    if layout == SINGLE:
        return read_checkpoint(path, header_only)
    # Beside a file with another name lies another model's config, as in a folder of many models.
    return _read_unet(path.parent if UNET_FILE.fullmatch(path.name) else None, [path], header_only)


def _read_pipeline(folder: Path, header_only: bool) -> Checkpoint:
    extra: dict[str, Tensor] = {}
    if (folder / "vae").is_dir():
        tensors = _module_weights(folder / "vae", header_only)
        try:
            extra |= {VAE_PREFIX + k: v for k, v in vae_from_diffusers(tensors).items()}
        except ValueError as error:
            raise ValueError(f"{folder / 'vae'}: {error}") from error
    encoders = [folder / name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()]
    for encoder in encoders:
        second, alone = encoder.name == "text_encoder_2", len(encoders) == 1
        # The only thing that tells SD2.x's encoder from SD1.x's; transformers' own default is OpenAI's.
        open_clip = alone and not second and _json(encoder / CONFIG).get("hidden_act", "quick_gelu") != "quick_gelu"
        try:
            weights = _module_weights(encoder, header_only)
            extra |= to_single_file(weights, second=second, alone=alone, open_clip=open_clip)
        except ValueError as error:
            raise ValueError(f"{encoder}: {error}") from error
    return _read_unet(folder / "unet", _module_files(folder / "unet"), header_only, extra)


def _read_unet(
    folder: Path | None, files: list[Path], header_only: bool, extra: Mapping[str, Tensor] = MappingProxyType({})
) -> Checkpoint:
    """folder: where its config.json is; extra: text encoder and VAE under the single file's keys."""
    weights, metadata = _merged(files, header_only)
    described = {}
    if folder is not None:
        metadata = metadata if "dmm.prediction" in metadata else {**metadata, **_schedule(folder)}
        described = _json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    try:
        unet = unet_from_diffusers(weights)
        if described:
            check_diffusers_config(described, unet_config_from_state_dict(unet))
        marks = {ZERO_SNR_MARK: torch.empty(0)} if metadata.pop(ZERO_SNR, None) == "true" else {}
        return assemble({**{UNET_PREFIX + k: v for k, v in unet.items()}, **extra, **marks}, metadata)
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from error


def _schedule(unet_folder: Path) -> dict[str, str]:
    """Prediction and zero terminal SNR by a pipeline's scheduler, as metadata; empty for a UNet folder without a
    pipeline."""
    path = unet_folder.parent / "scheduler" / "scheduler_config.json"
    if unet_folder.name != "unet" or not path.is_file():
        return {}
    config = _json(path)
    prediction = config.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        raise ValueError(
            f"{path}: prediction_type {str(prediction)[:100]!r} is not supported, only {sorted(PREDICTIONS)}"
        )
    zero_snr = {ZERO_SNR: "true"} if config.get("rescale_betas_zero_snr") else {}
    return {"dmm.prediction": PREDICTIONS[prediction], **zero_snr}


# --- folders ----------------------------------------------------------------------------------------------------------


def _module_weights(folder: Path, header_only: bool) -> dict[str, Tensor]:
    return _merged(_module_files(folder), header_only)[0]


def _module_files(folder: Path) -> list[Path]:
    """The safetensors file of a diffusers or transformers module's folder, or all files that its weights are split
    over.

    The full-precision file where there are variants (``.fp16.``). Raises ValueError when there is none.
    """
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors" and not p.name.startswith("."))
    for plain in (WEIGHTS, "model.safetensors"):
        if plain in names:
            return [folder / plain]
    split = [(m, n) for n in names if (m := re.search(r"-(\d{1,9})-of-(\d{1,9})\.safetensors$", n))]
    if split:
        # One series only: a folder may hold the files of a variant too.
        stems = sorted({n[: m.start()] for m, n in split}, key=len)
        chosen = [(m, n) for m, n in split if n[: m.start()] == stems[0]]
        if len(chosen) != int(chosen[0][0][2]):
            raise ValueError(
                f"{folder}: {len(chosen)} of {int(chosen[0][0][2])} parts of the weights are there: get the rest"
            )
        return [folder / n for _, n in chosen]
    if len(names) == 1:
        return [folder / names[0]]
    if names:
        raise ValueError(f"{folder} holds several models ({', '.join(names[:4])}): give the file itself")
    if any(p.suffix in _PICKLES for p in folder.iterdir()):
        raise ValueError(
            f"{folder} holds its weights only as a pickle. Pickles can run code and are never opened here: "
            "get the .safetensors version of this model"
        )
    raise ValueError(f"{folder} holds no .safetensors file: give a checkpoint file, a UNet folder or a pipeline folder")


def _merged(files: list[Path], header_only: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of files that hold one module's weights together. Raises ValueError for a key that is in two
    of them."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in files:
        more, said = read_weights(path, *([is_decisive] if header_only else []))
        if tensors.keys() & more.keys():
            raise ValueError(f"{path} repeats keys of the other parts beside it: get the folder again")
        tensors |= more
        metadata |= said
    return tensors, metadata


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file beside the weights. Raises ValueError naming it."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} does not exist: get the folder again")
    try:
        with path.open("rb") as file:
            text = file.read(_CONFIG_LIMIT + 1)
        value = json.loads(text) if len(text) <= _CONFIG_LIMIT else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): get it again") from error
    if isinstance(value, dict):
        return value
    raise ValueError(f"{path} is not a configuration (a JSON object): get it again")
