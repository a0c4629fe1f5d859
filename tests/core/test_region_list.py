"""Lists of regions in JSON, boxes in pixels, and warnings about boxes: against regions written by hand and closed forms."""

import json
import math

import pytest
import torch
from comfyui_dmm.dmm_core.bounding_boxes import covered, read_boxes
from comfyui_dmm.dmm_core.region_check import box_warnings
from comfyui_dmm.dmm_core.region_list import parse_regions
from comfyui_dmm.dmm_core.regions import Box, Region, style_map
from comfyui_dmm.dmm_core.style_value import Strength, parse_style

INK = {"style": "ink", "x": 0.0, "y": 0.0, "w": 0.5, "h": 1.0}


def one(**changes):
    (region,) = parse_regions(json.dumps([{**INK, **changes}]))
    return region


# --- what a list means ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (13, 40), (64, 24)])
@pytest.mark.parametrize("box", [(0, 0, 0.5, 1), (0.3, 0.2, 0.45, 0.6), (-0.2, 0.5, 0.7, 0.9)])
@pytest.mark.parametrize("fall_off", ["feather", "gaussian"])
def test_masks_equal_those_of_the_numeric_inputs(size, box, fall_off):
    """Bit for bit: the same box with its feather in latents, as Style Region gives it, and as a share of the shorter side."""
    latents = 2.5
    x, y, w, h = box
    listed = one(x=x, y=y, w=w, h=h, fall_off=fall_off, feather=latents / min(size), weight=2).place
    numeric = Region(Box(*box), fall_off=fall_off, feather=listed.feather_share * min(size), weight=2.0)
    assert listed.feather_share * min(size) == pytest.approx(latents, abs=1e-12)
    assert torch.equal(listed.coverage(*size), numeric.coverage(*size))
    (area, weights), (area_by_hand, by_hand) = (r.placed(*size)[0] for r in (listed, numeric))
    assert area == area_by_hand and torch.equal(weights, by_hand)
    assert torch.equal(style_map([listed], *size), style_map([numeric], *size))


def test_a_feather_in_shares_is_the_ramp_in_closed_form():
    """A quarter of 16 latents from the one inner edge of the left half: (distance + 1/2) / 4. Tolerance: float32's rounding."""
    cover = one(feather=0.25).place.coverage(16, 16)
    ramp = [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125] + [0] * 8
    torch.testing.assert_close(cover, torch.tensor(ramp, dtype=torch.float32).expand(1, 16, 16), rtol=0, atol=1e-6)
    larger = one(feather=0.25).place.coverage(16, 64)  # still a share of the shorter side
    assert larger[0, 0, 24:32].gt(0).all() and (larger[0, 0, 28:32] < 1).all() and (larger[0, 0, :28] == 1).all()


def test_a_mask_s_feather_in_shares():
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    shares, latents = Region(mask=mask, feather_share=0.25), Region(mask=mask, feather=4.0)
    assert torch.equal(shares.coverage(16, 24), latents.coverage(16, 24))


def test_every_key():
    text = """[
      {"style": "ink:0.7, pen:0.3", "x": 0.25, "y": 0, "w": 0.5, "h": 1, "strength": 0.5, "weight": 3, "feather": 0,
       "fall_off": "gaussian", "paint_on": "whole canvas", "prompt": " a cat ", "negative": "dog"},
      {"x": 0, "y": 0.5, "w": 1, "h": 0.5}
    ]"""
    first, second = parse_regions(text)
    assert first.style == Strength(parse_style("ink:0.7, pen:0.3"), 0.5) and (first.prompt, first.negative) == (
        "a cat",
        "dog",
    )
    place = first.place
    assert (place.box, place.weight, place.fall_off, place.crop) == (Box(0.25, 0, 0.5, 1), 3, "gaussian", False)
    assert place.feather_share == 0
    assert second.style == parse_style("none") and second.prompt == second.negative == ""
    place = second.place
    assert (place.box, place.weight, place.fall_off, place.crop) == (Box(0, 0.5, 1, 0.5), 1, "feather", True)
    assert place.feather_share == 0.05


@pytest.mark.parametrize("text", ["", "  \n", "[]"])
def test_no_regions(text):
    assert parse_regions(text) == ()


