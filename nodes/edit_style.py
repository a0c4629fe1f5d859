"""Edit Style: another name, description, picture or licence for a style of a model."""

from __future__ import annotations

from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..dmm_core.metadata import check_new_text
from ..training.paint.thumbnails import thumbnail_uri
from .host_model import with_edited_style


def picture(image: Tensor) -> Image.Image:
    """The first of a batch of images (B, H, W, C), 0..1."""
    pixels = (image[0].detach().float().cpu().nan_to_num() * 255).round().clamp(0, 255).byte()  # (H, W, C)
    return Image.fromarray(pixels.squeeze(2).numpy() if pixels.shape[2] == 1 else pixels.numpy())


class EditStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMEditStyle",
            display_name="Edit Style",
            category="DMM/style",
            description=(
                "Gives a style of a DMM model another name, description or picture. Save DMM Model writes them into the "
                "file. What is left empty stays as it is."
            ),
            search_aliases=["rename style", "style thumbnail", "style description"],
            inputs=[
                io.Model.Input("model", tooltip="The model with the style. Save DMM Model keeps the change."),
                io.String.Input("style", default="ink", tooltip="The style to edit, by its present name."),
                io.String.Input("name", default="", tooltip="Its new name. Nodes behind this one must use it."),
                io.String.Input(
                    "description", default="", multiline=True, tooltip="What it looks like, for whoever picks it."
                ),
                io.Image.Input(
                    "thumbnail", optional=True, tooltip="A picture in this style; the first of a batch, made small."
                ),
                io.String.Input(
                    "licence",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Under what terms the style may be used.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, style, name, description, thumbnail=None, licence="") -> io.NodeOutput:
        texts = {"name": name, "description": description, "licence": licence}
        changes = {key: text for key, text in texts.items() if text.strip()}
        for key, text in changes.items():
            check_new_text(key, text.strip() if key == "name" else text)
        if thumbnail is not None:
            changes["thumbnail"] = thumbnail_uri(picture(thumbnail))
        return io.NodeOutput(with_edited_style(model, style, changes))


NODES = [EditStyle]
