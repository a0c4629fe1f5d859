"""One name for one set of weights, in whatever precision a file stores them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ...dmm_core.vae import IGNORED_PREFIXES

NOT_WEIGHTS = ("position_ids",)
"""Ends of keys that some files carry and others do not: a counter."""


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values rounded to float16: a model saved as fp32 and as fp16 has one hash."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        if key.endswith(NOT_WEIGHTS) or key.startswith(IGNORED_PREFIXES):
            continue
        value = weights[key].detach()
        value = (value.half() if value.is_floating_point() else value).cpu().contiguous()
        digest.update(repr((key, tuple(value.shape))).encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_hash(*parts: object) -> str:
    """sha256 of anything that has a faithful repr (numbers, texts, tuples of them)."""
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names and exact values, in the dtypes they have."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(tensor_sha256(weights[key]).encode())
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    return hashlib.sha256(data.flatten().view(torch.uint8).numpy().data).hexdigest()
