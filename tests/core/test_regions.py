"""Weights of regions against their formulas, written out pixel by pixel, and against arXiv:2302.02412's tiles."""

import itertools
import math

import pytest
import torch
from comfyui_dmm.dmm_core.regions import (
    BOX_VARIANCE,
    MOD_VARIANCE,
    Box,
    Region,
    Rest,
    TileShare,
    background,
    feathered,
    gaussian,
    painted,
    style_map,
    tiles,
)


@pytest.mark.parametrize(
    "box, size, area",
    [
        (Box(0, 0, 1, 1), (16, 16), (16, 16, 0, 0)),
        (Box(0.5, 0, 0.5, 1), (16, 16), (16, 8, 0, 8)),
        (Box(0.5, 0.25, 0.5, 0.5), (13, 9), (7, 5, 3, 4)),  # odd sizes
        (Box(-0.5, -0.5, 1, 1), (16, 16), (8, 8, 0, 0)),  # partly outside: cut
        (Box(0.75, 0.75, 1, 1), (16, 16), (4, 4, 12, 12)),
        (Box(0.98, 0, 0.01, 1), (16, 16), (16, 1, 0, 15)),  # thinner than a latent
        (Box(0.999, 0.999, 0.5, 0.5), (1, 1), (1, 1, 0, 0)),
    ],
)
def test_boxes_on_canvases(box, size, area):
    assert box.area(*size) == area
    h, w, top, left = area
    assert top >= 0 and top + h <= size[0] and left >= 0 and left + w <= size[1]


def test_boxes_that_are_none():
    for wrong in ((0, 0, 0, 1), (0, 0, 1, -1), (math.nan, 0, 1, 1), (0, math.inf, 1, 1)):
        with pytest.raises(ValueError, match="has no area"):
            Box(*wrong)
    for outside in ((1, 0, 0.5, 0.5), (-0.5, 0, 0.5, 1), (0, 1.2, 1, 1), (0, -2, 1, 1)):
        with pytest.raises(ValueError, match="lies outside of the canvas, .* move it"):
            Box(*outside)


def test_feather_ramps_inside_and_not_at_the_canvas_border():
    weights = feathered((4, 6, 0, 2), 8, 10, 2)
    across = [0, 0, 0.25, 0.75, 1, 1, 0.75, 0.25, 0, 0]
    down = [1, 1, 0.75, 0.25, 0, 0, 0, 0]  # its upper edge is the canvas's
    expected = torch.tensor([[a * d for a in across] for d in down])
    torch.testing.assert_close(weights, expected)
    hard = feathered((4, 6, 0, 2), 8, 10, 0)
    assert hard.sum() == 24 and hard[:4, 2:8].eq(1).all()


def mixture_of_diffusers(size: int, var: float = 0.01) -> list[float]:
    """The one-dimensional tile weights of arXiv:2302.02412's published code, its normalising constant included."""
    middle = (size - 1) / 2
    return [
        math.exp(-(x - middle) * (x - middle) / (size * size) / (2 * var)) / math.sqrt(2 * math.pi * var)
        for x in range(size)
    ]


def test_gaussians_are_those_of_mixture_of_diffusers():
    weights = gaussian((5, 8, 2, 1), 9, 12, MOD_VARIANCE)
    outer = torch.outer(*(torch.tensor(mixture_of_diffusers(n), dtype=torch.float64) for n in (5, 8)))
    inside = weights[2:7, 1:9]
    torch.testing.assert_close(inside / inside.sum(), outer / outer.sum())
    assert weights.count_nonzero() == 5 * 8 and inside.min() > 0
    edge = gaussian((9, 9, 0, 0), 9, 9, BOX_VARIANCE)
    assert edge[4, 4] == 1 and 0.1 < edge[0, 4] < 0.25


