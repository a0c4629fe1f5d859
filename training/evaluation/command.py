"""``dmm evaluate``: a thin face on ``evaluate``; reads the files, and says how it goes on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.unet import UNetConfig, load_unet, unet_config_from_state_dict
from ...dmm_core.vae import latent_scale, load_vae
from ..dataset.cache_commands import ProgressBar, named_file, size
from ..hashing import text_hash, weights_hash
from .baselines import ALL, BASELINES, RANK, another_student, choose_baselines, make_baselines
from .settings import METRICS, OF_FEATURES, EvaluationSettings, usual_settings
from .studio import Member, Pictures, PromptStates

DEMO_PROMPTS, DEMO_SEED = 64, 7_000_000
"""Captions of scenes that no training draws."""


def add_parser(commands) -> None:
    p = commands.add_parser(
        "evaluate", help="compare a DMM model with its teachers: FID, KID, PAIR, eps; the same command goes on"
    )
    p.add_argument("model", help="the DMM model")
    p.add_argument(
        "--teacher", action="append", required=True, type=named_file, metavar="STYLE=FILE", help="repeatable; the style it was learnt as"
    )  # fmt: skip
    p.add_argument("--base", help="what the student was trained from, as a baseline")
    p.add_argument(
        "--baselines", metavar="NAMES", help=f"{ALL}, or with commas of {', '.join(BASELINES)} (docs/evaluation.md)"
    )
    p.add_argument("--rank", type=int, default=RANK, help=f"of the baseline low-rank (default: {RANK})")
    p.add_argument(
        "--also", action="append", default=[], type=named_file, metavar="NAME=FILE", help="repeatable; a further DMM model, or a plain one"
    )  # fmt: skip
    p.add_argument("--parts-from", help="full checkpoint to take a missing text encoder or VAE from")
    p.add_argument("--prompts", help="text file, one prompt a line (default for the demo family: its captions)")
    p.add_argument(
        "--features",
        help="demo classifier, or Inception v3 of torchvision or timm (default: the demo family's, else none)",
    )
    p.add_argument("--metrics", nargs="+", choices=METRICS, help="default: all that there is what they need for")
    p.add_argument("--size", type=size, metavar="WxH", help="in pixels (default: the model family's)")
    p.add_argument("--cfg", type=float, help="guidance (default: 7, for the demo family 4)")
    p.add_argument("--steps", type=int, help="sampling steps (default: 25, without a GPU 15, for the demo family 12)")
    defaults = EvaluationSettings()
    for name, text in (
        ("count", "pictures a style; FID needs more than its features are"),
        ("seed", "of all noise"),
        ("project", "compare only so many directions of the features, 0 for all"),
        ("resamples", "of the bootstrap, -1 for what is affordable"),
        ("bins", "of the timesteps, for the eps agreement"),
        ("bin-samples", "samples of each bin and style"),
        ("own-pictures", "of each teacher that the student sorts"),
        ("own-draws", "by which it judges each of them"),
        ("batch-size", "pictures at a time, 0 for what fits"),
        ("sampler", "dpmpp_2m, ddim or euler"),
        ("scheduler", "noise levels"),
        ("precision", "auto, fp32, bf16 or fp16"),
    ):
        value = getattr(defaults, name.replace("-", "_"))
        p.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} (default: {value})")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0")
    p.add_argument("--output", required=True, help="folder for the report and, in parts/, all that was painted")
    p.set_defaults(run=run)


def run(args) -> None:
    from ..distill import pick_device
    from .evaluate import evaluate
    from .report import markdown, write

    device = pick_device(args.device)
    cast, settings = gather(args, device)
    folder = Path(args.output)
    bar = ProgressBar()
    try:
        result = evaluate(cast, settings, folder / "parts", device, bar)
    except KeyboardInterrupt:
        print(f"what is painted stays in {folder / 'parts'}: the same command goes on from there", file=sys.stderr)
        raise
    finally:
        bar.close()
    result.about = {
        "title": f"{Path(args.model).name} against its teachers",
        "model": Path(args.model).name,
        "teachers": {name: Path(file).name for name, file in args.teacher},
        "base": args.base and Path(args.base).name,
        "also": {name: Path(file).name for name, file in args.also},
        "torch": torch.__version__,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = write(result, folder)
    print(markdown(result))
    print("\n" + "\n".join(f"wrote {file}" for file in files))


def gather(args, device: torch.device):
    """(Cast, EvaluationSettings) of a command line. Raises ValueError for files that do not belong together."""
    from ..dataset.cache import as_checkpoint, base_with_parts
    from ..dataset.image_folder import read_caption_file
    from .evaluate import Cast
    from .features import DEMO_FILE, load_features

    chosen = choose_baselines(args.baselines) if args.baselines is not None else ()
    student = base_with_parts(args.model, args.parts_from or args.base)
    config = unet_config_from_state_dict(student.unet)
    small = config.model_channels < 320
    if args.prompts:
        prompts = ["", *read_caption_file(args.prompts)]
    elif small:
        prompts = ["", *demo_prompts(DEMO_PROMPTS)]
    else:
        raise ValueError("no prompts: name a text file with a prompt a line (--prompts)")
    features_file = args.features or (DEMO_FILE if small else None)
    metrics = args.metrics or [m for m in METRICS if features_file or m not in OF_FEATURES]
    given = {name: getattr(args, name) for name in ("steps", "cfg") if getattr(args, name) is not None}
    if args.size:
        given["width"], given["height"] = args.size
    names = ("count", "seed", "project", "resamples", "bins", "bin_samples", "own_pictures", "own_draws", "batch_size", "sampler",
             "scheduler", "precision")  # fmt: skip
    settings = EvaluationSettings(
        **{
            **usual_settings(config, student.prediction, device),
            **given,
            **{name: getattr(args, name) for name in names},
        },
        metrics=tuple(metrics),
    )
    needs_features = bool(set(metrics) & set(OF_FEATURES))
    text = TextStates(prompts)
    styles = [style.name for style in student.styles]
    painter = member("student", student, student, text, keep=True)
    teachers = [member(name, as_checkpoint(file, student), student, text, file) for name, file in args.teacher]
    base = member("base", as_checkpoint(args.base, student), student, text, args.base) if args.base else None
    others = [another(name, file, student, text, [teacher.name for teacher in teachers]) for name, file in args.also]
    cast = Cast(
        painter,
        styles,
        teachers,
        prompts,
        base,
        decoder(student, config, device) if needs_features else None,
        load_features(features_file) if needs_features and features_file else None,
        [*others, *make_baselines(chosen, painter, styles, teachers, base, args.rank)],
    )
    return cast, settings


def another(name: str, file: str, student: Checkpoint, text: TextStates, teachers: Sequence[str]):
    """Of ``--also``."""
    from ..dataset.cache import as_checkpoint

    checkpoint = as_checkpoint(file, student)
    one = member(name, checkpoint, student, text, file, styled=True)
    return another_student(name, one, [style.name for style in checkpoint.styles], teachers)


def demo_prompts(count: int) -> list[str]:
    """Captions of the demo family's scenes, each another one."""
    import numpy as np

    from ..demo.scenes import sample_scene

    rng, found = np.random.default_rng(DEMO_SEED), {}
    while len(found) < count:
        found[sample_scene(rng).caption] = None
    return list(found)


