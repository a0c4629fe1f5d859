"""Save DMM Model: MODEL, and CLIP and VAE if given, as one safetensors file that keeps the styles; or the styles alone."""

from __future__ import annotations

import json
import os
from collections import Counter

import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..dmm_core.checkpoint import Checkpoint, save_checkpoint
from ..training.files.style_file import ONLY_ITS_OWN, centred_at_base, save_style
from . import paths
from .host_model import model_info, to_checkpoint

WHOLE, STYLES = "whole model", "styles only"


def workflow_metadata(prompt, extra_pnginfo) -> dict[str, str]:
    """The workflow, where the host's own savers put it, unless the user runs with --disable-metadata."""
    if args.disable_metadata:
        return {}
    entries = {"prompt": prompt, **(extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in entries.items() if value is not None}


def narrowed(checkpoint: Checkpoint, dtype: torch.dtype) -> list[str]:
    """A sentence for the user where weights of the UNet are narrower than ``dtype``, the UNet's in the file it came from."""
    count = Counter(weight.dtype for weight in checkpoint.unet.values() if weight.itemsize < dtype.itemsize)
    if not count:
        return []
    names = [str(name).removeprefix("torch.") for name in (count.most_common(1)[0][0], dtype)]
    return [
        f"{count.total()} weights of the UNet were written as {names[0]}, as ComfyUI holds them; the model came in {names[1]}. To keep "
        "that, start ComfyUI without its flags for the precision of the UNet (--fp8_e4m3fn-unet and the like)"
    ]


class SaveDMMModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMSaveModel",
            display_name="Save DMM Model",
            category="DMM",
            description=(
                "Saves a DMM model with its styles, their names and its recipe to output/dmm. LoRAs and merges become "
                "part of it; the selected style does not."
            ),
            search_aliases=["save checkpoint", "export model", "保存模型", "儲存模型", "モデル保存"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="What is saved: the weights with all LoRAs on the way, and the styles."
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, to make the file a whole checkpoint."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE, to make the file a whole checkpoint."),
                io.String.Input("filename_prefix", default="model", tooltip="The file in output/dmm begins with this."),
                io.Combo.Input(
                    "what",
                    options=[WHOLE, STYLES],
                    default=WHOLE,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Styles only: a small file in output/dmm_styles for Add DMM Styles to Model. It is of use on the model that it is "
                        "from; a merge centred at the base makes styles for a base that others have."
                    ),
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix, clip=None, vae=None, what=WHOLE) -> io.NodeOutput:
        target = paths.output_folder(paths.STYLES_FOLDER if what == STYLES else paths.FOLDER)
        folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, target)
        path = os.path.join(folder, f"{name}_{counter:05}_.safetensors")
        extra = workflow_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        said = f"saved {os.path.relpath(path, folder_paths.get_output_directory())}"
        if what == STYLES:
            checkpoint = to_checkpoint(model)
            save_style(path, checkpoint, model_info(model).made_for, extra)
            said += "" if centred_at_base(checkpoint.recipe) else f"\n{ONLY_ITS_OWN}"
        else:
            checkpoint = to_checkpoint(model, clip, vae)
            save_checkpoint(path, checkpoint, extra)
            said = "\n".join([said, *narrowed(checkpoint, model_info(model).dtype)])
        return io.NodeOutput(ui=ui.PreviewText(said))


NODES = [SaveDMMModel]
