"""``dmm info``: a thin face on ``files.describe``."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``info`` to the subparsers of the ``dmm`` command."""
    info = commands.add_parser("info", help="what is in a checkpoint file")
    info.add_argument("checkpoint", help="model file or folder, or a file of styles (docs/files.md)")
    info.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> None:
    from ..files.describe import describe

    print(describe(args.checkpoint))
