"""Regions of a canvas and the weights with which their prompts and styles are mixed: Mixture of Diffusers
(arXiv:2302.02412).

The noise predictions of all regions are averaged with these weights, ``eps = sum_k w_k eps_k / sum_k w_k``. A box may
be denoised on its own crop of the canvas, a mask on the whole of it. Positions are fractions of the canvas, so that a
region means the same at every size; areas are in latents, (height, width, top, left), the order of the host's "area".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Area = tuple[int, int, int, int]

MOD_VARIANCE = 0.01
"""Variance of the tiles' gaussian in units of the tile's side, as in arXiv:2302.02412's published implementation."""

BOX_VARIANCE = 0.0625
"""Variance of a box's gaussian over a background: a standard deviation of a quarter of the side; 0.13 is left at an
edge."""


@dataclass(frozen=True)
class Box:
    """A rectangle as fractions of the canvas, from its left upper corner; it may reach over the canvas's borders."""

    x: float
    y: float
    width: float
    height: float

    def __post_init__(self):
        sides = (self.x, self.y, self.width, self.height)
        if not all(map(math.isfinite, sides)) or self.width <= 0 or self.height <= 0:
            raise ValueError(f"a box at ({self.x}, {self.y}) of size {self.width} x {self.height} has no area")
        if self.x >= 1 or self.y >= 1 or self.x + self.width <= 0 or self.y + self.height <= 0:
            raise ValueError(
                f"a box at ({self.x:g}, {self.y:g}) of size {self.width:g} x {self.height:g} lies outside of the canvas, "
                "which reaches from 0 to 1: move it"
            )

    def area(self, height: int, width: int) -> Area:
        """The latents of a canvas that it covers, cut to the canvas; at least one."""

        def span(start: float, length: float, size: int) -> tuple[int, int]:
            first = min(max(round(start * size), 0), size - 1)
            return max(min(round((start + length) * size), size) - first, 1), first

        (h, top), (w, left) = span(self.y, self.height, height), span(self.x, self.width, width)
        return h, w, top, left

    @property
    def inside(self) -> float:
        """The share of it, in 0..1, that lies on the canvas."""
        across, down = (
            min(start + length, 1) - max(start, 0) for start, length in ((self.x, self.width), (self.y, self.height))
        )
        return across * down / (self.width * self.height)


def feathered(area: Area, height: int, width: int, feather: float) -> Tensor:
    """1 in an area and a linear ramp to 0 over ``feather`` latents at its inner edges -> (height, width).

    Edges that are borders of the canvas have no ramp: there is nothing to blend with.
    """

    def side(length: int, first: int, size: int) -> Tensor:
        place = torch.arange(size, dtype=torch.float64) + 0.5
        ramp = torch.ones(size, dtype=torch.float64)
        if first > 0:
            ramp = ramp.minimum(_slope(place - first, feather))
        if first + length < size:
            ramp = ramp.minimum(_slope(first + length - place, feather))
        return ramp

    h, w, top, left = area
    return (side(h, top, height)[:, None] * side(w, left, width)).float()


def _slope(inside: Tensor, feather: float) -> Tensor:
    """``inside`` latents from an edge -> 0 outside, 1 from ``feather`` inwards."""
    return (inside / feather).clamp(0, 1) if feather > 0 else (inside > 0).double()


def gaussian(area: Area, height: int, width: int, variance: float) -> Tensor:
    """A gaussian bump over an area, 1 at its centre, 0 outside of the area -> (height, width).

    arXiv:2302.02412, eq. 4: ``exp(-((x - mid) / side)^2 / (2 variance))`` along each side, at whole latents.
    """

    def side(length: int, first: int, size: int) -> Tensor:
        place = torch.arange(length, dtype=torch.float64)
        bump = torch.zeros(size, dtype=torch.float64)
        bump[first : first + length] = torch.exp(-(((place - (length - 1) / 2) / length) ** 2) / (2 * variance))
        return bump

    h, w, top, left = area
    return side(h, top, height)[:, None] * side(w, left, width)  # float64: far from the centre it gets very small


