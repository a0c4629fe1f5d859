"""Learn Style from Images and Match Style: a new style from a few pictures, and the blend of known ones that is nearest to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..dmm_core.checkpoint import Checkpoint, save_checkpoint
from ..dmm_core.metadata import StyleInfo
from ..dmm_core.sampling import host_noise
from ..dmm_core.style_value import Mix, parse_style
from ..dmm_core.vae import latent_scale
from ..training.evaluation.model_runner import placed
from ..training.evaluation.settings import usual_dtype
from ..training.fields import about_field
from ..training.files.hashing import tensor_sha256, weights_sha256
from ..training.files.outputs import check_output
from ..training.learn.config import LearnConfig
from ..training.learn.learner import OTHER_CFG, OTHER_STEPS, Step, StyleLearner
from ..training.learn.match import Match, match_blend
from ..training.learn.pictures import Examples, captions_of, collage, from_pixels, make_examples
from ..training.learn.style import check_model, learn_style, new_style, own_prompts, prompts_for, rows_of
from ..training.paint.images import to_pixels
from ..training.paint.paint_rows import paint_rows
from ..training.paint.thumbnails import thumbnail_uri
from ..training.teachers.teacher import Teacher, styled_unet
from . import host_model, paths
from .distill_settings import int_input
from .grow import model_inputs
from .preview import LARGEST, decoded, progress_on, told_with_file
from .style_types import StyleType
from .training_inputs import frozen_base
from .training_run import file_stem, memory_given_back

DEFAULTS = LearnConfig()


def setting_doc(name: str) -> str:
    return about_field(LearnConfig, name).doc


def picture_inputs() -> list:
    return [
        io.Image.Input("images", tooltip="The pictures: a batch, or several of any sizes. 5 to 20 are a good number."),
        io.String.Input(
            "captions",
            default="",
            multiline=True,
            tooltip=(
                "What the pictures show, a line for each, or one text for all. What is said here stays out of the style. Do not describe "
                "the style itself."
            ),
        ),
    ]


class LearnStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMLearnStyle",
            display_name="Learn Style from Images",
            category="DMM/training",
            description=(
                "Teaches a DMM model a new style from 5 to 20 pictures, in minutes. Its other styles stay bit for bit what they are. "
                "Saves a new file to output/dmm; cancel saves nothing."
            ),
            search_aliases=[
                "style from pictures",
                "train style",
                "few shot",
                "textual inversion",
                "train lora",
                "学习风格",
                "學習風格",
                "画風を学習",
                "그림에서 스타일 학습",
            ],
            is_input_list=True,
            inputs=[
                *model_inputs("its styles stay."),
                *picture_inputs(),
                io.String.Input("style", default="my style", tooltip="The name of the new style."),
                io.String.Input("name", default="my-dmm-style", tooltip="The file in output/dmm begins with this."),
                io.Combo.Input(
                    "learns", options=list(about_field(LearnConfig, "learns").choices), tooltip=setting_doc("learns")
                ),
                int_input("directions", 512, config=DEFAULTS, field="directions", advanced=True),
                int_input("steps", 100_000, config=DEFAULTS, field="steps"),
                io.Float.Input(
                    "prior",
                    default=DEFAULTS.prior,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip=setting_doc("prior"),
                    advanced=True,
                ),
                int_input(
                    "seed", 2**32 - 1, config=DEFAULTS, field="seed", low=0, advanced=True, control_after_generate=False
                ),
                io.Int.Input(
                    "preview_every",
                    default=50,
                    min=0,
                    max=100_000,
                    advanced=True,
                    tooltip="Steps between previews; 0: none.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                StyleType.Output(display_name="style"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, captions, **lists) -> io.NodeOutput:
        one = {key: value[0] for key, value in lists.items()}
        names = ("learns", "directions", "steps", "prior", "seed")
        config = LearnConfig(**{name: one[name] for name in names})
        config.validate()
        stem = file_stem(one["name"])
        # Nodes run in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(False), torch.no_grad(), memory_given_back():
            path, name, report = learnt(one, images, captions, config=config, stem=stem, node_id=cls.hidden.unique_id)
        model, *_ = host_model.load(str(path))
        said = f"saved dmm/{path.name}\n\n{report}"
        return io.NodeOutput(model, Mix(((name, 1.0),)), report, ui=in_new_style(told_with_file(said, path), name))


class MatchStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMMatchStyle",
            display_name="Match Style",
            category="DMM/evaluation",
            description=(
                "Finds the blend of a DMM model's styles that is nearest to your pictures, in seconds and without training, as a text for "
                "a style field."
            ),
            search_aliases=[
                "style of image",
                "which blend",
                "mix from picture",
                "匹配风格",
                "比對風格",
                "似たスタイル",
                "비슷한 스타일",
            ],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="From Load DMM Model."),
                io.Clip.Input("clip", tooltip="The model's text encoder, from the same loader."),
                io.Vae.Input("vae", tooltip="Encodes the images."),
                *picture_inputs(),
                io.Int.Input(
                    "draws",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="How often each picture is noised and judged: more are slower and surer. 0: as often as is usual.",
                ),
                io.Boolean.Input("with_none", default=True, tooltip="No style may be a part of the blend."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    advanced=True,
                    control_after_generate=False,
                    tooltip="Of the noise that is added.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text"),
                StyleType.Output(display_name="style"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, captions, **lists) -> io.NodeOutput:
        one = {key: value[0] for key, value in lists.items()}
        with torch.inference_mode(False), torch.no_grad(), memory_given_back():
            match, remarks = matched(one, images, captions, node_id=cls.hidden.unique_id)
        report = match.report(remarks)
        return io.NodeOutput(match.text, parse_style(match.text), report, ui=ui.PreviewText(report))


# --- what they do -----------------------------------------------------------------------------------------------------


def learnt(
    one: dict[str, Any], images: Sequence[Tensor], captions: Sequence[str], *, config: LearnConfig, stem: str, node_id
) -> tuple[Path, str, str]:
    """The file of the model with one more style, that style's name, and the report."""
    before = host_model.to_checkpoint(one["model"], one["clip"], one["vae"])
    check_model(before)
    pictures = pictures_of(images)
    info = new_style(before, StyleInfo(one["style"], thumbnail=thumbnail_uri(collage(pictures))))
    examples = host_examples(one, before, pictures, captions, node_id)
    prompts = prompts_for(before, examples, config)
    text = host_text(one, before, prompts)
    parts = [weights_sha256(before.unet), repr(config), repr(info), repr(examples.captions), repr(prompts)]
    parts += [tensor_sha256(latent) for latent in examples.latents]
    path = paths.result_file(stem, parts, before)
    check_output(path)
    mm.unload_all_models()  # their copies are not needed while this runs
    screen = LearnScreen(one["vae"], before, config, one["preview_every"], node_id)
    after, report = learn_style(
        before, text, examples, info=info, config=config, prompts=prompts, device=mm.get_torch_device(),
        progress=screen.progress, on_step=screen.on_step,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, dataclasses.replace(after, metadata={**after.metadata, "modelspec.title": stem}))
    return path, info.name, report.text()


