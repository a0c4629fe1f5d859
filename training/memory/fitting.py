"""Fits a run's settings to the memory of its device, with the planner."""

from __future__ import annotations

import dataclasses

import torch

from ...dmm_core.unet import UNetConfig
from ..config import TrainConfig
from ..fields import default_of
from ..loop.new_student import student_bank
from ..teachers.teacher import without_styles
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
    fits.
    """
    budget = budget_bytes(config.memory, device)
    if budget is None:
        return config, None
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
    return dataclasses.replace(config, **found.settings(), teacher_slots=found.slots), found
