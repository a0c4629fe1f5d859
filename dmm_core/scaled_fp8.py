"""Weights kept as float8 with a scale beside them, as ComfyUI's quantised files have them, read back as numbers.

A layer's weight is ``<layer>.weight`` (float8) times its scale. Two sets of marks are in use (ComfyUI's ``comfy/utils.py``,
``convert_old_quants``, and ``comfy/ops.py``, ``_load_quantized_module``):

old  ``<prefix>scaled_fp8`` (an empty tensor), ``<layer>.scale_weight``, ``<layer>.scale_input``
new  ``<layer>.comfy_quant`` (JSON as bytes: {"format": "float8_e4m3fn"}) or the header's ``_quantization_metadata``
     ({"layers": {"<layer>": {"format": ...}}}), ``<layer>.weight_scale``, ``<layer>.input_scale``

The scale of the input only makes matrix products faster and is of no use here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

MARK, LAYER_MARK, HEADER_MARK = "scaled_fp8", ".comfy_quant", "_quantization_metadata"
SCALES = (".scale_weight", ".weight_scale")
FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""Formats that are read, by ComfyUI's names."""
LONGEST_MARK = 4096  # bytes of JSON; real ones have 60

_INPUT_SCALES = (".scale_input", ".input_scale")
_OTHER_SCALES = tuple(f".weight_{name}" for name in ("scale_2", "scale_inv", "s_rel", "s_channel", "codebook"))
_ADVICE = "get the model in half precision, or in float8 with one scale for each weight"


def is_mark(key: str, shape: tuple[int, ...]) -> bool:
    """Whether the values of this tensor say how others are to be read; never for a large tensor."""
    return key.endswith(LAYER_MARK) and len(shape) == 1 and shape[0] <= LONGEST_MARK


def dequantised(
    tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """(tensors, metadata, number of weights that had a scale), with those weights in half precision and all marks gone.

    What has no marks comes back as it is, a plain float8 weight too. Tensors on the meta device stay there. Raises ValueError naming
    the key for other formats, marks that are no JSON, weights without their scale or the reverse, and scales that do not fit.
    """
    layers = {layer: f"'{layer}{LAYER_MARK}'" for layer in _layers(tensors, metadata)}
    scales = {key.removesuffix(end): key for end in SCALES for key in tensors if key.endswith(end)}
    if both := sorted(layer for layer in scales if all(layer + end in tensors for end in SCALES)):
        raise ValueError(f"'{both[0]}' has two scales, {' and '.join(SCALES)}: get the file again")
    if alone := sorted(layers.keys() - scales.keys()):
        raise ValueError(
            f"weight '{alone[0]}.weight' is marked as scaled float8 but its scale is missing: get the file again"
        )
    if strange := sorted(key for key in tensors if key.endswith(_OTHER_SCALES)):
        raise ValueError(f"'{strange[0]}' belongs to a quantised format that is not read here: {_ADVICE}")
    marks = {key for key in tensors if key == MARK or key.endswith((f".{MARK}", LAYER_MARK, *SCALES, *_INPUT_SCALES))}
    if not marks and HEADER_MARK not in metadata:
        return tensors, dict(metadata), 0
    out = {key: tensor for key, tensor in tensors.items() if key not in marks}
    for layer, scale_key in scales.items():
        key = f"{layer}.weight"
        if key not in out:
            raise ValueError(f"'{scale_key}' is the scale of a weight that is not in the file: get the file again")
        out[key] = _scaled(key, out[key], tensors[scale_key], scale_key)
    return out, {key: value for key, value in metadata.items() if key != HEADER_MARK}, len(scales)


def in_half(weight: Tensor) -> Tensor:
    """A dequantised weight (float32) as float16; in float32 still where float16's range would lose more than float8 did."""
    if weight.is_meta:
        return weight.half()
    largest = weight.abs().max().item() if weight.numel() else 0.0
    # Below 2**-10 the steps of float16 are no longer small against those of float8, which has 4 digits of its largest value.
    return weight if largest > torch.finfo(torch.float16).max or 0 < largest < 2**-10 else weight.half()


def _scaled(key: str, weight: Tensor, scale: Tensor, scale_key: str) -> Tensor:
    if weight.dtype not in FLOAT8.values():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"'{scale_key}' is the scale of a float8 weight, and '{key}' is {dtype}: {_ADVICE}")
    per_row = tuple(scale.shape) == (weight.shape[0], *[1] * (weight.ndim - 1)) if weight.ndim else False
    if scale.numel() != 1 and not per_row:
        shapes = f"{tuple(scale.shape)} for a weight of shape {tuple(weight.shape)}"
        raise ValueError(f"'{scale_key}' has shape {shapes}, expected one number, or one for each row: {_ADVICE}")
    if not scale.is_floating_point():
        raise ValueError(
            f"'{scale_key}' is {str(scale.dtype).removeprefix('torch.')}, expected floating point: {_ADVICE}"
        )
    if weight.is_meta or scale.is_meta:
        return torch.empty(weight.shape, dtype=torch.float16, device="meta")
    scale = scale.float() if per_row else scale.float().reshape(())
    if not scale.isfinite().all():
        raise ValueError(f"'{scale_key}' holds NaN or infinity: the file is damaged, get it again")
    return in_half(weight.float() * scale)


def _layers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[str]:
    """The layers that new marks name. Raises ValueError for formats that are not read here."""
    for key, tensor in tensors.items():
        if key.endswith(LAYER_MARK):
            if tensor.is_meta or tensor.dtype != torch.uint8 or not is_mark(key, tuple(tensor.shape)):
                raise ValueError(f"'{key}' is no mark of a quantised weight (JSON as bytes): get the file again")
            yield _checked(key.removesuffix(LAYER_MARK), _json(tensor.numpy().tobytes(), f"'{key}'"))
    if HEADER_MARK in metadata:
        layers = _json(metadata[HEADER_MARK], f"metadata '{HEADER_MARK}'").get("layers")
        if not isinstance(layers, dict):
            raise ValueError(f"metadata '{HEADER_MARK}' names no layers: get the file again")
        for layer, said in layers.items():
            yield _checked(layer, said)


def _json(text: bytes | str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({str(error)[:100]}): get the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object: get the file again")
    return value


def _checked(layer: str, said: object) -> str:
    name = said.get("format") if isinstance(said, dict) else None
    if not isinstance(name, str) or name not in FLOAT8:
        raise ValueError(
            f"weight '{layer[:200]}.weight' is quantised as {str(name)[:40]!r}; only {' and '.join(FLOAT8)} are read: {_ADVICE}"
        )
    return layer
