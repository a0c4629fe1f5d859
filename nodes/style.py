"""Style Selector: paint with one of the styles in a DMM model."""

from __future__ import annotations

from comfy_api.latest import io

from ..dmm_core.style import no_style_row, style_row
from . import style_patch
from .host_model import model_info

NO_STYLE = "none"


def style_index(names: list[str], wanted: str) -> int:
    """The style that a user means: its exact name, or the only one that differs in case and outer spaces alone.

    Raises ValueError naming the styles there are.
    """
    if wanted in names:
        return names.index(wanted)
    alike = [i for i, name in enumerate(names) if name.strip().casefold() == wanted.strip().casefold()]
    if len(alike) != 1:
        known = ", ".join([*names, NO_STYLE]) if names else f"none at all (a plain checkpoint); only '{NO_STYLE}' works"
        raise ValueError(f"unknown style '{wanted}'. The styles of this model: {known}")
    return alike[0]


class StyleSelector(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMStyleSelector",
            display_name="Style Selector",
            category="DMM",
            description="Makes a DMM model paint in one of its styles. A later Style Selector replaces an earlier one.",
            search_aliases=["dmm style", "choose style"],
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
        names = model_info(model).style_names
        if style == NO_STYLE:
            row = no_style_row(len(names))
        else:
            row = style_row(len(names), style_index(names, style), strength)
        model = model.clone()
        if names:
            style_patch.set_style(model, row)
        return io.NodeOutput(model)


NODES = [StyleSelector]
