"""``dmm distill``, ``dmm add-teacher`` and ``dmm forget``: thin faces on ``run.distill``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ...dmm_core.bank_grow import USUAL_GROWTH
from ..config import TrainConfig, settings_tables
from ..fields import about_field
from ..parallel.devices import local_device
from ..parallel.ranks import joined, launched
from ..run.watch.controls import StopAndSave
from .arguments import MODELS, named_file
from .progress_bar import ProgressBar
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
        grow = commands.add_parser(name, help=what, epilog=MODELS)
        grow.add_argument("--config", help="YAML file as for distill; its base is the DMM model")
        grow.add_argument("--dry-run", action="store_true", help="check all files, print config and memory plan")
        grow.add_argument("--memory", type=memory, help=f"{MEMORY_HELP} (default: the config's)")
        INSTANT[name][0](grow)
        grow.set_defaults(run=run_grown, fork=None, grown=name)


def instant_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--instant", action="store_true",
        help="without training and without a config, into the style bank of a merged model: --model, --teacher, --output",
    )  # fmt: skip
    parser.add_argument("--model", metavar="FILE", help="with --instant: the DMM model")
    parser.add_argument(
        "--teacher", action="append", type=named_file, metavar="STYLE=FILE",
        help="with --instant, repeatable: a checkpoint, or one with LoRAs: base.safetensors+lora.safetensors:0.8",
    )  # fmt: skip
    doc = about_field(TrainConfig, "growth").doc
    parser.add_argument(
        "--budget", help=f"with --instant. {doc} (default: {USUAL_GROWTH})".replace("%", "%%"), metavar="SIZE"
    )
    parser.add_argument("--output", metavar="FILE", help="with --instant: the new model, .safetensors")


def instant_forget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--instant", action="store_true",
        help="only delete, without training and without a config: --model, --style, --output. What the network knows stays in it",
    )  # fmt: skip
    parser.add_argument("--model", metavar="FILE", help="with --instant: the DMM model")
    parser.add_argument("--style", action="append", metavar="NAME", help="with --instant, repeatable: what goes")
    parser.add_argument("--output", metavar="FILE", help="with --instant: the new model, .safetensors")


def run_grown(args: argparse.Namespace) -> None:
    """``dmm add-teacher`` and ``dmm forget``: by training as a config says, or at once."""
    _, run, names = INSTANT[args.grown]
    given = [f"--{name}" for name in names if getattr(args, name)]
    if not args.instant:
        if given:
            raise ValueError(f"{', '.join(given)} belong to --instant: a config says all of it")
        if not args.config:
            raise ValueError("name what to train with --config, or do it at once with --instant")
        return run_distill(args)
    if args.config or args.dry_run or args.memory is not None:
        raise ValueError("--instant trains nothing: it takes no --config, --dry-run or --memory")
    if missing := [f"--{name}" for name in names if name != "budget" and not getattr(args, name)]:
        raise ValueError(f"--instant lacks {', '.join(missing)}")
    run(args)


def run_instant_add(args: argparse.Namespace) -> None:
    from ..merge.files import grow_file

    budget = USUAL_GROWTH if args.budget is None else args.budget
    report, files = grow_file(args.model, args.teacher, Path(args.output), budget, progress=ProgressBar())
    print(report.text())
    print("\n" + "\n".join(f"wrote {file}" for file in files))


def run_instant_forget(args: argparse.Namespace) -> None:
    from ..merge.files import delete_from_file

    print(delete_from_file(args.model, args.style, Path(args.output)).text())
    print(f"\nwrote {args.output}")


INSTANT = {
    "add-teacher": (instant_add, run_instant_add, ("model", "teacher", "budget", "output")),
    "forget": (instant_forget, run_instant_forget, ("model", "style", "output")),
}
"""Of each command: its options, what it does at once, and the names of the options that belong to that."""


def run_distill(args: argparse.Namespace) -> None:
    from ..config_file import load_config
    from ..parallel.devices import pick_device
    from ..parallel.sharding import check_parallel
    from ..run.distill import distill
    from ..run.load import load_run

    config = load_config(args.config, grown=bool(args.grown))
    if bool(config.forget) != (args.grown == "forget"):
        raise ValueError(
            "forget: in the config names styles to forget: run it with dmm forget"
            if config.forget
            else "name the styles to forget in the config, as forget: [name, ...]"
        )
    if bool(config.few_steps) != (args.grown == "fewstep"):
        raise ValueError(
            "few_steps: in the config means that a model learns to paint in a few steps: run it with dmm fewstep"
            if config.few_steps
            else "say in how many steps the model is to paint, as few_steps: {steps: 4} in the config"
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
            run.check()
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
