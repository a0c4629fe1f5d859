"""Reads untrusted safetensors files, with bounds on all that they declare and readable errors, and writes safetensors
files.

Only safetensors is ever read: a pickle can run code. The bounds are far above every real model and below what would
make the libraries run out of memory or time on a file of a few megabytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import atomic_write

HEADER_LIMIT = 32 * 2**20
"""Bytes; SDXL's header has 0.3 MB, and a style's thumbnail at most 0.2 MB more. (safetensors' own limit is 100 MB.)"""
MAX_BRACES = 300_000
"""Opening braces in a header: one per tensor, the others in metadata. safetensors needs 700 bytes of memory a
tensor."""
MAX_TENSORS = 20_000
"""SDXL's checkpoint has 2515."""
LONGEST_KEY = 500
MAX_DIMENSIONS = 16
MAX_SIZE = 2**40
"""Of one dimension: a tensor without elements may declare the others as large as it likes."""

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


# --- reading ----------------------------------------------------------------------------------------------------------


def read_keys(path: str | os.PathLike) -> list[str]:
    """The names of the tensors in a file. Raises ValueError saying what the file is instead."""
    with _opened(Path(path)) as header:
        return list(header.keys())


def read_weights(
    path: str | os.PathLike, load: Callable[[str, tuple[int, ...]], bool] = lambda key, shape: True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Those that ``load`` (key, shape) declines stay on disk: shape and dtype, on the
    meta device.

    Raises ValueError naming the file for one that is damaged, no safetensors file, or declares absurd sizes.
    """
    with _opened(Path(path)) as header:
        tensors = {key: _declared(header, key) for key in header.keys()}
        metadata = dict(header.metadata() or {})
        wanted = [key for key, tensor in tensors.items() if load(key, tuple(tensor.shape))]
        if wanted:
            with safe_open(path, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in wanted})
    return tensors, metadata


def _declared(header: safe_open, key: str) -> Tensor:
    """A tensor of the shape and dtype that a header declares, on the meta device."""
    entry = header.get_slice(key)
    shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
    if len(shape) > MAX_DIMENSIONS or any(size > MAX_SIZE for size in shape):
        raise ValueError(
            f"weight '{key}' declares {len(shape)} dimensions, or sizes over {MAX_SIZE}: get the file again"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"weight '{key}' is of dtype {dtype}: get the model in half precision")
    return torch.empty(shape, dtype=getattr(torch, _DTYPES[dtype]), device="meta")


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file, opened to read its header. Errors here or while it is used become ValueError or OSError that
    name it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the .safetensors file itself")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")  # a pipe would be waited for
    try:
        _check_length(path)
        with safe_open(path, framework="np") as header:  # for torch it would map the whole file into memory
            _check_keys(header.keys())
            yield header
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise ValueError(f"{path} {diagnosis(path, error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except RuntimeError as error:  # torch could not map the file into memory
        raise OSError(f"{path} could not be read: {error}") from error


def _check_length(path: Path) -> None:
    """Refuse, before safetensors parses them, headers that are small on disk and huge in memory."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > os.fstat(file.fileno()).st_size:
            return  # no safetensors file, or cut off: ``diagnosis`` says which
        if length > HEADER_LIMIT:
            raise ValueError(
                f"its header has {length} bytes, at most {HEADER_LIMIT} are read: remove large metadata, such as pictures "
                "of styles, from it"
            )
        if file.read(length).count(b"{") > MAX_BRACES:
            raise ValueError(f"it declares more than {MAX_BRACES} tensors: it is no Stable Diffusion model")


def _check_keys(keys: list[str]) -> None:
    if len(keys) > MAX_TENSORS:
        raise ValueError(f"it declares {len(keys)} tensors; no Stable Diffusion model has more than {MAX_TENSORS}")
    if any(len(key) > LONGEST_KEY for key in keys):
        raise ValueError(f"it names a tensor with more than {LONGEST_KEY} characters: it is no Stable Diffusion model")


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
        if size < 8 or length > HEADER_LIMIT:
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
        end = _declared_end(file.read(length))
        if end > size:
            return f"is cut off: {size} of {end} bytes are there; download or copy it again"
        return f"is a damaged safetensors file ({str(error)[:300]}): download or copy it again"


def _declared_end(header: bytes) -> int:
    """The size that a file with this header should have; 0 where the header does not say."""
    if header.count(b"[") + header.count(b",") > 10 * MAX_TENSORS:  # only for a message: not worth the memory
        return 0
    try:
        entries = json.loads(header)
        return 8 + len(header) + max(e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0


# --- writing ----------------------------------------------------------------------------------------------------------


def write_weights(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file completely or not at all. Raises ValueError for NaN and for metadata that could not be read back,
    OSError when the disk refuses."""
    check_writable(path, tensors, metadata)
    with refusal_explained(path), atomic_write(path) as temporary:
        save_file(storable(tensors), temporary, metadata=dict(metadata))


def check_writable(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise ValueError for weights that must not be saved (NaN) and metadata that could not be read back (too long)."""
    try:
        check_finite(tensors)
        length = len(json.dumps(metadata, ensure_ascii=False).encode()) + sum(len(key) + 200 for key in tensors)
        if length > HEADER_LIMIT:
            raise ValueError(
                f"its metadata have {length} bytes, at most {HEADER_LIMIT} can be read back: shorten the recipe, the "
                "workflow or the pictures of its styles"
            )
    except ValueError as error:
        raise ValueError(f"{path} was not saved: {error}") from error


@contextmanager
def refusal_explained(path: str | os.PathLike) -> Iterator[None]:
    """Turns what a disk or safetensors says about a failed write into an OSError with a next step."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({getattr(error, 'strerror', None) or error}); what was there before is untouched. "
            "Free some space, close programs that use the file, or choose another place"
        ) from error


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first tensor that holds NaN or infinity, of those that are to be written."""
    if (key := not_finite(tensors)) is not None:
        raise ValueError(f"weight '{key}' holds NaN or infinity: the training diverged, or a cast overflowed")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            return key
    return None


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; True for integers. A twentieth of the time of ``isfinite().all()`` on the CPU: the least and
    the greatest element are NaN where any is."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.float() if tensor.element_size() == 1 else tensor  # torch does not compare float8
    least, greatest = values.aminmax()
    return bool(torch.isfinite(least) & torch.isfinite(greatest))


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
