"""Style Region, Style Mix and Style Panorama: several styles and prompts on one canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from comfy_api.latest import io
from torch import Tensor

from ..dmm_core.bounding_boxes import covered, read_boxes
from ..dmm_core.region_check import box_warnings
from ..dmm_core.region_list import CROP, FULL, parse_regions
from ..dmm_core.regions import Box, Region, Rest, TileShare
from ..dmm_core.style_value import Style
from .host_model import model_info
from .region_canvas import bounding_boxes_input, canvas_report, list_input, picture_input, picture_size
from .region_patch import with_place
from .style_map import StyleMap, with_map
from .style_patch import STYLE
from .style_types import as_style, style_input

RegionType = io.Custom("DMM_REGION")
OWN_PROMPTS, ONE_PASS = "own prompts", "one pass"


@dataclass(frozen=True, eq=False)
class StyledRegion:
    """What travels on the wire."""

    place: Region | Rest | TileShare
    style: Style
    positive: list | None = None
    negative: list | None = None


def regions_input(least: int):
    return io.Autogrow.Input(
        "regions",
        io.Autogrow.TemplatePrefix(
            RegionType.Input("region", tooltip="A Style Region. A new socket appears when you use the last one."),
            prefix="region",
            min=least,
            max=100,
        ),
    )


def both_prompts() -> list:
    return [io.Conditioning.Output(display_name="positive"), io.Conditioning.Output(display_name="negative")]


def in_style(conditioning: list, style: Style) -> list:
    """A CONDITIONING in a style; entries that were given one of their own keep it."""
    return [[context, {STYLE: style, **entries}] for context, entries in conditioning]


class DMMRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        part = {"min": -2.0, "max": 3.0, "step": 0.01}
        return io.Schema(
            node_id="DMMRegion",
            display_name="Style Region",
            category="DMM/regions",
            description="A box, or a painted mask, with its own style and, if you like, its own prompt. Goes into Style Mix.",
            search_aliases=["regional prompt", "area", "mask style", "区域", "區域", "領域"],
            inputs=[
                style_input(),
                io.Conditioning.Input("positive", optional=True, tooltip="Its own prompt; without one, Style Mix's."),
                io.Conditioning.Input("negative", optional=True, tooltip="Its own negative; without one, Style Mix's."),
                io.Mask.Input("mask", optional=True, tooltip="The painted place, instead of the box."),
                io.Float.Input("x", default=0.0, **part, tooltip="Left edge of the box as a share of the canvas."),
                io.Float.Input("y", default=0.0, **part, tooltip="Upper edge of the box as a share of the canvas."),
                io.Float.Input("width", default=0.5, min=0.01, max=3.0, step=0.01, tooltip="A share of the canvas."),
                io.Float.Input("height", default=1.0, min=0.01, max=3.0, step=0.01, tooltip="A share of the canvas."),
                io.Combo.Input(
                    "fall_off",
                    options=["feather", "gaussian"],
                    tooltip="feather: full in the middle, soft at the edges. gaussian: a soft hill over the whole box.",
                ),
                io.Int.Input(
                    "feather", default=16, min=0, max=2048, step=8, tooltip="Width of the soft edge in pixels."
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Against overlapping regions.",
                ),
                io.Combo.Input(
                    "paint_on",
                    options=[CROP, FULL],
                    advanced=True,
                    tooltip=(
                        "own crop: a box is a small canvas of its own, with its whole prompt inside. whole canvas: the "
                        "prompt is painted everywhere and the box cut out of it. Masks always take the whole canvas."
                    ),
                ),
                io.Float.Input(
                    "feather_share",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Width of the soft edge as a share of the canvas's shorter side, so that it means the same at every size. "
                        "Above 0 it takes the place of feather."
                    ),
                ),
                bounding_boxes_input(
                    "A box in pixels, instead of x, y, width and height; needs the picture that it was drawn on. Several boxes are "
                    "one region, as a mask of them all."
                ),
                picture_input(),
            ],
            outputs=[RegionType.Output(display_name="region")],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        style,
        x,
        y,
        width,
        height,
        fall_off,
        feather,
        weight=1.0,
        paint_on=CROP,
        positive=None,
        negative=None,
        mask=None,
        feather_share=0.0,
        bboxes=None,
        picture=None,
    ) -> io.NodeOutput:
        size = picture_size(picture)
        box = None
        if mask is None:
            box, mask = box_or_mask(Box(x, y, width, height) if bboxes is None else bboxes, size)
        place = Region(
            box=box,
            mask=mask,
            fall_off=fall_off if mask is None else "feather",
            feather=feather / 8,
            weight=weight,
            crop=paint_on == CROP,
            feather_share=feather_share or None,
        )
        warnings = box_warnings("this region", box, size) if box is not None else []
        report = canvas_report(cls, warnings, picture if mask is None or picture is not None else mask)
        return io.NodeOutput(StyledRegion(place, as_style(style), positive, negative), ui=report)


def box_or_mask(place, size: tuple[int, int] | None) -> tuple[Box | None, Tensor | None]:
    """A Box, or bounding boxes from a wire, as (box, None), or (None, mask) of several. size: (height, width) of their picture.

    Raises ValueError when there is no box on the picture.
    """
    if isinstance(place, Box):
        return place, None
    boxes = pixel_boxes(place, size)
    if not boxes:
        raise ValueError(
            "bboxes hold no box on the picture: draw one, or disconnect them to use x, y, width and height"
        )
    return (boxes[0], None) if len(boxes) == 1 else (None, covered(boxes, *size))


def pixel_boxes(bboxes, size: tuple[int, int] | None) -> list[Box]:
    """Bounding boxes from a wire. Raises ValueError without the size (height, width) of their picture."""
    if size is None:
        raise ValueError(
            "bboxes are in pixels: connect the picture that they were drawn on to 'picture' (Create Bounding Boxes gives it as preview)"
        )
    return read_boxes(bboxes, *size)


def placed(parts: Sequence[StyledRegion], positive: list, negative: list) -> tuple[list, list]:
    """(positive, negative) with matching entries, one per part and prompt; the prompts that a part lacks are these."""
    sides = []
    for side, prompt in (("positive", positive), ("negative", negative)):
        entries = []
        for part in parts:
            own = getattr(part, side)
            entries += with_place(in_style(prompt if own is None else own, part.style), part.place)
        sides.append(entries)
    return sides[0], sides[1]


def mixed(background: Style, rest: Rest, regions: Sequence[StyledRegion], positive: list, negative: list):
    """(positive, negative): every region with its own prompt, over a background."""
    return placed([StyledRegion(rest, background), *regions], positive, negative)


def one_pass(background: Style, rest: Rest, regions: Sequence[StyledRegion], positive: list, negative: list):
    """(positive, negative): one prompt, and a map of styles inside a single forward.

    Raises ValueError for regions with prompts of their own.
    """
    if any(region.positive is not None or region.negative is not None for region in regions):
        raise ValueError(
            f"mode '{ONE_PASS}' paints one prompt for all: disconnect the prompts of the regions, clear those in region_list, or "
            f"choose '{OWN_PROMPTS}'"
        )
    styles = StyleMap(rest.regions, (background, *(r.style for r in regions)), rest.share)
    return with_map(positive, styles), with_map(negative, styles)


class StyleMix(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMStyleMix",
            display_name="Style Mix (Multi-Diffusers region)",
            category="DMM/regions",
            description=(
                "Paints several styles and prompts on one canvas: regions over a background. Connect both outputs to the "
                "sampler; a ControlNet may come before or after. Draw the regions in the node, or connect Style Regions."
            ),
            search_aliases=[
                "regional prompting",
                "mixture of diffusers",
                "multidiffusion",
                "style regions",
                "分区提示词",
                "區域提示詞",
                "領域別プロンプト",
                "draw regions",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The DMM model that will paint it: its styles are the choice."),
                io.Conditioning.Input("positive", tooltip="Prompt of the background."),
                io.Conditioning.Input("negative", tooltip="Negative prompt of the background."),
                style_input("background", tooltip="Style where no region is. A name, shares or a schedule."),
                io.Combo.Input(
                    "mode",
                    options=[OWN_PROMPTS, ONE_PASS],
                    tooltip=(
                        f"{OWN_PROMPTS}: every region is denoised with its prompt and style (Mixture of Diffusers). "
                        f"{ONE_PASS}: one prompt; the style changes from place to place inside one pass, at little cost."
                    ),
                ),
                regions_input(0),
                list_input(),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of the model, for the prompts in region_list. Without it they share positive and negative.",
                ),
                bounding_boxes_input(
                    "Boxes in pixels for region_list, in its order, instead of its own; need the picture that they were drawn on."
                ),
                picture_input(),
                io.Float.Input(
                    "background_share",
                    default=0.0,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What the background keeps of every pixel under the regions, with its prompt and style: 0 nothing, 0.3 ties the "
                        "picture together, above 0.5 the regions only tint it."
                    ),
                ),
                io.String.Input(
                    "common_prompt",
                    default="",
                    multiline=False,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Put before every prompt of region_list, such as 'a street at night, rain'. Prompts of connected Style Regions "
                        "stay as they are."
                    ),
                ),
            ],
            outputs=both_prompts(),
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        background,
        mode,
        regions=None,
        region_list="",
        clip=None,
        bboxes=None,
        picture=None,
        background_share=0.0,
        common_prompt="",
    ) -> io.NodeOutput:
        size = picture_size(picture)
        background, regions = as_style(background), connected(regions)
        drawn = listed(region_list, clip, bboxes, size, common_prompt)
        if not (regions or drawn):
            raise ValueError(
                "there is no region: draw one on the canvas, write one into region_list or connect a Style Region"
            )
        everyone = [*regions, *drawn]
        check(model, [background, *(region.style for region in everyone)])
        rest = Rest(tuple(region.place for region in everyone), background_share)
        function = one_pass if mode == ONE_PASS else mixed
        warnings = [
            line
            for i, region in enumerate(drawn, 1)
            for line in box_warnings(f"region {i} of the list", region.place.box, size)
        ]
        return io.NodeOutput(
            *function(background, rest, everyone, positive, negative), ui=canvas_report(cls, warnings, picture)
        )


def connected(regions: dict | None) -> list[StyledRegion]:
    """What ``regions_input`` gave."""
    return [region for region in (regions or {}).values() if region is not None]


def listed(text: str, clip, bboxes, size: tuple[int, int] | None, common: str = "") -> list[StyledRegion]:
    """The regions of a list, with their prompts encoded by ``clip``, in the places of ``bboxes`` if there are any.

    size: (height, width) of the picture of the boxes. common: put before every prompt that a region has of its own. Raises ValueError for
    a prompt without a text encoder, and for another number of boxes than of regions.
    """
    entries = parse_regions(text)
    places = [entry.place for entry in entries]
    if bboxes is not None:
        boxes = pixel_boxes(bboxes, size)
        if len(boxes) != len(entries):
            raise ValueError(
                f"bboxes hold {len(boxes)} boxes on the picture, and region_list {len(entries)} regions: the first box is the first "
                "region's, so there must be as many"
            )
        places = [replace(place, box=box) for place, box in zip(places, boxes)]
    regions = []
    for number, (entry, place) in enumerate(zip(entries, places), 1):
        name = f"region {number} of the list"
        prompt = ", ".join(part for part in (common.strip().rstrip(","), entry.prompt) if part) if entry.prompt else ""
        positive, negative = (encoded(name, text, clip) for text in (prompt, entry.negative))
        regions.append(StyledRegion(place, entry.style, positive, negative))
    return regions


def encoded(name: str, prompt: str, clip) -> list | None:
    """The CONDITIONING of a prompt, as CLIPTextEncode's; None for none. Raises ValueError without a text encoder."""
    if not prompt:
        return None
    if clip is None:
        shown = prompt if len(prompt) <= 40 else prompt[:39] + "\u2026"
        raise ValueError(
            f"{name} has a prompt of its own, '{shown}': connect the model's CLIP to 'clip', or clear the prompt"
        )
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def check(model, styles: Sequence[Style]) -> None:
    """Raise ValueError unless the model knows all these styles."""
    known = model_info(model).known
    for style in styles:
        style.check(known)


