"""A DMM model with one more style, learnt from a few pictures: what ``dmm learn-style`` and the node do."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dmm_core.bank import BANK, PARTS, split_key
from ...dmm_core.bank_room import last_alone, put_last, with_room
from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.metadata import StyleInfo
from ...dmm_core.style import MLP_NAMES, no_style_row
from ...dmm_core.style_value import check_new_name
from ...dmm_core.unet import load_unet
from ..config import check_names
from ..loop.few_steps import FEW_STEPS
from ..merge.grow import changed, recipe_of
from ..progress import ProgressCallback
from ..teachers.teacher import Teacher
from .config import LearnConfig
from .learner import FEW, Step, StyleLearner
from .match import Match, match_blend
from .pictures import Examples, other_captions


@dataclass(frozen=True)
class LearnReport:
    """What was learnt. untouched, start, best: mean error in eps of the held-out pictures without a style, in the blend where it began, and
    as it is now; step: of the best look; steps: taken. held: pictures that were held out; numbers: that learnt, one for one."""

    name: str
    learns: str
    pictures: int
    held: int
    began: str
    untouched: float
    start: float
    best: float
    step: int
    steps: int
    numbers: int
    seconds: float
    remarks: Sequence[str]

    def text(self) -> str:
        """In sentences."""
        what = {"code": "a code", "core": "a code and a core", "directions": "a code, a core and new directions"}[
            self.learns
        ]
        looked = f"{self.held} of them held out" if self.held else "none held out"
        lines = [
            f"'{self.name}' was learnt from {self.pictures} picture{'s' * (self.pictures != 1)} ({looked}): {what}, {self.numbers} "
            f"numbers, {self.steps} steps in {self.seconds:.0f} s, the best look after step {self.step}.",
            f"Error on {'the held-out' if self.held else 'the same'} pictures: {self.untouched:.4f} without a style, {self.start:.4f} as "
            f"{self.began}, where it began, {self.best:.4f} now. All other styles are unchanged.",
        ]
        if not self.step:
            lines.append("No step made it better: what is saved is the blend where it began.")
        return "\n".join([*lines, *(f"- {remark}" for remark in self.remarks)])


def check_model(model: Checkpoint) -> None:
    """Raise ValueError for a model that cannot get a style this way."""
    if not model.styles:
        raise ValueError("the model has no styles: it is a plain checkpoint, not a DMM model (dmm merge makes one)")
    refuse_few_steps(model)


def refuse_few_steps(model: Checkpoint) -> None:
    """Raise ValueError for a model of few steps: it predicts where a path ends, not the noise in a picture."""
    if model.recipe.get(FEW_STEPS):
        raise ValueError(
            "the model paints in a few steps, and styles are matched and learnt by the noise that a model sees: take the model "
            "that it was made of, whose few-step LoRA then paints the style too"
        )


def new_style(model: Checkpoint, info: StyleInfo) -> StyleInfo:
    """The description of a new style under a name that is free. Raises ValueError for one that is not."""
    name = check_new_name([style.name for style in model.styles], info.name)
    check_names([*(style.name for style in model.styles), name])
    return dataclasses.replace(info, name=name)


def prompts_for(model: Checkpoint, examples: Examples, config: LearnConfig, others: Sequence[str] = ()) -> list[str]:
    """The texts whose states learning needs: the empty one, the pictures' captions, then ``others``, or captions of our own."""
    empty, *given = own_prompts(examples)
    if not config.prior:
        return [empty, *given]
    own = [text for text in dict.fromkeys(others) if text and text not in given]
    return [empty, *given, *(own or other_captions(model.config, given, config.prior_pictures))][
        : 1 + len(given) + config.prior_pictures
    ]


def own_prompts(examples: Examples) -> list[str]:
    """The empty text and the pictures' captions, each once."""
    return ["", *dict.fromkeys(caption for caption in examples.captions if caption)]


def rows_of(prompts: Sequence[str], examples: Examples) -> tuple[Tensor, Tensor]:
    """(M,) the pictures' captions and (P,) the other captions, as rows of ``prompts``."""
    place = {text: i for i, text in enumerate(prompts)}
    rows = torch.tensor([place[caption] for caption in examples.captions])
    return rows, torch.arange(1 + len({caption for caption in examples.captions if caption}), len(prompts))


