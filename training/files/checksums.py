"""safetensors files that say of each of their tensors what it was when it was written, so that damage is found when it is read.

The digests are metadata: older versions of this pack, and everything else that reads safetensors, read such files too. Files without them
are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...dmm_core.files import atomic_write
from ...dmm_core.weights_file import read_weights, refusal_explained
from .hashing import repr_sha256, tensor_sha256

DIGEST = "dmm.digest"
"""Metadata, as JSON: {"tensors": {name: ``DIGITS`` of the sha256 of its bytes}, "header": sha256 of all else that the header says}."""
DIGITS = 32
"""Hexadecimal digits: 128 bits."""
ROW_DIGITS = 16
"""The same for a row of a tensor, of which there are many."""
THREADS = 8
"""At most. hashlib works on several tensors at once: it lets go of Python's lock."""


def write_checked(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file completely or not at all, with its digests. Raises OSError naming the file where the disk refuses."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with refusal_explained(path), atomic_write(path) as temporary:
        save_file(tensors, temporary, with_digest(tensors, metadata or {}))


def with_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` and, under ``DIGEST``, what is needed to find damage."""
    digests = tensor_digests(tensors)
    said = {"tensors": digests, "header": header_digest(tensors, metadata, digests)}
    return {**metadata, DIGEST: json.dumps(said)}


def read_checked(path: Path, header_only: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, as they were written. header_only: tensors on the meta device; then only the header is known to be
    sound. Raises ValueError naming what is damaged; what ``read_weights`` raises is passed on."""
    tensors, metadata = read_weights(path, *([lambda key, shape: False] if header_only else []))
    text = metadata.pop(DIGEST, None)
    if text is None:  # written before there were digests, or by others
        return tensors, metadata
    try:
        said: dict[str, Any] = json.loads(text)
        digests, header = dict(said["tensors"]), said["header"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged in its header ({error!r})") from error
    if header != header_digest(tensors, metadata, digests):
        raise ValueError(f"{path} is damaged in its header")
    if not header_only:
        now = tensor_digests(tensors)
        bad = sorted(key for key in now if now[key] != digests[key])
        if bad:
            raise ValueError(
                f"{path} is damaged: {len(bad)} of its {len(now)} tensors are not as they were written, such as '{bad[0]}'"
            )
    return tensors, metadata


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """``DIGITS`` of the sha256 of each tensor's bytes; of tensors on the CPU."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(lambda tensor: tensor_sha256(tensor)[:DIGITS], tensors.values())))


def header_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], digests: Mapping[str, str]) -> str:
    """sha256 of names, dtypes and shapes, the other metadata, and the tensors' digests."""
    declared = sorted((key, str(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items())
    return repr_sha256(declared, sorted(metadata.items()), sorted(digests.items()))


def row_digests(tensor: Tensor) -> str:
    """``ROW_DIGITS`` for each row (of the first dimension) of a tensor, one after the other: of its dtype, shape and bytes."""
    return "".join(
        hashlib.sha256(f"{row.dtype}{tuple(row.shape)}{tensor_sha256(row)}".encode()).hexdigest()[:ROW_DIGITS]
        for row in tensor
    )
