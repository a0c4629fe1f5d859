"""The stages of ``dmm demo build``: what is trained, from what, for how long. Each writes one file to the work folder.

At these sizes a second thread slows a training down: run_stage uses one, and build.py runs several stages at a time.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint, save_checkpoint
from ...dmm_core.unet import UNet, UNetConfig, load_unet
from ...dmm_core.vae import load_vae
from ..config import load_config
from ..data.batches import CaptionedLatents
from ..data.demo.latents import captioned_latents
from ..data.demo.looks import BASE_LOOK, LORA_LOOK, TEACHER_LOOKS
from ..data.demo.scenes import control_hint, sample_scene
from ..loop import adapters as lora
from ..run.distill import distill
from ..run.watch.watch import Watch
from ..text import ClipText
from . import controlnet
from .autoencoder import PHASES, refine_decoder, train_vae
from .classifier import save_classifier, train_classifier
from .denoiser import fit
from .ship import about, half, save_tensors, shipped_file
from .text_encoder import DIM, train_text_encoder

log = logging.getLogger(__name__)

RECIPE = Path(__file__).parents[1] / "configs" / "demo_full.yaml"

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
OFFSET = 0.2
"""Standard deviation of the offset noise, see denoiser.fit."""


@dataclass(frozen=True)
class Budget:
    """Training samples per network, and scenes rendered for them; the figures of the shipped family."""

    vae: tuple = PHASES
    decoder_steps: int = 2400
    text_steps: int = 700
    scenes: int = 2400
    classifier: int = 32_000
    base: int = 98_000
    settle: int = 32_000
    teacher: int = 48_000
    lora: int = 12_000
    control: int = 24_000
    student_steps: int = 2000


TINY = Budget(
    vae=((32, 4, 2), (128, 2, 1)),
    decoder_steps=2,
    text_steps=3,
    scenes=8,
    classifier=64,
    base=64,
    settle=64,
    teacher=64,
    lora=64,
    control=64,
    student_steps=2,
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


def build_vae(work: Path, budget: Budget) -> None:
    save_tensors(work / "vae.safetensors", train_vae(budget.vae, progress=_reporter("VAE")).state_dict())


def build_decoder(work: Path, budget: Budget) -> None:
    vae = load_vae(load_file(work / "vae.safetensors"))
    refine_decoder(vae, steps=budget.decoder_steps, progress=_reporter("decoder"))
    save_tensors(work / "decoder.safetensors", vae.state_dict())


def build_text(work: Path, budget: Budget) -> None:
    weights, right = train_text_encoder(budget.text_steps, progress=_reporter("text encoder"))
    log.info("text encoder: %.1f%% of held-out captions read without a mistake", 100 * right)
    save_tensors(work / "text.safetensors", weights)


def build_classifier(work: Path, budget: Budget) -> None:
    save_classifier(work / "classifier.safetensors", train_classifier(samples=budget.classifier))


def build_latents(work: Path, budget: Budget, look: str) -> None:
    vae = load_vae(load_file(work / "vae.safetensors"))
    data = captioned_latents(vae, [look], budget.scenes * (2 if look == BASE_LOOK else 1), SEED_SCENES)
    save_tensors(work / f"latents-{look}.safetensors", {"latents": data.buckets[0]})


def _data(work: Path, look: str) -> tuple[CaptionedLatents, Tensor]:
    """The scenes of one look with the text encoder's states of their captions (U, 77, d)."""
    latents = load_file(work / f"latents-{look}.safetensors")["latents"]
    rng = np.random.default_rng(SEED_SCENES)
    data = CaptionedLatents(latents, [sample_scene(rng).caption for _ in range(len(latents))])
    encoder = ClipText(load_file(work / "text.safetensors"))
    return data, torch.cat([encoder.encode(data.prompts[i : i + 64]) for i in range(0, len(data.prompts), 64)])


def _train_unet(work: Path, look: str, name: str, unet: UNet, *, samples: int, lr: float, offset: float = 0.0) -> None:
    data, contexts = _data(work, look)
    average = fit(
        lambda x_t, t, context, index: unet(x_t, t, context),
        list(unet.named_parameters()),
        data.buckets[0],
        data.rows,
        contexts=contexts,
        samples=samples,
        lr=lr,
        offset=offset,
        progress=_reporter(name),
    )
    save_tensors(work / f"{name}.safetensors", average)


def build_raw(work: Path, budget: Budget) -> None:
    torch.manual_seed(0)
    _train_unet(work, BASE_LOOK, "base-raw", UNet(DEMO_UNET), samples=budget.base, lr=2e-3)


