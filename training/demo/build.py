"""``dmm demo build``: make the whole demo family from nothing. Every weight in models/ comes out of here.

Stages write to a work folder and are skipped when their file is there, so an interrupted build goes on where it was. One thread
per process and ``jobs`` processes: at these sizes more threads are slower.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint, save_checkpoint
from ...dmm_core.files import atomic_write
from ...dmm_core.unet import UNet, UNetConfig, load_unet
from ...dmm_core.vae import load_vae
from ..config import DistillConfig
from ..data import CaptionedLatents
from ..distill import distill
from ..text import ClipText
from . import controlnet, lora
from .autoencoder import PHASES, refine_decoder, train_vae
from .bank import captioned_latents
from .denoiser import fit
from .looks import BASE_LOOK, LORA_LOOK, TEACHER_LOOKS
from .scenes import control_hint, sample_scene
from .text_encoder import DIM, train_text_encoder

log = logging.getLogger(__name__)

DEMO_UNET = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    depth_input=(0, 1),
    depth_output=(1, 1, 0, 0),
    context_dim=DIM,
)
LORA_RANK = 4
SEED_SCENES = 100


@dataclass(frozen=True)
class Budget:
    """Training samples per network, and scenes rendered for them; the figures of the shipped family."""

    vae: tuple = PHASES
    decoder_steps: int = 2400
    text_steps: int = 700
    scenes: int = 2400
    base: int = 98_000
    teacher: int = 32_000
    settle_base: int = 32_000
    settle_teacher: int = 16_000
    lora: int = 12_000
    control: int = 24_000


TINY = Budget(
    vae=((32, 4, 2), (128, 2, 1)),
    decoder_steps=2,
    text_steps=3,
    scenes=8,
    base=64,
    teacher=64,
    settle_base=64,
    settle_teacher=64,
    lora=64,
    control=64,
)
"""Runs every stage in seconds and learns nothing: for tests of the machinery."""


def _reporter(name: str, every: float = 20.0):
    """Progress in the log, once in ``every`` seconds."""
    state = {"next": time.monotonic() + every, "start": time.monotonic()}

    def report(step: int, steps: int, loss: float) -> None:
        now = time.monotonic()
        if now >= state["next"] or step == steps:
            state["next"] = now + every
            left = (now - state["start"]) / step * (steps - step)
            log.info("%s: step %d of %d, loss %.4f, %d s left", name, step, steps, loss, left)

    return report


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_write(path) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary)


def build_vae(work: Path, budget: Budget) -> None:
    _save(work / "vae.safetensors", train_vae(budget.vae, progress=_reporter("VAE")).state_dict())


def build_decoder(work: Path, budget: Budget) -> None:
    vae = load_vae(load_file(work / "vae.safetensors"))
    refine_decoder(vae, budget.decoder_steps, progress=_reporter("decoder"))
    _save(work / "decoder.safetensors", vae.state_dict())


def build_text(work: Path, budget: Budget) -> None:
    weights, right = train_text_encoder(budget.text_steps, progress=_reporter("text encoder"))
    log.info("text encoder: %.1f%% of held-out captions read without a mistake", 100 * right)
    _save(work / "text.safetensors", weights)


def build_latents(work: Path, budget: Budget, look: str) -> None:
    vae = load_vae(load_file(work / "vae.safetensors"))
    data = captioned_latents(vae, [look], budget.scenes * (2 if look == BASE_LOOK else 1), SEED_SCENES)
    _save(work / f"latents-{look}.safetensors", {"latents": data.latents})


def _data(work: Path, look: str) -> tuple[CaptionedLatents, Tensor]:
    """The scenes of one look with the text encoder's states of their captions (U, 77, d)."""
    latents = load_file(work / f"latents-{look}.safetensors")["latents"]
    rng = np.random.default_rng(SEED_SCENES)
    data = CaptionedLatents(latents, [sample_scene(rng).caption for _ in range(len(latents))])
    encoder = ClipText(load_file(work / "text.safetensors"))
    return data, torch.cat([encoder.encode(data.prompts[i : i + 64]) for i in range(0, len(data.prompts), 64)])


