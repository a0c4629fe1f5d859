"""From the wires of Distill Teachers to the objects of ``training/``: effective weights, text states, latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import comfy.model_management as mm
import comfy.model_sampling
import torch
from torch import Tensor

from ..dmm_core.bank import has_bank
from ..dmm_core.checkpoint import Checkpoint
from ..dmm_core.scaled_fp8 import dequantised
from ..dmm_core.unet import UNet, load_unet
from ..training.config import AttackConfig, FewStepConfig, TrainConfig, check_names
from ..training.data.batches import CaptionedLatents
from ..training.files.style_file import centred_at_base
from ..training.loop.few_steps import few_stepping, without_the_rest
from ..training.loop.forget import forgetting, named
from ..training.loop.trainer import Trainer
from ..training.memory.fitting import fitted
from ..training.progress import ProgressCallback
from ..training.teachers.teacher import (
    Teacher,
    check_architectures,
    in_style_order,
    plain_unet,
    soup,
    styled_unet,
    without_styles,
)
from . import host_model
from .teacher import TeacherInput
from .weights import HostWeights, unet_weights

Say = Callable[[str], None]
"""Shows a text to the user."""


@torch.no_grad()
def gather(
    base, clip, teachers: Sequence[TeacherInput], *, latents, captions, config: TrainConfig, say: Say
) -> Trainer:
    """Everything a run needs, copied from the host's objects; call it outside of inference mode. say: is told the memory plan.

    A base with a style bank goes on with the styles that it has: the teachers are put in their order, by name.
    Raises ValueError naming the input that does not fit.
    """
    data = captioned_latents(base, latents, captions)
    weights, styles = unet_weights(base, styles=True), []
    if goes_on(base):
        weights, styles = host_model.with_blend_codes(weights, host_model.model_info(base))
        teachers = in_style_order(styles, teachers)
    unet = (styled_unet if styles else plain_unet)(weights, "the base model", heads=host_model.model_heads(base))
    foundation = frozen_base(base, clip, unet, data.prompts)
    frozen = frozen_teachers(teachers, foundation, clip, data.prompts)
    for teacher, style in zip(frozen, styles):
        teacher.goes_on_as(style)
    config, device = ready(config, foundation, len(frozen), data=data, say=say)
    return Trainer(foundation, frozen, data, config, device=device)


@torch.no_grad()
def gather_grown(
    model, clip, teachers: Sequence[TeacherInput], *, latents, captions, config: TrainConfig, say: Say
) -> Trainer:
    """As ``gather``, for a DMM model whose styles stay and come first. Raises ValueError for a model without styles."""
    data = captioned_latents(model, latents, captions)
    foundation, old = frozen_styles(model, clip, data.prompts)
    new = frozen_teachers(teachers, foundation, clip, data.prompts)
    check_names([teacher.name for teacher in (*old, *new)])
    config, device = ready(config, foundation, len(new), data=data, say=say)
    return Trainer(foundation, [*old, *new], data, config, device=device)


@torch.no_grad()
def gather_forgetting(
    model, clip, forget: Sequence[str], *, latents, captions, config: TrainConfig, attack: AttackConfig, say: Say
) -> Trainer:
    """As ``gather``, for a DMM model without the styles named in ``forget``. Raises ValueError for names that it does not have."""
    data = captioned_latents(model, latents, captions)
    foundation, old = frozen_styles(model, clip, data.prompts)
    for name in forget:
        named(old, name)
    config, device = ready(config, foundation, 1, data=data, say=say)
    return forgetting(foundation, old, forget, data, config=config, device=device, attack=attack)


@torch.no_grad()
def gather_few_steps(
    model, clip, *, latents, captions, config: TrainConfig, settings: FewStepConfig, say: Say
) -> Trainer:
    """As ``gather``, for a DMM model that learns from itself to paint in a few steps. Raises ValueError for one that does so already."""
    data = captioned_latents(model, latents, captions)
    foundation, styles = frozen_styles(model, clip, data.prompts)
    recipe = host_model.model_info(model).recipe
    config, device = ready(without_the_rest(config), foundation, 1, data=data, say=say)
    return few_stepping(foundation, styles, data, config=config, device=device, settings=settings, recipe=recipe)


def goes_on(base) -> bool:
    """Whether a MODEL has a style bank, with which a distillation goes on."""
    return has_bank(HostWeights(base, styles=True))


def frozen_base(base, clip, unet: UNet, prompts: Sequence[str]) -> Teacher:
    return Teacher("base", unet, *text_states(base, clip, prompts), prediction(base, "the base model"), zero_snr(base))


def frozen_styles(model, clip, prompts: Sequence[str]) -> tuple[Teacher, list[Teacher]]:
    """A DMM model as it is now, LoRAs and named blends included: without a style, and as a teacher for each of its styles."""
    info = host_model.model_info(model)
    unet, styles = host_model.with_blend_codes(unet_weights(model, styles=True), info)
    foundation = frozen_base(model, clip, styled_unet(unet, "the model", heads=host_model.model_heads(model)), prompts)
    foundation.sha256 = foundation.weights_sha256
    foundation.at_base = centred_at_base(info.recipe)
    return foundation, [foundation.as_style(i, style) for i, style in enumerate(styles)]


def frozen_teachers(teachers: Sequence[TeacherInput], base: Teacher, clip, prompts: Sequence[str]) -> list[Teacher]:
    """The connected teachers; one without a CLIP of its own reads the captions with the base's."""
    frozen = []
    for teacher in teachers:
        heads = host_model.model_heads(teacher.model)
        unet = plain_unet(unet_weights(teacher.model, styles=True), f"teacher '{teacher.name}'", heads=heads)
        check_architectures(base.unet.config, [(teacher.name, unet.config)])
        own = (base.contexts, base.pooled)
        if teacher.clip not in (None, clip):
            own = text_states(teacher.model, teacher.clip, prompts)
        kind = prediction(teacher.model, f"teacher '{teacher.name}'")
        frozen.append(Teacher(teacher.name, unet, *own, kind, zero_snr(teacher.model), description=teacher.description))
    for teacher in (base, *frozen):
        teacher.sha256 = teacher.weights_sha256  # there is no file
    return frozen