def test_masks():
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    weights = painted(mask, 8, 8, 0)
    assert weights.shape == (1, 8, 8) and weights[0, :, 4:].eq(1).all() and weights.sum() == 32
    soft = painted(mask, 8, 8, 2)
    assert (soft[0, 3].diff() >= 0).all() and 0.2 < soft[0, 3, 3] < 0.5 and soft[0, 3, 0] < 0.01
    assert soft[0].std(dim=0).max() < 1e-6  # borders are repeated: no fall-off along the canvas's edge
    batch = painted(torch.rand(3, 30, 50), 7, 5, 1)
    assert batch.shape == (3, 7, 5) and batch.min() >= 0 and batch.max() <= 1
    for wrong, message in (
        (torch.zeros(8, 8), "the mask is empty"),
        (torch.stack([mask, 0 * mask]), "mask 2 of 2 is empty"),
        (torch.ones(1, 1, 8, 8), r"shape \(1, 1, 8, 8\)"),
        (torch.full((8, 8), math.nan), "not numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            painted(wrong, 8, 8, 0)


def test_what_is_left_is_background_and_every_pixel_is_somebodys():
    generator = torch.Generator().manual_seed(0)
    for trial in range(50):
        x, y, w, h, feather, weight = torch.rand(6, generator=generator).tolist()
        regions = (
            Region(Box(x - 0.3, y - 0.3, 0.4 + w, 0.4 + h), feather=5 * feather, weight=0.1 + weight),
            Region(mask=torch.rand(2, 20, 30, generator=generator), fall_off="feather", feather=feather),
            Region(Box(0.2, 0.4, w + 0.1, h + 0.1), fall_off="gaussian", weight=3),
        )
        size = (7 + trial % 5, 9 + trial % 7)
        placed = [place for where in (Rest(regions), *regions) for place in where.placed(*size)]
        total = torch.zeros(2, *size)
        for area, weights in placed:
            if area is not None:  # nothing counts outside of its own crop
                inside = torch.zeros(size)
                inside[area[2] : area[2] + area[0], area[3] : area[3] + area[1]] = 1
                weights = weights * inside
            total += weights
        assert total.min() > 1e-3
        shares = style_map(regions, *size)
        torch.testing.assert_close(shares.sum(1), torch.ones(2, *size))


def test_a_share_of_the_background_stays_under_the_regions():
    """``share * background + (1 - share) * mixture`` at every pixel, both as averaged weights and as shares of one pass."""
    generator = torch.Generator().manual_seed(1)
    for trial in range(20):
        x, w, weight, share = torch.rand(4, generator=generator).tolist()
        regions = (
            Region(Box(x - 0.3, 0, 0.4 + w, 0.7), feather=2, weight=0.1 + weight, crop=False),
            Region(mask=torch.rand(2, 20, 30, generator=generator), weight=2),
        )
        size = (6 + trial % 3, 8)
        weights = {}
        for kept in (0.0, share):
            stack = torch.zeros(2, 3, *size)
            for i, where in enumerate((Rest(regions, kept), *regions)):
                for _, one in where.placed(*size):
                    stack[:, i] += one
            weights[kept] = stack / stack.sum(1, keepdim=True)
        expected = (1 - share) * weights[0.0]
        expected[:, 0] += share
        torch.testing.assert_close(weights[share], expected)
        torch.testing.assert_close(style_map(regions, *size, share), expected)
    full = Region(Box(0, 0, 1, 1), feather=0)
    ((area, weights),) = Rest((full,), 0.25).placed(4, 4)  # hidden without a share
    assert area is None
    torch.testing.assert_close(weights, torch.full((1, 4, 4), 1 / 3))  # against the region's 1: a quarter
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="share of the background"):
            Rest((full,), wrong)


def test_a_region_over_everything_leaves_no_background():
    full = Region(Box(0, 0, 1, 1), feather=4)
    assert Rest((full,)).placed(6, 6) == []
    half = Region(Box(0, 0, 0.5, 1), feather=0)
    ((area, weights),) = Rest((half,)).placed(4, 4)
    assert area is None and weights[0].tolist() == [[0, 0, 1, 1]] * 4
    assert background([torch.full((1, 2, 2), 0.75)] * 2).max() == 0  # overlaps do not make it negative


def test_crops_are_for_boxes():
    assert Region(Box(0, 0, 0.5, 1)).placed(8, 8)[0][0] == (8, 4, 0, 0)
    assert Region(Box(0, 0, 0.5, 1), crop=False).placed(8, 8)[0][0] is None
    assert Region(mask=torch.ones(8, 8)).placed(8, 8)[0][0] is None
    heavy = Region(Box(0, 0, 1, 1), weight=2.5, feather=0).placed(2, 2)[0][1]
    assert heavy.eq(2.5).all()
    for wrong, message in (
        ({}, "either a box or a mask"),
        ({"box": Box(0, 0, 1, 1), "fall_off": "cubic"}, "'cubic': choose feather or gaussian"),
        ({"box": Box(0, 0, 1, 1), "weight": 0.0}, "must be above 0"),
        ({"box": Box(0, 0, 1, 1), "feather": -1.0}, "must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            Region(**wrong)


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (17, 61), (40, 33), (8, 100)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_tiles_cover_the_canvas_and_have_one_size(size, overlap):
    rows = tiles(*size, 16, 16, overlap=overlap)
    covered = torch.zeros(size)
    for area in (area for row in rows for area in row):
        h, w, top, left = area
        assert (h, w) == (min(16, size[0]), 16) and top + h <= size[0] and left + w <= size[1]
        covered[top : top + h, left : left + w] += 1
    assert covered.min() >= 1
    for row in rows:
        for before, after in itertools.pairwise(row):
            assert before[3] + 16 - after[3] >= math.floor(16 * overlap)
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="overlap of tiles"):
            tiles(*size, 16, 16, overlap=wrong)


def test_parts_of_a_panorama_share_the_tiles_from_left_to_right():
    shares = [[area for area, _ in TileShare(i, 3, 16, 16).placed(16, 64)] for i in range(3)]
    row = tiles(16, 64, 16, 16, overlap=0.5)[0]
    assert [area for share in shares for area in share] == row
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(ValueError, match="a canvas 128 pixels wide has 1 tiles of 128 in a row, too few for 2 parts"):
        TileShare(0, 2, 16, 16).placed(16, 16)
