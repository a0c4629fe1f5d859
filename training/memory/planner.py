"""Finds the best settings with which a run fits into a memory budget, from the model's sizes, before anything is
loaded.

The order, best first. What comes first is given up last:

1. all weights learn, rather than the style bank and the style side only, rather than low-rank adapters and the style side, beside which
   a bank stays as it is;
2. AdamW, rather than its 8-bit form, rather than Adafactor;
3. forwards of at least 4 samples (gradients add up to the batch that was asked for, so less costs time, not quality);
4. two places on the device for the teachers that wait in RAM, rather than one;
5. the average of the weights on the device, rather than in RAM;
6. activations kept, rather than blocks recomputed;
7. all teachers on the device, rather than in RAM: the first thing to go, since copies run beside the arithmetic.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...dmm_core.bank import BankConfig
from ...dmm_core.unet import UNet, UNetConfig
from .footprint import Sizes, Step, sizes, step_peak

GB = 2**30
"""As memory is sold."""

MARGIN = 0.08
"""Share of the budget that stays free: kernels' scratch memory and the gaps between tensors, which ``footprint`` does
not see."""

CUDA_CONTEXT = 600_000_000
"""Bytes that CUDA and its libraries take on a card before the first tensor (0.4 to 0.7 GB are usual)."""

COMFORTABLE = 4
"""Samples of one forward that keep a GPU busy."""

OPTIMIZER_TENSORS = 3
"""Temporary copies of one parameter that an optimiser's step makes (fused AdamW none, Adafactor about three)."""

OPTIMIZER_NEEDS = {"adamw": None, "adamw8bit": "bitsandbytes", "adafactor": "transformers"}
"""Optimisers from best to smallest, and the package that each needs (see ``optimizers.make_optimizer``)."""


@dataclass(frozen=True)
class Want:
    """What the user asks for, which a plan does not change.

    batch_size: samples of one optimiser step. features / adversarial: whether lambda_feat / lambda_adv are above 0.
    ema: whether the weights are averaged. teacher_dtype: "auto" is the precision on CUDA, fp32 elsewhere. device:
    "cuda" or "cpu". fixed: settings that the user has chosen already, by their names in ``Choice``. processes: that
    share the samples, each with a device of this size; sharded: each holds a shard of the student only. bank: the student's style bank.
    base: the sizes of a base that is a DMM model, None for one as the teachers are.
    """

    batch_size: int = 8
    features: bool = True
    adversarial: bool = False
    ema: bool = True
    precision: str = "bf16"
    teacher_dtype: str = "auto"
    lora_rank: int = 32
    device: str = "cuda"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    sharded: bool = False
    bank: BankConfig | None = None
    base: UNetConfig | None = None


@dataclass(frozen=True)
class Choice:
    """The settings that a planner chooses. The batch is micro_batch * accumulate, and processes share out the
    micro_batch; slots: places for teachers that wait in RAM."""

    trainable: str
    optimizer: str
    slots: int
    ema_device: str
    gradient_checkpointing: bool
    residency: str
    micro_batch: int
    accumulate: int


@dataclass(frozen=True)
class Plan(Choice):
    """Settings and what they need. breakdown: bytes on the device at the worst moment, by what they hold; ram: bytes of
    teachers and average in RAM beside it; budget: the bytes that were allowed, usable: what is left of them after the
    margin. models: teachers_per_step; moved: the most bytes of them that a step copies to the device (``bus``).
    """

    precision: str
    breakdown: dict[str, int]
    ram: int
    budget: int
    usable: int
    processes: int = 1
    models: int | str = "all"
    moved: int = 0

    @property
    def peak(self) -> int:
        """Bytes on the device at the worst moment."""
        return sum(self.breakdown.values())

    def settings(self) -> dict[str, Any]:
        """As fields of ``TrainConfig``, whose batch_size is the samples of one forward; its ``teacher_slots`` are
        ``slots``."""
        return {
            "batch_size": self.micro_batch,
            "accumulate": self.accumulate,
            "gradient_checkpointing": self.gradient_checkpointing,
            "optimizer": self.optimizer,
            "trainable": self.trainable,
            "ema_device": "cpu" if self.ema_device == "cpu" else "auto",
            "residency": self.residency,
            "precision": self.precision,
        }

    def describe(self) -> str:
        """A short table for people, in GB of 2^30 bytes."""
        learns = {
            "all": "all weights",
            "bank": "the style bank and the style side",
            "lora": "low-rank adapters and the style side",
            "style": "the style side",
        }
        places = "1 place" if self.slots == 1 else f"{self.slots} places"
        where = "all on the device" if self.residency == "device" else f"in RAM, {places} on the device"
        blocks = "blocks recomputed" if self.gradient_checkpointing else "activations kept"
        shared = f", shared by {self.processes} processes with this much memory each" if self.processes > 1 else ""
        asked = "all teachers" if self.models == "all" else f"{self.models} of the teachers and the base"
        width = max(len("together"), *map(len, self.breakdown))
        lines = [
            f"learning: {learns[self.trainable]}, {self.optimizer}, {self.precision}",
            f"batch:    {self.micro_batch} samples x {self.accumulate} forwards, {blocks}{shared}",
            f"teachers: {where} ({self.ram / GB:.1f} GB of RAM)",
            *(
                [f"moved:    {asked} in a step, {self.moved / 1e9:.1f} GB over the bus at the most"]
                if self.moved
                else []
            ),
            *(f"  {name:<{width}} {size / GB:6.2f} GB" for name, size in self.breakdown.items() if size),
            f"  {'together':<{width}} {self.peak / GB:6.2f} GB of {self.usable / GB:.1f} GB usable of {self.budget / GB:.1f} GB",
        ]
        return "\n".join(lines)


