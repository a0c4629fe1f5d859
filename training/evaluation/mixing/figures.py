"""Curves over the mixing ratio of two styles, and figures that sum them up: does a share of w look like a share of w?

A curve is one number per picture and ratio, (n, R); a figure is one number per set of weights, (W,). Weights (W, n) say how often each
picture counts: a row of ones is the pictures as they are, other rows are bootstrap resamples of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distances import resample
from ..matrix import NORMAL_95, Figure

CELLS = 4
"""Cells a side of the low resolution at which layouts are compared."""
TIE = 1e-3
"""Scores are rounded to this before they are ranked: float noise on two pictures that are one has no order."""
SLIP = 0.05
"""A picture's curve counts as monotone while it never falls by more."""
LEAST_REACH = 0.1
"""Where the mean scores at the two ends differ by less, width and half of a curve are not defined."""


@dataclass(frozen=True)
class FigureSpec:
    """What a figure means. title: in tables. aim: its best value, "high", "low", or a number. meaning: one line for the report."""

    title: str
    aim: str | float
    meaning: str

    def measure(self, values: Tensor) -> Tensor:
        """Values (W,) as they are averaged over pairs and compared between paths: their distance from the aim, where that is a number."""
        return values if isinstance(self.aim, str) else (values - self.aim).abs()

    @property
    def wish(self) -> str:
        return self.aim if isinstance(self.aim, str) else f"near {self.aim:g}"

    @property
    def measured(self) -> str:
        return self.title if isinstance(self.aim, str) else f"{self.title}, off {self.aim:g}"


FIGURES = {
    "reach": FigureSpec("reach", "high", "score at the second style less score at the first"),
    "spearman": FigureSpec("Spearman", "high", "rank correlation of ratio and score, of each picture, averaged"),
    "monotone": FigureSpec("monotone", "high", f"share of pictures whose score never falls by more than {SLIP}"),
    "fall": FigureSpec("fall", "low", "largest fall of the mean score from a ratio to a later one"),
    "width": FigureSpec("width", 0.8, "ratios between 10% and 90% of the way; 0.8 is a straight line"),
    "half": FigureSpec("half", 0.5, "ratio at 50% of the way"),
    "neither": FigureSpec("neither", "low", "share of the path that is taken for another style"),
    "content": FigureSpec("content", "high", "share of pictures between the ends with the caption's shape and colour"),
    "kept": FigureSpec("kept", "high", "the same, less that of the ends"),
    "layout": FigureSpec("layout", "low", "change of layout to the nearer end, 1 is that of another prompt's picture"),
}


@dataclass
class Observations:
    """Measurements of the n pictures of one path at R ratios, each a tensor (n, R); the first ratio is 0 and the last 1.

    score: 0 to 1, how much a picture looks like the second style. neither: 1 where a third style fits it best, else 0. to_first,
    to_second: ``layout_distances``. away: 1 less the probability of the first style; None where the judge gives one score only.
    content: 1 where a picture has the shape and colour of its caption, else 0, NaN where the caption names none; None where nobody can
    tell.
    """

    score: Tensor
    neither: Tensor
    to_first: Tensor
    to_second: Tensor
    away: Tensor | None = None
    content: Tensor | None = None


def weights_of(prompts: Sequence[int], resamples: int, seed: int) -> Tensor:
    """Bootstrap weights (1 + resamples, n) float64; the first row is of ones. prompts: the prompt of each picture.

    A resample draws prompts, each with all its pictures; where all pictures have one prompt it draws pictures.
    """
    _, place = torch.tensor(list(prompts)).unique(return_inverse=True)
    distinct = int(place.max()) + 1
    if distinct < 2:
        place, distinct = torch.arange(len(place)), len(place)
    drawn = resample(distinct, resamples, seed)[:, place]
    drawn = drawn[drawn.sum(1) > 0]
    return torch.cat([torch.ones(1, len(place), dtype=torch.float64), drawn])