def painted(mask: Tensor, height: int, width: int, feather: float) -> Tensor:
    """A painted mask (H, W) or batch of masks (B, H, W) in 0..1 on the latents -> (B, height, width).

    feather: radius in latents over which edges are blurred. Raises ValueError for an empty mask or one that is no mask.
    """
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or 0 in mask.shape:
        raise ValueError(f"a mask has shape {tuple(mask.shape)}: expected (batch, height, width)")
    if not torch.isfinite(mask).all():
        raise ValueError("a mask holds values that are not numbers")
    mask = F.interpolate(mask[:, None].float().clamp(0, 1), size=(height, width), mode="area")[:, 0]
    empty = [i for i, one in enumerate(mask) if not one.any()]
    if empty:
        which = f"mask {empty[0] + 1} of {len(mask)}" if len(mask) > 1 else "the mask"
        raise ValueError(f"{which} is empty: paint something, or remove the region")
    return _blur(mask, feather) if feather > 0 else mask


def _blur(mask: Tensor, radius: float) -> Tensor:
    """Gaussian blur of (B, H, W) with standard deviation ``radius`` / 2; borders are repeated."""
    reach = max(1, math.ceil(radius * 1.5))
    place = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-(place**2) / (2 * (radius / 2) ** 2))
    kernel = kernel / kernel.sum()
    image = mask[:, None]
    image = F.conv2d(F.pad(image, (reach, reach, 0, 0), mode="replicate"), kernel[None, None, None])
    image = F.conv2d(F.pad(image, (0, 0, reach, reach), mode="replicate"), kernel[None, None, :, None])
    return image[:, 0].clamp(0, 1)


def background(coverages: Sequence[Tensor]) -> Tensor:
    """Coverage of the background (B or 1, H, W): ``max(0, 1 - sum)`` of the regions' coverages (B or 1, H, W) in
    0..1."""
    return (1 - sum(coverages, start=torch.zeros(1, 1, 1))).clamp(min=0)


