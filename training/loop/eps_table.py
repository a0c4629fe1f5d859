"""How close a student is to its teachers: the eps error table that ends a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dmm_core.schedule import NoiseSchedule
from ...dmm_core.style import style_row
from ...dmm_core.unet import UNet
from ..data.batches import CaptionedLatents
from ..seeds import hash_seed
from ..teachers.pool import TeacherPool
from ..teachers.teacher import Teacher
from .losses import score_loss

Predict = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(x_t, t, context, y) -> prediction"""


@dataclass
class EpsErrors:
    """Mean (eps - eps_teacher)^2 for one teacher: of the base, of the soup (the teachers' average), of the student in this teacher's style,
    and in every other style (``wrong`` their mean, ``wrong_best`` the lowest); ``merged``: of a second student in this style."""

    teacher: str
    base: float
    soup: float
    student: float
    wrong: float
    wrong_best: float
    merged: float = float("nan")


@torch.no_grad()
def eps_errors(
    teachers: Sequence[Teacher],
    base: Teacher,
    soup: UNet | None,
    student: UNet,
    *,
    data: CaptionedLatents,
    samples: int = 64,
    seed: int = 1,
    pool: TeacherPool | None = None,
    merged: UNet | None = None,
) -> list[EpsErrors]:
    """Compare on the same x_t, spread evenly over t, the first ``samples`` pictures of one size of ``data``; all models on one device,
    or the teachers and the base where their ``pool`` has them. merged: a second student with the same styles.

    Everything is compared in the parameterisation of the model's output; teachers must share the base's.
    """
    schedule, device = NoiseSchedule(base.zero_snr), next(student.parameters()).device
    g = torch.Generator().manual_seed(hash_seed(seed, "eps errors"))
    count = min(samples, len(data.buckets[0]))
    x0, rows = data.buckets[0][torch.arange(count)], data.rows[:count]
    t = ((torch.arange(count) + 0.5) * 1000 / count).long()[torch.randperm(count, generator=g)]
    x_t = schedule.add_noise(x0, torch.randn(x0.shape, generator=g), t).to(device)
    t = t.to(device)

    def predict(unet: UNet, text: Teacher, style: int | None = None) -> Tensor:
        row = None if style is None else style_row(len(teachers), style)
        return text.predict(x_t, t, rows, row, unet=unet).out

    def unet_of(index: int) -> UNet:
        return pool.get(index) if pool else (*teachers, base)[index].unet

    of_base = predict(unet_of(len(teachers)), base)
    of_soup = predict(soup, base) if soup else torch.full_like(of_base, float("nan"))
    of_student = [predict(student, base, i) for i in range(len(teachers))]
    of_merged = [predict(merged, base, i) for i in range(len(teachers))] if merged else []
    table = []
    for i, teacher in enumerate(teachers):
        target = predict(unet_of(i), teacher)
        error = [score_loss(out, target).mean().item() for out in of_student]
        wrong = error[:i] + error[i + 1 :]
        table.append(
            EpsErrors(
                teacher.name,
                base=score_loss(of_base, target).mean().item(),
                soup=score_loss(of_soup, target).mean().item(),
                student=error[i],
                wrong=sum(wrong) / len(wrong) if wrong else float("nan"),
                wrong_best=min(wrong, default=float("nan")),
                merged=score_loss(of_merged[i], target).mean().item() if of_merged else float("nan"),
            )
        )
    return table


COLUMNS = {
    "student": "DMM",
    "merged": "merged",
    "base": "base",
    "soup": "soup",
    "wrong": "others",
    "wrong_best": "nearest",
}
"""Of the table, in an order in which the first ones tell most: a node shows no more than four of them."""
WIDTH = 9


def format_table(table: Sequence[EpsErrors]) -> str:
    """Plain text, one line per teacher and one for the mean; smaller is closer to the teacher. DMM: the student in that teacher's style;
    others: in the other styles, and in the nearest of them. Columns that nothing is known for are left out: the soup of a model that
    grew, the other styles where there is one."""
    titles = {
        name: title for name, title in COLUMNS.items() if not all(math.isnan(getattr(row, name)) for row in table)
    }
    width = max(len("teacher"), *(len(row.teacher) for row in table))
    lines = ["teacher".ljust(width) + "".join(title.rjust(WIDTH) for title in titles.values())]
    for row in table:
        lines.append(row.teacher.ljust(width) + "".join(f"{getattr(row, c):{WIDTH}.5f}" for c in titles))
    means = (sum(getattr(row, c) for row in table) / len(table) for c in titles)
    lines.append("mean".ljust(width) + "".join(f"{m:{WIDTH}.5f}" for m in means))
    return "\n".join(lines)
