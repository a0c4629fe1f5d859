"""Model files from one layout into another, every weight bit for bit: the functions behind ``dmm convert``.

Three layouts: the single file (``dmm_core.checkpoint``), diffusers' UNet folder (``dmm_core.diffusers_layout``), and a
small file with the style side alone: codebook, MLP and metadata. All of them become a ``Checkpoint`` on the way.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..dmm_core import checkpoint as layout
from ..dmm_core.checkpoint import STYLE_KEYS, UNET_PREFIX, VAE_PREFIX, ZERO_SNR_MARK, Checkpoint, save_checkpoint
from ..dmm_core.diffusers_layout import (
    check_diffusers_config,
    is_diffusers_unet,
    unet_config_to_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
    vae_from_diffusers,
)
from ..dmm_core.files import atomic_write
from ..dmm_core.metadata import architecture, check_styles, default_styles, read_metadata, write_metadata
from ..dmm_core.unet import unet_config_from_state_dict
from .hashing import weights_sha256
from .text import OPEN_CLIP_LAYER, OPEN_CLIP_WHOLE

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
"""A diffusers module's folder."""
ZERO_SNR = "dmm.zero_snr"
UNET_DIGEST = "dmm.unet_sha256"
"""Metadata of the files that cannot say it by a tensor: the schedule, and for which UNet a style side was made."""
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_CONFIG_LIMIT = 1_000_000  # bytes; real ones have 2000


# --- the three ways ---------------------------------------------------------------------------------------------------


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    parts_from: str | os.PathLike | None = None,
    onto: str | os.PathLike | None = None,
    half: bool = False,
) -> list[str]:
    """Write ``source`` as ``to``: "single" or "style" (a file), or "diffusers" (a UNet folder).

    parts_from: full model to take a missing text encoder or VAE from; onto: the model whose UNet gets the styles of
    ``source``, a style file; half: float32 weights as float16. Returns what the user should know, in sentences.
    Raises ValueError naming the file; what was at ``target`` before is then untouched.
    """
    if onto is None:
        if is_style_file(source):
            raise ValueError(f"{source} holds styles without a UNet: name the model that they belong to with --onto")
        checkpoint, notes = load_any(source), []
    else:
        checkpoint, notes = recombine(source, onto)
    if parts_from is not None:
        checkpoint = add_parts(checkpoint, load_any(parts_from))
    if half:
        checkpoint = halved(checkpoint)
    if to == "single":
        save_checkpoint(target, checkpoint)
    elif to == "style":
        save_style(target, checkpoint)
    elif to == "diffusers":
        save_diffusers(target, checkpoint)
        notes += _left_out(checkpoint)
    else:
        raise ValueError(f"cannot convert to {to!r}: expected single, style or diffusers")
    return notes


def load_any(path: str | os.PathLike) -> Checkpoint:
    """Read a single file, a diffusers UNet file, its folder, or a whole diffusers pipeline folder (safetensors only).

    Raises ValueError naming the file. Files without names get "style 0".."style N-1".
    """
    path = Path(path)
    if (path / "unet").is_dir():
        return _load_pipeline(path)
    if path.is_dir():
        return _load_unet(path, _module_files(path))
    with _opened(path) as file:
        keys = file.keys()
    if not is_diffusers_unet(keys):
        return layout.load_checkpoint(path)
    # Beside a file with another name lies another model's config, as in a folder of many models.
    own_folder = path.name.startswith(WEIGHTS.removesuffix(".safetensors"))
    return _load_unet(path.parent if own_folder else None, [path])


def add_parts(checkpoint: Checkpoint, companion: Checkpoint) -> Checkpoint:
    """``checkpoint`` with the text encoder, the VAE and the other tensors of ``companion`` where it has none itself."""
    parts = {name: getattr(checkpoint, name) or getattr(companion, name) for name in ("text", "vae", "other")}
    return replace(checkpoint, **parts)


def halved(checkpoint: Checkpoint) -> Checkpoint:
    """float32 and float64 weights as float16; all that is half or less already, and integers, as they are."""

    def half(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.half() if v.dtype in (torch.float32, torch.float64) else v for k, v in part.items()}

    parts = {name: half(getattr(checkpoint, name)) for name in ("unet", "text", "vae")}
    return replace(checkpoint, **parts)


