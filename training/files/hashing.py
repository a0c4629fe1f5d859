"""SHA-256 digests of tensors, of weights in any precision, and of plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.vae import IGNORED_PREFIXES

PART = 2**20
"""Elements that are converted at a time."""
NOT_WEIGHTS = ("position_ids",)
"""Ends of keys that some files carry and others do not: a counter."""


def unet_hash(checkpoint: Checkpoint) -> str:
    """``weights_hash`` of the UNet; another one where it has other attention heads than the usual ones."""
    weights, heads = weights_hash(checkpoint.unet), checkpoint.config.num_heads
    return repr_sha256(weights, heads) if heads else weights


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hexadecimal) over names, shapes and values rounded to float16, so that fp32 and fp16 copies of a model
    have one hash.

    Keys that some files carry and others do not are left out (``NOT_WEIGHTS``, the VAE's ``IGNORED_PREFIXES``).
    """
    digest = hashlib.sha256()
    for key in sorted(weights):
        if key.endswith(NOT_WEIGHTS) or key.startswith(IGNORED_PREFIXES):
            continue
        value = weights[key].detach()
        value = (value.half() if value.is_floating_point() else value).cpu().contiguous()
        digest.update(repr((key, tuple(value.shape))).encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def repr_sha256(*values: object) -> str:
    """sha256 (hexadecimal) of the repr of values that have a faithful one: numbers, texts, lists and tuples of them."""
    return hashlib.sha256(repr(values).encode("utf-8", "backslashreplace")).hexdigest()


def weights_sha256(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """sha256 (hexadecimal) over names and exact values, in ``dtype``, or else in the dtypes they have."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(tensor_sha256(weights[key], dtype).encode())
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """sha256 (hexadecimal) of a tensor's bytes in ``dtype``, or else in its own; neither shape nor dtype count."""
    digest = hashlib.sha256()
    # Part by part: what is converted stays in the processor's cache.
    for part in tensor.detach().cpu().contiguous().flatten().split(PART):
        digest.update((part if dtype is None else part.to(dtype)).view(torch.uint8).numpy().data)
    return digest.hexdigest()
