"""Four steps on the demo family: what a few-step model paints beside the 25 steps that it learnt from, and beside fewer steps of those.

    python -m comfyui_dmm.tests.benches.few_steps --out out/few-steps                               (train the arms, then judge)
    python -m comfyui_dmm.tests.benches.few_steps --out out/few-steps --arms "many paths,both" --seeds 0,1,2 --steps 3000
    python -m comfyui_dmm.tests.benches.few_steps --out out/few-steps --arms "" --also mine=my.safetensors

Each arm is ``dmm fewstep`` on the shipped demo model with the changes of ``ARMS``; "plain" is the negative control, ``dmm distill`` of that
model by its teachers, as many steps. All of it goes on after an interruption: runs in --out/runs, painted latents in --out/painted.

The reference is the demo model at 25 euler steps (sgm_uniform), cfg 4, from the same noise. Of each model, by style: PAIR to the reference,
the share of pictures that show what the caption says and the style's look (the family's classifier), and how far apart the twins ink and
pen are, as a share of the reference's distance. "none" is painting without a style. With --teachers also EXCESS and LEAK to the teachers,
which paint as the reference does. With --size the pictures have another size than the family's, and only PAIR and the twins are told: the
classifier knows no other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...dmm_core.checkpoint import load_checkpoint
from ...dmm_core.sampling import host_noise
from ...dmm_core.style import no_style_row, style_row
from ...dmm_core.unet import UNet, load_unet
from ...dmm_core.vae import SCALE_SD, load_vae
from ...training.config import DataSpec, DistillConfig, FewStepConfig, TrainConfig
from ...training.config_file import load_config
from ...training.data.demo.family import FIRST
from ...training.demo.classifier import load_classifier
from ...training.demo.judge import answered_right
from ...training.evaluation.agreement import pair
from ...training.evaluation.distances import principal_axes
from ...training.evaluation.features import load_features
from ...training.evaluation.matrix import Sets, Yardstick
from ...training.files.hashing import repr_sha256, weights_hash
from ...training.files.pieces import read_piece, write_piece
from ...training.paint.paint_rows import paint_rows
from ...training.run.distill import distill
from ...training.teachers.teacher import Teacher
from ...training.text import ClipText

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "dmm" / "demo-dmm.safetensors"
CLASSIFIER = ROOT / "models" / "demo-classifier.safetensors"
SEED = 5_000_000
"""Of the pictures' noise and captions; no training uses it."""
PROJECT = 40
"""Directions of the features in which FID is taken, as in docs/evaluation.md."""
REFERENCE = (25, 4.0)
SIZE = (128, 128)
"""Width and height of the family's pictures."""
CONSISTENCY = {"objective": "consistency"}
ARMS = {
    "default": {"paths": FewStepConfig().paths},
    "regression": {},
    "short paths": {"paths": 384, "path_steps": 2},
    "more paths": {"paths": 120},
    "more paths and all weights": {"paths": 120, "trainable": "all", "lr": 5e-4},
    "many paths": {"paths": 640},
    "many paths and all weights": {"paths": 640, "trainable": "all", "lr": 5e-4},
    "consistency": CONSISTENCY,
    "consistency and many paths": {**CONSISTENCY, "paths": 640},
    "follows the student": {**CONSISTENCY, "follows": "student"},
    "own paths alone": {**CONSISTENCY, "path_share": 1.0},
    "all weights": {**CONSISTENCY, "trainable": "all", "lr": 5e-4},
    "both": {"objective": "both", "skip": 40},
}
"""Changes of the settings, of few_steps or of train."""
PLAIN = "plain"


