"""Which timesteps of which teachers the student is still bad at, and rows drawn there more often.

Cells are (teacher, timestep bin), the base being one more teacher. A cell's chance is its share of running loss ** power, mixed with
even chances; importance weights p / q make means over the drawn rows means over evenly drawn ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 10
"""Of the timesteps, all of one width: 100 of the 1000."""
MEMORY = 20
"""Rows of a cell that its running loss looks back over."""


@dataclass(frozen=True)
class Chances:
    """How the rows of a batch are drawn; float64 on the CPU, K bins of timesteps.

    cells (N, K): of a row with a style, summing to 1. alone (N+1, K): of the bins alone, where the teacher is given (the base is the
    last one); each row sums to 1. shares (N,): what the teachers' shares would be without it.
    """

    cells: Tensor
    alone: Tensor
    shares: Tensor
    steps: int

    def pick(self, u: Tensor, to_base: Tensor, owner: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(teacher, bin, weight, t_importance), each (B,), by the inverse distribution function at u (B,) in [0, 1).

        Rows ``to_base`` are the base's, and with ``owner`` (B,) all others have that teacher: then only the bin is drawn. weight is
        p / q of teacher and timestep, t_importance that of the timestep alone, float32.
        """
        teachers, bins = self.cells.shape
        cell = inverse(u, self.cells.flatten().expand(len(u), -1))
        teacher, place = cell // bins, cell % bins
        weight = (self.shares[:, None] / bins / self.cells)[teacher, place]
        t_importance = (self.cells.sum(1, keepdim=True) / bins / self.cells)[teacher, place]
        given = to_base if owner is None else torch.ones_like(to_base)
        if given.any():
            teacher = torch.where(to_base, teachers, teacher if owner is None else owner)
            # Whose row it is does not depend on u, which for these rows is even in [0, 1), too.
            place = torch.where(given, inverse(u, self.alone[teacher]), place)
            even = 1 / bins / self.alone[teacher, place]
            weight, t_importance = torch.where(given, even, weight), torch.where(given, even, t_importance)
        return teacher, place, weight.float(), t_importance.float()

    def timesteps(self, place: Tensor, generator: torch.Generator) -> Tensor:
        """Bins (B,) -> timesteps (B,), evenly from each bin."""
        width = self.steps // self.cells.shape[1]
        return place * width + torch.randint(width, (len(place),), generator=generator)


class Difficulty:
    """The running losses of a run. ``loss`` (N+1, K) float64; ``rows`` (N+1, K) int64: rows seen so far.

    power: of the loss in the chances; floor: share of the rows that are drawn evenly all the same. Every process of a run sees the
    same rows, and so has the same table.
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
        """For the next rows. shares (N,): what the teachers must get; None leaves that to the losses.

        A teacher's bins have even chances until all of them were seen; so have all cells that compete.
        """
        alone = torch.stack([self._of(loss[None], rows)[0] for loss, rows in zip(self.loss, self.rows)])
        teachers = len(self.loss) - 1
        if shares is None:
            even = torch.full((teachers,), 1 / teachers, dtype=torch.float64)
            return Chances(self._of(self.loss[:-1], self.rows[:-1]), alone, even, self.steps)
        given = torch.tensor(shares, dtype=torch.float64)
        return Chances(given[:, None] * alone[:-1], alone, given, self.steps)

    def _of(self, loss: Tensor, rows: Tensor) -> Tensor:
        even = torch.full_like(loss, 1 / loss.numel())
        hard = loss**self.power
        if not rows.all() or not hard.sum() > 0:
            return even
        return self.floor * even + (1 - self.floor) * hard / hard.sum()

    def state_dict(self) -> dict[str, Tensor]:
        return {"loss": self.loss, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.loss, self.rows = state["loss"].clone(), state["rows"].clone()


def inverse(u: Tensor, shares: Tensor) -> Tensor:
    """u (B,) in [0, 1), shares (B, M) summing to 1 -> (B,) the index in whose share u lies."""
    # By rounding the shares may end before u: then it is the last one that is not empty.
    last = (shares > 0).long().cumsum(1).argmax(1)
    return torch.minimum(torch.searchsorted(shares.cumsum(1), u[:, None], right=True)[:, 0], last)
