"""Apply Style and Style for Prompt: put a style on a MODEL, for everything, or on one CONDITIONING, where it wins."""

from __future__ import annotations

import node_helpers
from comfy_api.latest import io

from . import style_patch
from .host_model import model_info, styled
from .style_types import as_style, style_input


class ApplyStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMApplyStyle",
            display_name="Apply Style",
            category="DMM/style",
            description="Makes a DMM model paint in a style, a blend or a schedule. A later one replaces an earlier one.",
            search_aliases=["style blend", "style schedule"],
            inputs=[io.Model.Input("model", tooltip="From Load DMM Model."), style_input(multiline=True)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, style) -> io.NodeOutput:
        return io.NodeOutput(styled(model, as_style(style)))


class StyleForPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMStyleForPrompt",
            display_name="Style for Prompt",
            category="DMM/style",
            description=(
                "Gives one prompt a style of its own, whatever the model's is. On the negative prompt it steers away from "
                "that style (style guidance); 'none' there strengthens the positive prompt's style."
            ),
            search_aliases=["style conditioning", "style guidance", "negative style"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt that is painted in this style."),
                io.Model.Input("model", tooltip="The DMM model that will paint it: its styles are the choice."),
                style_input(multiline=True),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning, model, style) -> io.NodeOutput:
        style = as_style(style)
        style.check(model_info(model).known)
        return io.NodeOutput(node_helpers.conditioning_set_values(conditioning, {style_patch.STYLE: style}))


NODES = [ApplyStyle, StyleForPrompt]