def arm_config(arm: str, steps: int, batch: int, seed: int, data: DataSpec, folder: Path) -> DistillConfig:
    """The run of an arm: of "plain" the demo's own recipe, which goes on from the shipped model."""
    train = TrainConfig(
        steps=steps, batch_size=batch, lr=2e-3, lr_schedule="cosine", warmup=0.03, betas=(0.9, 0.99), weight_decay=0.0, base_share=0.1,
        trainable="lora", lora_rank=32, ema_gamma=6.94, seed=seed, validation=64, save_every=100, lambda_feat=0.0, lambda_adv=0.0,
    )  # fmt: skip
    name = f"{arm}-{steps}x{batch}-{seed}".replace(" ", "-")
    config = DistillConfig(
        base=str(MODEL),
        output=str(folder / f"{name}.safetensors"),
        run_dir=str(folder / name),
        picture_every=0,
        data=data,
    )
    if arm == PLAIN:
        recipe = load_config(ROOT / "training" / "configs" / "demo_full.yaml")
        return dataclasses.replace(config, teachers=recipe.teachers, train=train)
    fields = {field.name for field in dataclasses.fields(FewStepConfig)}
    changes = ARMS[arm]
    few = FewStepConfig(**{"paths": 40, **{k: v for k, v in changes.items() if k in fields}})
    train = dataclasses.replace(train, **{k: v for k, v in changes.items() if k not in fields})
    return dataclasses.replace(config, few_steps=few, train=train)


