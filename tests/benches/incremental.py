"""Adding and forgetting styles on the demo family: the paper's Table 2 in eps error, and what an attack brings back.

    python -m comfyui_dmm.tests.benches.incremental                    (about 50 minutes on one CPU core)
    python -m comfyui_dmm.tests.benches.incremental --only add --seeds 0

Four styles are distilled together; then sticker, pen (ink's near-duplicate) and echo (the outlier) are added one at a time, with the
guard and without; beside them the joint merge of all seven. Then one style is forgotten in four ways, and each result is attacked: the
best code that can be learnt for it with the network frozen. Figures: eq. 9 against the true teachers on 128 scenes that nothing was
trained on. Models of finished arms stay in --folder and are not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...dmm_core.files import atomic_write
from ...dmm_core.metadata import StyleInfo
from ...dmm_core.unet import load_unet
from ...dmm_core.vae import load_vae
from ...training.config import AttackConfig
from ...training.data.demo.latents import captioned_latents
from ...training.data.demo.looks import BASE_LOOK, TEACHER_LOOKS
from ...training.demo.tour import HELD_OUT_SEED
from ...training.loop.codes import recover
from ...training.loop.eps_table import eps_errors
from ...training.loop.forget import forgetting
from ...training.loop.trainer import Trainer
from ...training.run.load import load_run
from ...training.run.train import train
from ...training.teachers.teacher import Teacher
from ...training.text import ClipText
from .demo_recipe import demo_config

ROOT = Path(__file__).parents[2]
FIRST, LATER = ("ink", "candy", "pop", "pixel"), ("sticker", "pen", "echo")
CPU = torch.device("cpu")
WARM = (0.0, 0.2, 0.5)
"""Shares of an addition's steps that look for the new code."""
ADDING = {"lr": 1e-3, "base_share": 0.05}