def matched(
    one: dict[str, Any], images: Sequence[Tensor], captions: Sequence[str], *, node_id
) -> tuple[Match, list[str]]:
    """The nearest blend, and what is to be said of the pictures."""
    before = host_model.to_checkpoint(one["model"])
    check_model(before)
    examples = host_examples(one, before, pictures_of(images), captions, node_id)
    prompts = own_prompts(examples)
    text = host_text(one, before, prompts)
    mm.unload_all_models()
    device = mm.get_torch_device()
    found = match_blend(
        placed(text, device, usual_dtype(device)), [style.name for style in before.styles], examples, rows_of(prompts, examples)[0],
        draws=one["draws"], seed=one["seed"], with_none=one["with_none"], progress=progress_on(node_id),
    )  # fmt: skip
    return found, examples.remarks


def pictures_of(images: Sequence[Tensor]) -> list[Image.Image]:
    """IMAGEs, each one picture or a batch, of any sizes. Raises ValueError for none, and for NaN."""
    pictures = [picture for batch in images if batch is not None and len(batch) for picture in from_pixels(batch)]
    if not pictures:
        raise ValueError("no pictures: connect at least one image, better 5 to 20")
    return pictures


def host_examples(
    one: dict[str, Any], before: Checkpoint, pictures: Sequence[Image.Image], captions: Sequence[str], node_id
) -> Examples:
    """The pictures as the host's VAE encodes them. captions: one text, or a list of one for each picture."""
    model, vae = one["model"], one["vae"]
    texts, remarks = captions_of(captions, len(pictures))

    def encode(picture: Image.Image) -> Tensor:
        return model.model.process_latent_in(vae.encode(to_pixels([picture])).float().cpu())[0].clone()

    return make_examples(
        pictures, texts, remarks, config=before.config, prediction=before.prediction, encode=encode,
        progress=progress_on(node_id),
    )  # fmt: skip


def host_text(one: dict[str, Any], before: Checkpoint, prompts: Sequence[str]) -> Teacher:
    """The model, with the prompts as the host's CLIP reads them."""
    unet = styled_unet(before.unet, "the model", heads=before.heads)
    return frozen_base(one["model"], one["clip"], unet, prompts)


def in_new_style(told: dict[str, list], name: str) -> dict[str, list]:
    """``told_with_file`` whose quickstart paints in the new style."""
    told["saved"][0]["style"] = name
    return told


# --- what is seen of it -----------------------------------------------------------------------------------------------


class LearnScreen:
    """Shows how a style is learnt: progress, and now and then a picture of the first caption in the style as it is."""

    def __init__(self, vae, model: Checkpoint, config: LearnConfig, every: int, node_id):
        self.vae, self.scale, self.every = vae, latent_scale(model.config), every
        self.progress, self.config, self.node_id = progress_on(node_id), config, node_id

    def on_step(self, learner: StyleLearner, step: Step) -> None:
        if not self.every or step.step % self.every:
            return
        shape = learner.examples.latents[0].shape
        noise = host_noise((1, *shape), self.config.seed).to(learner.device)
        row = learner.rows[:1]
        with torch.no_grad(), learner.autocast():
            latents = paint_rows(
                learner.unet, learner.model, row, noise, steps=OTHER_STEPS, cfg=OTHER_CFG, style=learner.style,
                callback=lambda *_: mm.throw_exception_if_processing_interrupted(),
            )  # fmt: skip
        (image,) = decoded(self.vae, latents, self.scale)
        bar = comfy.utils.ProgressBar(step.steps, node_id=self.node_id)
        bar.update_absolute(step.step, step.steps, ("JPEG", image, LARGEST))


NODES = [LearnStyle, MatchStyle]
