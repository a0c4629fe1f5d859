"""The stages in order of value: what a short time on a GPU should tell first stands first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SIZES = ("tiny", "sd15")
"""tiny: the demo family and random models of its size; sd15: random weights of the real sizes."""


@dataclass(frozen=True)
class Stage:
    """``measure(setup, **options)`` of a module in this folder, in at most ``limit`` seconds. part: of issue 16."""

    name: str
    part: str
    what: str
    module: str
    limit: float = 180
    options: Mapping[str, Any] = field(default_factory=dict)


HOST_FLAGS = {
    "default": [],
    "fp16": ["--fp16-unet"],
    "bf16": ["--bf16-unet"],
    "fp8": ["--fp8_e4m3fn-unet"],
    "lowvram": ["--lowvram"],
    "novram": ["--novram"],
}
"""Each a host of its own; the first one has the host's default memory manager."""

MEMORY = {
    "tiny": ("tiny",),
    "sd15": ("sd15-8x8", "sd15-4x12", "sd15-8x16", "sd15-8x24", "sd15-8x24-adv", "sd15-8x48", "sdxl-4x24", "sdxl-4x48"),
}
"""Planner presets of tests/benches/memory.py: teachers x GB."""


VARIANTS = (
    "channels last", "compiled", "flash attention", "efficient attention", "math attention", "channels last and compiled", "CUDA graphs",
)  # fmt: skip
"""Sides of tests/benches/training_step.py, in order of value."""


def check(name: str, what: str) -> Stage:
    return Stage(f"check-{name}", "a", what, "correctness", 150, {"check": name})


def stages(size: str) -> list[Stage]:
    first = [
        Stage("ceilings", "c", "bf16 matrix product and copy on the device, in their own right", "ceilings", 90),
        check("loop", "steps of the trainer against the same steps in float64 on the CPU"),
        check("offload", "teachers in RAM (pinned, copies on their own stream) against on the device, bitwise"),
        check("scaler", "fp16's GradScaler: steps that overflow are skipped, the others learn"),
        check("fused", "the run's AdamW against the plain one"),
        check("tf32", "tf32 inside of a run only, and its error"),
        check("resume", "stopped and resumed against straight on, bitwise"),
        Stage("step", "c", "training step: samples/s, TFLOP/s, share of the peak", "step", 240),
        Stage(
            "step-published",
            "c",
            "training step beside the published recipe's loop",
            "published",
            300,
            {"sides": ("theirs", "AdamW not fused", "checkpointing")},
        ),
        Stage("host-cpu", "b", "the host on the CPU: pictures to compare with", "host", 240, {"flags": ["--cpu"]}),
    ]
    host = [
        Stage(f"host-{name}", "b", f"the host {' '.join(flags) or 'as it starts'}", "host", 180, {"flags": flags})
        for name, flags in HOST_FLAGS.items()
    ]
    memory = [
        Stage(
            f"memory-{name}", "d", "a planner preset under its cap: predicted, measured", "memory", 150, {"name": name}
        )
        for name in MEMORY[size]
    ]
    middle = [
        Stage("residency", "e", "teachers in RAM against on the device: samples/s", "residency", 300),
        Stage("profile", "i", "top kernels of the training step", "profile", 200),
        Stage(
            "step-variants",
            "c",
            "training step: memory formats, compiled, CUDA graphs, attention kernels",
            "published",
            580,
            {"sides": VARIANTS, "one_by_one": True},
        ),
        Stage("sampling", "f", "styles, regions, one pass against the host's own UNet", "sampling", 400),
        Stage("sampling-bank", "f", "the same with a style bank", "sampling", 300, {"bank": "10%"}),
        Stage("tests", "a", "tests/core, the loop, states and residency by pytest", "suite", 300),
        Stage("step-sdxl", "h", "training step at SDXL's size", "step", 240, {"family": "sdxl"}),
    ]
    merge = Stage("merge", "g", "bench-merge, as many arms as time allows", "merge", 570)
    return [*first, *host, *memory[:1], *middle, *memory[1:], merge]