def what_learns(model: Checkpoint, config: LearnConfig) -> str:
    """What of the settings' ``learns`` the model can hold. Raises ValueError for a code alone where codes say nothing."""
    if model.config.bank and config.learns != "code":
        return config.learns
    mlp = next(name for name in MLP_NAMES if f"{name}.linear_2.weight" in model.unet)
    if not model.unet[f"{mlp}.linear_2.weight"].any():
        raise ValueError(
            "codes say nothing in this model, as in every fresh merge: its styles are in the bank. Learn a core, or directions (learns)"
        )
    return "code"


def learn_style(
    model: Checkpoint,
    text: Teacher,
    examples: Examples,
    *,
    info: StyleInfo,
    config: LearnConfig,
    prompts: Sequence[str],
    base: StyleInfo | None = None,
    device: torch.device | None = None,
    progress: ProgressCallback | None = None,
    on_step: Callable[[StyleLearner, Step], None] | None = None,
) -> tuple[Checkpoint, LearnReport]:
    """``model`` with one more style, ``info``, that paints like the pictures; its other styles are bitwise what they were.

    text: the model as a Teacher whose text states are of ``prompts`` (``prompts_for``); its UNet is not looked at. base: the model's file,
    for the recipe. progress, on_step: are told how it goes; an exception that they raise ends it, and ``model`` is as it was. Raises
    ValueError, before anything is computed, for a plain or few-step model, a name that is taken and settings that make no sense.
    """
    config.validate()
    check_model(model)
    info = new_style(model, info)
    learns = what_learns(model, config)
    started, device = time.perf_counter(), device or torch.device("cpu")
    rows, others = rows_of(prompts, examples)
    names = [style.name for style in model.styles]
    before = dataclasses.replace(text, unet=load_unet(model.unet, heads=model.heads).to(device))
    match = match_blend(before, names, examples, rows, seed=config.seed, progress=progress)
    del before  # of large models only one is on the device
    roomy = with_room(model.unet, config.directions if learns == "directions" else 0, match.weights())
    alone = dataclasses.replace(text, unet=load_unet(last_alone(roomy), heads=model.heads).to(device), style=None)
    known = {key: tuple(value.shape) for key, value in model.unet.items() if key.startswith(f"{BANK}.")}
    if all(roomy[key].shape == shape for key, shape in known.items() if split_key(key)[1] in PARTS[:2]):
        learns = "core" if known and learns != "code" else learns
    learner = StyleLearner(
        alone, examples, dataclasses.replace(config, learns=learns), known=known, rows=rows, others=others
    )
    untouched = learner.judge(no_style_row(1))
    painted = None
    if config.prior and len(others):
        painted = learner.paint_others(
            (lambda: progress(0, config.steps, "painting other captions")) if progress else None
        )
    for step in learner.run(painted):
        if progress:
            progress(step.step, step.steps, f"learning '{info.name}', error {step.error:.4f}")
        if on_step:
            on_step(learner, step)
    unet = put_last(roomy, {k: v.detach().cpu() for k, v in learner.unet.state_dict().items()}, model.unet)
    report = LearnReport(
        info.name, learns, len(examples), len(learner.held), began_as(match), untouched, learner.start, learner.best,
        learner.best_step, learner.step, learner.numbers, time.perf_counter() - started, remarks_of(model, examples, config, learns),
    )  # fmt: skip
    made = {
        "learned": recorded(report, match, config),
        "growth": {"directions": config.directions if learns == "directions" else 0},
    }
    return changed(model, unet, [*model.styles, info], recipe_of(model, made, base)), report


def began_as(match: Match) -> str:
    return f"'{match.text}'" if match.text != "none" else "no style"


def remarks_of(model: Checkpoint, examples: Examples, config: LearnConfig, learns: str) -> list[str]:
    """What the user should know beside the figures."""
    remarks = list(examples.remarks)
    if len(examples) < FEW:
        remarks.append(
            f"{len(examples)} picture{'s' * (len(examples) != 1)} cannot tell a style from what it shows, and none could be held out: look "
            "at what it paints, and give 5 to 20 if you can"
        )
    if learns != config.learns and not model.config.bank:
        remarks.append(
            "the model has no style bank, so the style is a code alone, which holds little that the model does not know: a merged model, "
            "or one distilled with init bank, learns more"
        )
    elif learns != config.learns:
        remarks.append("no layer had room for new directions: the style has a core in the bank as it is")
    return remarks


def recorded(report: LearnReport, match: Match, config: LearnConfig) -> dict[str, Any]:
    """What the file's recipe says."""
    return {
        "style": report.name,
        "pictures": report.pictures,
        "began as": match.text,
        "learns": report.learns,
        "settings": dataclasses.asdict(config),
        "steps": report.steps,
        "best step": report.step,
        "error": {"none": report.untouched, "start": report.start, "best": report.best},
    }