def _train_unet(work: Path, look: str, name: str, unet: UNet, samples: int, lr: float, offset: float = 0.0) -> None:
    data, contexts = _data(work, look)
    average = fit(
        lambda x_t, t, context, index: unet(x_t, t, context),
        list(unet.named_parameters()),
        data.latents,
        data.rows,
        contexts,
        samples,
        lr,
        offset=offset,
        progress=_reporter(name),
    )
    _save(work / f"{name}.safetensors", average)


def build_raw(work: Path, budget: Budget, look: str) -> None:
    """The base from nothing, or a teacher from the raw base."""
    torch.manual_seed(0)
    if look == BASE_LOOK:
        _train_unet(work, look, "base-raw", UNet(DEMO_UNET), budget.base, lr=2e-3)
    else:
        unet = load_unet(load_file(work / "base-raw.safetensors"))
        _train_unet(work, look, f"{look}-raw", unet, budget.teacher, lr=1.5e-3)


def settle(work: Path, budget: Budget, look: str) -> None:
    """Go on with offset noise, so that the caption decides the colours."""
    name = "base" if look == BASE_LOOK else look
    unet = load_unet(load_file(work / f"{name}-raw.safetensors"))
    samples = budget.settle_base if look == BASE_LOOK else budget.settle_teacher
    _train_unet(work, look, name, unet, samples, lr=1e-3, offset=0.2)


def build_lora(work: Path, budget: Budget) -> None:
    torch.manual_seed(1)
    unet = load_unet(load_file(work / "base.safetensors")).requires_grad_(False)
    adapters = lora.add_lora(unet, LORA_RANK, LORA_RANK)
    params = [(f"{n}.{k}", p) for n, adapter in adapters.items() for k, p in adapter.named_parameters()]
    data, contexts = _data(work, LORA_LOOK)
    average = fit(
        lambda x_t, t, context, index: unet(x_t, t, context), params, data.latents, data.rows, contexts,
        budget.lora, lr=3e-3, progress=_reporter("LoRA"),
    )  # fmt: skip
    with torch.no_grad():
        for key, p in params:
            p.copy_(average[key])
    _save(work / "lora.safetensors", lora.lora_state_dict(unet, adapters, LORA_RANK, LORA_RANK))


def build_control(work: Path, budget: Budget) -> None:
    torch.manual_seed(2)
    unet = load_unet(load_file(work / "base.safetensors")).requires_grad_(False)
    net = controlnet.ControlNet(unet)
    data, contexts = _data(work, BASE_LOOK)
    rng = np.random.default_rng(SEED_SCENES)
    hints = torch.from_numpy(np.stack([control_hint(sample_scene(rng)) for _ in range(len(data.latents))]))

    def predict(x_t, t, context, index):
        hint = hints[index].permute(0, 3, 1, 2).float().contiguous() / 255  # (B, H, W, 3) -> (B, 3, H, W)
        return unet(x_t, t, context, control=net(x_t, hint, t, context))

    average = fit(
        predict, list(net.named_parameters()), data.latents, data.rows, contexts, budget.control,
        lr=1e-3, caption_dropout=0.3, progress=_reporter("ControlNet"),
    )  # fmt: skip
    net.load_state_dict(average)
    _save(work / "control.safetensors", net.file_state_dict())


