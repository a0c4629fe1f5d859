"""What the paper's parts bring on the demo family: arms that differ in one setting each, at equal student samples.

    python -m comfyui_dmm.tests.benches.recipes                              (about an hour on one CPU core)
    python -m comfyui_dmm.tests.benches.recipes --arms plain,adversarial --seeds 0,1,2 --steps 700

Every arm is the recipe of ``demo_recipe`` with the changes of ``ARMS``. The table gives, over the teachers, the mean eps
error on 128 scenes that no arm has seen, the worst teacher's, and what the classifier of the demo family says of 25 pictures a
style: painted in its look, and showing what the caption says. Spread: over the seeds. One process, one arm after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
from PIL import Image

from ...dmm_core.unet import UNet, load_unet
from ...dmm_core.vae import load_vae
from ...training.config import DataSpec, DistillConfig
from ...training.data.cache import build_image_cache
from ...training.data.demo.latents import captioned_latents, demo_images
from ...training.data.demo.looks import BASE_LOOK, TEACHER_LOOKS
from ...training.demo.classifier import load_classifier
from ...training.demo.judge import judge
from ...training.demo.tour import HELD_OUT_SEED
from ...training.loop.eps_table import eps_errors
from ...training.paint.painter import Painter
from ...training.run.load import load_run
from ...training.run.train import train
from ...training.teachers.teacher import Teacher, soup
from ...training.text import ClipText
from .demo_recipe import demo_config
from .demo_rollouts import build_demo_rollouts

ROOT = Path(__file__).parents[2]
ARMS = {
    "plain": {},  # score and feature loss
    "score only": {"lambda_feat": 0.0},
    "adversarial": {"lambda_adv": 0.01, "adv_lr": 1e-3},
    "adversarial x10": {"lambda_adv": 0.1, "adv_lr": 1e-3},
    "final stage": {"final_share": 0.2},
    "low-rank": {"trainable": "lora", "lora_rank": 8},
    "image cache": {"data": "images"},
    "rollouts": {"data": "rollouts", "paths": 160, "lambda_feat": 0.0},
    "more rollouts": {"data": "rollouts", "paths": 480, "lambda_feat": 0.0},
    "paper": {"lambda_adv": 0.01, "adv_lr": 1e-3, "final_share": 0.2},
}
"""Changes of the recipe; final_share: of the steps, taken from the main stage; data: a cache made for this bench instead of scenes;
paths: paintings by each teacher in the rollouts, five states kept of each."""


def settings(base, changes: dict, steps: int, seed: int):
    changes = {k: v for k, v in changes.items() if k not in ("data", "paths")}
    last = round(steps * changes.pop("final_share", 0.0))
    return dataclasses.replace(
        base, steps=steps - last, final_steps=last, final_images=320, final_cfg=4.0, final_sampling_steps=16, seed=seed,
        validation=0, **changes,
    )  # fmt: skip


def one(arm: str, steps: int, seed: int) -> dict:
    """Train an arm and judge it."""
    config = demo_config()
    config.train = settings(dataclasses.replace(config.train, lambda_adv=0.0), ARMS[arm], steps, seed)
    if kind := ARMS[arm].get("data"):
        config.data = DataSpec("cache", str(make_cache(kind, config, ARMS[arm].get("paths"))))
    loaded = load_run(config, torch.device("cpu"))
    run = loaded.start()
    started = time.monotonic()
    train(run, None)
    seconds = time.monotonic() - started
    student = load_unet(run.student_weights())
    vae, text = load_vae(loaded.parts.vae), ClipText(loaded.parts.text)
    data = captioned_latents(vae, (BASE_LOOK, *TEACHER_LOOKS), 128, HELD_OUT_SEED)
    contexts = text.encode(data.prompts)
    base, *teachers = (dataclasses.replace(teacher, contexts=contexts) for teacher in (run.base, *run.teachers))
    table = errors(teachers, base, student, data)
    brush = Painter(student, text, vae, [t.name for t in teachers])
    classifier = load_classifier(ROOT / "models" / "demo-classifier.safetensors")
    accuracies = [judge(brush, classifier, t.name, style=brush.style_row(t.name), count=25, seed=1) for t in teachers]
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "samples": steps * config.train.batch_size,
        "seconds": seconds,
        "error": statistics.mean(table.values()),
        "worst": max(table.values()),
        "look": statistics.mean(v.look for v in accuracies),
        "caption": statistics.mean(v.both for v in accuracies),
        "by teacher": table,
    }


def make_cache(kind: str, config: DistillConfig, paths: int | None) -> Path:
    """The demo's scenes as a folder of pictures, through ``dmm cache``; or their captions, painted by the teachers."""
    folder = ROOT / "out" / f"bench-{kind}{paths or ''}"
    started = time.monotonic()
    if kind == "images":
        images, captions = demo_images((BASE_LOOK, *TEACHER_LOOKS), config.data.count, config.data.seed)
        pictures = folder.with_name("bench-pictures")
        pictures.mkdir(parents=True, exist_ok=True)
        for i, (image, caption) in enumerate(zip(images, captions)):
            Image.fromarray(image).save(pictures / f"{i:04d}.png")
            (pictures / f"{i:04d}.txt").write_text(caption, encoding="utf-8")
        build_image_cache(folder, pictures, config.base, parts_from=config.parts_from)
    else:
        build_demo_rollouts(folder, config, paths)
    print(f"{kind}: made in {time.monotonic() - started:.0f} s", flush=True)
    return folder


def errors(teachers: list[Teacher], base: Teacher, student: UNet, data) -> dict[str, float]:
    average = UNet(base.unet.config)
    average.load_state_dict(soup([t.unet.state_dict() for t in teachers]))
    return {
        row.teacher: row.student for row in eps_errors(teachers, base, average, student, data=data, samples=len(data))
    }


def row(arm: str, results: list[dict]) -> str:
    def cell(key: str, digits: int, scale: float = 1.0) -> str:
        values = [scale * r[key] for r in results]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    cells = [cell("error", 5), cell("worst", 5), cell("look", 1, 100), cell("caption", 1, 100), cell("seconds", 0)]
    return f"| {arm} | {len(results)} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument(
        "--results", default=str(ROOT / "out" / "recipes.jsonl"), help="finished arms; they are not run again"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(args.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    arms, seeds = args.arms.split(","), [int(seed) for seed in args.seeds.split(",")]
    for seed in seeds:
        for arm in arms:
            if not any((r["arm"], r["seed"], r["steps"]) == (arm, seed, args.steps) for r in done):
                done.append(one(arm, args.steps, seed))
                with path.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
                print(json.dumps(done[-1]), flush=True)
    print(f"\n{args.steps} steps of 32 samples\n")
    print(
        "| arm | seeds | eps error | worst teacher | look % | caption % | seconds |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for arm in arms:
        mine = [r for r in done if r["arm"] == arm and r["steps"] == args.steps and r["seed"] in seeds]
        print(row(arm, mine))


if __name__ == "__main__":
    main()
