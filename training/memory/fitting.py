"""Fits a run's settings to the memory of its device, with the planner."""

from __future__ import annotations

import dataclasses
import math

import torch

from ...dmm_core.unet import UNetConfig
from ..config import TrainConfig
from ..fields import default_of
from ..loop.new_student import student_bank
from ..loop.targets import teacher_dtype
from ..teachers.teacher import without_styles
from .bus import most_moved, teachers_in_time, weight_bytes
from .planner import GB, Plan, Want, plan

OPEN = {
    name: default_of(TrainConfig, name)
    for name in ("optimizer", "trainable", "ema_device", "gradient_checkpointing", "residency")
}
"""Settings that the planner may change, and the value that leaves them to it: any other is the user's own choice."""


def budget_bytes(memory: float | str, device: torch.device) -> int | None:
    """Bytes of its device that a run may use; None for "off" and, without a GPU, for "auto": then nothing is planned.

    "auto" counts all of a GPU's memory, used or not: the same machine must plan the same run again to go on with it.
    """
    if memory == "off" or (memory == "auto" and device.type != "cuda"):
        return None
    if memory == "auto":
        return torch.cuda.get_device_properties(device).total_memory
    return int(memory * GB)


def fitted(
    config: TrainConfig,
    unet: UNetConfig,
    latents_hw: tuple[int, int],
    teachers: int,
    *,
    device: torch.device,
    processes: int = 1,
    begun: int | None = None,
) -> tuple[TrainConfig, Plan | None]:
    """The settings that fit into ``config.memory``, with the same samples per step, and the plan they are from, if one
    was made.

    unet: of the base, which may be a DMM model; latents_hw: of the largest pictures. processes: of the run, each with such a device; begun:
    the batch_size with which the run has begun, which it keeps (see ``run.state.begun_with``). Raises ValueError when nothing
    fits, and for teachers_per_step auto without the seconds of a step.
    """
    budget = budget_bytes(config.memory, device)
    if budget is None:
        return with_teachers_in_time(config, unet, teachers, device=device, processes=processes)[0], None
    fixed = {name: getattr(config, name) for name, free in OPEN.items() if getattr(config, name) != free}
    if begun and config.batch_size * config.accumulate % begun == 0:
        fixed["micro_batch"] = begun
    sharded = processes > 1 and config.parallel == "fsdp"
    if sharded:  # the others do not work on shares of a weight
        fixed["optimizer"] = "adamw"
    want = Want(
        batch_size=config.batch_size * config.accumulate,
        features=config.lambda_feat > 0,
        adversarial=config.lambda_adv > 0,
        ema=config.ema_gamma is not None,
        precision=config.precision,
        teacher_dtype=config.teacher_dtype,
        lora_rank=config.lora_rank,
        device=device.type,
        fixed=fixed,
        processes=processes,
        sharded=sharded,
        bank=student_bank(unet, teachers, config) if config.init == "bank" and not unet.bank else unet.bank,
        base=unet if unet.num_styles else None,
    )
    found = plan(without_styles(unet), latents_hw, teachers, budget, want=want)
    config = dataclasses.replace(config, **found.settings(), teacher_slots=found.slots)
    config, moved = with_teachers_in_time(config, unet, teachers, device=device, processes=processes)
    return config, dataclasses.replace(found, models=config.teachers_per_step, moved=moved)


def with_teachers_in_time(
    config: TrainConfig, unet: UNetConfig, teachers: int, *, device: torch.device, processes: int = 1
) -> tuple[TrainConfig, int]:
    """The settings with a number, or "all", for teachers_per_step "auto"; and the most bytes that a step of theirs moves to the device.

    Where teachers wait is up to the memory that is free at the start if residency is "auto" still: they count as waiting in RAM.
    Arguments and ValueError as of ``fitted``.
    """
    c, wanted = config, config.teachers_per_step
    in_ram = c.residency != "device" and device.type != "cpu"
    if not in_ram:
        return (dataclasses.replace(c, teachers_per_step="all") if wanted == "auto" else c), 0
    waiting = teachers + int(not (c.lambda_adv or unet.num_styles))  # else the base stays on the device
    rows, each = (
        math.ceil(c.batch_size / processes),
        weight_bytes(without_styles(unet), teacher_dtype(c, device) or torch.float32),
    )
    if wanted == "auto":
        if c.step_seconds is None:
            raise ValueError(
                "teachers_per_step is 'auto', and step_seconds is not set: give the seconds that a step computes, as `seconds` in the "
                "log.jsonl of a run with teachers_per_step: 1 says, or a number of teachers"
            )
        copy = each / (c.bus_speed * 1e9)
        found = teachers_in_time(
            waiting, rows, c.accumulate, copy_seconds=copy, step_seconds=c.step_seconds, slots=c.teacher_slots
        )
        c = dataclasses.replace(c, teachers_per_step=found or "all")
    models = c.teachers_per_step if isinstance(c.teachers_per_step, int) else None
    return c, each * most_moved(models, waiting, rows, c.accumulate)
