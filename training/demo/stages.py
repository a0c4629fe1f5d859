"""The stages of ``dmm demo build``: what is trained, from what, for how long. Each writes one file to the work folder.

At these sizes a second thread slows a training down: run_stage uses one, and build.py runs several stages at a time.
"""

from __future__ import annotations

import dataclasses
import json
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
from ..config_file import load_config
from ..data.batches import CaptionedLatents
from ..data.demo.family import FAMILIES, FIRST, Family
from ..data.demo.latents import captioned_latents
from ..data.demo.scenes import control_hint
from ..files.checksums import write_checked
from ..loop import adapters as lora
from ..run.distill import distill
from ..run.watch.watch import Watch
from ..text import ClipText
from . import controlnet
from .autoencoder import PHASES, refine_decoder, train_vae
from .classifier import save_classifier, train_classifier
from .denoiser import fit
from .ship import about, half, save_tensors, shipped_file, shipped_vae
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
    student_steps: int = 3000


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
BUDGETS = {
    "first": Budget(),
    "second": Budget(
        vae=((64, 8, 900), (128, 2, 300)),
        decoder_steps=600,
        scenes=1200,
        classifier=20_000,
        base=72_000,
        settle=20_000,
        teacher=20_000,
    ),
}
"""By family. The second's is smaller: it is built on request, and only has to be painted well enough to compare recipes on."""
DISTILLED_SCENES = 640
"""Scenes of a family's own distillation data, as many as configs/demo.yaml has."""


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


def build_vae(work: Path, budget: Budget, family: Family) -> None:
    """From nothing for the shipped family; the others go on from the shipped one, which makes 14 to 26 dB of looks it has not seen."""
    report, start = _reporter("VAE"), None if family.shipped else shipped_vae()
    vae = train_vae(budget.vae, seed=family.seed, start=start, family=family, progress=report)
    save_tensors(work / "vae.safetensors", vae.state_dict())


def build_decoder(work: Path, budget: Budget, family: Family) -> None:
    vae = load_vae(load_file(work / "vae.safetensors"))
    report = _reporter("decoder")
    refine_decoder(vae, steps=budget.decoder_steps, seed=family.seed, family=family, progress=report)
    save_tensors(work / "decoder.safetensors", vae.state_dict())


def build_text(work: Path, budget: Budget, family: Family) -> None:
    weights, right = train_text_encoder(
        budget.text_steps, seed=family.seed, progress=_reporter("text encoder"), world=family.world
    )
    log.info("text encoder: %.1f%% of held-out captions read without a mistake", 100 * right)
    save_tensors(work / "text.safetensors", weights)


def build_classifier(work: Path, budget: Budget, family: Family) -> None:
    model = train_classifier(family.seed, samples=budget.classifier, progress=_reporter("classifier"), family=family)
    save_classifier(work / "classifier.safetensors", model)


def build_scenes(work: Path, budget: Budget, family: Family) -> None:
    """Scenes in every look, as a file that a distillation of the family reads (``kind: latents``)."""
    vae = load_vae(load_file(work / "vae.safetensors"))
    data = captioned_latents(vae, family.painted, min(DISTILLED_SCENES, budget.scenes), family.seed, family=family)
    captions = [data.prompts[row] for row in data.rows.tolist()]
    write_checked(work / "scenes.safetensors", {"latents": data.buckets[0]}, {"captions": json.dumps(captions)})


def build_latents(work: Path, budget: Budget, family: Family, look: str) -> None:
    vae = load_vae(load_file(work / "vae.safetensors"))
    count, seed = budget.scenes * (2 if look == family.base else 1), SEED_SCENES + family.seed
    data = captioned_latents(vae, [look], count, seed, family=family)
    save_tensors(work / f"latents-{look}.safetensors", {"latents": data.buckets[0]})


def _data(work: Path, family: Family, look: str) -> tuple[CaptionedLatents, Tensor]:
    """The scenes of one look with the text encoder's states of their captions (U, 77, d)."""
    latents = load_file(work / f"latents-{look}.safetensors")["latents"]
    rng = np.random.default_rng(SEED_SCENES + family.seed)
    data = CaptionedLatents(latents, [family.sample_scene(rng).caption for _ in range(len(latents))])
    encoder = ClipText(load_file(work / "text.safetensors"))
    return data, torch.cat([encoder.encode(data.prompts[i : i + 64]) for i in range(0, len(data.prompts), 64)])


def _train_unet(
    work: Path, family: Family, look: str, unet: UNet, *, name: str, samples: int, lr: float, offset: float = 0.0
) -> None:
    data, contexts = _data(work, family, look)
    average = fit(
        lambda x_t, t, context, index: unet(x_t, t, context),
        list(unet.named_parameters()),
        data.buckets[0],
        data.rows,
        contexts=contexts,
        samples=samples,
        lr=lr,
        offset=offset,
        seed=family.seed,
        progress=_reporter(name),
    )
    save_tensors(work / f"{name}.safetensors", average)


def build_raw(work: Path, budget: Budget, family: Family) -> None:
    torch.manual_seed(family.seed)
    _train_unet(work, family, family.base, UNet(DEMO_UNET), name="base-raw", samples=budget.base, lr=2e-3)


