"""``dmm convert``: a thin face on ``convert.convert``."""

from __future__ import annotations

import argparse

from .arguments import MODELS

LAYOUTS = ("single", "style", "diffusers")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``convert`` to the subparsers of the ``dmm`` command."""
    convert = commands.add_parser(
        "convert", help="a model file into another layout, weights unchanged (docs/files.md)", epilog=MODELS
    )
    convert.add_argument("source", metavar="IN", help="checkpoint file, diffusers folder, or style file with --onto")
    convert.add_argument("target", metavar="OUT", help="file to write, or the UNet folder of --to diffusers")
    convert.add_argument("--to", required=True, choices=LAYOUTS, help="one file, the styles alone, or a UNet folder")
    convert.add_argument("--parts-from", metavar="FILE", help="take a missing text encoder or VAE from this model")
    convert.add_argument("--onto", metavar="FILE", help="model whose UNet gets the styles of IN")
    convert.add_argument("--half", action="store_true", help="write float32 weights as float16")
    convert.set_defaults(run=run_convert, kept="nothing was written")


def run_convert(args: argparse.Namespace) -> None:
    from ..files.convert import convert

    for note in convert(args.source, args.target, args.to, parts_from=args.parts_from, onto=args.onto, half=args.half):
        print(f"note: {note}")
    print(f"wrote {args.target}")
