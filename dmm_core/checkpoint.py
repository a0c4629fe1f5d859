"""Reading and writing checkpoints: one safetensors file with UNet, styles, and text encoder and VAE where it has them.

The layout is the single file that ComfyUI users know. A DMM UNet (Song et al., arXiv:2504.12364) has two more modules:
the codebook ``model_embedding`` [N, D] and the style MLP. Style names, the recipe and so on are metadata.
Only safetensors is ever read: a pickle can run code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import atomic_write
from .metadata import StyleInfo, check_styles, default_styles, modelspec_prediction, read_metadata, write_metadata
from .style import CODEBOOK, MLP_NAMES
from .unet import unet_config_from_state_dict
from .vocabulary import IDS, TABLE, compact_vocabulary, expand_vocabulary

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.")
STYLE_KEYS = tuple(f"{name}." for name in (CODEBOOK, *MLP_NAMES))
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
"""Empty tensors by which ComfyUI marks v-prediction and a noise schedule rescaled to end in pure noise."""

_SD2_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_HEADER_LIMIT = 100_000_000  # bytes, safetensors' own


@dataclass
class Checkpoint:
    """The content of a file; tensors keep the file's dtypes.

    unet: keys without prefix, styles included; text: keys as in the file (``cond_stage_model.*`` or ``conditioner.*``);
    vae: keys without ``first_stage_model.``; other: every tensor that is none of these, keys as in the file;
    styles: one per style of the weights; recipe: how it was made; metadata: all other metadata, verbatim;
    prediction: "eps" or "v"; zero_snr: the model was trained on the schedule that ends in pure noise.
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
    return _read(path, header_only=False)


def read_info(path: str | os.PathLike) -> Checkpoint:
    """The same as ``load_checkpoint``, but with the weights left on disk: every tensor is on the meta device."""
    checkpoint = _read(path, header_only=True)
    for part in (checkpoint.unet, checkpoint.text, checkpoint.vae, checkpoint.other):
        part.update({key: tensor.to("meta") for key, tensor in part.items()})
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
        config = unet_config_from_state_dict(checkpoint.unet)
        rest = {**checkpoint.metadata, **(extra or {})}
        metadata = write_metadata(styles, checkpoint.recipe, checkpoint.prediction, rest, config, path.stem)
        tensors = checkpoint.tensors
        check_finite(tensors)
        marks = {V_MARK: checkpoint.prediction == "v", ZERO_SNR_MARK: checkpoint.zero_snr}
        tensors.update({key: torch.empty(0) for key, on in marks.items() if on})
        tensors = storable(compact_vocabulary(tensors))
    except ValueError as error:
        raise ValueError(f"{path} was not saved: {error}") from error
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({error}); what was there before is untouched. "
            "Free some space, close programs that use the file, or choose another place"
        ) from error


