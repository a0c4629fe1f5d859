"""`make demo`: merge the demo teachers at once, distil from there, compare both with the teachers, paint, and say where everything is."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from ...dmm_core.checkpoint import load_checkpoint
from ...dmm_core.unet import UNet, load_unet
from ..config_file import load_config
from ..data.demo.latents import demo_latents
from ..loop.eps_table import eps_errors, format_table
from ..merge.files import merge_files
from ..merge.merge import MergeConfig
from ..paint.images import blend_strip, grid, save_picture
from ..paint.painter import Painter, Settings, painter
from ..run.distill import distill
from ..run.watch.watch import Watch
from ..teachers.teacher import soup

CAPTIONS = (
    "a red star",
    "a big blue house, hills",
    "a green fish by the sea",
    "a yellow moon in the city",
    "an orange cat",
    "a pink flower, hills",
)
SETTINGS = Settings(steps=16, cfg=4.0, width=128, height=128)
BLEND, BLEND_SEED = ("ink", "sticker"), 3
HELD_OUT_SEED = 7_000_000
"""Seed of the scenes for the table; training draws its scenes from small seeds."""


def tour(config_path: str, watched: Callable[[], AbstractContextManager[Watch]]) -> None:
    """Everything `make demo` shows; files go beside the config's ``output``. watched: gives a Watch for the training, and only for that: it
    turns an interrupt into a request, which nothing else here answers."""
    started = time.monotonic()
    config = load_config(config_path)
    output = Path(config.output)
    at_once = output.with_name(output.stem.removesuffix("-dmm") + "-merged.safetensors")
    report, _ = merge_files(
        [(spec.name, spec.file) for spec in config.teachers],
        at_once,
        MergeConfig(config.train.bank),
        base=config.base,
        parts_from=config.parts_from,
        title=f"{config.title}, merged without training",
    )
    merged = time.monotonic()
    print(
        f"\n1. Merged without training, in {merged - started:.1f} s: {at_once}\n\n{report.text()}\n\n2. Distilled from there\n"
    )
    with watched() as watch:
        run = distill(config, watch)
    trained = time.monotonic()

    first_look = load_checkpoint(at_once)
    student = load_unet(load_checkpoint(output).unet)  # what was written, not what is in memory
    average = UNet(run.base.unet.config)
    average.load_state_dict(soup([t.unet.state_dict() for t in run.teachers]))
    data = demo_latents(load_checkpoint(output), 128, HELD_OUT_SEED)
    brush = painter(load_checkpoint(output))
    contexts = brush.text.encode(data.prompts)  # the demo family shares one text encoder
    base, *teachers = (replace(teacher, contexts=contexts) for teacher in (run.base, *run.teachers))
    table = eps_errors(
        teachers, base, average, student, data=data, samples=len(data), merged=load_unet(first_look.unet)
    )
    print(f"\neps error against each teacher (mean squared, {len(data)} unseen scenes; smaller is closer)\n")
    print(format_table(table))

    at_first = painter(first_look)
    rows, labels = [], []
    for spec, teacher in zip(config.teachers, run.teachers):
        plain = Painter(teacher.unet, brush.text, brush.vae)
        for name, who, row in (
            (f"{spec.name}: teacher", plain, None),
            (f"{spec.name}: merged", at_first, at_first.style_row(spec.name)),
            (f"{spec.name}: distilled", brush, brush.style_row(spec.name)),
        ):
            labels.append(name)
            rows.append(who.pictures(who.latents(CAPTIONS, row, seed=1, settings=SETTINGS)))
    sheet = output.with_name(output.stem + "-grid.png")
    title = "Each teacher, and one model in its style: merged without training, and distilled from there"
    save_picture(grid(rows, labels, CAPTIONS, title=title), sheet)

    first, second = BLEND
    shares = [i / 6 for i in range(7)]
    mixes = torch.cat([brush.style_row({first: 1 - share, second: share}) for share in shares])
    strip = output.with_name(output.stem + "-blend.png")
    frames = brush.pictures(
        brush.latents(["a big blue house, hills"] * 7, mixes, BLEND_SEED, SETTINGS, same_noise=True)
    )
    save_picture(blend_strip(frames, first, second, shares, title="One model, two styles, seven blends"), strip)

    print(f"\ncheckpoint  {output} ({output.stat().st_size / 1e6:.1f} MB)\npictures    {sheet}\nblend       {strip}")
    print(
        f"merged in {merged - started:.1f} s, distilled in {trained - merged:.0f} s, all in {time.monotonic() - started:.0f} s"
    )
    print(
        "\nIn ComfyUI: copy the checkpoint into ComfyUI/models/dmm (or models/checkpoints), open the template "
        "'DMM 01 - Quickstart' and pick the file in the 'Load DMM Model' node."
    )