def _stages() -> dict[str, tuple[Callable[[Path, Budget], None], tuple[str, ...]]]:
    """name -> (function, the stages it needs); what blocks most comes first."""
    stages = {"vae": (build_vae, ()), "text": (build_text, ())}
    looks = (BASE_LOOK, *TEACHER_LOOKS, LORA_LOOK)

    def with_look(function, look):
        return lambda work, budget: function(work, budget, look)

    for look in looks:
        stages[f"latents-{look}"] = (with_look(build_latents, look), ("vae",))
        if look == BASE_LOOK:
            stages["base-raw"] = (with_look(build_raw, look), ("text", f"latents-{look}"))
            stages["base"] = (with_look(settle, look), ("base-raw",))
    for look in TEACHER_LOOKS:
        stages[f"{look}-raw"] = (with_look(build_raw, look), ("base-raw", f"latents-{look}"))
        stages[look] = (with_look(settle, look), (f"{look}-raw",))
    stages["decoder"] = (build_decoder, ("vae",))
    stages["control"] = (build_control, ("base",))
    stages["lora"] = (build_lora, ("base", f"latents-{LORA_LOOK}"))
    return stages


STAGES = _stages()


def run_stage(name: str, work: Path, budget: Budget) -> float:
    """One stage in this process, on one thread; returns its seconds."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    started = time.monotonic()
    STAGES[name][0](work, budget)
    return time.monotonic() - started


def build_parts(work: Path, budget: Budget, jobs: int = 2) -> dict[str, float]:
    """Train every part that is not in ``work`` yet; returns the seconds of each stage that ran."""
    work.mkdir(parents=True, exist_ok=True)
    done = {name for name in STAGES if (work / f"{name}.safetensors").exists()}
    waiting = [name for name in STAGES if name not in done]
    seconds: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running: dict[concurrent.futures.Future, str] = {}
        while waiting or running:
            ready = [n for n in waiting if done.issuperset(STAGES[n][1])]
            for name in ready[: jobs - len(running)]:
                waiting.remove(name)
                running[pool.submit(run_stage, name, work, budget)] = name
            finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                seconds[name] = future.result()
                done.add(name)
                log.info("%s done in %.0f s", name, seconds[name])
    return seconds


def write_models(work: Path, models: Path) -> list[Path]:
    """Put base, teachers, ControlNet and LoRA as float16 files where ComfyUI users expect them; returns their paths.

    Base and teachers are UNets only and share the text encoder and VAE of the DMM checkpoint: the family has to stay small.
    """
    written = []
    for part, name in (("base", "base"), *((look, f"teacher-{look}") for look in TEACHER_LOOKS)):
        path = models / "dmm" / f"demo-{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        unet = _half(load_file(work / f"{part}.safetensors"))
        save_checkpoint(path, Checkpoint(unet=unet, metadata=_about(name.replace("-", " "))))
        written.append(path)
    for part, name in (("control", "controlnet/demo-outline"), ("lora", "loras/demo-frame")):
        path = models / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(path, _half(load_file(work / f"{part}.safetensors")))
        written.append(path)
    return written


def write_student(work: Path, models: Path, config: DistillConfig, on_step=None) -> Path:
    """Distil the demo DMM checkpoint (resumable): ``config`` with its paths pointed at ``models`` and ``work``."""
    parts = {"text": "text", "vae": "decoder"}
    whole = {key: _half(load_file(work / f"{file}.safetensors")) for key, file in parts.items()}
    base = _half(load_file(work / "base.safetensors"))
    save_checkpoint(work / "whole.safetensors", Checkpoint(unet=base, **whole, metadata=_about("base")))
    output = models / "dmm" / "demo-dmm.safetensors"
    config = dataclasses.replace(
        config,
        base=str(models / "dmm" / "demo-base.safetensors"),
        teachers=[
            dataclasses.replace(t, file=str(models / "dmm" / f"demo-teacher-{t.name}.safetensors"))
            for t in config.teachers
        ],
        parts_from=str(work / "whole.safetensors"),
        output=str(output),
        run_dir=str(work / "student"),
    )
    config.check()
    distill(config, on_step)
    return output


def _about(name: str) -> dict[str, str]:
    about = {
        "title": f"comfyui-dmm demo: {name}",
        "license": "Apache-2.0",
        "author": "comfyui-dmm",
        "resolution": "128x128",
    }
    return {f"modelspec.{key}": value for key, value in about.items()}


def _half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
