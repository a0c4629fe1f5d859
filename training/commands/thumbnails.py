"""``dmm thumbnails``: a thin face on ``paint.style_pictures`` and ``files.write_thumbnails``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

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
    print(
        paint_into(
            args.model,
            args.prompt,
            names=args.style,
            parts_from=args.parts_from,
            seed=args.seed,
            size=args.size,
            settings={"steps": args.steps, "cfg": args.cfg, "negative": args.negative},
            device=args.device,
        )
    )


def paint_into(
    model: str,
    prompt: str,
    *,
    names: Sequence[str] | None = None,
    parts_from: str | None = None,
    seed: int = 0,
    size: int = 0,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> str:
    """Paint thumbnails of these styles, or of all, into a model's file: what was done, in words.

    size: pixels a side, 0 for what the model was trained at; settings: others of ``painter.Settings``. Raises ValueError before anything
    is painted for a file that has no such styles or could not be written.
    """
    from ...dmm_core.checkpoint import load_checkpoint, read_info
    from ..data.buckets import default_resolution
    from ..files.outputs import check_output
    from ..files.write_thumbnails import write_thumbnails
    from ..paint.painter import Settings, painter
    from ..paint.style_pictures import style_thumbnails
    from ..parallel.devices import pick_device
    from ..teachers.models import as_checkpoint

    check_output(model, what="the model")
    known = [style.name for style in read_info(model).styles]
    if not known:
        raise ValueError(f"{model} is a plain checkpoint: it has no styles to paint thumbnails of")
    names = list(dict.fromkeys(names or known))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{model} has no style '{unknown[0]}': its styles are {', '.join(known)}")
    companion = as_checkpoint(parts_from) if parts_from else None
    brush = painter(load_checkpoint(model), companion, pick_device(device))
    side = size or default_resolution(brush.unet.config, brush.prediction)
    given = Settings(width=side, height=side, **(settings or {}))
    thumbnails = style_thumbnails(brush, names, prompt, seed=seed, settings=given, tick=ProgressBar())
    write_thumbnails(model, thumbnails)
    return f"{len(thumbnails)} thumbnail{'s' * (len(thumbnails) != 1)} in {model}"
