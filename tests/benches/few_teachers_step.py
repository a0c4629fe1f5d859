"""A step that asks K of 8 teachers, which wait in RAM, against a step that asks all of them: seconds, and bytes moved.

    python -m comfyui_dmm.tests.benches.few_teachers_step            (20 seconds of one CPU core)

Random models, small (the UNet of the tests' trainer) with 16 rows a step. On a CPU waiting teachers are copied into a place as on a GPU
(``residency: offload``); what that costs on a bus is counted in docs/performance.md. Both trainers give the same losses of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...training.data.batches import Batch
from ...training.loop.trainer import Trainer
from ..training.families import SMALL
from .memory import Preset, random_run
from .paired import Line, Side, paired, printed

TEACHERS, ROWS = 8, 16


def trainer_of(per_step: int) -> Trainer:
    torch.manual_seed(0)
    preset = Preset("small", SMALL, 16, TEACHERS, 8)
    settings = {"residency": "offload", "precision": "fp32", "memory": "off", "base_share": 0.0, "validation": 0}
    return random_run(preset, torch.device("cpu"), steps=10**6, batch_size=ROWS, teachers_per_step=per_step, **settings)


def losses(run: Trainer) -> Tensor:
    """Of one batch of two teachers' rows."""
    g = torch.Generator().manual_seed(1)
    t, eps = torch.randint(1000, (4,), generator=g), torch.randn(4, 4, 16, 16, generator=g)
    places, teacher = torch.arange(4), torch.tensor([3, 3, 5, 5])
    x_t = run.schedule.add_noise(run.data.buckets[0][places], eps, t)
    batch = Batch(x_t, t, teacher, run.data.rows[places])
    return run.objective.total(run.losses(batch), batch, 0).detach()


def lines(rounds: int, counts: tuple[int, ...] = (4, 2, 1)) -> Iterator[Line]:
    every = trainer_of(TEACHERS)
    # The models are the same random ones; no optimiser steps lie between.
    wanted = losses(every)
    try:
        for count in counts:
            few = trainer_of(count)
            try:
                found = losses(few)
                moved: dict[int, list[int]] = {TEACHERS: [], count: []}

                def step(run: Trainer, into: list[int]) -> Side:
                    return Side(lambda: into.append(run.train_step().moved_bytes))

                sides = step(every, moved[TEACHERS]), step(few, moved[count])
                name = f"a step with {count} of {TEACHERS} teachers / with all, in RAM"
                yield paired(name, *sides, tolerance=1e-6, rounds=rounds, same=lambda found=found: (wanted, found))
                total, less = sum(moved[TEACHERS]), sum(moved[count])
                yield Line(f"{name}: bytes moved", [less / total] * 3, total / len(moved[TEACHERS]), 0.0, 0.0, unit="B")
            finally:
                few.targets.pool.close()
    finally:
        every.targets.pool.close()


if __name__ == "__main__":
    print(printed(list(lines(9))))
