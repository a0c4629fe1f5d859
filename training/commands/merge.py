"""``dmm merge``: reads the files' headers, calls ``merge.merge``, writes the model and the report."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ...dmm_core.bank_size import USUAL
from .arguments import MODELS, named_file
from .progress_bar import ProgressBar
from .thumbnails import paint_into

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``merge`` to the subparsers of the ``dmm`` command."""
    p = commands.add_parser(
        "merge",
        help="many checkpoints into one DMM model in minutes, without training; the same command goes on",
        epilog=MODELS,
    )
    p.add_argument(
        "--teacher", action="append", required=True, type=named_file, metavar="STYLE=FILE",
        help="repeatable; a checkpoint, or one with LoRAs: base.safetensors+lora.safetensors:0.8",
    )  # fmt: skip
    p.add_argument("--base", metavar="FILE", help="what is painted without a style (default: the teachers' mean)")
    p.add_argument(
        "--centre", choices=("mean", "base"), default="mean",
        help="the model's own weights: the teachers' mean, or the base as it is, so that the styles alone can go onto any copy of it "
        "(default: mean)",
    )  # fmt: skip
    p.add_argument(
        "--to", choices=("single", "style"), default="single",
        help="one file, or with --centre base the styles alone, for Add DMM Styles to Model (default: single)",
    )  # fmt: skip
    p.add_argument(
        "--parts-from", metavar="FILE", help="full checkpoint for text encoder and VAE (default: the first file that has them)"
    )  # fmt: skip
    p.add_argument(
        "--budget",
        default=USUAL,
        help=f"of the styles: a share of the UNet, or 150MB (default: {USUAL})".replace("%", "%%"),
    )
    p.add_argument("--precision", choices=DTYPES, default="fp16", help="of the file (default: fp16)")
    p.add_argument("--title", default="DMM", help="the model's title in its file (default: DMM)")
    p.add_argument("--thumbnails", metavar="PROMPT", help="then paint a small picture of every style into the file")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0")
    p.add_argument(
        "--output", required=True, metavar="FILE", help="the DMM model, .safetensors; the report goes beside it"
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Merge, write model and report, print the report."""
    from ..merge.files import merge_files
    from ..merge.merge import MergeConfig
    from ..merge.report import MergeReport
    from ..parallel.devices import pick_device

    if args.thumbnails and args.to == "style":
        raise ValueError("styles alone (--to style) cannot paint thumbnails: merge into a whole model (--to single)")
    config = MergeConfig(args.budget, DTYPES[args.precision], pick_device(args.device), args.centre)

    def said_and_painted(report: MergeReport, files: list[Path]) -> None:
        print(report.text())
        print("\n" + "\n".join(f"wrote {file}" for file in files), flush=True)
        if args.thumbnails:
            print(paint_into(args.output, args.thumbnails, device=args.device))

    merge_files(
        args.teacher,
        Path(args.output),
        config,
        base=args.base,
        parts_from=args.parts_from,
        title=args.title,
        to=args.to,
        progress=ProgressBar(),
        then=said_and_painted,
    )