def _read(path: str | os.PathLike, header_only: bool) -> Checkpoint:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the .safetensors file itself")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, keys = file.metadata() or {}, list(file.keys())
            # The few tensors whose values decide how the rest is read.
            wanted = {V_MARK, ZERO_SNR_MARK, _SD2_BIAS, UNET_PREFIX + _SD2_BIAS, *((IDS, TABLE) if IDS in keys else ())}
            tensors = {
                key: _on_meta(file.get_slice(key)) if header_only and key not in wanted else file.get_tensor(key)
                for key in keys
            }
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise ValueError(f"{path} {diagnosis(path, error)}") from error
    try:
        return assemble(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def assemble(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    edm = [key for key in tensors if key in ("edm_mean", "edm_std") or key.startswith("edm_vpred.")]
    if edm:
        raise ValueError(f"this is an EDM model (key '{edm[0]}'); only eps- and v-prediction models are supported")
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
    styles, recipe, prediction, rest = read_metadata(metadata, count_styles(unet))
    if prediction is None:
        prediction = "v" if v_mark else modelspec_prediction(rest) or _sd2_prediction(unet)
    return Checkpoint(
        unet, expand_vocabulary(text), vae, styles, recipe, rest, prediction, zero_snr=zero_snr, other=other
    )


def count_styles(unet: Mapping[str, Tensor]) -> int:
    """N, after checking that codebook and MLP are complete and as wide as the time embedding; 0 without styles."""
    style = {key: tensor for key, tensor in unet.items() if key.startswith(STYLE_KEYS)}
    if not style:
        return 0
    mlps = [name for name in MLP_NAMES if any(key.startswith(f"{name}.") for key in style)]
    if len(mlps) > 1:
        raise ValueError(f"two style MLPs ({', '.join(mlps)}), expected one (SDXL's own add_embedding is label_emb)")
    time_embed = unet.get("time_embed.2.weight")
    codebook = style.get(f"{CODEBOOK}.weight")
    if time_embed is None or time_embed.ndim != 2 or codebook is None or codebook.ndim != 2 or not codebook.shape[0]:
        raise ValueError(f"style weights without a codebook '{CODEBOOK}.weight' [styles, width], or without time_embed")
    dim, mlp = time_embed.shape[0], (mlps or MLP_NAMES)[0]
    wanted = {f"{CODEBOOK}.weight": (codebook.shape[0], dim)}
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
    return codebook.shape[0]


def _sd2_prediction(unet: Mapping[str, Tensor]) -> str:
    """SD2's two releases differ only in their weights; ComfyUI tells them by the spread of one bias, and so must we."""
    bias, key = unet.get(_SD2_BIAS), _SD2_BIAS.replace("norm1.bias", "attn2.to_k.weight")
    if bias is None or key not in unet or unet[key].shape[-1] != 1024 or unet["input_blocks.0.0.weight"].shape[1] != 4:
        return "eps"
    return "v" if bias.float().std(unbiased=False) > 0.09 else "eps"


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            values = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no isfinite for float8
            if not values.isfinite().all():
                raise ValueError(f"weight '{key}' holds NaN or infinity: the training diverged, or a cast overflowed")


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two of them in one storage: what safetensors can write."""
    stored, storages = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages and tensor.numel():
            tensor = tensor.clone()
        storages.add(storage)
        stored[key] = tensor
    return stored


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


def _on_meta(entry) -> Tensor:
    """A tensor of a header entry's shape and dtype, without the data."""
    name = entry.get_dtype()
    if name not in _DTYPES:
        raise SafetensorError(f"dtype {name}")
    return torch.empty(entry.get_shape(), dtype=getattr(torch, _DTYPES[name]), device="meta")


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
    keys = list(keys)
    for part, guess in _LOOKALIKES.items():
        if any(part in key for key in keys):
            return guess
    return "choose a Stable Diffusion 1.x, 2.x or XL checkpoint"


def diagnosis(path: Path, error: SafetensorError) -> str:
    """Why safetensors refused a file, in the user's words: what it is instead, or how much of it is missing."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")  # of the header that follows
        if size == 0:
            return "is empty: download or copy it again"
        if start.startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
        if size < 8 or length > _HEADER_LIMIT:
            if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
                return (
                    "is a pickle (a .ckpt or .pt file), whatever its name says. Pickles can run code and are never "
                    "opened here: get the .safetensors version of this model, or convert it"
                )
            if start.lstrip().startswith(b"<"):
                return "is a web page, not a model: the download failed or needed a login; download it again"
            return "is not a safetensors file: choose a .safetensors checkpoint"
        if 8 + length > size:
            return f"is cut off inside its header ({size} bytes): download or copy it again"
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            end = 8 + length + max(entry["data_offsets"][1] for k, entry in header.items() if k != "__metadata__")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            end = 0
        if end > size:
            return f"is cut off: {size} of {end} bytes are there; download or copy it again"
        return f"is a damaged safetensors file ({error}): download or copy it again"
