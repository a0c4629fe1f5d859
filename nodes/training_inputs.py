"""From the wires of Distill Teachers to the objects of ``training/``: effective weights, text states, latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import comfy.model_base
import comfy.model_management as mm
import torch
from torch import Tensor

from ..dmm_core.checkpoint import Checkpoint
from ..dmm_core.unet import UNet, load_unet
from ..training.config import TrainConfig
from ..training.data import CaptionedLatents
from ..training.loop import Distillation
from ..training.memory.fitting import fitted
from ..training.teacher import Teacher, check_architectures, plain_unet, soup
from .teacher import TeacherInput
from .weights import unet_weights


@torch.no_grad()
def gather(
    base,
    clip,
    teachers: Sequence[TeacherInput],
    latents,
    captions,
    config: TrainConfig,
    say: Callable[[str], None] = lambda text: None,
) -> Distillation:
    """Everything a run needs, copied from the host's objects; call it outside of inference mode. say: is told the memory plan.

    Raises ValueError naming the input that does not fit.
    """
    data = captioned_latents(base, latents, captions)
    base_unet = plain_unet(unet_weights(base), "the base model")
    unets = []
    for teacher in teachers:
        unets.append(plain_unet(unet_weights(teacher.model), f"teacher '{teacher.name}'"))
        check_architectures(base_unet.config, [(teacher.name, unets[-1].config)])
    contexts, pooled = text_states(base, clip, data.prompts)
    frozen = [Teacher("base", base_unet, contexts, pooled, prediction(base, "the base model"), zero_snr(base))]
    for teacher, unet in zip(teachers, unets):
        own = (
            (contexts, pooled)
            if teacher.clip in (None, clip)
            else text_states(teacher.model, teacher.clip, data.prompts)
        )
        kind = prediction(teacher.model, f"teacher '{teacher.name}'")
        frozen.append(Teacher(teacher.name, unet, *own, kind, zero_snr(teacher.model), description=teacher.description))
    for teacher in frozen:
        teacher.sha256 = teacher.weights_sha256  # there is no file
    # The host's copies are not needed while training runs: give their memory to it.
    mm.unload_all_models()
    device = mm.get_torch_device()
    config, plan = fitted(config, base_unet.config, data.shape[1:], len(teachers), device)
    if plan:
        say(plan.describe())
    return Distillation(frozen[0], frozen[1:], data, config, device)


def prediction(patcher, who: str) -> str:
    """ "eps" or "v". Raises ValueError, naming ``who``, for a model that predicts anything else."""
    types = comfy.model_base.ModelType
    kinds = {types.EPS: "eps", types.V_PREDICTION: "v"}
    if patcher.model.model_type not in kinds:
        raise ValueError(
            f"{who} is a {patcher.model.model_type.name} model: only eps- and v-prediction models can be distilled"
        )
    return kinds[patcher.model.model_type]


def zero_snr(patcher) -> bool:
    """Whether the model's noise schedule ends in pure noise, by the setting that the host builds it from."""
    return bool(patcher.model.model_config.sampling_settings.get("zsnr", False))


def clip_and_vae_parts(base, clip, vae) -> Checkpoint:
    """What a student inherits: text encoder and VAE in the keys of a checkpoint file, copied from the host's objects."""
    config = base.model.model_config
    text = config.process_clip_state_dict_for_saving(clip.state_dict_for_saving())
    images = vae.get_sd()
    copy = {"text": text, "vae": images}
    parts = {part: {k: v.detach().to("cpu").clone() for k, v in weights.items()} for part, weights in copy.items()}
    return Checkpoint(unet={}, prediction=prediction(base, "the base model"), **parts)


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


def average_unet(run: Distillation) -> UNet:
    """The soup of the teachers, a baseline for the report."""
    unet = UNet(run.base.unet.config)
    unet.load_state_dict(soup([teacher.unet.state_dict() for teacher in run.teachers]))
    return unet.to(run.device)


def student_unet(run: Distillation) -> UNet:
    return load_unet(run.student_weights()).to(run.device)
