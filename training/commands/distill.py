"""``dmm distill``, ``dmm add-teacher`` and ``dmm forget``: thin faces on ``run.distill``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..config import TrainConfig, settings_tables
from ..fields import about_field
from ..parallel.devices import local_device
from ..parallel.ranks import joined, launched
from ..run.watch.controls import StopAndSave
from .watched import watched

MEMORY_HELP = "GB, auto or off. " + about_field(TrainConfig, "memory").doc


class ListSettings(argparse.Action):
    """An option that prints the settings of a config and ends, as --help does."""

    def __init__(self, option_strings, dest, **more):
        super().__init__(option_strings, dest, nargs=0, **more)

    def __call__(self, parser, *_):
        print(settings_tables())
        parser.exit()


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add the three to the subparsers of the ``dmm`` command."""
    distill = commands.add_parser(
        "distill", help="distil teachers into a DMM checkpoint; the same command again goes on"
    )
    distill.add_argument("--config", required=True, help="YAML file, see training/configs/")
    distill.add_argument(
        "--dry-run", action="store_true", help="check all files, print config and memory plan, train nothing"
    )
    distill.add_argument("--memory", type=memory, help=f"{MEMORY_HELP} (default: the config's)")
    distill.add_argument(
        "--fork",
        metavar="RUN",
        help="begin a new run with the weights of another: its run folder or a state file of it",
    )
    distill.add_argument("--list-settings", action=ListSettings, help="print all settings of a config, and exit")
    distill.set_defaults(run=run_distill, grown="")

    for name, what in (
        ("add-teacher", "teach a DMM model more styles; the ones it has are kept"),
        ("forget", "take styles out of a DMM model, without their teachers' files"),
    ):
        grow = commands.add_parser(name, help=what)
        grow.add_argument("--config", required=True, help="YAML file as for distill; its base is the DMM model")
        grow.add_argument("--dry-run", action="store_true", help="check all files, print config and memory plan")
        grow.add_argument("--memory", type=memory, help=f"{MEMORY_HELP} (default: the config's)")
        grow.set_defaults(run=run_distill, fork=None, grown=name)


def run_distill(args: argparse.Namespace) -> None:
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