# --- the style side alone ---------------------------------------------------------------------------------------------


def is_style_file(path: str | os.PathLike) -> bool:
    """Whether a file holds a codebook and no UNet. Raises ValueError for what is no safetensors file; folders: False."""
    path = Path(path)
    if path.is_dir():
        return False
    with _opened(path) as file:
        keys = file.keys()
    return bool(keys) and all(key.startswith(STYLE_KEYS) for key in keys)


def save_style(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Codebook, MLP and metadata of a DMM checkpoint. Raises ValueError for a checkpoint without styles."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a style file's name must end in .safetensors")
    if not checkpoint.num_styles:
        raise ValueError(f"{path} was not saved: the model has no styles")
    style, _ = _split(checkpoint.unet)
    metadata = _metadata(path, checkpoint) | {UNET_DIGEST: unet_digest(checkpoint.unet)}
    _check(path, style)
    with _refusal_explained(path), atomic_write(path) as temporary:
        save_file(layout.storable(style), temporary, metadata=metadata)


def recombine(style_path: str | os.PathLike, onto: str | os.PathLike) -> tuple[Checkpoint, list[str]]:
    """The model ``onto`` with the styles, names, recipe and metadata of a style file, and remarks for the user.

    Raises ValueError when the files' widths do not fit.
    """
    if not is_style_file(style_path):
        raise ValueError(f"{style_path} is not a file of styles alone (dmm convert --to style makes them)")
    base = load_any(onto)
    style, metadata = _tensors(Path(style_path))
    config = unet_config_from_state_dict(base.unet)
    digest, zero_snr = metadata.pop(UNET_DIGEST, None), metadata.pop(ZERO_SNR, None) == "true"
    _, plain = _split(base.unet)
    try:
        unet = plain | style
        num_styles = layout.count_styles(unet)
        if bool(config.adm_channels) != (unet_config_from_state_dict(unet).style_mlp != "add_embedding"):
            raise ValueError("one of the two is an SDXL model and the other is not")
        styles, recipe, prediction, rest = read_metadata(metadata, num_styles)
    except ValueError as error:
        raise ValueError(f"{style_path} does not fit onto {onto}: {error}") from error
    combined = replace(
        base,
        unet=unet,
        styles=styles,
        recipe=recipe,
        metadata=rest,
        prediction=prediction or base.prediction,
        zero_snr=zero_snr or base.zero_snr,
    )
    other = digest is not None and digest != unet_digest(plain)
    remark = f"{onto} is not the UNet that {style_path} was made with, or not in the same precision"
    return combined, [remark] if other else []


def unet_digest(unet: Mapping[str, Tensor]) -> str:
    """Of a UNet's tensors without its style side, in the dtypes they have."""
    return weights_sha256(_split(unet)[1])


