"""The ``dmm`` command: each subcommand is a thin face on a function that the nodes call too."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from .commands import cache as cache_commands
from .commands import convert as convert_command
from .commands import evaluate as evaluation_command
from .commands import mixing as mixing_command
from .commands.progress_bar import ProgressBar, new_bar
from .parallel.devices import local_device
from .parallel.ranks import AgreedError, LostProcess, Ranks, joined, launched
from .run.watch.controls import StopAndSave, signals
from .run.watch.progress import Progress

MODELS = str(Path(__file__).parents[1] / "models")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after an error that was explained, 130 when interrupted."""
    ranks = launched()
    logging.basicConfig(level=logging.INFO if ranks.is_main else logging.WARNING, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a log has it in order with what goes to stderr
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.run(args)
    except LostProcess as error:
        if error.speak:
            print(f"\n{who(ranks)}: {error}", file=sys.stderr)  # a progress bar may be in this line
        return 1
    except ValueError as error:
        if ranks.is_main or not isinstance(error, AgreedError):
            print(f"{who(ranks)}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{who(ranks)}: {error.strerror or error}: {error.filename or 'while writing'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if ranks.is_main:
            print("dmm: interrupted; what was learnt is saved, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def who(ranks: Ranks) -> str:
    """Who speaks, for messages."""
    return "dmm" if ranks.is_main else f"dmm, process {ranks.rank}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="dmm", description="Distil many Stable Diffusion checkpoints into one, and paint with it."
    )
    top.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    commands = top.add_subparsers(required=True, metavar="command")

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

    cache_commands.add_parsers(commands)

    sample = commands.add_parser("sample", help="paint with a checkpoint")
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
    sample.set_defaults(run=run_sample)

    info = commands.add_parser("info", help="what is in a checkpoint file")
    info.add_argument("checkpoint", help="model file or folder, or a file of styles (docs/files.md)")
    info.set_defaults(run=run_info)

    convert_command.add_parser(commands)
    evaluation_command.add_parser(commands)
    mixing_command.add_parser(commands)

    demo = commands.add_parser("demo", help="the demo family")
    actions = demo.add_subparsers(required=True, metavar="action")
    build = actions.add_parser("build", help="train the whole demo family from nothing")
    build.add_argument(
        "--work", default="out/demo-build", help="folder for the parts; an interrupted build goes on there"
    )
    build.add_argument("--models", default=MODELS, help="where the finished files go")
    build.add_argument("--jobs", type=int, default=2, help="processes at a time")
    build.set_defaults(run=run_demo_build)
    judge = actions.add_parser("judge", help="how often base, teachers and DMM paint what a caption says")
    judge.add_argument("--models", default=MODELS, help="folder of the demo family")
    judge.add_argument("--count", type=int, default=200, help="pictures per model")
    judge.set_defaults(run=run_demo_judge)
    tour = actions.add_parser("run", help="distil the demo teachers, print a table, paint grids (`make demo`)")
    tour.add_argument("--config", default=str(Path(__file__).parent / "configs" / "demo.yaml"))
    tour.set_defaults(run=run_demo)
    return top


class Bar:
    """A progress bar with the smoothed loss of every teacher and the time left; another while teachers paint."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.progress = Progress()
        self.painting = ProgressBar()

    def __call__(self, run, metrics) -> None:
        if self.bar is None:
            self.bar = new_bar(metrics.steps, initial=metrics.step - 1, unit="step")
        self.progress.update(metrics)
        self.bar.set_postfix_str(self.progress.scores(), refresh=False)
        self.bar.update()
        if metrics.step == metrics.steps:
            self.bar.close()


@contextlib.contextmanager
def watched(picture_every: int = 0, ranks: Ranks | None = None):
    """A Watch with progress bars, whose run can be asked for things by signals (see ``controls.signals``). Of several processes the
    first one has bars."""
    from .run.watch.watch import Watch

    watch = Watch(picture_every=picture_every)
    if not ranks or ranks.is_main:
        bar = Bar()
        watch.on_step, watch.on_paint = bar, bar.painting
    with signals(watch.controls):
        yield watch


def run_distill(args) -> None:
    from .config import load_config
    from .parallel.devices import pick_device
    from .parallel.sharding import check_parallel
    from .run.distill import distill
    from .run.load import load_run

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


def run_sample(args) -> None:
    from ..dmm_core.style_value import Strength
    from .data.buckets import default_resolution
    from .files.model_files import load_any
    from .paint.images import grid
    from .paint.painter import Settings, painter

    companion = load_any(args.parts_from) if args.parts_from else None
    brush = painter(load_any(args.checkpoint), companion)
    size = args.size or default_resolution(brush.unet.config, brush.prediction)
    settings = Settings(args.steps, args.cfg, args.sampler, args.scheduler, size, size, args.negative)
    styles = brush.styles if args.style == "all" else [args.style]
    rows = []
    for style in styles:
        value = Strength(brush.style(style), args.strength)
        rows.append(brush.pictures(brush.latents(args.prompt, value, args.seed, settings)))
    image = rows[0][0] if len(rows) == len(rows[0]) == 1 else grid(rows, styles, args.prompt)
    image.save(args.output)
    print(f"wrote {args.output}")


def run_info(args) -> None:
    from .files.describe import describe

    print(describe(args.checkpoint))


def run_demo_build(args) -> None:
    from .demo.build import build_parts
    from .demo.judge import audit
    from .demo.ship import publish
    from .demo.stages import Budget

    started = time.monotonic()
    work, models = Path(args.work), Path(args.models)
    seconds = build_parts(work, Budget(), args.jobs)
    for path in publish(work, models):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
    print(f"built in {time.monotonic() - started:.0f} s: " + ", ".join(f"{n} {s:.0f} s" for n, s in seconds.items()))
    print(audit(models))


def run_demo_judge(args) -> None:
    from .demo.judge import audit

    print(audit(Path(args.models), args.count))


def run_demo(args) -> None:
    from .demo.tour import tour

    with watched() as watch:
        tour(args.config, watch)


if __name__ == "__main__":
    sys.exit(main())
