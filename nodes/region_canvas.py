"""What a node with a canvas (web/js/region_canvas.js) takes, and what it tells it after a run."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

REPORT = "dmm_canvas"
"""In what a node sends to the page: [{"warnings": [text], "picture": a picture of the host's temporary folder or None}]."""

BoundingBoxType = io.Custom("BOUNDING_BOX")


def list_input():
    return io.String.Input(
        "region_list",
        default="",
        multiline=True,
        optional=True,
        tooltip=(
            "More regions, drawn on the canvas or written as JSON: "
            '[{"style": "ink", "x": 0, "y": 0, "w": 0.5, "h": 1, "strength": 1, "feather": 0.05, "prompt": ""}]. Sides are shares of '
            "the canvas, feather a share of its shorter side. Connected regions come first, then these; where they overlap all of them "
            "paint, by their weight. A prompt or negative of their own needs clip; without one they share those of this node."
        ),
    )


def bounding_boxes_input(tooltip: str):
    # Without forceInput the page would give it the widgets of one box.
    return BoundingBoxType.Input("bboxes", optional=True, tooltip=tooltip, extra_dict={"forceInput": True})


def picture_input():
    return io.Image.Input(
        "picture",
        optional=True,
        tooltip=(
            "Shown under the boxes after a run, and the size that bboxes are measured on. It is not painted. Without it the canvas shows "
            "the last picture that the graph made."
        ),
    )


def picture_size(picture: Tensor | None) -> tuple[int, int] | None:
    """(height, width) in pixels of an IMAGE (B, H, W, 3); None without one."""
    return None if picture is None else (picture.shape[1], picture.shape[2])


def canvas_report(cls, warnings: list[str], picture: Tensor | None) -> dict:
    """What the canvas shows after a run. picture: an IMAGE (B, H, W, 3) or a MASK (B, H, W), of which the first is shown."""
    saved = None
    if picture is not None:
        first = picture if picture.ndim != 2 else picture[None]
        first = first[:1] if first.ndim == 4 else first[:1, ..., None].expand(-1, -1, -1, 3)
        saved = ui.PreviewImage(first, cls=cls).as_dict()["images"][0]
    return {REPORT: [{"warnings": warnings, "picture": saved}]}
