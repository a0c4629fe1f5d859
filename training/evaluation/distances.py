"""How far two sets of features are from each other: FID and KID, of the sets as they are and of resamples of them.

Features are (n, d) tensors, one row a picture. Weights (R, n) say how often each picture counts: a row of ones is the set itself, rows
of multinomial counts are bootstrap resamples (``resample``). All sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..seeds import hash_seed

BLOCK = 1024
"""Rows of a kernel matrix that are in memory at a time."""

Pairs = Sequence[tuple[int, int]]
"""(index of a row's set, index of a column's set)"""
OnItem = Callable[[], None]
"""What it raises ends the work."""


def fewest_pictures(size: int) -> int:
    """How many pictures FID needs on features of this size: with fewer the covariance has directions without any spread."""
    return size + 1


def check_count(count: int, size: int) -> None:
    """Raises ValueError, with the number that is needed, when FID on features of this size makes no sense for ``count`` pictures."""
    if count < fewest_pictures(size):
        raise ValueError(
            f"FID on {size} features needs at least {fewest_pictures(size)} pictures a style, {count} are asked for: paint "
            f"{fewest_pictures(size)} or more, project the features to fewer than {count}, or leave FID out (KID has no such limit)"
        )


def resample(count: int, resamples: int, seed: int) -> Tensor:
    """(resamples, count) float64: how often each picture is drawn, when ``count`` are drawn with replacement."""
    g = torch.Generator().manual_seed(hash_seed(seed, "bootstrap"))
    drawn = torch.randint(count, (resamples, count), generator=g)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )


# --- FID --------------------------------------------------------------------------------------------------------------


@dataclass
class Gaussian:
    """mean (d,) and covariance (d, d), float64."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def gaussian(x: Tensor, weight: Tensor) -> Gaussian:
    """Mean and unbiased covariance of features (n, d) that count ``weight`` (n,) times."""
    x, total = x.double(), weight.sum()
    mean = weight @ x / total
    centred = x - mean
    return Gaussian(mean, centred.T @ (weight[:, None] * centred) / (total - 1))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """FID (arXiv:1706.08500): |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    S_a S_b has the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric: no square root of a matrix that is not is taken.
    """
    between = torch.linalg.eigvalsh(a.root @ b.covariance @ a.root).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return ((a.mean - b.mean).square().sum() + traces - 2 * between).item()


def fid(
    rows: Sequence[Tensor], columns: Sequence[Tensor], weights: Tensor, pairs: Pairs, *, on_item: OnItem = lambda: None
) -> Tensor:
    """FID of each pair of sets -> (R, pairs) float64. on_item: called after each."""
    out = torch.empty(len(weights), len(pairs), dtype=torch.float64)
    for r, weight in enumerate(weights):
        left = {i: gaussian(rows[i], weight) for i in {i for i, _ in pairs}}
        right = {j: gaussian(columns[j], weight) for j in {j for _, j in pairs}}
        for place, (i, j) in enumerate(pairs):
            out[r, place] = frechet(left[i], right[j])
            on_item()
    return out


# --- KID --------------------------------------------------------------------------------------------------------------


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / d + 1)^3 of arXiv:1801.01401 for every pair of rows."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(
    rows: Sequence[Tensor], columns: Sequence[Tensor], weights: Tensor, pairs: Pairs, *, on_item: OnItem = lambda: None
) -> Tensor:
    """KID of each pair of sets -> (R, pairs) float64: the unbiased estimate of MMD^2 with all pictures at once, no subsets.

    In a resample a picture is never compared with its own copies, so that resamples are no larger on average than the set itself.
    """
    alone_left = {i: _mean_within(rows[i], weights) for i in {i for i, _ in pairs}}
    alone_right = {j: _mean_within(columns[j], weights) for j in {j for _, j in pairs}}
    out = torch.empty(len(weights), len(pairs), dtype=torch.float64)
    for place, (i, j) in enumerate(pairs):
        out[:, place] = alone_left[i] + alone_right[j] - 2 * _mean_across(rows[i], columns[j], weights)
        on_item()
    return out


def _mean_within(x: Tensor, weights: Tensor) -> Tensor:
    """(R,) mean kernel over pairs of different pictures of one set."""
    x, total = x.double(), weights.sum(1)
    own = (x.square().sum(1) / x.shape[1] + 1) ** 3  # of every picture with itself
    squares = weights.square()
    return (_sum(x, x, weights) - squares @ own) / (total.square() - squares.sum(1))


def _mean_across(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return _sum(x.double(), y.double(), weights) / weights.sum(1).square()


def _sum(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """(R,) sum over all pairs of w_i w_j k(x_i, y_j)."""
    total = torch.zeros(len(weights), dtype=torch.float64)
    for start in range(0, len(x), BLOCK):
        part = slice(start, start + BLOCK)
        total += ((weights[:, part] @ kernel(x[part], y)) * weights).sum(1)
    return total


DISTANCES = {"FID": fid, "KID": kid}


# --- fewer features ---------------------------------------------------------------------------------------------------


def principal_axes(features: Tensor, size: int) -> Tensor:
    """The ``size`` directions (d, size) in which features (n, d) vary most. Raises ValueError when there are not so many."""
    if not 1 <= size <= features.shape[1]:
        raise ValueError(f"the features cannot be projected to {size}: they have {features.shape[1]}")
    x = features.double()
    _, vectors = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))  # rising
    return vectors.flip(1)[:, :size]