def plan(
    config: UNetConfig,
    latents_hw: tuple[int, int],
    teachers: int,
    budget_bytes: int,
    *,
    want: Want | None = None,
    measured_peak: float = 1.0,
) -> Plan:
    """The best settings for ``teachers`` UNets of these sizes and their base within ``budget_bytes`` of device memory.

    latents_hw: the largest latents of the data. measured_peak: measured over estimated activations of an earlier run,
    which ``tests/benches/memory.py`` prints; the estimate is multiplied by it. Takes seconds to a minute: training
    steps are run on fake tensors. Raises ValueError with the GB that would do when nothing fits, or for a fixed setting
    that is no choice.
    """
    want = want or Want()
    usable = usable_bytes(budget_bytes, want.device)
    smallest: tuple[int, list[Choice]] = (0, [])
    for choice in choices(want):
        step = _step(config, latents_hw, teachers, choice=choice, want=want)
        needs = resident_bytes(sizes(step), teachers, choice, want)
        stays = sum(needs.values())
        if not smallest[1] or stays < smallest[0]:
            smallest = stays, []
        if stays == smallest[0]:
            smallest[1].append(choice)
        if stays > usable:  # no need to look at activations
            continue
        needs["activations"] = activation_bytes(step, choice, want, measured_peak) + blocks_in_use(config, want)
        if sum(needs.values()) <= usable:
            ram = _ram(sizes(step), teachers, choice, want)
            return Plan(
                **vars(choice), precision=want.precision, breakdown=needs, ram=ram, budget=budget_bytes, usable=usable,
                processes=want.processes,
            )  # fmt: skip
    stays, tight = smallest
    if not tight:
        raise ValueError(f"no setting is left to choose from: {dict(want.fixed)} contradict each other")
    steps = [_step(config, latents_hw, teachers, choice=choice, want=want) for choice in tight]
    least = stays + min(activation_bytes(step, choice, want, measured_peak) for step, choice in zip(steps, tight))
    least += blocks_in_use(config, want)
    need = (least + _overhead(want.device)) / (1 - MARGIN)
    easier = ["smaller pictures"]
    easier += ["no discriminator (lambda_adv: 0)"] if want.adversarial else []
    easier += [f"another {', '.join(sorted(want.fixed))}"] if want.fixed else []
    raise ValueError(
        f"{teachers} teachers of this size need {need / GB:.1f} GB of memory at the least, {budget_bytes / GB:.1f} GB are there; "
        f"less will do with {' or '.join(easier)}"
    )