def build_base(work: Path, budget: Budget) -> None:
    """Go on with offset noise, so that the caption decides the colours."""
    unet = load_unet(load_file(work / "base-raw.safetensors"))
    _train_unet(work, BASE_LOOK, "base", unet, samples=budget.settle, lr=1e-3, offset=OFFSET)


def build_teacher(work: Path, budget: Budget, look: str) -> None:
    """From the finished base, with offset noise all along: started before it, teachers unlearn what colours mean."""
    unet = load_unet(load_file(work / "base.safetensors"))
    _train_unet(work, look, look, unet, samples=budget.teacher, lr=1.5e-3, offset=OFFSET)


def build_lora(work: Path, budget: Budget) -> None:
    torch.manual_seed(1)
    unet = load_unet(load_file(work / "base.safetensors")).requires_grad_(False)
    adapters = lora.add_lora(unet, LORA_RANK, LORA_RANK)
    params = [(f"{n}.{k}", p) for n, adapter in adapters.items() for k, p in adapter.named_parameters()]
    data, contexts = _data(work, LORA_LOOK)
    average = fit(
        lambda x_t, t, context, index: unet(x_t, t, context), params, data.buckets[0], data.rows, contexts=contexts,
        samples=budget.lora, lr=3e-3, progress=_reporter("LoRA"),
    )  # fmt: skip
    with torch.no_grad():
        for key, p in params:
            p.copy_(average[key])
    save_tensors(work / "lora.safetensors", lora.lora_state_dict(unet, adapters, LORA_RANK, LORA_RANK))


def build_control(work: Path, budget: Budget) -> None:
    torch.manual_seed(2)
    unet = load_unet(load_file(work / "base.safetensors")).requires_grad_(False)
    net = controlnet.ControlNet(unet)
    data, contexts = _data(work, BASE_LOOK)
    rng = np.random.default_rng(SEED_SCENES)
    hints = torch.from_numpy(np.stack([control_hint(sample_scene(rng)) for _ in range(len(data))]))

    def predict(x_t, t, context, index):
        hint = hints[index].permute(0, 3, 1, 2).float().contiguous() / 255  # (B, H, W, 3) -> (B, 3, H, W)
        return unet(x_t, t, context, control=net(x_t, hint, t, context))

    average = fit(
        predict, list(net.named_parameters()), data.buckets[0], data.rows, contexts=contexts, samples=budget.control,
        lr=1e-3, caption_dropout=0.3, progress=_reporter("ControlNet"),
    )  # fmt: skip
    net.load_state_dict(average)
    save_tensors(work / "control.safetensors", net.file_state_dict())


def build_student(work: Path, budget: Budget) -> None:
    """Distil the demo DMM checkpoint from the shipped, half-precision teachers (resumable)."""
    whole = {key: half(load_file(work / f"{part}.safetensors")) for key, part in (("text", "text"), ("vae", "decoder"))}
    unet = half(load_file(work / "base.safetensors"))
    save_checkpoint(work / "whole.safetensors", Checkpoint(unet=unet, **whole, metadata=about("base")))
    config = load_config(RECIPE)
    config = dataclasses.replace(
        config,
        base=str(shipped_file(work, "base")),
        teachers=[dataclasses.replace(t, file=str(shipped_file(work, t.name))) for t in config.teachers],
        parts_from=str(work / "whole.safetensors"),
        output=str(work / "student.safetensors"),
        run_dir=str(work / "student-run"),
        train=dataclasses.replace(config.train, steps=budget.student_steps),
    )
    config.check()
    report = _reporter("student")

    def on_step(run, metrics):
        report(metrics.step, metrics.steps, sum(metrics.score.values()) / len(metrics.score))

    distill(config, Watch(on_step=on_step))


def _stages() -> dict[str, tuple[Callable[[Path, Budget], None], tuple[str, ...]]]:
    """name -> (function, the stages it needs); what blocks most comes first."""
    stages = {"vae": (build_vae, ()), "text": (build_text, ()), "classifier": (build_classifier, ())}
    looks = (BASE_LOOK, *TEACHER_LOOKS, LORA_LOOK)

    def with_look(function, look):
        return lambda work, budget: function(work, budget, look)

    for look in looks:
        stages[f"latents-{look}"] = (with_look(build_latents, look), ("vae",))
        if look == BASE_LOOK:
            stages["base-raw"] = (build_raw, ("text", f"latents-{look}"))
            stages["base"] = (build_base, ("base-raw",))
    stages["decoder"] = (build_decoder, ("vae",))
    for look in TEACHER_LOOKS:
        stages[look] = (with_look(build_teacher, look), ("base", f"latents-{look}"))
    stages["student"] = (build_student, ("text", "decoder", "base", *TEACHER_LOOKS))
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
