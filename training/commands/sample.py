"""``dmm sample``: a thin face on ``paint.painter``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import MODELS


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``sample`` to the subparsers of the ``dmm`` command."""
    sample = commands.add_parser("sample", help="paint with a checkpoint", epilog=MODELS)
    sample.add_argument("checkpoint", help="model file or folder (docs/files.md)")
    sample.add_argument("--prompt", action="append", required=True, help="may be given several times")
    style_help = 'name, shares ("ink:0.7, pen:0.3") or schedule ("0%%: ink; 60%%: pen"); "all": one row per style'
    sample.add_argument("--style", default="none", help=f"{style_help} (default: none)")
    sample.add_argument("--strength", type=float, default=1.0)
    sample.add_argument("--parts-from", help="full checkpoint to take a missing text encoder or VAE from")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--size", type=int, default=0, help="pixels a side (default: what the model was trained at)")
    for name, default in (
        ("steps", 20),
        ("cfg", 4.0),
        ("sampler", "dpmpp_2m"),
        ("scheduler", "karras"),
        ("negative", ""),
    ):
        sample.add_argument(f"--{name}", type=type(default), default=default)
    sample.add_argument("--output", default="sample.png")
    sample.set_defaults(run=run_sample, kept="nothing was written")


def run_sample(args: argparse.Namespace) -> None:
    from ...dmm_core.style_value import Strength
    from ..data.buckets import default_resolution
    from ..files.model_settings import say_guesses, split_settings
    from ..files.outputs import check_output
    from ..paint.images import grid, picture_kind, save_picture
    from ..paint.painter import Settings, painter
    from ..teachers.models import as_checkpoint

    inputs = [split_settings(file)[0] for file in (args.checkpoint, args.parts_from) if file]
    check_output(args.output, inputs)
    picture_kind(args.output)
    companion = as_checkpoint(args.parts_from) if args.parts_from else None
    checkpoint = as_checkpoint(args.checkpoint, companion)
    say_guesses({Path(args.checkpoint).name: checkpoint})
    brush = painter(checkpoint, companion)
    size = args.size or default_resolution(brush.unet.config, brush.prediction)
    settings = Settings(args.steps, args.cfg, args.sampler, args.scheduler, size, size, args.negative)
    styles = brush.styles if args.style == "all" else [args.style]
    rows = []
    for style in styles:
        value = Strength(brush.style(style), args.strength)
        rows.append(brush.pictures(brush.latents(args.prompt, value, args.seed, settings)))
    image = rows[0][0] if len(rows) == len(rows[0]) == 1 else grid(rows, styles, args.prompt)
    save_picture(image, args.output)
    print(f"wrote {args.output}")
