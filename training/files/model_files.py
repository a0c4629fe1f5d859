"""Reads any model file or folder as a ``Checkpoint``, for every command and node.

The single file (``dmm_core.checkpoint``), diffusers' UNet as a file or a folder (``dmm_core.diffusers_layout``), and
diffusers' pipeline folder with text encoders and VAE. Only safetensors is read, with the bounds of
``dmm_core.weights_file``.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
    heads_in_config,
    is_diffusers_unet,
    unet_from_diffusers,
    vae_from_diffusers,
)
from ...dmm_core.files import file_sha256
from ...dmm_core.heads import HEADS
from ...dmm_core.scaled_fp8 import dequantised
from ...dmm_core.unet import unet_config_from_state_dict, with_heads
from ...dmm_core.weights_file import read_keys, read_weights
from .clip_layout import to_single_file
from .model_settings import with_yaml
from .remembered import Stamps, remembered, stamps

logger = logging.getLogger(__name__)

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

VARIANTS = ("", "fp32", "ema", "fp16", "bf16", "non_ema", "non_ema.fp16")
"""Of the weights of one module, in the order in which they are taken where there are several."""
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})(?P<behind>(?:\.\w+)*)\.safetensors")
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
    return UNET if is_diffusers_unet([key for file in _series_of(path) for key in read_keys(file)]) else SINGLE


def weight_files(path: str | os.PathLike) -> list[Path]:
    """The safetensors files that ``load_any`` reads. Raises ValueError for a folder without any, and for a part of weights whose others are
    missing."""
    path = Path(path)
    if not path.is_dir():
        return _series_of(path)
    if not (path / "unet").is_dir():
        return _module_files(path)
    return [file for name in _MODULES if (path / name).is_dir() for file in _module_files(path / name)]


def weight_stamps(path: str | os.PathLike) -> Stamps | None:
    """``remembered.stamps`` of the files that ``load_any`` reads weights from; None where it could not read them."""
    try:
        return stamps(weight_files(path))
    except (ValueError, OSError):
        return None


def change_stamp(path: str | os.PathLike) -> tuple[tuple[str, int, int], ...]:
    """Names, times and sizes of the files that ``load_any`` reads, which differ once one has changed. Raises OSError
    when one is gone."""
    path = Path(path)
    files = _series_of(path) if path.exists() and not path.is_dir() else [path]
    if path.suffix == ".safetensors" and (beside := path.with_suffix(".yaml")).is_file():
        files.append(beside)
    if UNET_FILE.fullmatch(path.name) and (beside := path.with_name(CONFIG)).is_file():
        files.append(beside)
    if path.is_dir():
        found = [*path.glob("*"), *path.glob("*/*")]
        files += sorted(p for p in found if p.suffix in (".safetensors", ".json") and p.is_file())
    return tuple((str(file), (status := file.stat()).st_mtime_ns, status.st_size) for file in files)


def model_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file; of a folder, or of weights in several files, that of the lines "<sha256>  <path in the folder>" of these files, as
    sha256sum prints them."""
    path = Path(path)
    files = weight_files(path)
    if files == [path]:
        return _sha256(path)
    folder = path if path.is_dir() else path.parent
    lines = sorted(f"{_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return remembered("sha256 of a file", stamps([path]), lambda: file_sha256(path))


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
    files = _series_of(path)
    if layout == UNET:
        # Beside a file with another name lies another model's config, as in a folder of many models.
        return _read_unet(path.parent if UNET_FILE.fullmatch(path.name) else None, files, header_only)
    return read_checkpoint(path, header_only) if files == [path] else _read_parts(files, header_only)


def _read_parts(files: list[Path], header_only: bool) -> Checkpoint:
    """A single file's content that lies in several files."""
    tensors, metadata, scaled = _merged(files, header_only)
    try:
        return replace(assemble(tensors, metadata), scaled_fp8=scaled)
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from error


def _read_pipeline(folder: Path, header_only: bool) -> Checkpoint:
    extra: dict[str, Tensor] = {}
    scaled = 0
    if (folder / "vae").is_dir():
        tensors, _, scaled = _merged(_module_files(folder / "vae"), header_only)
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
            weights, _, more = _merged(_module_files(encoder), header_only)
            scaled += more
            extra |= to_single_file(weights, second=second, alone=alone, open_clip=open_clip)
        except ValueError as error:
            raise ValueError(f"{encoder}: {error}") from error
    unet = _read_unet(folder / "unet", _module_files(folder / "unet"), header_only, extra)
    return replace(unet, scaled_fp8=unet.scaled_fp8 + scaled)


def _read_unet(
    folder: Path | None, files: list[Path], header_only: bool, extra: Mapping[str, Tensor] = MappingProxyType({})
) -> Checkpoint:
    """folder: where its config.json is; extra: text encoder and VAE under the single file's keys."""
    weights, metadata, scaled = _merged(files, header_only)
    described = {}
    if folder is not None:
        metadata = metadata if "dmm.prediction" in metadata else {**metadata, **_schedule(folder)}
        described = _json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    try:
        unet = unet_from_diffusers(weights)
        if described:
            config = unet_config_from_state_dict(unet)
            check_diffusers_config(described, config)
            heads = heads_in_config(described, config)
        marks = {ZERO_SNR_MARK: torch.empty(0)} if metadata.pop(ZERO_SNR, None) == "true" else {}
        whole = assemble({**{UNET_PREFIX + k: v for k, v in unet.items()}, **extra, **marks}, metadata)
        if described and whole.heads_from != HEADS:
            whole = replace(whole, heads=heads, heads_from=CONFIG)
        elif described and with_heads(config, heads) != with_heads(config, whole.heads):
            raise ValueError(
                f"its config.json says {heads} attention heads, and its metadata {whole.heads}: get it again"
            )
        return replace(whole, scaled_fp8=scaled)
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


def _module_files(folder: Path) -> list[Path]:
    """The safetensors file of a diffusers or transformers module's folder, or all files that its weights are split over.

    Of several variants (``.fp16.``) the first of ``VARIANTS``, complete ones before others. An index beside the files is not needed and not
    read. Raises ValueError when there is none.
    """
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors" and not p.name.startswith("."))
    for plain in (WEIGHTS, "model.safetensors"):
        if plain in names:
            return [folder / plain]
    if not names and any(p.suffix in _PICKLES for p in folder.iterdir()):
        raise ValueError(
            f"{folder} holds its weights only as a pickle. Pickles can run code and are never opened here: "
            "get the .safetensors version of this model"
        )
    if not names:
        raise ValueError(
            f"{folder} holds no .safetensors file: give a checkpoint file, a UNet folder or a pipeline folder"
        )
    series: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        series.setdefault(_name_parts(name), []).append(name)
    if len(series) > 1 and (
        len({base for base, _, _ in series}) > 1 or any(variant not in VARIANTS for _, variant, _ in series)
    ):
        raise ValueError(f"{folder} holds several models ({', '.join(names[:4])}): give the file itself")

    def rank(key: tuple[str, str, str]) -> tuple[bool, int, int]:
        variant = VARIANTS.index(key[1]) if key[1] in VARIANTS else 0
        return not _is_complete(series[key], key[2]), variant, len(key[2])

    chosen = min(series, key=rank)
    if not _is_complete(series[chosen], chosen[2]):
        raise ValueError(_missing(folder, series[chosen], chosen[2]))
    if len(series) > 1:
        logger.info("%s: of several variants of the weights, '%s' is read", folder, series[chosen][0])
    return [folder / name for name in series[chosen]]


def _series_of(path: Path) -> list[Path]:
    """The files that a file's weights are split over, by its name; itself alone for most. Raises ValueError when one is missing."""
    key = _name_parts(path.name)
    if not key[2] or not path.is_file():
        return [path]
    others = (p for p in path.parent.iterdir() if p.suffix == ".safetensors" and _name_parts(p.name) == key)
    names = sorted(p.name for p in others)
    if not _is_complete(names, key[2]):
        raise ValueError(_missing(path.parent, names, key[2]))
    return [path.parent / name for name in names]


def _name_parts(name: str) -> tuple[str, str, str]:
    """(name, variant, number of files) of a file of weights, "" for what it does not say: ("model", "fp16", "00002").

    A variant stands before the numbers (``model.fp16-00001-of-00002.safetensors``) or behind them.
    """
    match = _PART.fullmatch(name)
    stem = match["stem"] + match["behind"] if match else name.removesuffix(".safetensors")
    base, _, variant = stem.partition(".")
    if match:
        return base, variant, match["count"]
    return (base, variant, "") if variant in VARIANTS else (stem, "", "")


def _is_complete(names: list[str], count: str) -> bool:
    """Whether the files of one series are all there; count: how many there should be, "" for a file by itself."""
    numbers = {int(match["number"]) for name in names if (match := _PART.fullmatch(name))}
    return not count or (len(names) == int(count) and numbers == set(range(1, len(names) + 1)))


def _missing(folder: Path, names: list[str], count: str) -> str:
    return f"{folder}: {len(names)} of {int(count)} parts of the weights are there ({names[0]}): get the rest"


def _merged(files: list[Path], header_only: bool) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Tensors and metadata of files that hold one module's weights together, and how many of them were scaled float8. Raises ValueError
    for a key that is in two of them."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in files:
        more, said = read_weights(path, *([is_decisive] if header_only else []))
        if tensors.keys() & more.keys():
            raise ValueError(f"{path} repeats keys of the other parts beside it: get the folder again")
        tensors |= more
        metadata |= said
    try:  # a scale may lie in another file than its weight
        return dequantised(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from error


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
