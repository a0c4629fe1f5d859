"""A style added to a bank without training, and one deleted or forgotten: the figures of docs/bank.md, "Adding and forgetting".

    python -m comfyui_dmm.tests.benches.bank_growth --only add
    python -m comfyui_dmm.tests.benches.bank_growth --only forget --steps 150

Demo family, one seed, CPU. eps errors on 128 scenes that nothing was trained on.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import torch

from ...dmm_core.bank_drop import drop_styles
from ...dmm_core.bank_fit import fit_bank, neutral_style
from ...dmm_core.bank_grow import grown_unet, growth_of
from ...dmm_core.bank_size import bank_of
from ...dmm_core.unet import load_unet, unet_config_from_state_dict
from ...training.config import AttackConfig
from ...training.loop.codes import recover
from ...training.loop.forget import ask_old, forgetting
from ...training.loop.new_student import plain_shapes
from ...training.run.train import train
from .incremental import ADDING, CPU, ROOT, Bench

HALF = 2
"""Bytes of a number in the files that the budgets are meant for."""


class BankBench(Bench):
    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return plain_shapes(self.base.unet.config)

    @torch.no_grad()
    def merged(self, names, budget: str) -> dict[str, torch.Tensor]:
        """An untrained merge, with the base as "no style"."""
        models = [self.teachers[name].unet.state_dict() for name in names]
        size = bank_of(budget, self.shapes, len(models) + 1, HALF)
        fitted = fit_bank(
            models, self.base.unet.state_dict(), size.rank, shapes=self.shapes, bias=size.bias, dtype=torch.float16
        )
        weights = {key: value for one in fitted for key, value in one.weights.items()}
        mlp = neutral_style(len(models), self.base.unet.config.embed_dim, "add_embedding", torch.float16)
        print(f"  merge of {len(models)}, {budget}: rank {size.rank}, {100 * size.share:.1f}%", flush=True)
        return weights | mlp

    @torch.no_grad()
    def adding(self, new: str, budget: str, growths) -> None:
        names = [name for name in self.teachers if name != new]
        before = self.merged(names, budget)
        mean = {key: before[key] for key in self.shapes} | neutral_style(
            1, self.base.unet.config.embed_dim, "add_embedding", torch.float16
        )
        alone = self.errors(mean, [new])[new]
        old = self.errors(before, names)
        bank = unet_config_from_state_dict(before).bank
        assert bank is not None
        for words in growths:
            growth = growth_of(words, self.shapes, bank, new=1, itemsize=HALF)
            started = time.monotonic()
            grown = grown_unet(before, [self.teachers[new].unet.state_dict()], growth.rank, shapes=self.shapes)
            seconds = time.monotonic() - started
            errors = self.errors(grown, [*names, new])
            same = max(abs(errors[name] - old[name]) for name in names)
            print(
                f"  + {new} {words}: rank +{growth.rank}, +{100 * growth.share:.1f}%, {seconds:.1f} s; eps error {alone:.4f} -> "
                f"{errors[new]:.4f}; the others' {sum(old.values()) / len(old):.4f}, changed by {same:.1e} at most",
                flush=True,
            )

    def forgetting(self, gone: str, budget: str, check: int) -> None:
        everyone = list(self.teachers)
        old, styles = self.as_base(self.merged(everyone, budget), everyone)
        config = self.settings(self.steps, init="base", batch_size=16, **ADDING)
        run = forgetting(old, styles, [gone], self.data, config=config, device=CPU, attack=AttackConfig())
        place = everyone.index(gone)
        stay = [name for name in everyone if name != gone]
        dropped = drop_styles(old.unet.state_dict(), [place])
        print(
            f"  the others tell {dropped.told[0].before:.3f}, around their mean {dropped.told[0].around:.3f}",
            flush=True,
        )
        arms = {"deleted": dropped.unet, "never there": self.merged(stay, budget)}
        started = time.monotonic()
        train(run, None)
        print(f"  trained {self.steps} steps in {time.monotonic() - started:.0f} s", flush=True)
        arms["deleted and trained"] = run.student_weights()
        everywhere = self.errors(old.unet.state_dict(), everyone)
        print(f"  before: {gone} {everywhere[gone]:.4f}, others {mean_of(everywhere, stay):.4f}", flush=True)
        for label, weights in arms.items():
            errors = self.errors(weights, stay)
            unet, found = load_unet(weights), []
            for cores in (False, True):
                found.append(recover(run, unet, functools.partial(ask_old, run, styles[place]), check, cores=cores))
            print(
                f"  {gone}, {label}: others {mean_of(errors, stay):.4f}; found with codes {found[0].error:.4f}, and cores "
                f"{found[1].error:.4f} (from {found[1].start:.4f}); without a style {found[0].untouched:.4f}",
                flush=True,
            )


def mean_of(errors: dict[str, float], names) -> float:
    return sum(errors[name] for name in names) / len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("add", "forget"), required=True)
    parser.add_argument("--styles", default="ink,pixel,echo", help="each left out, or forgotten, on its own")
    parser.add_argument("--budgets", default="10%,124%", help="of the merge")
    parser.add_argument("--steps", type=int, default=150, help="of forgetting")
    parser.add_argument("--check", type=int, default=100, help="steps of the attack at the end")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = BankBench(Path(ROOT / "out" / "bank-growth"), 0, args.steps, args.steps)
    for budget in args.budgets.split(","):
        for name in args.styles.split(","):
            print(f"{name}, merges with a bank of {budget}", flush=True)
            if args.only == "add":
                growths = ("0%", "4%", "10%", "20%") if budget == "10%" else ("0%", "12%", "20%", "40%")
                bench.adding(name, budget, growths)
            else:
                bench.forgetting(name, budget, args.check)


if __name__ == "__main__":
    main()
