"""The paper's evaluation (arXiv:2504.12364, Sec. 4.1) from features: every style against every teacher, above the teachers' floor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .distances import DISTANCES, OnItem, resample

NORMAL_95 = 1.96
MANY_FEATURES = 512
"""With more features only the diagonals are resampled, and fewer times: the cost of FID grows with the third power of their number."""
CHUNK = 10
"""Resamples that are computed at a time, which bounds the memory."""


@dataclass(frozen=True)
class Figure:
    """A number, and its spread: the standard deviation it would have with other pictures or samples; None where that is not known."""

    value: float
    spread: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%: 1.96 spreads around the value.

        Not the quantiles of the resamples: a resample has fewer different pictures, so that its FID is larger on average, and its
        quantiles would lie beside the value.
        """
        if self.spread is None:
            return None
        return self.value - NORMAL_95 * self.spread, self.value + NORMAL_95 * self.spread

    def text(self, digits: int = 2) -> str:
        return f"{self.value:.{digits}f}" + ("" if self.spread is None else f" ± {NORMAL_95 * self.spread:.{digits}f}")


@dataclass
class Distances:
    """One metric, "FID" or "KID", of a model to all teachers.

    m[i][j]: distance of the model in style i to teacher j; floor[i][j]: of teacher i to teacher j, whose pictures are from other seeds;
    base[j]: of the base to teacher j, None without a base. count: pictures of a style; size: of a feature vector; resamples: of the
    bootstrap. total and floor_total: traces of m and floor; excess: their difference; leak: mean of |m - floor| off the diagonal, None with
    one style. own, own_floor, own_excess: the diagonals and their difference, by style. base_excess: sum of base less floor_total.
    """

    metric: str
    names: list[str]
    count: int
    size: int
    resamples: int
    m: list[list[float]]
    floor: list[list[float]]
    base: list[float] | None
    total: Figure
    floor_total: Figure
    excess: Figure
    leak: Figure | None
    own: list[Figure]
    own_floor: list[Figure]
    own_excess: list[Figure]
    base_excess: float | None = None

    @property
    def worst(self) -> int:
        """Index of the style with the largest excess."""
        return max(range(len(self.names)), key=lambda i: self.own_excess[i].value)


@dataclass
class Sets:
    """Features (n, d) by style, all from the same prompts: the student's and the teachers' first batch from the same noise, the
    teachers' second batch from other noise, and the base's first batch."""

    names: Sequence[str]
    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    second: Sequence[Tensor]
    base: Tensor | None = None
    on_item: OnItem = field(default=lambda: None, repr=False)
    """Called after each distance."""


def compare(metric: str, sets: Sets, resamples: int, seed: int) -> Distances:
    """The metric "FID" or "KID" of the student of ``sets``, with all that follows from its matrix and the floor.

    resamples: of the bootstrap, 0 for none. Raises ValueError for features of other shapes or that are not finite.
    """
    count, size = sets.teacher[0].shape
    check_features("student", sets.student, n=len(sets.names), count=count, size=size)
    return Yardstick(metric, sets, resamples, seed).measure(sets.student, sets.base)


def check_features(name: str, group: Sequence[Tensor], *, n: int, count: int, size: int) -> None:
    """Raises ValueError for features that are not n sets of (count, size) finite numbers."""
    bad = [i for i, x in enumerate(group) if tuple(x.shape) != (count, size) or not torch.isfinite(x).all()]
    if len(group) != n or bad:
        raise ValueError(f"features of {name}: expected {n} sets of {(count, size)} finite numbers, wrong: {bad}")