def build_base(work: Path, budget: Budget, family: Family) -> None:
    """Go on with offset noise, so that the caption decides the colours."""
    unet = load_unet(load_file(work / "base-raw.safetensors"))
    _train_unet(work, family, family.base, unet, name="base", samples=budget.settle, lr=1e-3, offset=OFFSET)


def build_teacher(work: Path, budget: Budget, family: Family, look: str) -> None:
    """From the finished base, with offset noise all along: started before it, teachers unlearn what colours mean."""
    unet = load_unet(load_file(work / "base.safetensors"))
    _train_unet(work, family, look, unet, name=look, samples=budget.teacher, lr=1.5e-3, offset=OFFSET)


def build_lora(work: Path, budget: Budget, family: Family, look: str = "") -> None:
    """The LoRA of the family, or that of one of its further looks."""
    torch.manual_seed(1)
    unet = load_unet(load_file(work / "base.safetensors")).requires_grad_(False)
    adapters = lora.add_lora(unet, LORA_RANK, LORA_RANK)
    params = [(f"{n}.{k}", p) for n, adapter in adapters.items() for k, p in adapter.named_parameters()]
    data, contexts = _data(work, family, look or family.lora)
    average = fit(
        lambda x_t, t, context, index: unet(x_t, t, context), params, data.buckets[0], data.rows, contexts=contexts,
        samples=budget.lora, lr=3e-3, progress=_reporter("LoRA"),
    )  # fmt: skip
    with torch.no_grad():
        for key, p in params:
            p.copy_(average[key])
    name = f"lora-{look}" if look else "lora"
    save_tensors(work / f"{name}.safetensors", lora.lora_state_dict(unet, adapters, LORA_RANK, LORA_RANK))


def build_control(work: Path, budget: Budget, family: Family) -> None:
    torch.manual_seed(2)
    unet = load_unet(load_file(work / "base.safetensors")).requires_grad_(False)
    net = controlnet.ControlNet(unet)
    data, contexts = _data(work, family, family.base)
    rng = np.random.default_rng(SEED_SCENES + family.seed)
    hints = torch.from_numpy(np.stack([control_hint(family.sample_scene(rng)) for _ in range(len(data))]))

    def predict(x_t, t, context, index):
        hint = hints[index].permute(0, 3, 1, 2).float().contiguous() / 255  # (B, H, W, 3) -> (B, 3, H, W)
        return unet(x_t, t, context, control=net(x_t, hint, t, context))

    average = fit(
        predict, list(net.named_parameters()), data.buckets[0], data.rows, contexts=contexts, samples=budget.control,
        lr=1e-3, caption_dropout=0.3, progress=_reporter("ControlNet"),
    )  # fmt: skip
    net.load_state_dict(average)
    save_tensors(work / "control.safetensors", net.file_state_dict())


def build_student(work: Path, budget: Budget, family: Family) -> None:
    """Distil the demo DMM checkpoint from the shipped, half-precision teachers (resumable)."""
    whole = {key: half(load_file(work / f"{part}.safetensors")) for key, part in (("text", "text"), ("vae", "decoder"))}
    unet = half(load_file(work / "base.safetensors"))
    save_checkpoint(work / "whole.safetensors", Checkpoint(unet=unet, **whole, metadata=about("base")))
    config = load_config(RECIPE)
    config = dataclasses.replace(
        config,
        base=str(shipped_file(work, "base", family)),
        teachers=[dataclasses.replace(t, file=str(shipped_file(work, t.name, family))) for t in config.teachers],
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


Stage = Callable[[Path, Budget, Family], None]


def stages_of(family: Family = FIRST) -> dict[str, tuple[Stage, tuple[str, ...]]]:
    """name -> (function, the stages it needs); what blocks most comes first. Only the shipped family has a student and a ControlNet."""
    stages: dict[str, tuple[Stage, tuple[str, ...]]] = {
        "vae": (build_vae, ()),
        "text": (build_text, ()),
        "classifier": (build_classifier, ()),
    }

    def with_look(function, look):
        return lambda work, budget, family: function(work, budget, family, look)

    for look in (*family.painted, *filter(None, [family.lora]), *family.more_loras):
        stages[f"latents-{look}"] = (with_look(build_latents, look), ("vae",))
        if look == family.base:
            stages["base-raw"] = (build_raw, ("text", f"latents-{look}"))
            stages["base"] = (build_base, ("base-raw",))
    stages["decoder"] = (build_decoder, ("vae",))
    for look in family.teachers:
        stages[look] = (with_look(build_teacher, look), ("base", f"latents-{look}"))
    if family.shipped:
        stages["student"] = (build_student, ("text", "decoder", "base", *family.teachers))
        stages["control"] = (build_control, ("base",))
    else:
        stages["scenes"] = (build_scenes, ("vae",))
    if family.lora:
        stages["lora"] = (build_lora, ("base", f"latents-{family.lora}"))
    for look in family.more_loras:
        stages[f"lora-{look}"] = (with_look(build_lora, look), ("base", f"latents-{look}"))
    return stages


def run_stage(name: str, work: Path, budget: Budget, family: str = FIRST.name) -> float:
    """One stage in this process, on one thread; returns its seconds."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    started = time.monotonic()
    found = FAMILIES[family]
    stages_of(found)[name][0](work, budget, found)
    return time.monotonic() - started