class Bench:
    def __init__(self, folder: Path, seed: int, steps: int, added: int):
        self.folder, self.seed, self.steps, self.added = folder, seed, steps, added
        config = demo_config()
        loaded = load_run(config, CPU)
        self.base, self.data, self.config = loaded.base, loaded.data, dataclasses.replace(loaded.config, seed=seed)
        self.teachers = {t.name: t for t in loaded.teachers}
        text = ClipText(loaded.parts.text)
        self.held_out = captioned_latents(load_vae(loaded.parts.vae), (BASE_LOOK, *TEACHER_LOOKS), 128, HELD_OUT_SEED)
        self.contexts = text.encode(self.held_out.prompts)

    def settings(self, steps: int, **changes):
        return dataclasses.replace(self.config, steps=steps, validation=0, **changes)

    def model(self, name: str, make) -> dict[str, Tensor]:
        """The weights of a finished arm, trained if they are not in the folder; its seconds are in its own file."""
        path = self.folder / f"{name}-{self.seed}-{self.steps}-{self.added}.safetensors"
        if not path.exists():
            started = time.monotonic()
            run = make()
            train(run, None)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                save_file(run.student_weights(), temporary, {"seconds": f"{time.monotonic() - started:.0f}"})
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        return load_file(path)

    def joint(self, names) -> dict[str, Tensor]:
        teachers = [self.teachers[name] for name in names]
        return self.model(
            "joint-" + "-".join(names), lambda: Trainer(self.base, teachers, self.data, self.settings(self.steps))
        )

    def as_base(self, weights: dict[str, Tensor], names) -> tuple[Teacher, list[Teacher]]:
        """A student as the frozen old model, and its styles as teachers."""
        old = Teacher("base", load_unet(weights), self.base.contexts)
        return old, [old.as_style(i, StyleInfo(name)) for i, name in enumerate(names)]

    def add(self, before: dict[str, Tensor], names, new, label: str, **changes) -> dict[str, Tensor]:
        def make() -> Trainer:
            old, styles = self.as_base(before, names)
            config = self.settings(self.added * len(new), init="base", **{**ADDING, **changes})
            return Trainer(old, [*styles, *(self.teachers[n] for n in new)], self.data, config)

        return self.model(f"{label}-{'-'.join(names)}+{'-'.join(new)}", make)

    def errors(self, weights: dict[str, Tensor], names) -> dict[str, float]:
        """Of each style against its true teacher; "(no style)" against the base model."""
        teachers = [dataclasses.replace(self.teachers[name], contexts=self.contexts) for name in names]
        base = dataclasses.replace(self.base, contexts=self.contexts)
        table = eps_errors(teachers, base, None, load_unet(weights), data=self.held_out, samples=len(self.held_out))
        return {row.teacher: row.student for row in table}

    # --- the two tables -----------------------------------------------------------------------------------------------

    def adding(self) -> dict[str, dict[str, float]]:
        everyone = (*FIRST, *LATER)
        four = self.joint(FIRST)
        table = {"joint 4": self.errors(four, FIRST), "joint 7": self.errors(self.joint(everyone), everyone)}
        guarded, names = four, FIRST
        for name in LATER:  # 4, +1, +1, +1
            guarded = self.add(guarded, names, [name], "guard")
            names = (*names, name)
            table[f"+ {name}, guard"] = self.errors(guarded, names)
        two = self.add(self.add(four, FIRST, LATER[:1], "guard"), (*FIRST, LATER[0]), LATER[1:], "guard")
        table["4 + 1 + 2, guard"] = self.errors(two, everyone)
        first = (*FIRST, LATER[0])
        for label, changes in (
            ("no guard", {"guard": 0.0}),
            ("no guard, no base", {"guard": 0.0, "base_share": 0.0}),
            ("guard, warm start", {"warm_start": 60}),
        ):
            weights = self.add(four, FIRST, LATER[:1], label.replace(",", "").replace(" ", "-"), **changes)
            table[f"+ {LATER[0]}, {label}"] = self.errors(weights, first)
        return table

    def warm(self, four: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """A style is added to ``four`` at equal samples, a share of which looks for its code first while all else is frozen."""
        table, new = {}, LATER[0]
        for share in WARM:
            warm = round(share * self.added)

            def make(warm=warm) -> Trainer:
                old, styles = self.as_base(four, FIRST)
                config = self.settings(self.added - warm, init="base", warm_start=warm, **ADDING)
                return Trainer(old, [*styles, self.teachers[new]], self.data, config)

            errors = self.errors(self.model(f"warm-{share}", make), (*FIRST, new))
            old = statistics.mean(errors[name] for name in FIRST)
            table[f"{warm} of {self.added} steps for the code"] = {new: errors[new], "the old four": old}
        return table

    def forgetting(self, gone: str, attack_steps: int) -> dict[str, dict[str, float]]:
        everyone = (*FIRST, *LATER)
        seven = self.joint(everyone)
        kept = [name for name in everyone if name != gone]
        place = everyone.index(gone)
        deleted = dict(seven)
        rows = [i for i in range(len(everyone)) if i != place]
        deleted["model_embedding.weight"] = seven["model_embedding.weight"][rows].clone()
        arms = {"untouched": (seven, everyone), "row deleted": (deleted, kept)}
        for label, attack in (
            ("trained, no attack", AttackConfig(codes=0)),
            ("trained against attacks", AttackConfig()),
        ):

            def make(attack=attack) -> Trainer:
                old, styles = self.as_base(seven, everyone)
                config = self.settings(self.added, init="base", **ADDING)
                return forgetting(old, styles, [gone], self.data, config=config, device=CPU, attack=attack)

            arms[label] = (self.model(f"forget-{gone}-{label.replace(' ', '-').replace(',', '')}", make), kept)
        arms["never learnt"] = (self.joint(kept), kept)
        judge = Trainer(  # gives batches and the true teacher's answers
            self.base, [self.teachers[name] for name in everyone], self.data, self.settings(1)
        )

        def truth(batch):
            asked = dataclasses.replace(batch, teacher=torch.full_like(batch.teacher, place))
            return judge.targets(asked, batch.x_t, batch.t).out

        table = {}
        for label, (weights, names) in arms.items():
            errors = self.errors(weights, names)
            unet = load_unet(weights)
            found = recover(judge, unet, truth, attack_steps)
            table[label] = {
                "others": statistics.mean(errors[name] for name in kept),
                "worst other": max(errors[name] for name in kept),
                "its own code": errors.get(gone, float("nan")),
                "recovered": found.error,
                "no style": found.untouched,
            }
            print(gone, label, table[label], flush=True)
        return table


def print_table(title: str, tables: list[dict[str, dict[str, float]]]) -> None:
    columns = list(dict.fromkeys(c for table in tables for row in table.values() for c in row))
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for label in tables[0]:
        cells = []
        for column in columns:
            values = [table[label][column] for table in tables if column in table[label]]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}" if values else "")
        print(f"| {label} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("add", "forget", "warm"), help="one of the three tables")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=700, help="of a joint merge, 32 samples each")
    parser.add_argument(
        "--added", type=int, default=300, help="steps for each style that is added, or for forgetting one"
    )
    parser.add_argument("--attack-steps", type=int, default=150)
    parser.add_argument(
        "--forget", default="candy,ink", help="styles, each forgotten on its own; ink has a near-duplicate"
    )
    parser.add_argument("--folder", default=str(ROOT / "out" / "bench-incremental"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    benches = [Bench(Path(args.folder), int(seed), args.steps, args.added) for seed in args.seeds.split(",")]
    if args.only in (None, "warm"):
        four = benches[0].joint(FIRST)  # of one seed: what varies is how a style is added
        tables = [bench.warm(four) for bench in benches]
        print(json.dumps(tables))
        print_table(f"eps error after '{LATER[0]}' was added, with a warm start and without", tables)
    if args.only in (None, "add"):
        tables = [bench.adding() for bench in benches]
        print(json.dumps(tables))
        print_table("eps error against the true teachers, styles added one at a time", tables)
    if args.only in (None, "forget"):
        for gone in args.forget.split(","):
            tables = [bench.forgetting(gone, args.attack_steps) for bench in benches]
            print(json.dumps(tables))
            print_table(f"forgetting '{gone}'", tables)


if __name__ == "__main__":
    main()