def mean_curve(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted means over the pictures: values (n, R) or (n,), weights (W, n) -> (W, R) or (W,). NaN are left out; no value gives NaN."""
    known = ~values.isnan()
    return (weights @ values.double().nan_to_num()) / (weights @ known.double())


def curves(observed: Observations, weights: Tensor) -> dict[str, Tensor]:
    """The mean curve (W, R) of each measurement that there is, by name."""
    named = {name: getattr(observed, name) for name in ("score", "away", "neither", "content", "to_first", "to_second")}
    return {name: mean_curve(values, weights) for name, values in named.items() if values is not None}


def figures(observed: Observations, ratios: Sequence[float], weights: Tensor) -> dict[str, Tensor]:
    """Every figure of ``FIGURES`` that can be measured, (W,) float64; NaN where it is not defined."""
    w = torch.tensor(ratios, dtype=torch.float64)
    mean = curves(observed, weights)
    score = mean["score"]
    inner = slice(1, -1)
    width, half = transition(score, w)
    out = {
        "reach": score[:, -1] - score[:, 0],
        "spearman": mean_curve(spearman(observed.score, w), weights),
        "monotone": mean_curve((falls(observed.score.double()) <= SLIP).double(), weights),
        "fall": falls(score),
        "width": width,
        "half": half,
        "neither": torch.trapezoid(mean["neither"], w),
        "layout": mean_curve(torch.minimum(observed.to_first, observed.to_second)[:, inner].double().mean(1), weights),
    }
    if "content" in mean:
        out["content"] = mean["content"][:, inner].mean(1)
        out["kept"] = out["content"] - mean["content"][:, [0, -1]].mean(1)
    return {name: out[name] for name in FIGURES if name in out}


def falls(curve: Tensor) -> Tensor:
    """(..., R) -> (...): the largest fall from a point to a later one; 0 for a curve that never falls."""
    return (curve.cummax(-1).values - curve).amax(-1)


def spearman(scores: Tensor, ratios: Tensor) -> Tensor:
    """(n, R), rising ratios (R,) -> (n,): rank correlation, ties with their mean rank; 0 for a flat curve."""

    def ranks(x: Tensor) -> Tensor:
        less = x[:, None, :] < x[:, :, None]  # (n, R, R)
        equal = x[:, None, :] == x[:, :, None]
        return less.double().sum(-1) + equal.double().sum(-1) / 2

    a, b = ranks((scores.double() / TIE).round()), ranks(ratios[None].double())
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    product = (a * b).sum(1)
    return torch.where(product == 0, 0, product / (a.square().sum(1) * b.square().sum(1)).sqrt())


def transition(curve: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Curves (W, R) -> (W,) width from 10% to 90% of the way between the ends' values, (W,) ratio at 50%: where each is first reached,
    on straight lines between the ratios. NaN where the ends are less than ``LEAST_REACH`` apart."""
    reach = curve[:, -1:] - curve[:, :1]
    way = (curve - curve[:, :1]) / reach  # (W, R), from 0 to 1
    low, half, high = (first_at(way, ratios, level) for level in (0.1, 0.5, 0.9))
    some = reach[:, 0] >= LEAST_REACH
    return torch.where(some, high - low, torch.nan), torch.where(some, half, torch.nan)


def first_at(way: Tensor, ratios: Tensor, level: float) -> Tensor:
    """Curves (W, R) that begin at 0 and end at 1 -> (W,): the ratio at which each is first at this level, 0 < level <= 1."""
    at = (way >= level).to(torch.uint8).argmax(1)  # the first True
    after, before = at[:, None].clamp(min=1), at[:, None].clamp(min=1) - 1
    low, high = way.gather(1, before)[:, 0], way.gather(1, after)[:, 0]
    start, end = ratios[before[:, 0]], ratios[after[:, 0]]
    return start + (end - start) * (level - low) / (high - low)


def layout_distances(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (n, R, C, h, w), n > 1, of one path -> (n, R) distances of layout to its first and to its last picture.

    Mean squared difference of ``CELLS`` x ``CELLS`` cell means, over that of two pictures of different prompts at the ends: 0 is the
    same layout, 1 that of a stranger.
    """
    n, count = latents.shape[:2]
    small = F.adaptive_avg_pool2d(latents.flatten(0, 1).double(), CELLS).flatten(1).unflatten(0, (n, count))
    strangers = 2 * small[:, [0, -1]].var(0).mean()
    distances = [(small - small[:, [end]]).square().mean(2) for end in (0, -1)]
    first, second = (torch.where(d == 0, 0, d / strangers) for d in distances)
    return first, second


# --- many to one ------------------------------------------------------------------------------------------------------


def as_figure(values: Tensor) -> Figure:
    """Values (W,) -> the first, which is of the pictures as they are, with the standard deviation of the others, the resamples. No spread
    where more than half of the resamples are NaN."""
    drawn = values[1:][~values[1:].isnan()]
    spread = drawn.std().item() if len(drawn) > 1 and 2 * len(drawn) >= len(values) - 1 else None
    return Figure(values[0].item(), spread)


@dataclass(frozen=True)
class PathDifference:
    """One figure of two paths. difference: first less second, of their distances from the aim where that is a number. better: the name of
    the path that is better with 95% confidence, or None."""

    difference: Figure
    better: str | None


def mean_of(values: Sequence[Tensor]) -> Tensor:
    """Values (W,) of several pairs -> their mean (W,) over the pairs whose first value is not NaN."""
    several = torch.stack(list(values))  # (P, W)
    several = several[~several[:, 0].isnan()]
    return several.nanmean(0) if len(several) else torch.full_like(values[0], torch.nan)


def path_difference(
    spec: FigureSpec, names: tuple[str, str], first: Sequence[Tensor], second: Sequence[Tensor]
) -> PathDifference:
    """The difference of two paths in one figure, averaged over the pairs. names: of the paths. first, second: (W,) for each pair, from the
    same resamples; a pair counts where both are numbers."""
    difference = as_figure(mean_of([spec.measure(a) - spec.measure(b) for a, b in zip(first, second, strict=True)]))
    better = None
    if difference.spread is not None and abs(difference.value) > NORMAL_95 * difference.spread:
        better = names[(difference.value > 0) != (spec.aim == "high")]
    return PathDifference(difference, better)
