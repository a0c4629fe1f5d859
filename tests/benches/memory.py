"""What the planner expects a run to take on the device, and on a CUDA machine what it does take.

    python -m comfyui_dmm.tests.benches.memory                  (a minute or two of one CPU core)
    python -m comfyui_dmm.tests.benches.memory --preset 24      (only the plans for 24 GB)

With CUDA every plan is carried out, on a device that gives no more memory than the plan may use: four steps of the real trainer on
random weights of the real sizes, which needs as much RAM as the table says. The column of activations, measured over estimated, is what
``training.memory.planner.plan`` takes as ``measured_peak``.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass
from typing import Any

import torch

from ...dmm_core.unet import UNet, UNetConfig
from ...training.config import TrainConfig
from ...training.data.batches import CaptionedLatents
from ...training.loop.trainer import Trainer
from ...training.memory.footprint import CAPTION_TOKENS, DTYPES
from ...training.memory.planner import GB, Plan, Want, plan
from ...training.teachers.teacher import Teacher

STEPS = 4
SD15 = UNetConfig()
SDXL = UNetConfig(
    channel_mult=(1, 2, 4), num_res_blocks=(2, 2, 2), depth_input=(0, 0, 2, 2, 10, 10), depth_middle=10,
    depth_output=(10, 10, 10, 2, 2, 2, 0, 0, 0), context_dim=2048, linear_proj=True, adm_channels=2816,
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A card of ``gb`` GB and what is to be distilled on it."""

    family: str
    config: UNetConfig
    side: int
    teachers: int
    gb: int
    adversarial: bool = False

    @property
    def name(self) -> str:
        return f"{self.family}, {self.teachers} teachers, {self.gb} GB{', discriminator' if self.adversarial else ''}"


PRESETS = (
    Preset("SD1.5", SD15, 64, 8, 8),
    Preset("SD1.5", SD15, 64, 4, 12),
    Preset("SD1.5", SD15, 64, 8, 16),
    Preset("SD1.5", SD15, 64, 8, 24),
    Preset("SD1.5", SD15, 64, 8, 24, adversarial=True),
    Preset("SD1.5", SD15, 64, 8, 48),
    Preset("SDXL", SDXL, 128, 4, 24),
    Preset("SDXL", SDXL, 128, 4, 48),
)


def make_plan(preset: Preset) -> Plan:
    want = Want(adversarial=preset.adversarial)
    return plan(preset.config, (preset.side, preset.side), preset.teachers, preset.gb * GB, want=want)


def random_run(preset: Preset, device: torch.device, **settings: Any) -> Trainer:
    """The trainer with models of the preset's sizes that never learnt anything. settings: of ``TrainConfig``."""
    config, dtype = preset.config, DTYPES[settings["precision"]]
    data = CaptionedLatents(torch.randn(16, 4, preset.side, preset.side), [f"caption {i}" for i in range(16)])
    prompts = len(data.prompts)

    def model(name: str) -> Teacher:
        pooled = (
            torch.randn(prompts, config.adm_channels - 6 * 256) if config.adm_channels else None
        )  # y is this and six sizes
        with device:  # random numbers come faster on a GPU
            unet = UNet(config).to(dtype)
        return Teacher(name, unet.cpu(), torch.randn(prompts, CAPTION_TOKENS, config.context_dim), pooled)

    usual = {"ema_gamma": 6.94, "lambda_feat": 0.001, "lambda_adv": 0.01 if preset.adversarial else 0.0}
    teachers = [model(f"teacher {i}") for i in range(preset.teachers)]
    return Trainer(model("base"), teachers, data, TrainConfig(**{**usual, **settings}), device=device)


def measure(preset: Preset, made: Plan, device: torch.device) -> tuple[int | None, float]:
    """(bytes at the worst moment, samples per second) of a few steps; on CUDA on a device that gives no more than the plan may use,
    elsewhere nothing limits or counts the bytes, which are None.

    Everything that the run held is given back. The first step, which warms up, is not timed.
    """
    cuda = device.type == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, preset.gb * GB / total))
    run = random_run(preset, device, **made.settings(), teacher_slots=made.slots, steps=STEPS)
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = [metrics.seconds for metrics in run.run()]  # of whole steps: their figures are read from the device
        samples = made.micro_batch * made.accumulate
        return torch.cuda.max_memory_allocated() if cuda else None, samples * (STEPS - 1) / sum(seconds[1:])
    finally:
        run.targets.pool.close()
        del run
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)


def described(made: Plan) -> str:
    how = [
        made.trainable,
        made.optimizer,
        f"{made.micro_batch} x {made.accumulate}",
        "recomputed" if made.gradient_checkpointing else "kept",
        "teachers on the device" if made.residency == "device" else f"teachers in RAM, {made.slots} placed",
        f"average: {made.ema_device}",
    ]
    return "; ".join(how)


def carried_out(preset: Preset, device: torch.device | None) -> dict[str, Any]:
    """Figures of a preset's plan, carried out on the device, or with None only planned. Sizes in GB of 2^30 bytes.

    Raises ValueError where the planner finds no plan.
    """
    made = make_plan(preset)
    activations = made.breakdown["activations"]
    figures: dict[str, Any] = {
        "plan": described(made),
        "RAM": made.ram / GB,
        "kept": (made.peak - activations) / GB,
        "estimated peak": made.peak / GB,
    }
    if device is not None:
        peak, figures["samples/s"] = measure(preset, made, device)
        if peak is not None:
            figures["measured peak"] = peak / GB
            figures["activations, measured / estimated"] = (peak - made.peak + activations) / activations
    return figures


def line(preset: Preset) -> str:
    try:
        found = carried_out(preset, torch.device("cuda") if torch.cuda.is_available() else None)
    except ValueError as error:
        return f"| {preset.name} | {error} | | | | | | |"
    digits = {
        "RAM": 1,
        "kept": 2,
        "estimated peak": 2,
        "measured peak": 2,
        "activations, measured / estimated": 2,
        "samples/s": 2,
    }
    numbers = [f"{found[name]:.{many}f}" if name in found else "–" for name, many in digits.items()]
    return "| " + " | ".join([preset.name, found["plan"], *numbers]) + " |"


def run(args: argparse.Namespace) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: estimates only"
    print(
        f"batch 8, bf16, feature loss, average of the weights; GB of 2^30 bytes; torch {torch.__version__}; {device}\n"
    )
    print(
        "| preset | plan | RAM | kept | estimated peak | measured peak | activations, measured / estimated | samples/s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for preset in PRESETS:
        if args.preset in (None, preset.gb):
            print(line(preset), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", type=int, choices=sorted({p.gb for p in PRESETS}), help="only plans of these GB")
    run(parser.parse_args())