def ready(
    config: TrainConfig, base: Teacher, teachers: int, *, data: CaptionedLatents, say: Say
) -> tuple[TrainConfig, torch.device]:
    """The settings that fit the device, and the device, emptied of what the host had there."""
    mm.unload_all_models()  # its copies are not needed while training runs
    device = mm.get_torch_device()
    config, plan = fitted(config, base.unet.config, data.shape[1:], teachers, device=device)
    if plan:
        say(plan.describe())
    return config, device


def prediction(patcher, who: str) -> str:
    """ "eps" or "v", as the MODEL paints (ModelSamplingDiscrete included). Raises ValueError, naming ``who``, for anything else."""
    kinds = {comfy.model_sampling.EPS: "eps", comfy.model_sampling.V_PREDICTION: "v"}
    levels, *kind = type(patcher.get_model_object("model_sampling")).__bases__
    if levels is not comfy.model_sampling.ModelSamplingDiscrete or len(kind) != 1 or kind[0] not in kinds:
        names = ", ".join(base.__name__ for base in (levels, *kind))
        raise ValueError(f"{who} samples by {names}: only eps- and v-prediction models can be distilled")
    return kinds[kind[0]]


def zero_snr(patcher) -> bool:
    """Whether the MODEL's noise schedule ends in pure noise."""
    return bool(patcher.get_model_object("model_sampling").zsnr)


def clip_and_vae_parts(base, clip, vae) -> Checkpoint:
    """What a student inherits: text encoder and VAE in the keys of a checkpoint file, copied from the host's objects."""
    config = base.model.model_config
    # The host wraps weights as parameters, which it may not do with those of a CLIP that painted, outside of inference mode.
    with torch.inference_mode():
        text = config.process_clip_state_dict_for_saving(clip.state_dict_for_saving())
        images = vae.get_sd()
    copy = {"text": text, "vae": images}
    parts = {part: {k: v.detach().to("cpu").clone() for k, v in weights.items()} for part, weights in copy.items()}
    parts["text"] = dequantised(parts["text"], {})[0]
    skip = host_model.clip_skip(clip)
    return Checkpoint(unet={}, prediction=prediction(base, "the base model"), clip_skip=skip, **parts)


def base_parts(base, clip, vae) -> Checkpoint:
    """What a student inherits from the base of a distillation."""
    return (dmm_parts if goes_on(base) else clip_and_vae_parts)(base, clip, vae)


def dmm_parts(model, clip, vae) -> Checkpoint:
    """As ``clip_and_vae_parts``, with what the DMM model says of its styles and its making."""
    info = host_model.model_info(model)
    parts = clip_and_vae_parts(model, clip, vae)
    parts.styles, parts.recipe = info.all_styles, info.recipe
    return parts


def interruptible(say: Say) -> ProgressCallback:
    """A progress callback that also answers the host's cancel."""

    def tick(done: int, total: int, what: str) -> None:
        mm.throw_exception_if_processing_interrupted()
        say(f"{what}: {done} of {total}")

    return tick


def captioned_latents(model, latents, captions) -> CaptionedLatents:
    """LATENTs (each one picture or a batch, of any sizes) and their captions -> scaled latents, a bucket for each size."""
    samples = [picture[None] for latent in latents for picture in latent["samples"]]  # (1, C, h, w) each
    captions = list(captions)
    if len(samples) != len(captions):
        raise ValueError(f"{len(captions)} captions for {len(samples)} pictures: connect one text for each picture")
    sizes = sorted({tuple(sample.shape[1:]) for sample in samples})
    order = [[i for i, sample in enumerate(samples) if tuple(sample.shape[1:]) == size] for size in sizes]
    buckets = [
        model.model.process_latent_in(torch.cat([samples[i] for i in places]).float().cpu()).clone() for places in order
    ]
    return CaptionedLatents(buckets, [captions[i] for places in order for i in places])


def text_states(model, clip, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Contexts (U, L, d) of prompts by the host's CLIP and, for a model that takes them, the pooled texts (U, p)."""
    contexts, pooled = [], []
    for prompt in prompts:
        mm.throw_exception_if_processing_interrupted()
        encoded = clip.encode_from_tokens(clip.tokenize(prompt), return_dict=True)
        contexts.append(encoded["cond"].float().cpu()[0])  # (L, d)
        if model.model.adm_channels:
            pooled.append(encoded["pooled_output"].float().cpu()[0])  # (p,)
    length = math.lcm(*{len(c) for c in contexts})  # attention over repeated keys gives what it gives over them once
    stacked = torch.stack([c.repeat(length // len(c), 1) for c in contexts])
    return stacked.clone(), torch.stack(pooled).clone() if pooled else None


def average_unet(run: Trainer) -> UNet:
    """The soup of the teachers, a baseline for the report."""
    unet = UNet(without_styles(run.base.unet.config))
    unet.load_state_dict(soup([teacher.unet.state_dict() for teacher in run.teachers]))
    return unet.to(run.device)


def student_unet(run: Trainer) -> UNet:
    return load_unet(run.student_weights(), heads=run.base.unet.config.num_heads).to(run.device)
