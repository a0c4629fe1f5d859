"""A thumbnail of every style of a model's file, painted by ComfyUI's own sampler."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import comfy.sample
import comfy.utils
import torch

from ..dmm_core.checkpoint import read_info
from ..dmm_core.style_value import Mix
from ..training.data.buckets import default_resolution
from ..training.files.write_thumbnails import write_thumbnails
from ..training.paint.thumbnails import thumbnail_uri
from .edit_style import picture
from .host_model import styled, with_edited_style
from .preview import send_text

STEPS, CFG, SAMPLER, SCHEDULER, SEED = 8, 4.0, "dpmpp_2m", "karras", 0
LARGEST_ON_CPU = 200_000_000
"""Parameters of a UNet; a larger one would paint for minutes a picture."""


def paint_thumbnails(path: str, model, clip, vae, prompt: str, node_id) -> tuple[Any, str]:
    """Paint one prompt from one noise in every style of the file, which the model was loaded from, and write the pictures into it: a clone
    of the MODEL with them, and what was done, or why nothing was, as a line of text. The host's interrupt ends it; the file then is as it
    was."""
    info = read_info(path)
    size = sum(weight.numel() for weight in info.unet.values())
    if mm.get_torch_device().type == "cpu" and size > LARGEST_ON_CPU:
        return (
            model,
            f"no thumbnails: {size / 1e6:.0f} million parameters would paint for long without a GPU (dmm thumbnails does it)",
        )
    side = default_resolution(info.config, info.prediction)
    latent = torch.zeros(1, info.config.in_channels, side // 8, side // 8, device=mm.intermediate_device())
    noise = comfy.sample.prepare_noise(latent, SEED)
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, ""))
    bar = comfy.utils.ProgressBar(len(info.styles), node_id=node_id)
    thumbnails = {}
    for done, style in enumerate(info.styles):
        send_text(f"thumbnails: {done} of {len(info.styles)}", node_id)
        samples = comfy.sample.sample(
            styled(model, Mix(((style.name, 1.0),))), noise, STEPS, CFG, SAMPLER, SCHEDULER, positive, negative, latent,
            disable_pbar=True, seed=SEED,
        )  # fmt: skip
        thumbnails[style.name] = thumbnail_uri(picture(vae.decode(samples)))
        bar.update_absolute(done + 1, len(info.styles))
    write_thumbnails(path, thumbnails)
    for name, uri in thumbnails.items():
        model = with_edited_style(model, name, {"thumbnail": uri})
    return model, f"{len(thumbnails)} thumbnails of '{prompt}'"
