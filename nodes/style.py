"""Style Selector: paint with one of the styles in a DMM model."""

from __future__ import annotations

from comfy_api.latest import io

from ..dmm_core.style_value import NO_STYLE, Mix, Strength
from .host_model import styled


class StyleSelector(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMStyleSelector",
            display_name="Style Selector",
            category="DMM",
            description="Makes a DMM model paint in one of its styles. A later Style Selector replaces an earlier one.",
            search_aliases=["dmm style", "choose style", "style picker", "风格", "風格", "スタイル", "스타일"],
            inputs=[
                io.Model.Input("model", tooltip="From Load DMM Model."),
                io.String.Input("style", default=NO_STYLE, tooltip=f"A style of the model by name, or '{NO_STYLE}'."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="1 is the style as trained, 0 no style; above 1 exaggerates it.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, style, strength) -> io.NodeOutput:
        return io.NodeOutput(styled(model, Strength(Mix(((style, 1.0),)), strength)))


NODES = [StyleSelector]
