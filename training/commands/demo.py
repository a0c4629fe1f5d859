"""``dmm demo``: build the demo family, judge it, distil it and show the result."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .watched import watched

if TYPE_CHECKING:
    from ..data.demo.family import Family

ROOT = Path(__file__).parents[2]
MODELS = str(ROOT / "models")


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add ``demo`` and its actions to the subparsers of the ``dmm`` command."""
    demo = commands.add_parser("demo", help="the demo family")
    actions = demo.add_subparsers(required=True, metavar="action")
    build = actions.add_parser("build", help="train the whole demo family from nothing")
    build.add_argument("--family", default="first", help="first, the shipped one, or second: other looks and scenes")
    build.add_argument("--work", help="folder for the parts; an interrupted build goes on there (out/demo-build)")
    build.add_argument("--models", help="where the finished files go (models/ of the pack)")
    build.add_argument(
        "--out",
        help="folder of another family than the shipped one: parts, and finished files in its models/ (out/demo-FAMILY)",
    )
    build.add_argument("--jobs", type=int, default=2, help="processes at a time")
    build.add_argument(
        "--count", type=int, default=200, help="pictures per model for the table at the end; 0 leaves it out"
    )
    build.set_defaults(run=run_demo_build)
    judge = actions.add_parser("judge", help="how often base, teachers and DMM paint what a caption says")
    judge.add_argument("--family", default="first", help="first or second")
    judge.add_argument("--models", help="folder of the family's finished files")
    judge.add_argument("--count", type=int, default=200, help="pictures per model; 0 leaves the table out")
    judge.add_argument("--sheet", help="write a contact sheet of what base and teachers paint to this picture file")
    judge.set_defaults(run=run_demo_judge)
    looks = actions.add_parser("looks", help="draw scenes of a demo family in each of its looks; needs no models")
    looks.add_argument("--family", default="first", help="first or second")
    looks.add_argument("--output", required=True, help="a picture file")
    looks.set_defaults(run=run_demo_looks)
    tour = actions.add_parser("run", help="distil the demo teachers, print a table, paint grids (`make demo`)")
    tour.add_argument("--config", default=str(ROOT / "training" / "configs" / "demo.yaml"))
    tour.set_defaults(run=run_demo)


def run_demo_build(args: argparse.Namespace) -> None:
    from ..data.demo.family import family_named
    from ..demo.build import build_parts
    from ..demo.judge import audit
    from ..demo.ship import publish
    from ..demo.stages import BUDGETS

    started = time.monotonic()
    family = family_named(args.family)
    work, models = folders(family, args.work, args.models, args.out)
    seconds = build_parts(work, BUDGETS[family.name], args.jobs, family)
    for path in publish(work, models, family):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
    print(f"built in {time.monotonic() - started:.0f} s: " + ", ".join(f"{n} {s:.0f} s" for n, s in seconds.items()))
    if args.count:
        print(audit(models, args.count, family))


def folders(family: Family, work: str | None, models: str | None, out: str | None) -> tuple[Path, Path]:
    """(parts, finished files). ValueError when the shipped family is given ``out``: its files go to --models."""
    if family.shipped:
        if out:
            raise ValueError(
                f"--out is for families that are not shipped: give --work and --models for the {family.name} one"
            )
        return Path(work or "out/demo-build"), Path(models or MODELS)
    place = Path(out or f"out/demo-{family.name}")
    return Path(work) if work else place, Path(models) if models else place / "models"


def run_demo_judge(args: argparse.Namespace) -> None:
    from ..data.demo.family import family_named
    from ..demo.judge import audit

    family = family_named(args.family)
    models = folders(family, None, args.models, None)[1]
    if args.sheet:
        from ..demo.sheet import painted_sheet
        from ..files.outputs import check_output
        from ..paint.images import picture_kind, save_picture

        check_output(args.sheet, what="--sheet")
        picture_kind(args.sheet)
        save_picture(painted_sheet(family, models), args.sheet, quality=80)
        print(f"wrote {args.sheet}")
    if args.count:
        print(audit(models, args.count, family))


def run_demo_looks(args: argparse.Namespace) -> None:
    from ..data.demo.family import family_named
    from ..demo.sheet import looks_sheet
    from ..files.outputs import check_output
    from ..paint.images import picture_kind, save_picture

    check_output(args.output)
    picture_kind(args.output)
    save_picture(looks_sheet(family_named(args.family)), args.output, quality=80)
    print(f"wrote {args.output}")


def run_demo(args: argparse.Namespace) -> None:
    from ..demo.tour import tour

    tour(args.config, watched)
