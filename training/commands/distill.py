"""``dmm distill``, ``dmm add-teacher`` and ``dmm forget``: thin faces on ``run.distill``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..parallel.devices import local_device
from ..parallel.ranks import joined, launched
from ..run.watch.controls import StopAndSave
from .watched import watched


def add_parsers(commands) -> None:
    """Add the three to the subparsers of the ``dmm`` command."""
    distill = commands.add_parser(
        "distill", help="distil teachers into a DMM checkpoint; the same command again goes on"
    )
    distill.add_argument("--config", required=True, help="YAML file, see training/configs/")
    distill.add_argument(
        "--dry-run", action="store_true", help="check all files, print config and memory plan, train nothing"
    )
    distill.add_argument("--memory", type=memory, help="GB that the run may use, auto or off (default: the config's)")
    distill.add_argument(
        "--fork",
        metavar="RUN",
        help="begin a new run with the weights of another: its run folder or a state file of it",
    )
    distill.set_defaults(run=run_distill, grown="")

    for name, what in (
        ("add-teacher", "teach a DMM model more styles; the ones it has are kept"),
        ("forget", "take styles out of a DMM model, without their teachers' files"),
    ):
        grow = commands.add_parser(name, help=what)
        grow.add_argument("--config", required=True, help="YAML file as for distill; its base is the DMM model")
        grow.add_argument("--dry-run", action="store_true", help="check all files, print config and memory plan")
        grow.add_argument("--memory", type=memory, help="GB that the run may use, auto or off")
        grow.set_defaults(run=run_distill, fork=None, grown=name)


def run_distill(args) -> None:
    from ..config import load_config
    from ..parallel.devices import pick_device
    from ..parallel.sharding import check_parallel
    from ..run.distill import distill
    from ..run.load import load_run

    config = load_config(args.config)
    if bool(config.forget) != (args.grown == "forget"):
        raise ValueError(
            "forget: in the config names styles to forget: run it with dmm forget"
            if config.forget
            else "name the styles to forget in the config, as forget: [name, ...]"
        )
    if args.memory is not None:
        config.train.memory = args.memory
        config.train.check()
    ranks = launched()
    check_parallel(config.train, ranks.world)
    device = local_device(pick_device(config.train.device), ranks)
    show = print if ranks.is_main else (lambda text: None)
    show(json.dumps(config.to_dict(), indent=2))
    if args.dry_run:
        with joined(ranks, device), ranks.together():
            run = load_run(config, device, bool(args.grown), ranks)
        show(run.plan.describe() if run.plan else "memory: nothing planned (see the setting 'memory')")
        return
    with watched(config.picture_every, ranks) as watch, joined(ranks, device, raised_by_all=(StopAndSave,)):
        distill(config, watch, fork_from=args.fork and Path(args.fork), grown=bool(args.grown), ranks=ranks)
    show(f"wrote {config.output}")


def memory(text: str) -> float | str:
    """ "12" -> 12.0; "auto" and "off" stay."""
    if text in ("auto", "off"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not GB, auto or off") from None
