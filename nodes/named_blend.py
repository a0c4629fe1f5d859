"""Name a Blend: a mix of styles becomes a style of the model itself."""

from __future__ import annotations

from comfy_api.latest import io

from ..dmm_core.metadata import StyleInfo, check_new_text
from .host_model import with_blend
from .style_types import as_style, style_input


class NameBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMNameBlend",
            display_name="Name a Blend",
            category="DMM/style",
            description=(
                "Adds a blend to a DMM model as a style with a name. Use it at once by that name; Save DMM Model writes it "
                "into the file beside the learned styles."
            ),
            search_aliases=["save blend", "new style", "custom style"],
            inputs=[
                io.Model.Input("model", tooltip="From Load DMM Model. Save DMM Model keeps the named blend."),
                style_input(multiline=True, default="ink:0.5, candy:0.5"),
                io.String.Input("name", default="my blend", tooltip="The name of the new style."),
                io.String.Input(
                    "description",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="What it looks like, for whoever picks it.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, style, name, description="") -> io.NodeOutput:
        style = as_style(style)
        check_new_text("name", name.strip())
        check_new_text("description", description)
        return io.NodeOutput(with_blend(model, style, StyleInfo(name, description=description or str(style))))


NODES = [NameBlend]
