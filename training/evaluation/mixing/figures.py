"""Curves along the way from one style to another, and what they say: does the slider do what it promises?

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
"""Ends whose mean scores are less apart have no way between them that could be even or uneven."""


@dataclass(frozen=True)
class FigureSpec:
    """A figure: aim is what would be best, "high", "low", or the number to be near."""

    title: str
    aim: str | float
    meaning: str

    def measure(self, values: Tensor) -> Tensor:
        """What is averaged over pairs and compared between paths: how far off the aim, where that is a number."""
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
    """What was seen along one path, each (n, R), the first ratio 0 and the last 1.

    score: 0 to 1, how much a picture is of the second style; away: the same from the first style's side (1 less its probability), or
    None where a judge has one score only. neither: 1 where it is taken for another style. content: 1 where shape and colour are the
    caption's, NaN where it names none, or None without a judge. to_first, to_second: ``layout_distances``.
    """

    score: Tensor
    neither: Tensor
    to_first: Tensor
    to_second: Tensor
    away: Tensor | None = None
    content: Tensor | None = None


def weights_of(prompts: Sequence[int], resamples: int, seed: int) -> Tensor:
    """(1 + resamples, n) float64, the first row of ones: a resample draws prompts, each with all its pictures.

    Where all pictures show one prompt, they are drawn themselves.
    """
    _, place = torch.tensor(list(prompts)).unique(return_inverse=True)
    distinct = int(place.max()) + 1
    if distinct < 2:
        place, distinct = torch.arange(len(place)), len(place)
    drawn = resample(distinct, resamples, seed)[:, place]
    drawn = drawn[drawn.sum(1) > 0]
    return torch.cat([torch.ones(1, len(place), dtype=torch.float64), drawn])


def mean_curve(values: Tensor, weights: Tensor) -> Tensor:
    """(n, R) or (n,), (W, n) -> (W, R) or (W,); NaN do not count, and are what comes out where nothing does."""
    known = ~values.isnan()
    return (weights @ values.double().nan_to_num()) / (weights @ known.double())


def curves(observed: Observations, weights: Tensor) -> dict[str, Tensor]:
    """Every mean curve (W, R)."""
    named = {name: getattr(observed, name) for name in ("score", "away", "neither", "content", "to_first", "to_second")}
    return {name: mean_curve(values, weights) for name, values in named.items() if values is not None}


def figures(observed: Observations, ratios: Sequence[float], weights: Tensor) -> dict[str, Tensor]:
    """Every figure (W,), see ``FIGURES``; NaN where it makes no sense."""
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
    """(W,), the first of the pictures as they are -> that value, and the spread over the others; no spread where few are numbers."""
    drawn = values[1:][~values[1:].isnan()]
    spread = drawn.std().item() if len(drawn) > 1 and 2 * len(drawn) >= len(values) - 1 else None
    return Figure(values[0].item(), spread)


@dataclass(frozen=True)
class PathDifference:
    """difference: of two paths' figures, for a figure that aims at a number of how far off they are; better: the name of the path that
    is better by more than chance, or None."""

    difference: Figure
    better: str | None


def mean_of(values: Sequence[Tensor]) -> Tensor:
    """(W,) of some pairs -> their mean (W,), of those pairs for which there is a number."""
    several = torch.stack(list(values))  # (P, W)
    several = several[~several[:, 0].isnan()]
    return several.nanmean(0) if len(several) else torch.full_like(values[0], torch.nan)


def path_difference(
    spec: FigureSpec, names: tuple[str, str], first: Sequence[Tensor], second: Sequence[Tensor]
) -> PathDifference:
    """A figure of two paths, each (W,) of every pair, over the same resamples; pairs count that have a number on both paths."""
    difference = as_figure(mean_of([spec.measure(a) - spec.measure(b) for a, b in zip(first, second, strict=True)]))
    better = None
    if difference.spread is not None and abs(difference.value) > NORMAL_95 * difference.spread:
        better = names[(difference.value > 0) != (spec.aim == "high")]
    return PathDifference(difference, better)
