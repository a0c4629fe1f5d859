"""Merge Checkpoints to DMM: many models into one with a style each, without training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..dmm_core.bank_size import USUAL
from ..dmm_core.checkpoint import save_checkpoint
from ..dmm_core.metadata import StyleInfo
from ..training.config import check_names
from ..training.files.hashing import repr_sha256, weights_sha256
from ..training.files.outputs import check_output
from ..training.merge.finished import remember, remembered
from ..training.merge.merge import CENTRES, MergeConfig, Source, forget_parts, merge, merge_folder
from ..training.merge.report import MergeReport
from ..training.paint.images import to_pixels
from . import host_model, paths
from .preview import send_text, told_with_file
from .teacher import TeacherInput
from .thumbnails import paint_thumbnails
from .training_inputs import clip_and_vae_parts, prediction, zero_snr
from .training_run import file_stem, memory_given_back, teachers_input
from .weights import HostWeights

logger = logging.getLogger(__name__)

PICTURED = "a red house, hills"
"""What thumbnails show where nobody says it: lines, areas, colours and depth, and the demo models know the words."""


class MergeCheckpoints(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMMerge",
            display_name="Merge Checkpoints to DMM",
            category="DMM/training",
            description=(
                "Many models become one that paints in the look of each by name, in minutes and without training: their average, and a "
                "style bank of what sets each apart. Distill Teachers takes more time and comes nearer. Cancel keeps what is computed; "
                "queueing the same graph again goes on from there."
            ),
            search_aliases=[
                "merge",
                "model merge",
                "checkpoint merge",
                "instant merge",
                "style bank",
                "merge loras",
                "融合",
                "合并",
                "合併",
                "マージ",
                "병합",
            ],
            inputs=[
                io.Model.Input("base", tooltip="What the merged model paints without a style."),
                io.Clip.Input(
                    "clip", tooltip="The text encoder of the merged model, from the same loader as the base."
                ),
                io.Vae.Input("vae", tooltip="The VAE of the merged model."),
                teachers_input(),
                io.String.Input(
                    "budget",
                    default=USUAL,
                    tooltip=(
                        "How much the styles may add to the file: a share of the model such as 10%, or a size such as 150MB. More keeps "
                        "more of each look; the report says how much."
                    ),
                ),
                io.String.Input("name", default="merged", tooltip="The file in output/dmm begins with this."),
                io.Combo.Input(
                    "centre",
                    options=list(CENTRES),
                    default=CENTRES[0],
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What the model's own weights are. mean: of all teachers, which keeps more of them. base: the base as it is, so "
                        "that Save DMM Model's 'styles only' can be put onto anyone's copy of the base."
                    ),
                ),
                io.String.Input(
                    "thumbnail_prompt",
                    default=PICTURED,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What the thumbnails of the styles show: a small picture of each in a few steps, once the model is saved. Empty: "
                        "none. Without a GPU only small models paint them."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Image.Output(display_name="kept", tooltip="How much of each model is kept, block by block."),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, base, clip, vae, teachers, budget, name, centre=CENTRES[0], thumbnail_prompt=PICTURED
    ) -> io.NodeOutput:
        stem, inputs = file_stem(name), [teacher for teacher in teachers.values() if teacher is not None]
        check_names([teacher.name for teacher in inputs])
        # Nodes run in inference mode, whose tensors a model that is trained later would refuse.
        with torch.inference_mode(False), torch.no_grad(), memory_given_back():
            config = MergeConfig(budget.strip(), device=mm.get_torch_device(), centre=centre)
            path, report, folder = merged(
                inputs, base, clip, vae, config=config, stem=stem, node_id=cls.hidden.unique_id
            )
            picture = to_pixels([report.picture()])
        model, text_encoder, decoder, _ = host_model.load(str(path))
        said = f"saved dmm/{path.name}"
        if thumbnail_prompt.strip():
            model, done = with_pictures(path, model, text_encoder, decoder, thumbnail_prompt, cls.hidden.unique_id)
            said += f"\n{done}"
        forget_parts(folder)
        said += f"\n\n{report.text()}"
        return io.NodeOutput(model, picture, report.text(), ui=told_with_file(said, path))


def merged(
    teachers: Sequence[TeacherInput], base, clip, vae, *, config: MergeConfig, stem: str, node_id
) -> tuple[Path, MergeReport, Path]:
    """The file of the merged model, named by a hash of what is in it, the report on it, and the folder that remembers it
    until ``forget_parts``: where a cancel comes first, the same merge is not made again."""
    send_text("reading the models", node_id)
    foundation = source("the base model", base, StyleInfo("the base model"))
    sources = [source(f"teacher '{one.name}'", one.model, StyleInfo(one.name, one.description)) for one in teachers]
    stamps = [one.stamp for one in (foundation, *sources)]
    settings = [config.budget, *(one.name for one in sources), *(["base"] if config.centre == "base" else [])]
    settings += [repr(foundation.heads)] if foundation.heads else []
    inherited = clip_and_vae_parts(base, clip, vae)
    path = paths.result_file(stem, [*stamps, *settings], inherited)
    check_output(path)
    parts = path.parent.with_name("dmm_runs") / f"{path.stem}-merge"
    bar = comfy.utils.ProgressBar(len(foundation.unet), node_id=node_id)

    def progress(done: int, total: int, what: str) -> None:
        bar.update_absolute(done, total)
        send_text(f"{what}: {done} of {total}", node_id)

    kinds = [(one.prediction, one.zero_snr) for one in (foundation, *sources)]
    what = repr_sha256(path.name, stamps, settings, [one.info.description for one in sources], kinds)
    with merge_folder(parts):
        report = remembered(parts, what, path)
        if report is None:
            checkpoint, report = merge(sources, foundation, inherited, config, folder=parts, progress=progress)
            path.parent.mkdir(parents=True, exist_ok=True)
            unet = as_narrow(checkpoint.unet, config.dtype)
            save_checkpoint(path, dataclasses.replace(checkpoint, unet=unet, metadata={"modelspec.title": stem}))
            remember(parts, what, path, report)
        report.write(parts.with_name(path.stem))
    return path, report, parts


def with_pictures(path: Path, model, clip, vae, prompt: str, node_id) -> tuple[Any, str]:
    """``paint_thumbnails`` in the file of a merged model, which is saved whatever happens here: the MODEL with them, and what was done."""
    try:
        return paint_thumbnails(str(path), model, clip, vae, prompt, node_id)
    except Exception as error:
        logger.warning("no thumbnails of the merged model", exc_info=True)
        return model, f"no thumbnails: {error}"


def source(who: str, model, info: StyleInfo) -> Source:
    """A MODEL as a source, of which one weight at a time is computed. who: it is, in errors."""
    weights = HostWeights(model, styles=True)
    digest = weights_sha256(weights)
    info = dataclasses.replace(info, sha256=digest)
    kind, heads = prediction(model, who), host_model.model_heads(model)
    return Source(info, weights, weights.shapes, digest, kind, zero_snr(model), heads)


def as_narrow(unet: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A UNet in ``dtype``, if that changes no number: without a GPU the host holds in float32 what the base's file has in half."""
    narrow = {key: weight.to(dtype) for key, weight in unet.items()}
    return narrow if all(torch.equal(narrow[key].to(weight.dtype), weight) for key, weight in unet.items()) else unet


NODES = [MergeCheckpoints]
