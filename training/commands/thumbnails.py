"""``dmm thumbnails``: a thin face on ``paint.style_pictures`` and ``files.write_thumbnails``."""

from __future__ import annotations

import argparse

from .progress_bar import ProgressBar


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``thumbnails`` to the subparsers of the ``dmm`` command."""
    p = commands.add_parser(
        "thumbnails",
        help="paint a small picture of every style into a DMM model's file; its weights stay bit for bit what they are",
    )
    p.add_argument("model", metavar="MODEL", help="DMM model, .safetensors; it is replaced when all is painted")
    p.add_argument("--prompt", required=True, metavar="TEXT", help="what all of them show")
    p.add_argument("--style", action="append", metavar="NAME", help="repeatable; only these styles (default: all)")
    p.add_argument("--parts-from", metavar="FILE", help="full checkpoint to take a missing text encoder or VAE from")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--size", type=int, default=0, help="pixels a side (default: what the model was trained at)")
    for name, default in (("steps", 20), ("cfg", 4.0), ("negative", "")):
        p.add_argument(f"--{name}", type=type(default), default=default)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Paint, then write; an interrupt leaves the file as it was."""
    from ...dmm_core.checkpoint import load_checkpoint, read_info
    from ..data.buckets import default_resolution
    from ..files.outputs import check_output
    from ..files.write_thumbnails import write_thumbnails
    from ..paint.painter import Settings, painter
    from ..paint.style_pictures import style_thumbnails
    from ..parallel.devices import pick_device
    from ..teachers.models import as_checkpoint

    check_output(args.model, what="the model")
    known = [style.name for style in read_info(args.model).styles]
    if not known:
        raise ValueError(f"{args.model} is a plain checkpoint: it has no styles to paint thumbnails of")
    names = list(dict.fromkeys(args.style or known))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{args.model} has no style '{unknown[0]}': its styles are {', '.join(known)}")
    companion = as_checkpoint(args.parts_from) if args.parts_from else None
    checkpoint = load_checkpoint(args.model)
    brush = painter(checkpoint, companion, pick_device(args.device))
    size = args.size or default_resolution(brush.unet.config, brush.prediction)
    settings = Settings(args.steps, args.cfg, width=size, height=size, negative=args.negative)
    thumbnails = style_thumbnails(brush, names, args.prompt, seed=args.seed, settings=settings, tick=ProgressBar())
    write_thumbnails(args.model, thumbnails)
    print(f"{len(thumbnails)} thumbnail{'s' * (len(thumbnails) != 1)} in {args.model}")
