"""What a distillation costs on 1, 8 and 64 GPUs, on paper: the formulae, and the tables of docs/performance.md.

    python -m comfyui_dmm.tests.benches.scale            (a second; prints)
    python -m comfyui_dmm.tests.benches.scale --write    (writes the part "Scale on paper" of docs/performance.md)

A sample is a row of a batch: the teacher's forward, the student's, and its backward, which computes twice as much as the forward:

    FLOP(sample) = forward(teacher) + 3 forward(student) = 4 forward

A style bank makes the student's passes longer (``WITH_BANK``). Where the bank alone learns, the backward has no gradients of the frozen
weights to compute and is one forward; what it computes for the bank's own is left out.

Rate of a GPU: samples/s of a row "step" (SDXL: "step-sdxl") of docs/gpu-rows.json, the best one of CUDA devices there, else a published
share of a published peak (``SHARE`` of ``PEAK``). Communication: every step sums the gradients of what is trained over the GPUs; in a ring
each sends 2 (n - 1) / n times their bytes, over the slowest link on the way; nothing of it is hidden behind the backward pass here, though
DDP hides most. What is left out: loading, saving, evaluation, waiting for data, teachers in RAM (docs/performance.md, "Teachers in RAM").
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...dmm_core.unet import UNetConfig
from ...training.loop.new_student import plain_shapes
from ...training.markdown import table
from ...training.presets import PRESETS
from ..gpu.report import KEPT, write_part
from ..gpu.rows import OK, Row, read_rows
from .memory import SD15, SDXL

MARKS = "<!-- tests/benches/scale.py writes from here -->", "<!-- end of what scale.py writes -->"
TOKENS = 77
PEAK, SHARE = 312e12, 0.28
"""Published: an A100's bf16 matrix peak, and the share of it at which MosaicML trained Stable Diffusion 2."""
PAPER_RATE = 11.6
"""Published (arXiv:2504.12364): samples/s of an A100, from 32 million samples in about 32 GPU days; with its discriminator."""
WITH_BANK = 1.166
"""Measured (docs/bank.md, SD1.5's size on a CPU): a student's forward and backward with a bank of 10%, over without."""
INSIDE, BETWEEN = 300e9, 25e9
"""Published, bytes/s of a GPU in one direction: NVLink of an A100 within a machine of 8; a 200 Gbit/s card each between machines."""
MACHINE = 8
GPUS = (1, 8, 64)
DAY = 86_400
MEASURED, COUNTED, PUBLISHED = "measured", "counted", "published"


# --- FLOP of a UNet ---------------------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int, side: int) -> int:
    """side: of the output, in latents."""
    return 2 * inputs * outputs * kernel**2 * side**2


def linear(inputs: int, outputs: int, rows: int = 1) -> int:
    return 2 * inputs * outputs * rows


def attention(channels: int, queries: int, keys: int) -> int:
    """Q K^T and the product with V."""
    return 2 * 2 * queries * keys * channels


def res_block(inputs: int, outputs: int, embed: int, side: int) -> int:
    skip = 0 if inputs == outputs else conv(inputs, outputs, 1, side)
    return conv(inputs, outputs, 3, side) + linear(embed, outputs) + conv(outputs, outputs, 3, side) + skip


def transformer(channels: int, depth: int, context: int, side: int) -> int:
    """proj_in and proj_out, and layers of self-attention, attention to the text, and a gated MLP of four times the width."""
    pixels = side**2
    own = 4 * linear(channels, channels, pixels) + attention(channels, pixels, pixels)
    to_text = 2 * linear(channels, channels, pixels) + 2 * linear(context, channels, TOKENS)
    to_text += attention(channels, pixels, TOKENS)
    mlp = linear(channels, 8 * channels, pixels) + linear(4 * channels, channels, pixels)
    return (2 * linear(channels, channels, pixels) + depth * (own + to_text + mlp)) if depth else 0


def forward_flop(unet: UNetConfig, side: int) -> int:
    """Of one row of latents (in_channels, side, side): matrix products, convolutions and attention, a multiplication and an
    addition as two."""
    embed, context, base = unet.embed_dim, unet.context_dim, unet.model_channels
    total = linear(base, embed) + linear(embed, embed)
    if unet.adm_channels:
        total += linear(unet.adm_channels, embed) + linear(embed, embed)
    total += conv(unet.in_channels, base, 3, side)
    channels, skips, depths = base, [base], iter(unet.depth_input)
    last = len(unet.channel_mult) - 1
    for level, mult in enumerate(unet.channel_mult):
        for _ in range(unet.num_res_blocks[level]):
            total += res_block(channels, mult * base, embed, side)
            channels = mult * base
            total += transformer(channels, next(depths), context, side)
            skips.append(channels)
        if level < last:
            side //= 2
            total += conv(channels, channels, 3, side)
            skips.append(channels)
    total += 2 * res_block(channels, channels, embed, side) + transformer(channels, unet.depth_middle, context, side)
    depths = iter(unet.depth_output)
    for level in range(last, -1, -1):
        for _ in range(unet.num_res_blocks[level] + 1):
            total += res_block(channels + skips.pop(), unet.channel_mult[level] * base, embed, side)
            channels = unet.channel_mult[level] * base
            total += transformer(channels, next(depths), context, side)
        if level:
            side *= 2
            total += conv(channels, channels, 3, side)
    return total + conv(channels, unet.out_channels, 3, side)


