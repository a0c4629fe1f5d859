"""Adaptive sampling: rows are drawn more often for the teachers and timesteps at which the student's loss is still
high.

Cells are (teacher, timestep bin), the base being one more teacher. A cell's probability q is its share of running loss
** power, mixed with the uniform distribution p. Importance weights p / q make means over the drawn rows estimates of
means over uniformly drawn ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 10
"""Of the timesteps, all of one width: 100 of the 1000."""
MEMORY = 20
"""Rows of a cell that its running loss looks back over."""


class Drawn(NamedTuple):
    """What was drawn for each row of a batch, (B,) each. bins: of timesteps. importance: p / q of teacher and timestep,
    t_importance: p / q of the timestep alone, float32."""

    teacher: Tensor
    bins: Tensor
    importance: Tensor
    t_importance: Tensor


@dataclass(frozen=True)
class Chances:
    """The probabilities by which the rows of a batch are drawn; float64 on the CPU, K bins of ``steps`` timesteps.

    cells (N, K): of teacher and bin, for rows with a style; they sum to 1. given (N+1, K): of the bins for a given
    teacher (the base is the last one); each row sums to 1. shares (N,): the teachers' shares under the uniform
    distribution p.
    """

    cells: Tensor
    given: Tensor
    shares: Tensor
    steps: int

    def pick(self, u: Tensor, to_base: Tensor, owner: Tensor | None = None) -> Drawn:
        """Draw by the inverse distribution function at u (B,) in [0, 1).

        Rows ``to_base`` (B,) are the base's, and with ``owner`` (B,) all others have that teacher: then only the bin is
        drawn.
        """
        teachers, bins = self.cells.shape
        cell = inverse(u, self.cells.flatten().expand(len(u), -1))
        teacher, place = cell // bins, cell % bins
        importance = (self.shares[:, None] / bins / self.cells)[teacher, place]
        t_importance = (self.cells.sum(1, keepdim=True) / bins / self.cells)[teacher, place]
        is_given = to_base if owner is None else torch.ones_like(to_base)
        if is_given.any():
            teacher = torch.where(to_base, teachers, teacher if owner is None else owner)
            # The teacher of these rows does not depend on u, so u is uniform in [0, 1) for them, too.
            place = torch.where(is_given, inverse(u, self.given[teacher]), place)
            of_bin = 1 / bins / self.given[teacher, place]
            importance = torch.where(is_given, of_bin, importance)
            t_importance = torch.where(is_given, of_bin, t_importance)
        return Drawn(teacher, place, importance.float(), t_importance.float())

    def pick_bins(self, u: Tensor, teacher: Tensor) -> Drawn:
        """The same for rows whose teachers (B,), N for the base, were drawn by the cells' sums already: u chooses bins."""
        bins = self.cells.shape[1]
        sums = self.cells.sum(1, keepdim=True)
        of_teacher = torch.cat([self.cells / sums, self.given[-1:]])  # (N+1, K); NaN where a teacher is never drawn
        place = inverse(u, of_teacher[teacher])
        p_to_q = torch.cat([self.shares[:, None] / bins / self.cells, 1 / bins / self.given[-1:]])
        return Drawn(teacher, place, p_to_q[teacher, place].float(), (1 / bins / of_teacher[teacher, place]).float())

    def timesteps(self, bins: Tensor, generator: torch.Generator) -> Tensor:
        """Bins (B,) -> timesteps (B,), uniformly from each bin."""
        width = self.steps // self.cells.shape[1]
        return bins * width + torch.randint(width, (len(bins),), generator=generator)


class Difficulty:
    """The running losses of a run. ``loss`` (N+1, K) float64; ``rows`` (N+1, K) int64: rows seen so far.

    power: of the loss in the probabilities; floor: share of the rows that are drawn uniformly all the same. Every
    process of a run sees the same rows, and so has the same table.
    """

    def __init__(self, teachers: int, steps: int, power: float, floor: float):
        self.steps, self.power, self.floor = steps, power, floor
        self.loss = torch.zeros(teachers + 1, BINS, dtype=torch.float64)
        self.rows = torch.zeros(teachers + 1, BINS, dtype=torch.int64)

    def see(self, teacher: Tensor, t: Tensor, loss: Tensor) -> None:
        """Losses (B,) of rows of these teachers (N for the base) at these timesteps (in place).

        A plain mean of a cell's first rows, later an exponential one.
        """
        cell = teacher * BINS + t // (self.steps // BINS)
        count = torch.bincount(cell, minlength=self.loss.numel()).view_as(self.loss)
        total = torch.bincount(cell, weights=loss.double(), minlength=self.loss.numel()).view_as(self.loss)
        rate = torch.maximum(count / (self.rows + count).clamp(min=1), 1 - (1 - 1 / MEMORY) ** count.double())
        self.loss += torch.where(count > 0, rate * (total / count.clamp(min=1) - self.loss), 0.0)
        self.rows += count

    def chances(self, shares: Sequence[float] | None = None) -> Chances:
        """The probabilities for the next rows. shares (N,): what the teachers must get; None leaves that to the losses.

        A teacher's bins are uniform until each of them was seen, and so are all cells where ``shares`` is None.
        """
        given = torch.stack([self._probabilities(loss[None], rows)[0] for loss, rows in zip(self.loss, self.rows)])
        teachers = len(self.loss) - 1
        if shares is None:
            equal = torch.full((teachers,), 1 / teachers, dtype=torch.float64)
            return Chances(self._probabilities(self.loss[:-1], self.rows[:-1]), given, equal, self.steps)
        fixed = torch.tensor(shares, dtype=torch.float64)
        return Chances(fixed[:, None] * given[:-1], given, fixed, self.steps)

    def _probabilities(self, loss: Tensor, rows: Tensor) -> Tensor:
        """Of cells with these running losses and numbers of rows, in their shape, summing to 1."""
        uniform = torch.full_like(loss, 1 / loss.numel())
        hard = loss**self.power
        if not rows.all() or not hard.sum() > 0:
            return uniform
        return self.floor * uniform + (1 - self.floor) * hard / hard.sum()

    def state_dict(self) -> dict[str, Tensor]:
        return {"loss": self.loss, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.loss, self.rows = state["loss"].clone(), state["rows"].clone()


def inverse(u: Tensor, probabilities: Tensor) -> Tensor:
    """The inverse distribution function: u (B,) in [0, 1), probabilities (B, M) that sum to 1 in each row -> indices
    (B,)."""
    # By rounding the sum may end before u: then it is the last index of a probability above 0.
    last = (probabilities > 0).long().cumsum(1).argmax(1)
    return torch.minimum(torch.searchsorted(probabilities.cumsum(1), u[:, None], right=True)[:, 0], last)
