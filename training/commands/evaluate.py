"""``dmm evaluate``: reads the files, calls ``evaluate`` and writes the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ...dmm_core.bank_size import USUAL
from ...dmm_core.checkpoint import Checkpoint
from ..data.text_states import TextStates
from ..evaluation.baselines import ALL, BASELINES, RANK, Contender, another_student, choose_baselines, make_baselines
from ..evaluation.evaluate import Lineup, evaluate
from ..evaluation.features import DEMO_FILE, load_features
from ..evaluation.model_ref import ModelRef
from ..evaluation.settings import METRICS, OF_FEATURES, EvaluationSettings
from ..files.model_settings import say_guesses
from .arguments import MODELS, add_settings, named_file, size
from .evaluation_inputs import going_on, is_small, model_ref, painting, prompts_of, vae_decoder

OPTIONS = (
    "count", "seed", "project", "resamples", "bins", "bin_samples", "own_pictures", "own_draws", "batch_size", "sampler", "scheduler",
    "precision",
)  # fmt: skip
"""Settings whose defaults do not depend on the model."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``evaluate`` to the subparsers of the ``dmm`` command."""
    p = commands.add_parser(
        "evaluate",
        help="compare a DMM model with its teachers: FID, KID, PAIR, eps; the same command goes on",
        epilog=MODELS,
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
        "--budget", default=USUAL, help=f"size of the baseline merge's style bank (default: {USUAL})".replace("%", "%%")
    )
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
    add_settings(p, EvaluationSettings, OPTIONS)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0")
    p.add_argument("--output", required=True, help="folder for the report and, in parts/, all that was painted")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate, write the report into the folder and print it."""
    from ..evaluation.report import markdown, write
    from ..parallel.devices import pick_device

    device = pick_device(args.device)
    lineup, settings = read_inputs(args, device)
    folder = Path(args.output)
    with going_on(folder) as (parts, bar):
        result = evaluate(lineup, settings, folder=parts, device=device, progress=bar)
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


def read_inputs(args: argparse.Namespace, device: torch.device) -> tuple[Lineup, EvaluationSettings]:
    """The models and the settings that a command line names. Raises ValueError for files that do not belong together."""
    from ..teachers.models import as_checkpoint, base_with_parts

    chosen = choose_baselines(args.baselines) if args.baselines is not None else ()
    student = base_with_parts(args.model, args.parts_from or args.base)
    config = student.config
    prompts = prompts_of(args.prompts, config)
    features_file = args.features or (DEMO_FILE if is_small(config) else None)
    metrics = args.metrics or [m for m in METRICS if features_file or m not in OF_FEATURES]
    settings = EvaluationSettings(**painting(args, OPTIONS, student, device), metrics=tuple(metrics))
    needs_features = bool(set(metrics) & set(OF_FEATURES))
    text = TextStates(prompts)
    styles = [style.name for style in student.styles]
    say_guesses({"the model": student})
    painter = model_ref("student", student, student, text, keep=True)

    def read(name: str, file: str) -> ModelRef:
        checkpoint = as_checkpoint(file, student)
        say_guesses({name: checkpoint})
        return model_ref(name, checkpoint, student, text, file=file)

    teachers = [read(name, file) for name, file in args.teacher]
    base = read("base", args.base) if args.base else None
    others = [
        another(name, file, student, text, teachers=[teacher.name for teacher in teachers]) for name, file in args.also
    ]
    lineup = Lineup(
        painter,
        styles,
        teachers,
        prompts,
        base,
        vae_decoder(student, config, device) if needs_features else None,
        load_features(features_file) if needs_features and features_file else None,
        [*others, *make_baselines(chosen, painter, styles, teachers, base=base, rank=args.rank, budget=args.budget)],
    )
    return lineup, settings


def another(name: str, file: str, student: Checkpoint, text: TextStates, *, teachers: Sequence[str]) -> Contender:
    """A model of ``--also``: the file of a DMM model, which needs a style for each of the teachers, or of a plain one."""
    from ..teachers.models import as_checkpoint

    checkpoint = as_checkpoint(file, student)
    one = model_ref(name, checkpoint, student, text, file=file, styled=True)
    return another_student(name, one, [style.name for style in checkpoint.styles], teachers)
