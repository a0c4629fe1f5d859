"""``dmm demo``: build the demo family, judge it, distil it and show the result."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from .watched import watched

ROOT = Path(__file__).parents[2]
MODELS = str(ROOT / "models")


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add ``demo`` and its actions to the subparsers of the ``dmm`` command."""
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
    tour.add_argument("--config", default=str(ROOT / "training" / "configs" / "demo.yaml"))
    tour.set_defaults(run=run_demo)


def run_demo_build(args: argparse.Namespace) -> None:
    from ..demo.build import build_parts
    from ..demo.judge import audit
    from ..demo.ship import publish
    from ..demo.stages import Budget

    started = time.monotonic()
    work, models = Path(args.work), Path(args.models)
    seconds = build_parts(work, Budget(), args.jobs)
    for path in publish(work, models):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
    print(f"built in {time.monotonic() - started:.0f} s: " + ", ".join(f"{n} {s:.0f} s" for n, s in seconds.items()))
    print(audit(models))


def run_demo_judge(args: argparse.Namespace) -> None:
    from ..demo.judge import audit

    print(audit(Path(args.models), args.count))


def run_demo(args: argparse.Namespace) -> None:
    from ..demo.tour import tour

    with watched() as watch:
        tour(args.config, watch)
