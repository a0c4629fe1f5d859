"""``dmm judge-mixing``: reads the files, calls ``judge_mixing`` and writes the report."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.text_states import TextStates
from ..evaluation.features import DEMO_FILE, FeatureNet, PixelDecoder, load_features
from ..evaluation.mixing.judge_mixing import BLEND, MERGE, PATHS, RATIOS, MixingLineup, Pair, judge_mixing
from ..evaluation.mixing.judges import looks_of
from ..evaluation.settings import EvaluationSettings
from ..files.model_settings import say_guesses
from .arguments import MODELS, add_settings, named_file, size
from .evaluation_inputs import going_on, is_small, model_ref, painting, prompts_of, vae_decoder

OPTIONS = ("count", "seed", "resamples", "own_draws", "batch_size", "sampler", "scheduler", "precision")
"""Settings whose defaults do not depend on the model."""
DEFAULTS = {"count": 64, "own_draws": 16}
"""Of those that are smaller here than in an evaluation: they count for each pair and ratio."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``judge-mixing`` to the subparsers of the ``dmm`` command."""
    p = commands.add_parser(
        "judge-mixing",
        help="how well blends of styles mix, beside merged weights of the teachers; the same command goes on",
        epilog=MODELS,
    )
    p.add_argument("model", help="the DMM model")
    p.add_argument(
        "--teacher", action="append", default=[], type=named_file, metavar="STYLE=FILE", help="for weight merging; repeatable"
    )  # fmt: skip
    p.add_argument("--pairs", action="append", metavar="A:B,C:D", help="pairs of styles, or all (default: all)")
    p.add_argument(
        "--ratios",
        type=ratios,
        default=RATIOS,
        metavar="0,...,1",
        help="shares of the second style, or how many (default: 9)",
    )
    p.add_argument(
        "--paths", nargs="+", choices=PATHS, default=[BLEND, MERGE], help="what is compared, the first with the others"
    )
    p.add_argument("--parts-from", help="full checkpoint to take a missing text encoder or VAE from")
    p.add_argument("--prompts", help="text file, one prompt a line (default for the demo family: its captions)")
    p.add_argument(
        "--features",
        metavar="CLASSIFIER",
        help="the demo classifier as judge, or none for the student (default: what fits)",
    )
    p.add_argument("--size", type=size, metavar="WxH", help="in pixels (default: the model family's)")
    p.add_argument("--cfg", type=float, help="guidance (default: 7, for the demo family 4)")
    p.add_argument("--steps", type=int, help="sampling steps (default: 25, without a GPU 15, for the demo family 12)")
    add_settings(p, EvaluationSettings, OPTIONS, DEFAULTS)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0")
    p.add_argument("--output", required=True, help="folder for the report and, in parts/, all that was painted")
    p.set_defaults(run=run)


def ratios(text: str) -> tuple[float, ...]:
    """ "0,0.5,1" -> (0, 0.5, 1); "5" -> five, evenly spaced"""
    try:
        if text.strip().isdecimal() and int(text) > 2:
            return tuple(k / (int(text) - 1) for k in range(int(text)))
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a list such as 0,0.5,1 nor a number from 3") from None


def named_pairs(texts: Sequence[str] | None, styles: Sequence[str], usual: Sequence[str]) -> list[Pair]:
    """ "ink:candy,pop:pixel" and the like -> pairs of style names, which may themselves hold a colon; "all" or None -> all pairs of the
    ``usual`` ones. Raises ValueError for what names no two styles.
    """
    pairs: list[Pair] = []
    for part in (part.strip() for text in texts or ["all"] for part in text.split(",")):
        if part == "all":
            pairs += itertools.combinations(usual, 2)
            continue
        found = [(a, b) for a, b in itertools.permutations(styles, 2) if part == f"{a}:{b}"]
        if len(found) != 1:
            known = ", ".join(styles) or "none at all (a plain checkpoint)"
            raise ValueError(f"'{part}' is no pair of two styles, written A:B: they are {known}")
        pairs += found
    return pairs


def run(args: argparse.Namespace) -> None:
    """Judge, write the report into the folder and print it."""
    from ..evaluation.mixing.report import markdown, write
    from ..parallel.devices import pick_device

    device = pick_device(args.device)
    lineup, decoder, settings, pairs = read_inputs(args, device)
    folder = Path(args.output)
    with going_on(folder) as (parts, bar):
        mixing = judge_mixing(
            lineup, settings, pairs, args.ratios, paths=args.paths, folder=parts, device=device, progress=bar
        )
    mixing.about = {
        "title": f"Style mixing of {Path(args.model).name}",
        "model": Path(args.model).name,
        "teachers": {name: Path(file).name for name, file in args.teacher},
        "torch": torch.__version__,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = write(mixing, folder, decoder)
    print(markdown(mixing))
    print("\n" + "\n".join(f"wrote {file}" for file in files))


def read_inputs(
    args: argparse.Namespace, device: torch.device
) -> tuple[MixingLineup, PixelDecoder | None, EvaluationSettings, list[Pair]]:
    """The models, the decoder, the settings and the pairs that a command line names.

    Raises ValueError for files that do not belong together.
    """
    from ..teachers.models import as_checkpoint, base_with_parts

    student = base_with_parts(args.model, args.parts_from)
    config = student.config
    styles = [style.name for style in student.styles]
    prompts = prompts_of(args.prompts, config)
    merging = MERGE in args.paths
    files = dict(args.teacher)
    unknown = sorted(set(files) - set(styles))
    if unknown or len(files) < len(args.teacher):
        raise ValueError(
            f"a teacher is named twice, or no style of the student is called {', '.join(unknown) or 'so'}: its styles are "
            f"{', '.join(styles) or 'none at all (a plain checkpoint)'}"
        )
    pairs = named_pairs(args.pairs, styles, [name for name in styles if name in files] if merging else styles)
    used = [name for name in styles if name in files and any(name in pair for pair in pairs)] if merging else []
    read = {name: as_checkpoint(files[name], student) for name in used}
    say_guesses({"the model": student, **read})
    settings = EvaluationSettings(**painting(args, OPTIONS, student, device))
    text = TextStates(prompts)
    decoder = vae_decoder(student, config, device) if student.vae else None
    lineup = MixingLineup(
        model_ref("student", student, student, text, keep=True),
        styles,
        [model_ref(name, checkpoint, student, text, file=files[name]) for name, checkpoint in read.items()],
        prompts,
        decoder,
        choose_classifier(args.features, is_small(config), pairs, decoder is not None),
    )
    return lineup, decoder, settings, pairs


def choose_classifier(file: str | None, small: bool, pairs: Sequence[Pair], has_decoder: bool) -> FeatureNet | None:
    """The classifier of ``file``; without a file the demo family's, if the models are of that family (``small``), a decoder is there and
    it knows every style of the pairs. None, also for the file "none": the student judges by itself."""
    if file == "none" or not file and not (small and has_decoder):
        return None
    network = load_features(file or DEMO_FILE)
    if not file and not {name for pair in pairs for name in pair} <= set(looks_of(network)):
        return None
    return network
