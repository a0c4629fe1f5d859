"""Few teachers a step: a step draws K models, the base being one more teacher, and all of its rows go to these.

Systematic sampling with unequal probabilities (Madow, Ann. Math. Statist. 20, 1949): model i with the share s_i of all rows is drawn with
the probability pi_i = K s_i, or 1 where that is more, and gets the share s_i / pi_i of the step's rows. So s_i of all rows are its own,
whatever K is. With the models laid side by side on a line, pi_i wide, the drawn ones are those at u, u + 1, ..., u + K - 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..seeds import hash_seed

GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples fill [0, 1) evenly wherever one begins."""
ERA = 8
"""Steps for each model in which they lie in one order on the line; the next era has another, so that others meet in a step."""


def draw_chances(shares: Tensor, count: int) -> Tensor:
    """pi (M,) float64: with which probability each model is drawn when a step draws ``count`` of them.

    shares (M,) float64, summing to 1. pi sums to ``count``, or where fewer models have a share, to their number.
    """
    if count >= int((shares > 0).sum()):
        return (shares > 0).double()
    sure = torch.zeros_like(shares, dtype=torch.bool)
    while True:
        rest = shares.masked_fill(sure, 0.0)
        chances = torch.where(sure, 1.0, (count - sure.sum()) * rest / rest.sum())
        if not ((chances > 1) & ~sure).any():
            return chances
        sure |= chances >= 1


def drawn_models(shares: Tensor, count: int, seed: int, step: int) -> Tensor:
    """The models of step ``step``, sorted, int64: ``count`` of them, or all that have a share where these are fewer.

    They follow from the arguments alone. Over all seeds each model has its probability ``draw_chances`` in every step; in a run, u moves
    by the golden ratio from step to step, so that each model comes as often as it should in any stretch of an era.
    """
    era, place = divmod(step, ERA * len(shares))
    g = torch.Generator().manual_seed(hash_seed(seed, "teachers of the steps", era))
    order = torch.randperm(len(shares), generator=g)
    u = (torch.rand(1, generator=g, dtype=torch.float64) + place * GOLDEN) % 1.0
    chances = draw_chances(shares, count)[order]
    points = u + torch.arange(round(chances.sum().item()))
    last = int((chances > 0).nonzero().max())  # by rounding the line may end before the last point
    return order[torch.searchsorted(chances.cumsum(0), points, right=True).clamp(max=last)].unique()


def rows_of_models(shares: Tensor, count: int, rows: int, *, seed: int, step: int) -> Tensor:
    """The model (rows,) of every row of a step, sorted. Each drawn model gets its share of them, rounded up or down, and over all seeds
    exactly its share."""
    models = drawn_models(shares, count, seed, step)
    each = shares[models] / draw_chances(shares, count)[models]  # (K,), sums to 1
    g = torch.Generator().manual_seed(hash_seed(seed, "rows of a step", step))
    points = (torch.arange(rows) + torch.rand(1, generator=g, dtype=torch.float64)) / rows
    ends = (each / each.sum()).cumsum(0)
    return models[torch.searchsorted(ends, points, right=True).clamp(max=len(models) - 1)]