# --- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """side: of the native canvas in latents; stage: of tests/gpu that times a training step."""

    name: str
    unet: UNetConfig
    side: int
    stage: str

    @cached_property
    def numbers(self) -> int:
        """Weights of the UNet."""
        total = 0
        for shape in plain_shapes(self.unet).values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total

    @cached_property
    def sample_flop(self) -> int:
        return 4 * forward_flop(self.unet, self.side)


FAMILIES = (Family("SD1.5", SD15, 64, "step"), Family("SDXL", SDXL, 128, "step-sdxl"))


@dataclass(frozen=True)
class Recipe:
    """trained: share of the UNet's numbers whose gradients are summed, in float32. backward: the student's, in forwards; student: its
    passes with a bank, over those without."""

    name: str
    samples: int
    batch: int
    trained: float
    backward: float = 2.0
    student: float = 1.0

    @property
    def work(self) -> float:
        """Of a sample, over one of a student without a bank whose weights all learn."""
        return (1 + (1 + self.backward) * self.student) / 4


def recipes() -> tuple[Recipe, ...]:
    def of(name: str, shown: str, trained: float = 1.0, **passes: float) -> Recipe:
        settings = PRESETS[name]
        batch = settings["batch_size"] * settings["accumulate"]
        return Recipe(shown, settings["steps"] * batch, batch, trained, **passes)

    bank = float(PRESETS["standard"]["bank"].rstrip("%")) / 100
    return (
        of("paper", "the paper's samples (preset paper)"),
        of("standard", "preset standard, from the bank", 1 + bank, student=WITH_BANK),
        of("standard", "the same, the bank alone learns", bank, student=WITH_BANK, backward=1.0),
        of("draft", "preset draft, from the bank", 1 + bank, student=WITH_BANK),
    )


@dataclass(frozen=True)
class Rate:
    """samples/s of one GPU that computes alone, and where that is from."""

    samples: float
    source: str


def rate_of(family: Family, rows: Sequence[Row]) -> Rate:
    found = [row for row in rows if row.stage == family.stage and row.size == "sd15" and row.status == OK]
    best = max(found, key=lambda row: row.figures.get("samples/s", 0.0), default=None)
    if best is not None and best.figures.get("samples/s"):
        return Rate(float(best.figures["samples/s"]), f"{MEASURED} on {best.device}")
    return Rate(SHARE * PEAK / family.sample_flop, f"{PUBLISHED}: {SHARE:.0%} of an A100's peak; FLOP {COUNTED}")


def sent_bytes(recipe: Recipe, family: Family, gpus: int) -> float:
    """That each GPU sends in one step: the ring's two passes over the gradients, 4 bytes a number."""
    return 2 * (gpus - 1) / gpus * 4 * recipe.trained * family.numbers


def sum_seconds(recipe: Recipe, family: Family, gpus: int) -> float:
    """Of one step's sum of gradients."""
    return sent_bytes(recipe, family, gpus) / (INSIDE if gpus <= MACHINE else BETWEEN)


def cost(recipe: Recipe, family: Family, gpus: int, rate: Rate) -> tuple[float, float]:
    """(days on the wall, share of them that computes). A batch smaller than the GPUs grows to one row each: fewer steps of as many
    samples."""
    rows = max(1.0, recipe.batch / gpus)
    steps = recipe.samples / (rows * gpus)
    computes, sums = recipe.work * rows / rate.samples, sum_seconds(recipe, family, gpus)
    return steps * (computes + sums) / DAY, computes / (computes + sums)


def days(value: float) -> str:
    return f"{value:.3g} days" if value >= 2 else f"{24 * value:.3g} h"


def written(rows: Sequence[Row]) -> str:
    """The tables in Markdown."""
    lines = []
    for family in FAMILIES:
        rate = rate_of(family, rows)
        for recipe in recipes():
            cells = [f"{days(d)} ({share:.0%})" for d, share in (cost(recipe, family, n, rate) for n in GPUS)]
            sent = sent_bytes(recipe, family, max(GPUS)) / 1e9
            lines.append([family.name, recipe.name, f"{recipe.samples / 1e6:.3g}M", *cells, f"{sent:.2f} GB"])
    head = ["", "recipe", "samples", *(f"{n} GPU{'s' * (n > 1)}" for n in GPUS), "sent by a GPU each step, of 64"]
    facts = []
    for family in FAMILIES:
        rate = rate_of(family, rows)
        flop = f"{forward_flop(family.unet, family.side) / 1e12:.3f} ({COUNTED})"
        facts.append(
            [
                family.name,
                f"{family.numbers / 1e6:.0f}M",
                flop,
                f"{family.sample_flop / 1e12:.2f}",
                f"{rate.samples:.3g}",
                rate.source,
            ]
        )
    about = ["", "numbers", "TFLOP forward, a row", "TFLOP a sample", "samples/s of a GPU", "which is"]
    paper = PRESETS["paper"]["steps"] * PRESETS["paper"]["batch_size"] / PAPER_RATE / DAY
    share = PAPER_RATE * FAMILIES[0].sample_flop / PEAK
    return "\n\n".join(
        [
            table(about, facts),
            table(head, lines),
            f"In brackets: the share of that time that computes; the rest sums gradients. Against it, {PUBLISHED}: the paper's run took "
            f"{paper:.0f} days of one A100 ({PAPER_RATE} samples/s with its discriminator, VAE and text encoders; {share:.0%} of the "
            "peak by the FLOP counted here, which leave those out).",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/performance.md instead of printing")
    parser.add_argument("--rows", type=Path, default=KEPT)
    args = parser.parse_args()
    part = written(read_rows(args.rows))
    if args.write:
        write_part(part, MARKS)
    else:
        print(part)


if __name__ == "__main__":
    main()