@pytest.mark.parametrize(
    "text, words",
    [
        ("ink", "is not JSON.*line 1, column 1: 'ink'"),
        ("[{},]", "is not JSON"),
        ('[\n{"x": 0,\n "y" 1}]', "line 3.*'y' 1|line 3, column 6: ' \"y\" 1"),
        ("[" * 100_000, "cannot be read|is not JSON"),
        ('[{"x": ' + "9" * 5000 + "}]", "cannot be read|lacks"),
        ('{"x": 0}', r"the list of regions is \{'x': 0\}: write \["),
        ("7", "the list of regions is 7"),
        ("[7]", "region 1 of the list is 7"),
        (json.dumps([INK, {"x": 0, "y": 0}]), "region 2 of the list lacks w, h"),
        (json.dumps([{**INK, "width": 1}]), "region 1 of the list has 'width', which is no part of a region"),
        (json.dumps([{**INK, "x": "0.5"}]), "x of region 1 of the list is '0.5': it must be a number"),
        (json.dumps([{**INK, "x": True}]), "x of region 1 of the list is True"),
        (json.dumps([{**INK, "h": math.nan}]), "h of region 1 of the list is nan"),
        (json.dumps([{**INK, "w": math.inf}]), "w of region 1 of the list is inf"),
        (json.dumps([{**INK, "w": 10**400}]), "w of region 1 of the list is 1000"),
        (json.dumps([{**INK, "w": 0}]), "region 1 of the list: a box at .* has no area"),
        (json.dumps([{**INK, "x": 1.5}]), "region 1 of the list: a box at .* lies outside of the canvas"),
        (json.dumps([{**INK, "strength": -1}]), "strength of region 1 of the list is -1: it must be in 0 to 4"),
        (json.dumps([{**INK, "weight": 0}]), "weight of region 1 of the list is 0"),
        (json.dumps([{**INK, "feather": 16}]), "feather of region 1 of the list is 16: it must be in 0 to 1"),
        (json.dumps([{**INK, "style": ""}]), "region 1 of the list: the style is empty"),
        (json.dumps([{**INK, "style": 3}]), "style of region 1 of the list is 3: it must be a text"),
        (json.dumps([{**INK, "prompt": None}]), "prompt of region 1 of the list is None"),
        (json.dumps([{**INK, "fall_off": "hard"}]), "fall_off of region 1 of the list is 'hard': choose feather or"),
        (json.dumps([{**INK, "paint_on": "crop"}]), "paint_on of region 1 of the list is 'crop': choose own crop or"),
        (json.dumps([INK] * 101), "the list has 101 regions: at most 100"),
    ],
)
def test_what_cannot_be_read_is_named(text, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_regions(text)
    assert len(str(error.value)) < 400


# --- boxes in pixels --------------------------------------------------------------------------------------------------


def pixels(x, y, width, height, **more):
    return {"x": x, "y": y, "width": width, "height": height, **more}


@pytest.mark.parametrize("nest", [lambda b: b, lambda b: [b], lambda b: [[b], [pixels(0, 0, 1, 1)]]])
def test_boxes_in_the_host_s_forms(nest):
    assert read_boxes(nest(pixels(64, 0, 64, 32, metadata={"desc": "cat"})), 128, 256) == [Box(0.25, 0, 0.25, 0.25)]


def test_boxes_of_nothing_are_left_out():
    boxes = [pixels(0, 0, 0, 9), pixels(300, 0, 9, 9), pixels(-5, 0, 5, 9), pixels(-5, 0, 10, 64)]
    assert read_boxes(boxes, 128, 256) == [Box(-5 / 256, 0, 10 / 256, 0.5)]
    assert read_boxes([], 128, 256) == read_boxes([[]], 128, 256) == []


@pytest.mark.parametrize("wrong", ["box", 3, [3], [{"x": 0}], pixels(0, 0, "a", 1), pixels(0, math.nan, 1, 1)])
def test_boxes_that_are_none(wrong):
    with pytest.raises(ValueError, match="bboxes are|bounding box 1 is"):
        read_boxes(wrong, 128, 128)


def test_several_boxes_are_a_mask():
    mask = covered(read_boxes([pixels(0, 0, 8, 4), pixels(4, 2, 8, 4)], 16, 16), 16, 16)
    expected = torch.zeros(16, 16)
    expected[:4, :8], expected[2:6, 4:12] = 1, 1
    assert torch.equal(mask, expected)


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_the_share_of_a_box_on_the_canvas():
    assert Box(0.2, 0.3, 0.5, 0.5).inside == pytest.approx(1)
    assert Box(-0.5, 0.5, 1, 1).inside == pytest.approx(0.25)
    assert Box(-1, -1, 3, 3).inside == pytest.approx(1 / 9)


def test_warnings():
    assert box_warnings("region 1", Box(0.5, 0, 0.9, 1), (512, 512)) == []
    (off,) = box_warnings("region 1", Box(0.8, 0, 1, 1), (512, 512))
    assert off == "region 1: 80% of the box lies outside of the canvas, and is not painted"
    (thin,) = box_warnings("region 1", Box(0, 0, 0.03, 1), (512, 512))
    assert "1.9 latents of a canvas 512 pixels wide" in thin
    assert box_warnings("region 1", Box(0, 0, 0.03, 1), (512, 1024)) == []
    (flat,) = box_warnings("region 1", Box(0, 0, 1, 0.1), (128, 512))
    assert "1.6 latents of a canvas 128 pixels high" in flat
    (unknown,) = box_warnings("region 1", Box(0, 0, 0.02, 1))
    assert "under 2 latents on canvases up to 800 pixels wide" in unknown
    assert box_warnings("region 1", Box(0, 0, 0.04, 1)) == []
