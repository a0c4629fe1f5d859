"""Style Sheet, Style Travel and Label Styles: one batch, same noise, another style per picture."""

from __future__ import annotations

import math

from comfy_api.latest import io
from PIL import Image

from ..dmm_core.style_value import NO_STYLE, Blend, Mix, PerItem, Style, parse_style
from ..training.paint.images import grid, to_pictures, to_pixels
from .host_model import model_info, styled
from .style_types import StyleType


def style_lines(text: str) -> list[Style]:
    """One style per line that is not empty."""
    return [parse_style(line) for line in text.splitlines() if line.strip()]


def per_item(model, latent: dict, styles: list[Style]) -> tuple:
    """(MODEL that paints picture i in style i, LATENT with each picture once per style and the same noise, the style)."""
    style = PerItem(tuple(styles))
    model = styled(model, style)
    samples, count = latent["samples"], len(styles)
    repeated = {**latent, "samples": samples.repeat_interleave(count, 0)}
    # The host draws noise per index, so equal indices share it.
    indices = latent.get("batch_index") or range(len(samples))
    repeated["batch_index"] = [index for index in indices for _ in range(count)]
    mask = latent.get("noise_mask")
    if mask is not None and len(mask) > 1:
        repeated["noise_mask"] = mask.repeat_interleave(count, 0)
    return model, repeated, style


LATENT_TIP = "An empty latent, or a picture to paint over. Every style starts from it and from the same noise."


class StyleSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMStyleSheet",
            display_name="Style Sheet",
            category="DMM/style",
            description="The same prompt in every style of the model, in one batch.",
            search_aliases=["all styles", "style grid", "compare styles", "对比", "一览", "一覽", "一覧"],
            inputs=[
                io.Model.Input("model", tooltip="From Load DMM Model."),
                io.Latent.Input("latent", tooltip=LATENT_TIP),
                io.String.Input(
                    "styles",
                    default="",
                    multiline=True,
                    tooltip="One style, blend or schedule per line. Empty: every style of the model.",
                ),
                io.Boolean.Input("with_none", default=False, tooltip="Begin with a picture in no style."),
            ],
            outputs=[io.Model.Output(), io.Latent.Output(), StyleType.Output(display_name="style")],
        )

    @classmethod
    def execute(cls, model, latent, styles, with_none) -> io.NodeOutput:
        chosen = style_lines(styles) or [Mix(((name, 1.0),)) for name in model_info(model).known]
        if with_none:
            chosen.insert(0, Mix(((NO_STYLE, 1.0),)))
        if not chosen:
            raise ValueError("this MODEL has no styles (it is a plain checkpoint): use one from Load DMM Model")
        return io.NodeOutput(*per_item(model, latent, chosen))


class StyleTravel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMStyleTravel",
            display_name="Style Travel",
            category="DMM/style",
            description="An animation, or a strip, that wanders from style to style: one picture per frame, same noise.",
            search_aliases=["style interpolation", "style animation", "morph"],
            inputs=[
                io.Model.Input("model", tooltip="From Load DMM Model."),
                io.Latent.Input("latent", tooltip=LATENT_TIP),
                io.String.Input(
                    "stops",
                    default="ink\ncandy",
                    multiline=True,
                    tooltip="The styles to pass, one per line; at least two.",
                ),
                io.Int.Input(
                    "frames", default=8, min=2, max=1000, tooltip="Pictures in all, first and last stop included."
                ),
            ],
            outputs=[io.Model.Output(), io.Latent.Output(), StyleType.Output(display_name="style")],
        )

    @classmethod
    def execute(cls, model, latent, stops, frames) -> io.NodeOutput:
        return io.NodeOutput(*per_item(model, latent, travel(style_lines(stops), frames)))


def travel(stops: list[Style], frames: int) -> list[Style]:
    """``frames`` styles evenly along the way through ``stops``. Raises ValueError for fewer than two stops."""
    if len(stops) < 2:
        raise ValueError(f"a travel needs at least two stops, got {len(stops)}: write one style per line")
    styles = []
    for frame in range(frames):
        place = frame * (len(stops) - 1) / (frames - 1)
        leg = min(int(place), len(stops) - 2)
        share = place - leg
        styles.append(stops[leg + round(share)] if share in (0, 1) else Blend(stops[leg], stops[leg + 1], share))
    return styles


class LabelStyles(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMLabelStyles",
            display_name="Label Styles",
            category="DMM/style",
            description="One sheet of pictures, each with its style's name above it.",
            search_aliases=["contact sheet", "image grid", "style labels"],
            inputs=[
                io.Image.Input("images", tooltip="The pictures of one sheet, in the order of the styles."),
                StyleType.Input("style", tooltip="From Style Sheet or Style Travel."),
                io.String.Input("title", default="", tooltip="Stands above the sheet."),
                io.Int.Input("columns", default=0, min=0, max=100, tooltip="0: about as many as rows."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, images, style, title, columns) -> io.NodeOutput:
        names = [str(one) for one in style.styles] if isinstance(style, PerItem) else [str(style)]
        labels = [names[i % len(names)] for i in range(len(images))]
        return io.NodeOutput(to_pixels([label_sheet(images, labels, title, columns)]))


def label_sheet(images, labels: list[str], title: str, columns: int) -> Image.Image:
    """IMAGE (B, H, W, 3) in 0..1 -> one picture, every image under its label."""
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    pictures = to_pictures(images)
    size = max(15, pictures[0].width // 20)
    empty = -len(pictures) % columns
    pictures, labels = [*pictures, *[None] * empty], [*labels, *[""] * empty]
    rows = []
    for i in range(0, len(pictures), columns):  # a sheet per row, so that the labels of a row stand on one line
        rows.append([grid([pictures[i : i + columns]], col_labels=labels[i : i + columns], font_size=size)])
    return grid(rows, title=title, font_size=size)


NODES = [StyleSheet, StyleTravel, LabelStyles]
