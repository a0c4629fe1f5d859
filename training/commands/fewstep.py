"""``dmm fewstep``: a thin face on ``run.distill``."""

from __future__ import annotations

import argparse

from .distill import MEMORY_HELP, memory, run_distill


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``fewstep`` to the subparsers of the ``dmm`` command."""
    parser = commands.add_parser(
        "fewstep", help="teach a DMM model to paint in a few steps, in every style; the same command again goes on"
    )
    parser.add_argument(
        "--config", required=True, help="YAML file as for distill, with few_steps; its base is the DMM model"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check all files, print config and memory plan, train nothing"
    )
    parser.add_argument("--memory", type=memory, help=f"{MEMORY_HELP} (default: the config's)")
    parser.set_defaults(run=run_distill, fork=None, grown="fewstep")
