"""Identify Style: which of a DMM model's styles a picture is in, by what the model itself makes of it."""

from __future__ import annotations

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..dmm_core.style_value import Mix, PerItem
from ..training.data.buckets import fit
from ..training.evaluation.identify import Verdict, identify, judged_size
from ..training.evaluation.model_runner import placed
from ..training.evaluation.settings import usual_dtype
from ..training.paint.images import to_pictures, to_pixels
from ..training.teachers.teacher import styled_unet
from . import host_model
from .style_types import StyleType
from .training_inputs import frozen_base
from .training_run import memory_given_back
from .weights import unet_weights


class IdentifyStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMIdentifyStyle",
            display_name="Identify Style",
            category="DMM/evaluation",
            description=(
                "Names the style of a picture: the style in which the model itself explains it best. Any picture gets an answer; the "
                "report says how sure it is."
            ),
            search_aliases=[
                "which style",
                "classify style",
                "recognise style",
                "style of image",
                "识别",
                "辨識",
                "判別",
            ],
            inputs=[
                io.Model.Input("model", tooltip="From Load DMM Model."),
                io.Clip.Input("clip", tooltip="The model's text encoder, from the same loader."),
                io.Image.Input(
                    "image", optional=True, tooltip="Pictures of any size; needs the VAE. Or connect latent."
                ),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the images; not needed for latents."),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Pictures as latents, judged at the size that they have."
                ),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    tooltip="What the pictures show, if you know: it helps a little.",
                ),
                io.Int.Input(
                    "draws",
                    default=32,
                    min=2,
                    max=1000,
                    tooltip="How often each picture is noised and judged: more are slower and surer.",
                ),
                io.Boolean.Input("with_none", default=True, tooltip="No style is a possible answer."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, advanced=True, tooltip="Of the noise that is added."
                ),
            ],
            outputs=[
                io.String.Output(display_name="name", is_output_list=True),
                StyleType.Output(display_name="style"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, caption, draws, with_none, seed, image=None, vae=None, latent=None) -> io.NodeOutput:
        if (image is None) == (latent is None):
            raise ValueError("connect either image (with the vae) or latent")
        if image is not None and vae is None:
            raise ValueError("an image needs the vae: connect the one from Load DMM Model")
        with torch.inference_mode(False), torch.no_grad(), memory_given_back():
            verdicts = identify_pictures(
                model,
                clip,
                caption=caption,
                draws=draws,
                with_none=with_none,
                seed=seed,
                image=image,
                vae=vae,
                latent=latent,
                node_id=cls.hidden.unique_id,
            )
        styles = [Mix(((verdict.name, 1.0),)) for verdict in verdicts]
        titles = [f"picture {i}: " if len(verdicts) > 1 else "" for i in range(1, len(verdicts) + 1)]
        report = "\n\n".join(title + verdict.text() for title, verdict in zip(titles, verdicts))
        style = styles[0] if len(styles) == 1 else PerItem(tuple(styles))
        return io.NodeOutput([verdict.name for verdict in verdicts], style, report, ui=ui.PreviewText(report))


def identify_pictures(model, clip, *, caption, draws, with_none, seed, image, vae, latent, node_id) -> list[Verdict]:
    """The model's answer for each picture of ``image`` (which needs the vae) or of ``latent``; progress goes to the node."""
    info = host_model.model_info(model)
    weights, styles = host_model.with_blend_codes(unet_weights(model, styles=True), info)
    student = frozen_base(model, clip, styled_unet(weights, "the model"), ["", caption.strip()])
    if image is not None:
        size = judged_size(student.unet.config, student.prediction, (image.shape[2], image.shape[1]))
        samples = vae.encode(resized(image, size))
    else:
        samples = latent["samples"]
    latents = model.model.process_latent_in(samples.float().cpu()).clone()
    mm.unload_all_models()  # their copies are not needed while this runs
    device = mm.get_torch_device()
    names = [style.name for style in styles]
    bar = comfy.utils.ProgressBar(len(latents) * draws * (len(names) + with_none), node_id=node_id)

    def on_batch(forwards: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update(forwards)

    rows = torch.full((len(latents),), 1)
    return identify(
        placed(student, device, usual_dtype(device)),
        names,
        latents,
        rows,
        draws=draws,
        seed=seed,
        with_none=with_none,
        on_batch=on_batch,
    )


def resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """IMAGE (B, H, W, 3) in 0..1 -> (B, h, w, 3): the largest centred part of the shape of ``size`` (w, h)."""
    return to_pixels([fit(picture, size) for picture in to_pictures(image[..., :3])])


NODES = [IdentifyStyle]