class Yardstick:
    """One distance to the teachers of ``sets``, with the floor, by which anyone can be measured; the student of ``sets`` is not read.

    Everyone is measured to the teachers' second batch, so a student that equals its teachers scores the floor exactly. Resamples draw
    prompts: a prompt brings all its pictures, of whoever is measured, the teachers and both batches.
    """

    def __init__(self, metric: str, sets: Sets, resamples: int, seed: int):
        self.metric, self.sets, self.resamples = metric, sets, resamples
        self.count, self.size = sets.teacher[0].shape
        for name, group in (("teacher", sets.teacher), ("second", sets.second)):
            check_features(name, group, n=len(sets.names), count=self.count, size=self.size)
        self.whole = self.size <= MANY_FEATURES
        self.once = torch.ones(1, self.count, dtype=torch.float64)
        self.weights = resample(self.count, resamples, seed) if resamples > 1 else None
        self.floor, self.floor_drawn = self._matrices(sets.teacher)

    def _matrices(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The matrix (N, N) of N sets, or of one set for all styles, and its resamples (R, N, N), whose numbers off the diagonal are 0
        where features are many."""
        drawn = None
        if self.weights is not None:
            drawn = torch.cat([self._table(rows, weights, self.whole) for weights in self.weights.split(CHUNK)])
        return self._table(rows, self.once, True)[0], drawn

    def _table(self, rows: Sequence[Tensor], weights: Tensor, whole: bool) -> Tensor:
        n, function = len(self.sets.names), DISTANCES[self.metric]
        if len(rows) == 1:
            values = function(
                rows, self.sets.second, weights, [(0, j) for j in range(n)], on_item=self.sets.on_item
            )  # (R, N)
            return values[:, None].expand(-1, n, -1) if whole else torch.diag_embed(values)
        pairs = list(itertools.product(range(n), range(n))) if whole else [(i, i) for i in range(n)]
        values = function(rows, self.sets.second, weights, pairs, on_item=self.sets.on_item)
        return values.reshape(-1, n, n) if whole else torch.diag_embed(values)

    def measure(self, rows: Sequence[Tensor], base: Tensor | None = None) -> Distances:
        """The distances of a model, from its features (n, d): one tensor for each style, or a single one that stands for every style.

        base: features (n, d) of the base, for the report. Raises ValueError for features of other shapes or that are not finite.
        """
        sets, n = self.sets, len(self.sets.names)
        check_features("a model", rows, n=1 if len(rows) == 1 else n, count=self.count, size=self.size)
        m, drawn = self._matrices(rows)
        of_base = None if base is None else self._table([base], self.once, True)[0, 0].tolist()
        spread = spreads(drawn, self.floor_drawn)
        point = figures(m, self.floor)

        def one(name: str) -> Figure:
            return Figure(point[name].item(), spread(name))

        def each(name: str) -> list[Figure]:
            return [Figure(v, spread(name, i)) for i, v in enumerate(point[name].tolist())]

        leak = Figure(point["leak"].item(), spread("leak") if self.whole else None) if n > 1 else None
        base_excess = None if of_base is None else sum(of_base) - point["floor_total"].item()
        return Distances(
            metric=self.metric,
            names=list(sets.names),
            count=self.count,
            size=self.size,
            resamples=self.resamples,
            m=m.tolist(),
            floor=self.floor.tolist(),
            base=of_base,
            total=one("total"),
            floor_total=one("floor_total"),
            excess=one("excess"),
            leak=leak,
            own=each("own"),
            own_floor=each("own_floor"),
            own_excess=each("own_excess"),
            base_excess=base_excess,
        )


def figures(m: Tensor, floor: Tensor) -> dict[str, Tensor]:
    """Matrices (..., N, N) -> every figure that is made of them, (...) or (..., N)."""
    own, own_floor = (x.diagonal(dim1=-2, dim2=-1) for x in (m, floor))
    n = m.shape[-1]
    off = (m - floor).abs() * (1 - torch.eye(n, dtype=m.dtype))
    return {
        "own": own,
        "own_floor": own_floor,
        "own_excess": own - own_floor,
        "total": own.sum(-1),
        "floor_total": own_floor.sum(-1),
        "excess": (own - own_floor).sum(-1),
        "leak": off.sum((-2, -1)) / max(n * (n - 1), 1),
    }


def spreads(m: Tensor | None, floor: Tensor | None) -> Callable[..., float | None]:
    """A function of a figure's name (see ``figures``) and, where it is one per style, the style's index -> its standard deviation over
    resampled matrices (R, N, N); it gives None where there are none."""
    table = None if m is None or floor is None else {name: values.std(0) for name, values in figures(m, floor).items()}

    def of(name: str, index: int | None = None) -> float | None:
        if table is None:
            return None
        return (table[name] if index is None else table[name][index]).item()

    return of
