"""``dmm cache``: thin faces on the functions that make and check caches."""

from __future__ import annotations

import argparse

from ..data.rollout_paths import RolloutSettings
from ..fields import describe
from .arguments import MODELS, add_settings, named_file, size
from .progress_bar import ProgressBar

# All but the sizes: --size may be repeated.
ROLLOUT_OPTIONS = [row.name for row in describe(RolloutSettings) if row.name != "sizes"]


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add ``cache`` and its actions to the subparsers of the ``dmm`` command."""
    cache = commands.add_parser("cache", help="encode pictures, or record teachers' paintings, once for many runs")
    actions = cache.add_subparsers(required=True, metavar="action")

    images = actions.add_parser(
        "images",
        help="a folder of captioned pictures -> latents and text states; the same command goes on",
        epilog=MODELS,
    )
    images.add_argument("--images", required=True, help="folder of pictures with captions, see docs/data.md")
    _add_models(images)
    images.add_argument(
        "--teacher",
        action="append",
        default=[],
        help="file whose own text encoder is wanted too, or FILE+LORA:0.8; repeatable",
    )
    images.add_argument(
        "--resolution", type=int, help="pixels a side of the square bucket (default: the model family's)"
    )
    images.add_argument("--max-aspect", type=float, default=3.0, help="longest bucket, 1 for squares only (default: 3)")
    images.add_argument("--skip-bad", action="store_true", help="leave out what cannot be used instead of stopping")
    images.add_argument("--batch-size", type=int, default=4, help="pictures at a time (default: 4)")
    images.add_argument("--workers", type=int, default=4, help="threads that read pictures (default: 4)")
    images.set_defaults(run=run_images)

    rollouts = actions.add_parser(
        "rollouts",
        help="captions -> states on the teachers' sampling paths with their predictions; no pictures needed",
        epilog=MODELS,
    )
    rollouts.add_argument("--captions", required=True, help="text file, one caption a line")
    _add_models(rollouts)
    rollouts.add_argument(
        "--teacher", action="append", required=True, type=named_file, metavar="NAME=FILE", help="repeatable"
    )
    rollouts.add_argument(
        "--size", action="append", type=size, metavar="WxH", help="in pixels, repeatable (default: the family's)"
    )
    add_settings(rollouts, RolloutSettings, ROLLOUT_OPTIONS)
    rollouts.set_defaults(run=run_rollouts)

    text = actions.add_parser(
        "text", help="add teachers' text encoders to a finished cache of either kind", epilog=MODELS
    )
    text.add_argument("--cache", required=True, help="folder of the cache")
    text.add_argument("--teacher", action="append", required=True, help="file with a text encoder; repeatable")
    text.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0")
    text.set_defaults(run=run_text)

    check = actions.add_parser("check", help="read every file of a cache and compare it with the manifest")
    check.add_argument("--cache", required=True, help="folder of the cache")
    check.set_defaults(run=run_check)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", required=True, help="checkpoint the student starts from; its VAE and text encoder are used"
    )
    parser.add_argument("--parts-from", help="full checkpoint to take a missing VAE or text encoder from")
    parser.add_argument("--output", required=True, help="folder of the cache")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0")


def run_images(args: argparse.Namespace) -> None:
    from ..data.cache import build_image_cache
    from ..parallel.devices import pick_device

    report = build_image_cache(
        args.output,
        args.images,
        args.base,
        teachers=args.teacher,
        parts_from=args.parts_from,
        resolution=args.resolution,
        max_aspect=args.max_aspect,
        skip_bad=args.skip_bad,
        device=pick_device(args.device),
        batch_size=args.batch_size,
        workers=args.workers,
        progress=ProgressBar(),
    )
    print(f"{report}\nwrote {args.output}")


def run_rollouts(args: argparse.Namespace) -> None:
    from ..data.image_folder import read_caption_file
    from ..data.rollouts import build_rollouts
    from ..parallel.devices import pick_device

    names = [name for name, _ in args.teacher]
    if len(set(names)) < len(names):
        raise ValueError(f"two teachers of one name: {', '.join(names)}")
    options = {name: getattr(args, name) for name in ROLLOUT_OPTIONS}
    settings = RolloutSettings(sizes=tuple(args.size or ()), **options)
    captions = read_caption_file(args.captions)
    counts = build_rollouts(
        args.output,
        args.base,
        dict(args.teacher),
        captions,
        settings=settings,
        parts_from=args.parts_from,
        device=pick_device(args.device),
        progress=ProgressBar(),
    )
    print(f"states: {', '.join(f'{name} {count}' for name, count in counts.items())}\nwrote {args.output}")


def run_text(args: argparse.Namespace) -> None:
    from ..data.cache import add_text
    from ..parallel.devices import pick_device

    new = add_text(args.cache, args.teacher, pick_device(args.device), ProgressBar())
    print(f"{new} text encoder(s) added to {args.cache}")


def run_check(args: argparse.Namespace) -> None:
    from ..data.open_cache import open_cache

    data = open_cache(args.cache, verify=True)
    what = "states" if data.has_targets else "pictures"
    print(f"{args.cache}: {len(data)} {what}, {len(data.prompts) - 1} captions; every file is as it was written")