class Judge:
    """What models paint of ``count`` scenes in each style of the demo model (and without one), and what is to be said of it."""

    def __init__(self, count: int, folder: Path, size: tuple[int, int] = SIZE):
        self.count, self.folder, self.size = count, folder, size
        whole = load_checkpoint(MODEL)
        self.styles = [style.name for style in whole.styles]
        self.vae, self.unet = load_vae(whole.vae).eval(), load_unet(whole.unet)
        rng = np.random.default_rng(SEED)
        self.scenes = [FIRST.sample_scene(rng) for _ in range(count)]
        prompts = ["", *(scene.caption for scene in self.scenes)]
        self.contexts = ClipText(whole.text).encode(prompts)
        self.classifier, self.features = load_classifier(CLASSIFIER), load_features(CLASSIFIER)

    @torch.no_grad()
    def paint(self, unet: UNet, style: str | None, steps: int, cfg: float, seed: int = SEED) -> Tensor:
        """Latents (count, 4, height / 8, width / 8), kept in the folder; picture k is of scene k and
        seed + k. style: None without one, "" of a plain UNet."""
        key = repr_sha256(weights_hash(unet.state_dict()), style, steps, cfg, seed, self.count, self.size)[:24]
        path = self.folder / f"{key}.safetensors"
        if found := read_piece(path, self.count):
            return found["latents"]
        n = unet.config.num_styles
        row = None
        if n:
            row = style_row(n, self.styles.index(style)) if style else no_style_row(n)
        text = Teacher("model", unet, self.contexts)
        shape = (1, 4, self.size[1] // 8, self.size[0] // 8)
        noise = torch.cat([host_noise(shape, seed + k) for k in range(self.count)])
        latents = paint_rows(
            unet, text, torch.arange(1, self.count + 1), noise,
            steps=steps, cfg=cfg, style=row, sampler="euler", scheduler="sgm_uniform",
        )  # fmt: skip
        write_piece(path, {"latents": latents})
        return latents

    def paint_all(self, unet: UNet, steps: int, cfg: float) -> dict[str, Tensor]:
        return {name: self.paint(unet, None if name == "none" else name, steps, cfg) for name in (*self.styles, "none")}

    @torch.no_grad()
    def answers(self, latents: Tensor, look: str) -> tuple[float, float]:
        """Shares of the pictures that show object and colour of the caption, and that are painted in the look."""
        right = answered_right(self.classifier, self.vae.decode(latents / SCALE_SD), self.scenes, look)
        shown = np.logical_and(right["shape"], right["colour"])
        return float(shown.mean()), float(np.mean(right["look"]))

    @torch.no_grad()
    def vectors(self, latents: Tensor) -> Tensor:
        return self.features(self.vae.decode(latents / SCALE_SD))

    def figures(self, painted: dict[str, Tensor], reference: dict[str, Tensor]) -> dict:
        once = torch.ones(1, self.count, dtype=torch.float64)
        out: dict = {"pair": {name: pair(z, reference[name], once).item() for name, z in painted.items()}}
        judged = painted if self.size == SIZE else {}
        answers = {name: self.answers(z, FIRST.base if name == "none" else name) for name, z in judged.items()}
        out["caption"] = {name: both for name, (both, _) in answers.items()}
        out["look"] = {name: look for name, (_, look) in answers.items()}
        apart = [(z["ink"] - z["pen"]).square().mean().sqrt().item() for z in (painted, reference)]
        out["twins"] = apart[0] / apart[1]
        return out

    def yardstick(self) -> tuple[Yardstick, Tensor]:
        """FID to the teachers, which paint as the reference does, and the directions it is taken in."""
        batches = []
        for seed in (SEED, SEED + 2**31):
            found = []
            for name in self.styles:
                teacher = load_unet(load_checkpoint(MODEL.with_name(f"demo-teacher-{name}.safetensors")).unet)
                found.append(self.vectors(self.paint(teacher, "", *REFERENCE, seed=seed)))
            batches.append(found)
        axes = principal_axes(torch.cat([*batches[0], *batches[1]]), PROJECT)
        first, second = ([x.double() @ axes for x in group] for group in batches)
        return Yardstick("FID", Sets(self.styles, first, first, second), 0, SEED), axes


def table(rows: dict[str, dict]) -> str:
    """A Markdown table, a line for each model."""
    styles = list(next(iter(rows.values()))["pair"])
    lines = [
        f"| | {' | '.join(styles)} | captions | looks | twins | EXCESS | LEAK |",
        "| --- " * (len(styles) + 6) + "|",
    ]
    for name, row in rows.items():
        cells = [f"{row['pair'][style]:.3f}" for style in styles]
        styled = [style for style in styles if style != "none"]
        answered = [[row[what][s] for s in styled if s in row[what]] for what in ("caption", "look")]
        cells += [f"{100 * statistics.mean(shares):.1f}%" if shares else "" for shares in answered]
        cells.append(f"{row['twins']:.2f}")
        cells += [f"{row[what]:.1f}" if what in row else "" for what in ("excess", "leak")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "few-steps")
    parser.add_argument("--arms", default="default,many paths,plain")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--count", type=int, default=48, help="pictures a style")
    parser.add_argument("--latents", help="the scenes, as data of kind latents, where they are made already")
    parser.add_argument("--cache", help="a folder of dmm cache images to learn from instead, as of several sizes")
    parser.add_argument("--size", default="128x128", help="of the pictures that are judged, as WIDTHxHEIGHT")
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=FILE", help="judge another few-step model too"
    )
    parser.add_argument(
        "--teachers", action="store_true", help="EXCESS and LEAK too, for which all teachers paint twice"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = args.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    data = DataSpec("demo_scenes", count=640)
    for kind, file in (("latents", args.latents), ("cache", args.cache)):
        data = DataSpec(kind, file) if file else data
    width, height = map(int, args.size.split("x"))
    if args.teachers and (width, height) != SIZE:
        parser.error("--teachers asks the classifier, which knows 128x128 alone: leave --size out")
    files = dict(one.split("=", 1) for one in args.also)
    for seed in [int(seed) for seed in args.seeds.split(",")]:
        for arm in filter(None, args.arms.split(",")):
            config = arm_config(arm, args.steps, args.batch, seed, data, runs)
            distill(config, grown=arm != PLAIN)
            files[f"{arm}, seed {seed}"] = config.output
    judge = Judge(args.count, args.out / "painted", (width, height))
    reference = judge.paint_all(judge.unet, *REFERENCE)
    painted = {"DMM, 25 steps, cfg 4": reference}
    for steps in (4, 8):
        painted[f"DMM, {steps} steps, cfg 4"] = judge.paint_all(judge.unet, steps, 4.0)
    painted["DMM, 4 steps, cfg 1"] = judge.paint_all(judge.unet, 4, 1.0)
    for name, file in files.items():
        unet = load_unet(load_checkpoint(file).unet)
        for cfg in (1, 4) if name.startswith(PLAIN) else (1,):
            painted[f"{name}, 4 steps, cfg {cfg}"] = judge.paint_all(unet, 4, float(cfg))
    rows = {name: judge.figures(z, reference) for name, z in painted.items()}
    print(table(rows), flush=True)
    if args.teachers:
        yardstick, axes = judge.yardstick()
        for name, z in painted.items():
            found = yardstick.measure([judge.vectors(z[style]).double() @ axes for style in judge.styles])
            rows[name] |= {"excess": found.excess.value, "leak": found.leak.value}
        print(table(rows))
    (args.out / "few_steps.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