def tiles(height: int, width: int, tile_height: int, tile_width: int, *, overlap: float) -> list[list[Area]]:
    """Rows of overlapping tiles that cover a canvas; all have one size, so that they fit into one batch.

    overlap: the least share of a tile that it has in common with the next, 0 <= overlap < 1.
    Raises ValueError for other overlaps and for tiles without size.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"the overlap of tiles is {overlap}: it must be 0 or more and less than 1")
    if tile_height < 1 or tile_width < 1:
        raise ValueError(f"tiles of {tile_height} x {tile_width} latents have no area")

    def starts(size: int, tile: int) -> list[int]:
        if tile >= size:
            return [0]
        steps = math.ceil((size - tile) / max(1, math.floor(tile * (1 - overlap))))
        return [round(i * (size - tile) / steps) for i in range(steps + 1)]

    h, w = min(tile_height, height), min(tile_width, width)
    return [[(h, w, top, left) for left in starts(width, w)] for top in starts(height, h)]


# --- what a prompt or a style is given: its place -----------------------------------------------------------------------

Placement = tuple[Area | None, Tensor]
"""(crop, or None for the full canvas; weights (B or 1, height, width) on the full canvas)"""


@dataclass(frozen=True, eq=False)
class Region:
    """One region of the canvas: a box or a painted mask.

    mask: (H, W) or (B, H, W) in 0..1, at any size. fall_off: "feather" or "gaussian" (boxes only). feather: width of
    the soft edge in latents. weight: how much it counts where regions overlap. crop: a box is denoised on its own crop.
    feather_share: if given, the width of the soft edge as a share of the canvas's shorter side, in place of ``feather``.
    """

    box: Box | None = None
    mask: Tensor | None = None
    fall_off: str = "feather"
    feather: float = 1.0
    weight: float = 1.0
    crop: bool = True
    feather_share: float | None = None

    def __post_init__(self):
        if (self.box is None) == (self.mask is None):
            raise ValueError("a region needs either a box or a mask")
        if self.fall_off not in ("feather", "gaussian"):
            raise ValueError(f"the fall-off of a region is {self.fall_off!r}: choose feather or gaussian")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"the weight of a region is {self.weight}: it must be above 0")
        if not (math.isfinite(self.feather) and self.feather >= 0):
            raise ValueError(f"the feather of a region is {self.feather}: it must be 0 or more")
        if self.feather_share is not None and not 0 <= self.feather_share <= 1:
            raise ValueError(f"the feather of a region is {self.feather_share} of the canvas: it must be in 0 to 1")

    def soft_edge(self, height: int, width: int) -> float:
        """The width of the soft edge in latents, on a canvas of height x width latents."""
        return self.feather if self.feather_share is None else self.feather_share * min(height, width)

    def coverage(self, height: int, width: int) -> Tensor:
        """(B or 1, height, width) in 0..1, the weight left aside."""
        if self.mask is not None:
            return painted(self.mask, height, width, self.soft_edge(height, width))
        assert self.box is not None, "a region has a box or a mask"
        area = self.box.area(height, width)
        if self.fall_off == "gaussian":
            return gaussian(area, height, width, BOX_VARIANCE)[None].float()
        return feathered(area, height, width, self.soft_edge(height, width))[None]

    def placed(self, height: int, width: int) -> list[Placement]:
        area = self.box.area(height, width) if self.box is not None and self.crop else None
        return [(area, self.weight * self.coverage(height, width))]


@dataclass(frozen=True, eq=False)
class Rest:
    """The background: the canvas without the regions.

    share: what it keeps of every pixel of the canvas, also under the regions, in 0..1 without 1: the prediction is
    ``share * background + (1 - share) * mixture``. Raises ValueError for another.
    """

    regions: tuple[Region, ...]
    share: float = 0.0

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise ValueError(
                f"the share of the background under the regions is {self.share}: it must be 0 or more and less than 1"
            )

    def placed(self, height: int, width: int) -> list[Placement]:
        weights, *_ = averaged(self.regions, height, width, self.share)
        return [(None, weights)] if weights.any() else []


@dataclass(frozen=True, eq=False)
class TileShare:
    """The tiles of one of ``count`` parts of a panorama, from left to right (arXiv:2302.02412).

    tile_height, tile_width: in latents. Raises ValueError on a canvas with fewer tiles in a row than parts.
    """

    part: int
    count: int
    tile_height: int
    tile_width: int
    overlap: float = 0.5

    def placed(self, height: int, width: int) -> list[Placement]:
        rows = tiles(height, width, self.tile_height, self.tile_width, overlap=self.overlap)
        if len(rows[0]) < self.count:
            raise ValueError(
                f"a canvas {8 * width} pixels wide has {len(rows[0])} tiles of {8 * self.tile_width} in a row, too few for "
                f"{self.count} parts: take a wider canvas, narrower tiles or more overlap"
            )
        areas = [area for row in rows for i, area in enumerate(row) if i * self.count // len(row) == self.part]
        return [(area, gaussian(area, height, width, MOD_VARIANCE)[None].float()) for area in areas]


def style_map(regions: Sequence[Region], height: int, width: int, share: float = 0.0) -> Tensor:
    """Shares of the background and of each region per latent (B or 1, 1 + R, height, width); they sum to 1.

    share: what the background keeps under the regions, as ``Rest.share``.
    """
    weights = averaged(regions, height, width, share)
    batch = max(len(w) for w in weights)
    stack = torch.stack([w.expand(batch, -1, -1) if len(w) == 1 else w for w in weights], dim=1)  # (B, 1 + R, h, w)
    return stack / stack.sum(1, keepdim=True)


def averaged(regions: Sequence[Region], height: int, width: int, share: float) -> list[Tensor]:
    """Weights (B or 1, height, width) with which background and regions are averaged, the background's first. share: as ``Rest.share``."""
    coverages = [region.coverage(height, width) for region in regions]
    rest, parts = background(coverages), [region.weight * c for region, c in zip(regions, coverages)]
    if share:  # share = extra / (extra + mixture)
        rest = rest + share / (1 - share) * (rest + sum(parts))
    return [rest, *parts]
