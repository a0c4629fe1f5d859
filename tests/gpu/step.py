"""The training step alone: samples/s, and which share of the device's matrix peak that is."""

from __future__ import annotations

import dataclasses
import statistics

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...training.loop.trainer import Trainer
from ..benches.memory import SD15, SDXL, Preset, random_run
from ..training.families import SMALL, SMALL_XL
from .ceilings import matrix_peak
from .setup import Setup

PRESETS = {
    ("tiny", "sd"): Preset("tiny", SMALL, 8, 2, 8),
    ("tiny", "sdxl"): Preset("tiny SDXL", SMALL_XL, 8, 2, 8),
    ("sd15", "sd"): Preset("SD1.5", SD15, 64, 4, 80),
    ("sd15", "sdxl"): Preset("SDXL", SDXL, 128, 2, 80),
}
BATCH = {"tiny": 4, "sd15": 16}
FOREVER = 1_000_000
"""Steps of a run that is timed, not finished."""


def run_of(setup: Setup, family: str = "sd", **settings) -> Trainer:
    """All weights learn with AdamW in bf16, the activations of SDXL are recomputed; settings: what is otherwise."""
    preset = PRESETS[setup.size, family]
    if "teachers" in settings:
        preset = dataclasses.replace(preset, teachers=settings.pop("teachers"))
    usual = {
        "batch_size": BATCH[setup.size] // (2 if family == "sdxl" else 1),
        "precision": "bf16",
        "residency": "device",
        "gradient_checkpointing": family == "sdxl" and not setup.tiny,
    }
    return random_run(preset, setup.device, steps=FOREVER, **{**usual, **settings})


def seconds_of_steps(run: Trainer, seconds: float, least: int = 3, warm: int = 2) -> list[float]:
    """Of whole steps, which read their figures from the device: for about so many seconds, after a few to warm up."""
    for _ in range(warm):
        run.train_step()
    taken: list[float] = []
    while len(taken) < least or sum(taken) < seconds:
        taken.append(run.train_step().seconds)
    return taken


def counted_tflop(run: Trainer) -> float:
    """TFLOP of one step: the matrix products, convolutions and attention of teachers, student and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run.train_step()
    return counter.get_total_flops() / 1e12


def measure(setup: Setup, family: str = "sd") -> None:
    peak = matrix_peak(setup.device)
    setup.note(**{"bf16 product TFLOP/s": peak})
    run = run_of(setup, family)
    try:
        rows = run.config.batch_size
        work = counted_tflop(run)
        setup.note(batch=rows, **{"TFLOP a sample": work / rows})
        taken = seconds_of_steps(run, min(30.0, setup.left / 3) if setup.cuda else 3.0)
        step = statistics.median(taken)
        setup.note(
            **{"samples/s": rows / step, "s a step": step, "TFLOP/s": work / step, "share of peak": work / step / peak}
        )
        if setup.cuda:
            setup.note(**{"peak memory GB": torch.cuda.max_memory_allocated() / 2**30})
    finally:
        run.targets.pool.close()