def _split(unet: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(style side, all else) of a UNet."""
    style = {k: v for k, v in unet.items() if k.startswith(STYLE_KEYS)}
    return style, {k: v for k, v in unet.items() if k not in style}


# --- the diffusers layout ---------------------------------------------------------------------------------------------


def save_diffusers(folder: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """A UNet folder: the weights, their metadata inside, and config.json. The folder is made where it is missing.

    Raises ValueError for a UNet that diffusers cannot describe; files that were there before are then untouched.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: the diffusers layout needs a folder")
    if not folder.parent.is_dir():
        raise ValueError(f"the folder of {folder} does not exist: create it first")
    try:
        unet = unet_to_diffusers(checkpoint.unet)
        config = unet_config_from_state_dict(checkpoint.unet)
        resolution = architecture(config, checkpoint.prediction)[1]
        described = unet_config_to_diffusers(config, resolution and int(resolution.split("x")[0]) // 8)
    except ValueError as error:
        raise ValueError(f"{folder} was not saved: {error}") from error
    metadata = _metadata(folder, checkpoint)
    _check(folder, unet)
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        # Both are complete before either takes its place.
        with (
            _refusal_explained(folder),
            atomic_write(folder / WEIGHTS) as weights,
            atomic_write(folder / CONFIG) as text,
        ):
            save_file(layout.storable(unet), weights, metadata=metadata)
            text.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _left_out(checkpoint: Checkpoint) -> list[str]:
    names = {"text encoder": checkpoint.text, "VAE": checkpoint.vae, "other tensors": checkpoint.other}
    left = [name for name, part in names.items() if part]
    if not left:
        return []
    return [f"left out of the UNet folder: {', '.join(left)}; on the way back, --parts-from takes them from the source"]


def _load_pipeline(folder: Path) -> Checkpoint:
    extra = {}
    if (folder / "vae").is_dir():
        tensors = _module_tensors(folder / "vae")
        try:
            extra |= {VAE_PREFIX + k: v for k, v in vae_from_diffusers(tensors).items()}
        except ValueError as error:
            raise ValueError(f"{folder / 'vae'}: {error}") from error
    if (folder / "text_encoder").is_dir() or (folder / "text_encoder_2").is_dir():
        extra |= _load_text(folder)
    return _load_unet(folder / "unet", _module_files(folder / "unet"), extra)


def _load_unet(
    folder: Path | None, files: list[Path], extra: Mapping[str, Tensor] = MappingProxyType({})
) -> Checkpoint:
    """folder: where its config.json is; extra: text encoder and VAE under the single file's keys."""
    weights, metadata = _merged(files)
    described = {}
    if folder is not None:
        metadata = metadata if "dmm.prediction" in metadata else {**metadata, **_schedule(folder)}
        described = _json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    try:
        unet = unet_from_diffusers(weights)
        if described:
            check_diffusers_config(described, unet_config_from_state_dict(unet))
        marks = {ZERO_SNR_MARK: torch.empty(0)} if metadata.pop(ZERO_SNR, None) == "true" else {}
        return layout.assemble({**{UNET_PREFIX + k: v for k, v in unet.items()}, **extra, **marks}, metadata)
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from error


def _schedule(unet_folder: Path) -> dict[str, str]:
    """What a pipeline's scheduler says about its UNet, as metadata; empty for a UNet folder on its own."""
    path = unet_folder.parent / "scheduler" / "scheduler_config.json"
    if unet_folder.name != "unet" or not path.is_file():
        return {}
    config = _json(path)
    kind = config.get("prediction_type", "epsilon")
    if not isinstance(kind, str) or kind not in PREDICTIONS:
        raise ValueError(f"{path}: prediction_type {kind!r} is not supported, only {sorted(PREDICTIONS)}")
    zero_snr = {ZERO_SNR: "true"} if config.get("rescale_betas_zero_snr") else {}
    return {"dmm.prediction": PREDICTIONS[kind], **zero_snr}


def _load_text(folder: Path) -> dict[str, Tensor]:
    """CLIP as transformers saves it -> the keys of an SD1.x, SD2.x or SDXL single file.

    One encoder with OpenAI's activation is SD1.x's, one with OpenCLIP's SD2.x's; two are SDXL's.
    """
    second = folder / "text_encoder_2"
    if not second.is_dir():
        if _activation(folder / "text_encoder") == "quick_gelu":
            return _clip(folder / "text_encoder", "cond_stage_model.transformer.")
        return _open_clip(folder / "text_encoder", "cond_stage_model.model.")
    first = {}
    if (folder / "text_encoder").is_dir():  # the refiner has only the second
        first = _clip(folder / "text_encoder", "conditioner.embedders.0.transformer.")
    return first | _open_clip(second, f"conditioner.embedders.{int(bool(first))}.model.")


def _activation(folder: Path) -> str:
    return _json(folder / CONFIG).get("hidden_act", "quick_gelu")  # transformers' own default


def _clip(folder: Path, prefix: str) -> dict[str, Tensor]:
    tensors = _module_tensors(folder)
    if not any(k.removeprefix("text_model.") == "embeddings.token_embedding.weight" for k in tensors):
        raise ValueError(f"{folder}: not a CLIP text encoder: 'embeddings.token_embedding.weight' is missing")
    bare = ("text_model.", "text_projection.")
    return {prefix + (k if k.startswith(bare) else f"text_model.{k}"): v for k, v in tensors.items()}


def _open_clip(folder: Path, prefix: str) -> dict[str, Tensor]:
    try:
        return {prefix + k: v for k, v in to_open_clip(_module_tensors(folder)).items()}
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def to_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' key names -> OpenCLIP's, the inverse of ``text.from_open_clip``; query, key and value as one.

    Raises ValueError for keys that a CLIP text encoder does not have.
    """
    weights = {k.removeprefix("text_model."): v for k, v in weights.items() if not k.endswith("position_ids")}
    names, whole = ({ours: theirs for theirs, ours in table.items()} for table in (OPEN_CLIP_LAYER, OPEN_CLIP_WHOLE))
    missing, out = sorted(whole.keys() - weights.keys()), {}
    if missing:
        raise ValueError(f"not a CLIP text encoder: {missing} are missing")
    for key, weight in weights.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key in whole:
            out[whole[key]] = weight
        elif key == "text_projection.weight":
            out["text_projection"] = weight.T.contiguous()
        elif match and match[2] in names:
            out[f"transformer.resblocks.{match[1]}.{names[match[2]]}.{match[3]}"] = weight
        elif match and match[2] == "self_attn.q_proj":
            others = [key.replace("q_proj", f"{part}_proj") for part in "kv"]
            if not all(k in weights for k in others):
                raise ValueError(f"not a CLIP text encoder: {others} are missing")
            parts = torch.cat([weight, *(weights[k] for k in others)])
            out[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = parts
        elif not match or match[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise ValueError(f"not a CLIP text encoder: key '{key}'")
    return out


# --- files ------------------------------------------------------------------------------------------------------------


def _module_tensors(folder: Path) -> dict[str, Tensor]:
    return _merged(_module_files(folder))[0]


def _module_files(folder: Path) -> list[Path]:
    """The safetensors file of a diffusers or transformers module's folder, or all its parts.

    The full-precision file where there are variants (``.fp16.``). Raises ValueError when there is none.
    """
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors" and not p.name.startswith("."))
    for plain in (WEIGHTS, "model.safetensors"):
        if plain in names:
            return [folder / plain]
    parts = [(m, n) for n in names if (m := re.search(r"-(\d+)-of-(\d+)\.safetensors$", n))]
    if parts:
        # One series only: a folder may hold the parts of a variant too.
        stems = sorted({n[: m.start()] for m, n in parts}, key=len)
        chosen = [(m, n) for m, n in parts if n[: m.start()] == stems[0]]
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


def _merged(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = {}, {}
    for path in files:
        more, said = _tensors(path)
        if tensors.keys() & more.keys():
            raise ValueError(f"{path} repeats keys of the other parts beside it: get the folder again")
        tensors |= more
        metadata |= said
    return tensors, metadata


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as file:
        keys = file.keys()
        try:
            return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(f"{path} {layout.diagnosis(path, error)}") from error


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise ValueError(f"{path} {layout.diagnosis(path, error)}") from error


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file beside the weights. Raises ValueError naming it."""
    try:
        with path.open("rb") as file:
            text = file.read(_CONFIG_LIMIT + 1)
        value = json.loads(text) if len(text) <= _CONFIG_LIMIT else None
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: get the folder again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): get it again") from error
    if isinstance(value, dict):
        return value
    raise ValueError(f"{path} is not a configuration (a JSON object): get it again")


def _metadata(path: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """As ``save_checkpoint`` writes it."""
    try:
        styles = checkpoint.styles or default_styles(checkpoint.num_styles)
        check_styles(styles, checkpoint.num_styles)
        config = unet_config_from_state_dict(checkpoint.unet)
        rest = {**checkpoint.metadata, **({ZERO_SNR: "true"} if checkpoint.zero_snr else {})}
        return write_metadata(styles, checkpoint.recipe, checkpoint.prediction, rest, config, path.stem)
    except ValueError as error:
        raise ValueError(f"{path} was not saved: {error}") from error


def _check(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        layout.check_finite(tensors)
    except ValueError as error:
        raise ValueError(f"{path} was not saved: {error}") from error


@contextmanager
def _refusal_explained(path: Path) -> Iterator[None]:
    """Turns what a disk or safetensors says about a failed write into an OSError with a next step."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({error}); what was there before is untouched. "
            "Free some space, close programs that use the file, or choose another place"
        ) from error
