"""Add DMM Styles to Model: the styles of a file put beside any MODEL of their architecture."""

from __future__ import annotations

from comfy_api.latest import io

from ..training.files.model_files import change_stamp
from . import host_model, paths


class AddStyles(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMAddStyles",
            display_name="Add DMM Styles to Model",
            category="DMM",
            description=(
                "Gives a model the styles of a file that holds styles alone, as a LoRA loader gives it a LoRA. Without a style picked, the "
                "model paints as before."
            ),
            search_aliases=["load styles", "style add-on", "style lora", "styles only"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From any loader, with or without LoRAs: the model that the styles were made for, or a relative.",
                ),
                io.Combo.Input(
                    "styles",
                    options=paths.style_files(),
                    tooltip="From models/dmm_styles and output/dmm_styles, where Save DMM Model puts styles only.",
                ),
            ],
            outputs=[io.Model.Output()],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, styles, **_):
        return (styles, change_stamp(paths.style_file_path(styles)))

    @classmethod
    def execute(cls, model, styles) -> io.NodeOutput:
        model, base = host_model.with_added_styles(model, paths.style_file_path(styles))
        names = list(host_model.model_info(model).known)
        # In the page the styles stand on cards.
        return io.NodeOutput(
            model, ui={"text": [f"{len(names)} styles: {', '.join(names)}\n{base}"], "remarks": [base]}
        )


NODES = [AddStyles]