class TextStates:
    """The prompts under each text encoder, encoded once."""

    def __init__(self, prompts: Sequence[str]):
        self.prompts, self._made = list(prompts), {}

    def of(self, weights) -> tuple:
        from ..text import ClipText

        key = weights_hash(weights)
        if key not in self._made:
            self._made[key] = ClipText(weights).encode_pooled(self.prompts)
        return self._made[key]


def member(
    name: str,
    checkpoint: Checkpoint,
    student: Checkpoint,
    text: TextStates,
    file: str = "",
    keep: bool = False,
    styled: bool = False,
) -> Member:
    """Of a checkpoint that was read; unless it is to be kept, its file is read again when its turn comes: one teacher is in memory at
    a time. Without a text encoder of its own it reads the prompts with the student's. styled: it may be a DMM model."""
    from ..dataset.cache import as_checkpoint
    from ..teacher import Teacher

    config: UNetConfig = unet_config_from_state_dict(checkpoint.unet)
    if not (keep or styled) and config.num_styles:
        raise ValueError(f"'{name}' is itself a DMM model with {config.num_styles} styles: use a plain checkpoint")
    encoder = checkpoint.text or student.text
    states = text.of(encoder)
    key = text_hash(weights_hash(checkpoint.unet), weights_hash(encoder), checkpoint.prediction, checkpoint.zero_snr)
    prediction, zero_snr = checkpoint.prediction, checkpoint.zero_snr
    held = checkpoint if keep else None

    def open_it() -> Teacher:
        weights = (held or as_checkpoint(file, student)).unet
        return Teacher(name, load_unet(weights, dtype=None, copy=held is not None), *states, prediction, zero_snr)

    words = PromptStates(weights_hash(encoder), *states)
    return Member(name, key, open_it, config, zero_snr, prediction, words)


def decoder(checkpoint: Checkpoint, config: UNetConfig, device: torch.device) -> Pictures:
    """The checkpoint's own VAE."""
    if not checkpoint.vae:
        raise ValueError(
            "no VAE to look at pictures with: name a full checkpoint (--parts-from), or leave out fid and kid"
        )
    vae, scale = load_vae(checkpoint.vae).to(device).eval(), latent_scale(config)
    return Pictures(lambda latents: vae.decode(latents / scale), weights_hash(checkpoint.vae))
