"""How much of a checkpoint do a few pictures give? Styles learnt from renders of looks that a DMM model does not know, against those looks'
true teachers (docs/experiments.md has the figures).

    python -m comfyui_dmm.tests.benches.learn_style --family-folder FOLDER --model DMM.safetensors --output rows.jsonl --arms core lora ...

FOLDER: of ``dmm demo build --family second``; the model: distilled from some of its teachers. Every row is written when it is done; the
same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...dmm_core.checkpoint import Checkpoint, load_checkpoint
from ...dmm_core.metadata import StyleInfo
from ...dmm_core.schedule import NoiseSchedule
from ...dmm_core.style import style_row
from ...dmm_core.unet import UNet, load_unet
from ...dmm_core.vae import load_vae
from ...training.data.demo.family import SECOND
from ...training.data.demo.latents import captioned_latents, demo_images
from ...training.data.text_states import TextStates
from ...training.demo.classifier import load_classifier
from ...training.demo.judge import judge
from ...training.learn.config import LearnConfig
from ...training.learn.learner import StyleLearner
from ...training.learn.match import masses_row, match_blend
from ...training.learn.pictures import Examples, encoder_of, make_examples
from ...training.learn.style import learn_style, prompts_for, rows_of
from ...training.loop.adapters import add_lora, folded_state_dict
from ...training.loop.losses import score_loss
from ...training.paint.painter import painter
from ...training.teachers.teacher import Teacher, plain_unet, styled_unet

EVALUATED, JUDGED = 96, 40
"""Unseen scenes for the eps error; pictures for the classifier."""
LORA_LR = 3e-3


class LoraLearner(StyleLearner):
    """The same pictures, steps and looks for a LoRA of a plain UNet, without the prior."""

    def __init__(self, *args, rank: int, **more):
        self.rank = rank
        super().__init__(*args, **more)
        self.style = self.none = None

    def _choose(self):
        torch.manual_seed(0)
        self.unet.requires_grad_(False)
        add_lora(self.unet, self.rank, self.rank, torch.Generator().manual_seed(0))
        named = {n: p for n, p in self.unet.named_parameters() if p.requires_grad}
        self.trained = {n: torch.ones(p.shape) for n, p in named.items()}
        return [{"params": [p], "scale": LORA_LR / self.config.lr} for p in named.values()]


@dataclasses.dataclass(eq=False)
class Bench:
    folder: Path
    file: Path
    steps: int
    asked: dict = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def model(self) -> Checkpoint:
        return load_checkpoint(self.file)

    @functools.cached_property
    def base(self) -> Checkpoint:
        return load_checkpoint(self.folder / "models" / "dmm" / "demo-base.safetensors")

    @functools.cached_property
    def classifier(self):
        return load_classifier(self.folder / "models" / "demo-classifier.safetensors")

    @functools.cached_property
    def brush(self):
        return painter(self.model)

    @functools.cached_property
    def others(self) -> list[str]:
        rng, found = np.random.default_rng(88_000_001), {}
        while len(found) < 64:
            found[SECOND.sample_scene(rng).caption] = None
        return list(found)

    def teacher(self, look: str) -> UNet:
        file = self.folder / "models" / "dmm" / f"demo-teacher-{look}.safetensors"
        return load_unet(load_checkpoint(file).unet)

    def pictures(self, look: str, count: int, seed: int, captions: str) -> Examples:
        images, texts = demo_images([look], 20, 91_000_000 + 1000 * seed, SECOND)
        texts, mirrored = texts[:count], captions.endswith("+mirror")
        captions = captions.removesuffix("+mirror")
        if captions == "shuffled":
            texts = texts[1:] + texts[:1]
        elif captions != "own":
            texts = [captions.removeprefix("text:")] * count
        encode = encoder_of(self.model, torch.device("cpu"))
        pictures = [Image.fromarray(image) for image in images[:count]]
        if mirrored:
            pictures += [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in pictures]
            texts = texts * 2
        return make_examples(pictures, texts, [], config=self.model.config, prediction="eps", encode=encode)

    def questions(self, look: str):
        """x_t, t, contexts and the true teacher's answers on unseen scenes in the look."""
        if look not in self.asked:
            self.asked[look] = self._questions(look)
        return self.asked[look]

    def _questions(self, look: str):
        data = captioned_latents(load_vae(self.model.vae), [look], EVALUATED, 95_000_000, family=SECOND)
        contexts = self.brush.text.encode(data.prompts)
        g = torch.Generator().manual_seed(5)
        t = ((torch.arange(EVALUATED) + 0.5) * 1000 / EVALUATED).long()[torch.randperm(EVALUATED, generator=g)]
        x0 = data.buckets[0]
        x_t = NoiseSchedule().add_noise(x0, torch.randn(x0.shape, generator=g), t)
        c = contexts[data.rows]
        with torch.no_grad():
            return x_t, t, c, self.teacher(look)(x_t, t, c)

    @torch.no_grad()
    def error(self, look: str, unet: UNet, style=None) -> float:
        x_t, t, c, target = self.questions(look)
        row = None if style is None else style.expand(len(t), -1)
        return score_loss(unet(x_t, t, c, style=row), target).mean().item()

    def judged(self, look: str, unet: UNet, style=None) -> dict:
        brush = dataclasses.replace(self.brush, unet=unet, styles=["x"] if style is not None else [])
        found = judge(brush, self.classifier, look, style=style, count=JUDGED, seed=3, family=SECOND)
        return {"caption right": found.both, "look right": found.look}

    def row(self, arm: str, look: str, count: int, seed: int, captions: str, of: str, settings: dict) -> dict:
        """One figure of the table. of: the look of the pictures, where it is another one."""
        config = LearnConfig(steps=self.steps, seed=seed, **settings)
        examples = self.pictures(of or look, count, seed, captions)
        base = self.error(look, load_unet(self.base.unet))
        began, more = time.perf_counter(), {}
        if arm == "teacher":
            unet, style = self.teacher(look), None
        elif arm == "base":
            unet, style = load_unet(self.base.unet), None
        elif arm == "blend":
            prompts = prompts_for(self.model, examples, config, self.others)
            text = Teacher("m", styled_unet(self.model.unet, "m"), *TextStates(prompts).of(self.model.text))
            names = [one.name for one in self.model.styles]
            match = match_blend(text, names, examples, rows_of(prompts, examples)[0], seed=seed)
            unet, style = text.unet, masses_row(torch.tensor(match.weights()))
            more = {"blend": match.text}
        elif arm.startswith("lora"):
            prompts = prompts_for(self.model, examples, config, self.others)
            states = TextStates(prompts).of(self.model.text)
            text = Teacher("b", plain_unet(self.base.unet, "b"), *states)
            rows, others = rows_of(prompts, examples)
            learner = LoraLearner(text, examples, config, known={}, rows=rows, others=others, rank=int(arm[4:] or 8))
            for _ in learner.run(None):
                pass
            unet, style = load_unet(folded_state_dict(learner.unet)), None
            more = {"numbers": learner.numbers, "step": learner.best_step, "steps": learner.step, "held": learner.best}
        else:
            config = dataclasses.replace(config, learns=arm)
            prompts = prompts_for(self.model, examples, config, self.others)
            text = Teacher("m", styled_unet(self.model.unet, "m"), *TextStates(prompts).of(self.model.text))
            after, report = learn_style(
                self.model, text, examples, info=StyleInfo("new"), config=config, prompts=prompts
            )
            unet = load_unet(after.unet)
            style = style_row(after.num_styles, after.num_styles - 1)
            more = {"numbers": report.numbers, "step": report.step, "steps": report.steps, "held": report.best}
            more |= {"none": report.untouched, "start": report.start, "began": report.began}
        seconds = time.perf_counter() - began
        error = self.error(look, unet, style)
        return {
            "error": error,
            "base": base,
            "way": 1 - error / base,
            "seconds": seconds,
            **more,
            **self.judged(look, unet, style),
        }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--family-folder", type=Path, required=True)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--arms", nargs="+", required=True)
    p.add_argument("--looks", nargs="+", required=True)
    p.add_argument("--counts", nargs="+", type=int, default=[20])
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument(
        "--captions",
        nargs="+",
        default=["own"],
        help="own, shuffled, or text:SOMETHING for all; own+mirror: every picture mirrored too",
    )
    p.add_argument("--of", default="", help="the look of the pictures, for the negative control")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--set", nargs="*", default=[], help="of LearnConfig: lr=0.05")
    args = p.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.family_folder, args.model, args.steps)
    given = {
        name: json.loads(value) if value[:1] in "-.0123456789" and "%" not in value else value
        for name, value in (one.split("=") for one in args.set)
    }
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    for seed in args.seeds:
        for count in args.counts:
            for captions in args.captions:
                for arm in args.arms:
                    for look in args.looks:
                        key = {
                            "arm": arm,
                            "look": look,
                            "count": count,
                            "seed": seed,
                            "captions": captions,
                            "of": args.of,
                        }
                        key |= {"max steps": args.steps, "set": given}
                        if any(all(row.get(k) == v for k, v in key.items()) for row in done):
                            continue
                        row = key | bench.row(arm, look, count, seed, captions, args.of, given)
                        with args.output.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
