"""Fold Style into Weights: the MODEL's style as patches of its weights, so that painting costs what the UNet costs."""

from __future__ import annotations

from comfy_api.latest import io, ui

from . import style_patch
from .folded import with_folded
from .host_model import model_info
from .weights import HostWeights


class FoldStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMFoldStyle",
            display_name="Fold Style into Weights",
            category="DMM/style",
            description=(
                "For models with a style bank: puts the MODEL's style into its weights, as a LoRA would be. Painting then takes no "
                "more time than without a bank; changing the style takes as long as loading a LoRA. Styles of prompts and regions "
                "still work. Save DMM Model saves the model as it was."
            ),
            search_aliases=["bake style", "faster", "style bank"],
            inputs=[io.Model.Input("model", tooltip="With its style chosen, by Style Selector or Apply Style.")],
            outputs=[io.Model.Output()],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        if not model_info(model).styles:
            raise ValueError("this MODEL has no styles (it is a plain checkpoint): there is nothing to fold")
        folded = with_folded(model, HostWeights(model, styles=True))
        said = f"'{style_patch.chosen_style(model)}' is in the weights"
        if style_patch.folded_of(folded) is None:
            said = "this model has no style bank: its styles cost next to nothing, and there is nothing to fold"
        return io.NodeOutput(folded, ui=ui.PreviewText(said))


NODES = [FoldStyle]
