"""Style Region, Style Mix and Style Panorama: several styles and prompts on one canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from comfy_api.latest import io

from ..dmm_core.regions import Box, Region, Rest, TileShare
from ..dmm_core.style_value import Style
from .host_model import model_info
from .region_patch import with_place
from .style_map import StyleMap, with_map
from .style_patch import STYLE
from .style_types import as_style, style_input

RegionType = io.Custom("DMM_REGION")
OWN_PROMPTS, ONE_PASS = "own prompts", "one pass"
CROP, FULL = "own crop", "whole canvas"


@dataclass(frozen=True, eq=False)
class StyledRegion:
    """What travels on the wire."""

    place: Region | Rest | TileShare
    style: Style
    positive: list | None = None
    negative: list | None = None


def regions_input():
    return io.Autogrow.Input(
        "regions", io.Autogrow.TemplatePrefix(RegionType.Input("region"), prefix="region", min=1, max=100)
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
            ],
            outputs=[RegionType.Output(display_name="region")],
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
    ) -> io.NodeOutput:
        place = Region(
            box=Box(x, y, width, height) if mask is None else None,
            mask=mask,
            fall_off=fall_off if mask is None else "feather",
            feather=feather / 8,
            weight=weight,
            crop=paint_on == CROP,
        )
        return io.NodeOutput(StyledRegion(place, as_style(style), positive, negative))


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


def mixed(background: Style, regions: Sequence[StyledRegion], positive: list, negative: list) -> tuple[list, list]:
    """Every region with its own prompt, over a background."""
    rest = Rest(tuple(region.place for region in regions))
    return placed([StyledRegion(rest, background), *regions], positive, negative)


def one_pass(background: Style, regions: Sequence[StyledRegion], positive: list, negative: list) -> tuple[list, list]:
    """One prompt, and a map of styles inside a single forward. Raises ValueError for regions with prompts of their own."""
    if any(region.positive is not None or region.negative is not None for region in regions):
        raise ValueError(
            f"mode '{ONE_PASS}' paints one prompt for all: disconnect the prompts of the regions, or choose '{OWN_PROMPTS}'"
        )
    styles = StyleMap(tuple(r.place for r in regions), (background, *(r.style for r in regions)))
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
                "sampler; a ControlNet may come before or after."
            ),
            search_aliases=[
                "regional prompting",
                "mixture of diffusers",
                "multidiffusion",
                "style regions",
                "分区提示词",
                "區域提示詞",
                "領域別プロンプト",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The DMM model that will paint it: its styles are the choice."),
                io.Conditioning.Input("positive", tooltip="Prompt of the background."),
                io.Conditioning.Input("negative"),
                style_input("background", tooltip="Style where no region is. A name, shares or a schedule."),
                io.Combo.Input(
                    "mode",
                    options=[OWN_PROMPTS, ONE_PASS],
                    tooltip=(
                        f"{OWN_PROMPTS}: every region is denoised with its prompt and style (Mixture of Diffusers). "
                        f"{ONE_PASS}: one prompt; the style changes from place to place inside one pass, at little cost."
                    ),
                ),
                regions_input(),
            ],
            outputs=both_prompts(),
        )

    @classmethod
    def execute(cls, model, positive, negative, background, mode, regions) -> io.NodeOutput:
        background, regions = as_style(background), [region for region in regions.values() if region is not None]
        check(model, [background, *(region.style for region in regions)])
        function = one_pass if mode == ONE_PASS else mixed
        return io.NodeOutput(*function(background, regions, positive, negative))


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
                io.Conditioning.Input("negative"),
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
                regions_input(),
            ],
            outputs=both_prompts(),
        )

    @classmethod
    def execute(cls, model, positive, negative, tile_width, tile_height, overlap, regions) -> io.NodeOutput:
        regions = [region for region in regions.values() if region is not None]
        check(model, [region.style for region in regions])
        parts = [
            replace(region, place=TileShare(i, len(regions), tile_height // 8, tile_width // 8, overlap))
            for i, region in enumerate(regions)
        ]
        return io.NodeOutput(*placed(parts, positive, negative))


NODES = [DMMRegion, StyleMix, StylePanorama]