def resident_bytes(each: Sizes, teachers: int, choice: Choice, want: Want) -> dict[str, int]:
    """Bytes that are on the device from the first step to the last, by what they hold."""
    places = teachers  # beside the base
    if (
        choice.residency == "offload"
    ):  # the discriminator looks through the base, which then stays, as one of other sizes does
        stays = want.adversarial or want.base is not None
        places = min(places, choice.slots if stays else choice.slots - 1)
    needs = {
        "student": each.student,
        "gradients": each.trained,
        "optimiser": each.optimizer[choice.optimizer],
        "average": each.trained if want.ema and choice.ema_device == "device" else 0,
    }
    if want.sharded:
        needs = {name: -(-size // want.processes) for name, size in needs.items()}
    return {**needs, "teachers": places * each.teacher + each.base, "discriminator": each.head}


def rows_at_once(micro_batch: int, want: Want) -> int:
    """Samples of one forward in one process."""
    return -(-micro_batch // want.processes)


def blocks_in_use(config: UNetConfig, want: Want) -> int:
    """Bytes of the blocks that are gathered at a time where the student is sharded: the one that computes, the next
    one, and one block's gradients."""
    if not want.sharded:
        return 0
    with torch.device("meta"):
        student = UNet(dataclasses.replace(config, bank=want.bank))
    blocks = [*student.input_blocks, student.middle_block, *student.output_blocks]
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    bank = sum(p.numel() for p in student.bank_parameters())  # of no block: whole throughout, and so are its gradients
    rest = sum(p.numel() for p in student.parameters()) - sum(p.numel() for b in blocks for p in b.parameters()) - bank
    return (3 * largest + rest + 2 * bank) * (2 if want.precision in ("bf16", "fp16") else 4)


def activation_bytes(step: Step, choice: Choice, want: Want, factor: float = 1.0) -> int:
    """Bytes at the worst moment of a step on top of ``resident_bytes``.

    The peak is convex in the number of samples (the worst of many moments, each linear in it), so the straight line
    between one sample and many is never too low; two sizes are tried instead of all.
    """
    rows = rows_at_once(choice.micro_batch, want)
    many = max((n for n in range(1, want.batch_size) if want.batch_size % n == 0), default=1)
    many = rows_at_once(many, want)
    if not step.accumulating or rows == 1 or many == 1:
        peak = step_peak(step, rows)
    else:
        low, high = step_peak(step, 1), step_peak(step, many)
        peak = low + (high - low) * (rows - 1) // (many - 1)
    return max(int(factor * peak), OPTIMIZER_TENSORS * sizes(step).largest)


def _step(config: UNetConfig, latents_hw: tuple[int, int], teachers: int, *, choice: Choice, want: Want) -> Step:
    height, width = latents_hw
    narrow = want.precision if want.device == "cuda" else "fp32"
    return Step(
        config=config,
        latents_hw=(height, width),
        styles=teachers,
        precision=want.precision,
        teacher_dtype=narrow if want.teacher_dtype == "auto" else want.teacher_dtype,
        gradient_checkpointing=choice.gradient_checkpointing,
        trainable=choice.trainable,
        bank=want.bank,
        lora_rank=want.lora_rank,
        features=want.features,
        adversarial=want.adversarial,
        accumulating=choice.accumulate > 1,
        device=want.device,
        base=want.base,
    )


def _ram(each: Sizes, teachers: int, choice: Choice, want: Want) -> int:
    """Bytes of teachers and average in RAM."""
    average = each.trained if want.ema and choice.ema_device == "cpu" else 0
    return average + (teachers * each.teacher + each.base if choice.residency == "offload" else 0)


def _importable(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


def usable_bytes(budget: int, device: str) -> int:
    """Bytes of a budget that are left after the margin and CUDA's own memory."""
    return int(budget * (1 - MARGIN)) - _overhead(device)


def _overhead(device: str) -> int:
    """Bytes that a device has lost before the first tensor."""
    return CUDA_CONTEXT if device == "cuda" else 0


def choices(want: Want) -> Iterator[Choice]:
    """Every setting that is open, best first (see the top of this file). Raises ValueError when ``want.fixed`` leaves
    none."""
    cuda, fixed = want.device == "cuda", dict(want.fixed)
    # On the CPU "the device" and RAM are one memory: moving things between them saves nothing.
    options: dict[str, Sequence[Any]] = {
        "trainable": ("all", "bank", "lora") if want.bank else ("all", "lora"),
        "optimizer": [
            name for name, package in OPTIMIZER_NEEDS.items() if _importable(package) and (cuda or name != "adamw8bit")
        ],
        "comfortable": (True, False),
        "slots": (2, 1),
        "ema_device": ("device", "cpu") if cuda and want.ema else ("device",),
        "gradient_checkpointing": (False, True),
        "residency": ("device", "offload") if cuda else ("device",),
        "micro_batch": [n for n in range(want.batch_size, want.processes - 1, -1) if want.batch_size % n == 0],
    }
    if unknown := sorted(set(fixed) - set(options)):
        raise ValueError(f"the planner does not choose {', '.join(unknown)}; it chooses {', '.join(sorted(options))}")
    options |= {name: (value,) for name, value in fixed.items()}
    for values in itertools.product(*options.values()):
        one: dict[str, Any] = dict(zip(options, values))
        comfortable = rows_at_once(one["micro_batch"], want) >= min(COMFORTABLE, rows_at_once(want.batch_size, want))
        if one.pop("comfortable") != comfortable or (one["residency"] == "device" and one["slots"] == 1):
            continue
        yield Choice(**one, accumulate=max(1, want.batch_size // one["micro_batch"]))