class StylePanorama(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMPanorama",
            display_name="Style Panorama",
            category="DMM/regions",
            description=(
                "Paints a canvas larger than the model knows in overlapping tiles (Mixture of Diffusers). Regions share it from "
                "left to right, each with its style and prompt; their boxes and masks are not used."
            ),
            search_aliases=["tiled diffusion", "wide picture", "mixture of diffusers", "全景", "パノラマ"],
            inputs=[
                io.Model.Input("model", tooltip="The DMM model that will paint it: its styles are the choice."),
                io.Conditioning.Input("positive", tooltip="For regions without a prompt of their own."),
                io.Conditioning.Input("negative", tooltip="Negative prompt of the background."),
                io.Int.Input(
                    "tile_width", default=512, min=32, max=8192, step=8, tooltip="Pixels. The model's own size."
                ),
                io.Int.Input(
                    "tile_height", default=512, min=32, max=8192, step=8, tooltip="Pixels. The model's own size."
                ),
                io.Float.Input(
                    "overlap",
                    default=0.5,
                    min=0.0,
                    max=0.9,
                    step=0.05,
                    tooltip="Least share that neighbouring tiles overlap.",
                ),
                regions_input(1),
            ],
            outputs=both_prompts(),
        )

    @classmethod
    def execute(cls, model, positive, negative, tile_width, tile_height, overlap, regions) -> io.NodeOutput:
        regions = connected(regions)
        check(model, [region.style for region in regions])
        parts = [
            replace(region, place=TileShare(i, len(regions), tile_height // 8, tile_width // 8, overlap))
            for i, region in enumerate(regions)
        ]
        return io.NodeOutput(*placed(parts, positive, negative))


NODES = [DMMRegion, StyleMix, StylePanorama]
