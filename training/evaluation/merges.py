"""Weights without training: weighted sums of models that are read one at a time, and low-rank approximations of what sets them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def weighted_sum(sources: Iterable[tuple[float, Callable[[], Weights]]]) -> dict[str, Tensor]:
    """sum_i share_i * weights_i in float32. Each source is opened when its turn comes and given up before the next one."""
    total: dict[str, Tensor] = {}
    for share, open_it in sources:
        weights = open_it()
        for key, value in weights.items():
            if key in total:
                total[key].add_(value.float(), alpha=share)
            else:
                total[key] = value.float() * share
        del weights, value  # or this one would still be here while the next one is read
    return total


def soup_shares(count: int) -> list[float]:
    """Of the mean of ``count`` models ("model soup", arXiv:2203.05482)."""
    return [1 / count] * count


def chain_shares(count: int, ratio: float = 0.5) -> list[float]:
    """Of ComfyUI's ModelMergeSimple in a row, each time ratio * (what is there) + (1 - ratio) * (the next model): at 0.5 the last model
    has half of everything."""
    shares = [1.0]
    for _ in range(count - 1):
        shares = [ratio * share for share in shares] + [1 - ratio]
    return shares


def task_vector_shares(count: int, scale: float) -> list[float]:
    """Of base + scale * sum_i (teacher_i - base) (arXiv:2212.04089, Sec. 4.2), the base first."""
    return [1 - count * scale, *[scale] * count]


# --- low rank ---------------------------------------------------------------------------------------------------------


def is_full(shape: torch.Size, rank: int) -> bool:
    """Whether a parameter of this shape has no more than ``rank`` to it: vectors, and matrices as small as that."""
    return len(shape) < 2 or rank >= min(shape[0], shape[1:].numel())


def low_rank(difference: Tensor, rank: int) -> Tensor:
    """The nearest tensor of this rank in the sum of squares, (out, ...) -> (out, ...) in its dtype: its largest singular directions
    (Eckart and Young). Convolutions are matrices (out, in * k * k); what ``is_full`` stays as it is.

    From the eigenvectors of the smaller of A A^T and A^T A, which costs a small part of a full SVD of a wide matrix.
    """
    if is_full(difference.shape, rank):
        return difference
    matrix = difference.flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    small = matrix.double() @ matrix.double().T if wide else matrix.double().T @ matrix.double()
    _, vectors = torch.linalg.eigh(small)  # rising
    main = vectors[:, -rank:].to(matrix.dtype)
    near = main @ (main.T @ matrix) if wide else (matrix @ main) @ main.T
    return near.reshape(difference.shape)


def adapter_size(shapes: Iterable[torch.Size], rank: int) -> int:
    """Numbers that one adapter holds: rank * (out + in * k * k) of a matrix, or the matrix itself where that is less."""
    total = 0
    for shape in shapes:
        whole = shape.numel()
        total += whole if is_full(shape, rank) else min(rank * (shape[0] + whole // shape[0]), whole)
    return total
