"""``dmm learn-style`` and ``dmm match-style``: thin faces on ``learn.style`` and ``learn.match``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..fields import describe
from ..learn.config import LearnConfig
from .arguments import MODELS, add_settings
from .progress_bar import ProgressBar

if TYPE_CHECKING:
    import torch

    from ...dmm_core.checkpoint import Checkpoint
    from ..learn.pictures import Examples
    from ..teachers.teacher import Teacher

SETTINGS = [row.name for row in describe(LearnConfig)]


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add both to the subparsers of the ``dmm`` command."""
    learn = commands.add_parser(
        "learn-style",
        help="a new style from 5 to 20 pictures: a DMM model gets one more, and the others stay as they are",
        epilog=MODELS,
    )
    _add_inputs(learn)
    learn.add_argument("--name", required=True, help="of the new style")
    learn.add_argument("--description", default="", help="of the new style, for its card")
    learn.add_argument(
        "--other-captions",
        metavar="FILE",
        help="text file with captions that must go on working, one a line (default: everyday things)",
    )
    add_settings(learn, LearnConfig, SETTINGS)
    learn.add_argument("--output", required=True, metavar="FILE", help="the model with one more style, .safetensors")
    learn.set_defaults(run=run_learn, kept="nothing was written, the model is as it was")

    match = commands.add_parser(
        "match-style",
        help="which blend of a DMM model's styles is nearest to these pictures, as a text for a style field",
        epilog=MODELS,
    )
    _add_inputs(match)
    match.add_argument(
        "--draws", type=int, default=0, help="times each picture is noised and judged (default: 192 for all together)"
    )
    match.add_argument("--seed", type=int, default=0)
    match.add_argument(
        "--without-none", action="store_true", help="do not count painting without a style among the styles"
    )
    match.set_defaults(run=run_match, kept="nothing was written")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="DMM model")
    parser.add_argument(
        "--images", required=True, metavar="FOLDER", help="the pictures, with captions beside them (docs/data.md)"
    )
    parser.add_argument("--caption", default="", help="what the pictures show that have no caption of their own")
    parser.add_argument(
        "--parts-from", metavar="FILE", help="full checkpoint to take a missing text encoder or VAE from"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0")


def run_learn(args: argparse.Namespace) -> None:
    """Learn, write the model, print the report."""
    from ...dmm_core.checkpoint import save_checkpoint
    from ...dmm_core.metadata import StyleInfo
    from ..data.image_folder import read_caption_file
    from ..learn.pictures import collage
    from ..learn.style import check_model, learn_style, new_style, prompts_for
    from ..merge.files import checked_output, file_info
    from ..paint.thumbnails import thumbnail_uri
    from ..parallel.devices import pick_device
    from ..teachers.models import as_checkpoint

    config = LearnConfig(**{name: getattr(args, name) for name in SETTINGS})
    config.validate()
    output, device, bar = Path(args.output), pick_device(args.device), ProgressBar()
    checked_output(output, args.model, args.parts_from)
    model = as_checkpoint(args.model)
    check_model(model)
    info = new_style(model, StyleInfo(args.name, args.description))
    others = read_caption_file(args.other_captions) if args.other_captions else []
    with_parts, examples, pictures = read_inputs(args, model, device, bar)
    prompts = prompts_for(model, examples, config, others)
    text = text_of(with_parts, prompts)
    info = StyleInfo(info.name, info.description, thumbnail=thumbnail_uri(collage(pictures)))
    after, report = learn_style(
        model,
        text,
        examples,
        info=info,
        config=config,
        prompts=prompts,
        base=file_info(args.model),
        device=device,
        progress=bar,
    )
    bar.close()
    save_checkpoint(output, after)
    print(f"{report.text()}\n\nwrote {output}")


def run_match(args: argparse.Namespace) -> None:
    """Print the blend, and how each style alone explains the pictures."""
    import dataclasses

    from ...dmm_core.unet import load_unet
    from ..evaluation.settings import usual_dtype
    from ..learn.match import match_blend
    from ..learn.style import check_model, own_prompts, rows_of
    from ..parallel.devices import pick_device
    from ..teachers.models import as_checkpoint

    device, bar = pick_device(args.device), ProgressBar()
    model = as_checkpoint(args.model)
    check_model(model)
    with_parts, examples, _ = read_inputs(args, model, device, bar)
    prompts = own_prompts(examples)
    text = text_of(with_parts, prompts)
    unet = load_unet(model.unet, usual_dtype(device), heads=model.heads).to(device)
    found = match_blend(
        dataclasses.replace(text, unet=unet),
        [style.name for style in model.styles],
        examples,
        rows_of(prompts, examples)[0],
        draws=args.draws,
        seed=args.seed,
        with_none=not args.without_none,
        progress=bar,
    )
    bar.close()
    print(found.report(examples.remarks))


def read_inputs(
    args: argparse.Namespace, model: Checkpoint, device: torch.device, bar: ProgressBar
) -> tuple[Checkpoint, Examples, list]:
    """The model with the parts that its own file lacks, the pictures as it sees them, and as they are."""
    from ..files.model_files import add_parts
    from ..learn.pictures import encoder_of, make_examples, read_folder
    from ..teachers.models import as_checkpoint

    if args.parts_from:
        model = add_parts(model, as_checkpoint(args.parts_from))
    pictures, captions, remarks = read_folder(args.images, args.caption)
    examples = make_examples(
        pictures, captions, remarks,
        config=model.config, prediction=model.prediction, encode=encoder_of(model, device), progress=bar,
    )  # fmt: skip
    return model, examples, pictures


def text_of(model: Checkpoint, prompts: Sequence[str]) -> Teacher:
    """The model as a Teacher with the text states of ``prompts``. Raises ValueError for one without a text encoder."""
    from ..data.text_states import TextStates
    from ..teachers.teacher import Teacher, check_text, styled_unet

    weights, clip_skip = model.encoder()
    if not weights:
        raise ValueError("the model has no text encoder: name a full checkpoint to take it from (--parts-from)")
    unet = styled_unet(model.unet, "the model", heads=model.heads)
    text = Teacher(
        "the model", unet, *TextStates(prompts).of(weights, clip_skip=clip_skip), model.prediction, model.zero_snr
    )
    check_text([text])
    return text
