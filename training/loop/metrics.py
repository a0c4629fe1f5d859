"""What one step did, in numbers: for progress bars, logs and graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batches import Batch
from .objective import Losses, mean

BASE = "(no style)"
"""The name under which style-less rows are reported."""


@dataclass
class MicroBatch:
    """One forward of a step: its rows, what each lost, and the weighted sum that the student follows (a number, on the device until
    ``on_cpu``)."""

    batch: Batch
    losses: Losses
    loss: Tensor


@dataclass
class Metrics:
    """What one step did. ``score`` and ``count`` are per teacher name: mean eq. 9 loss of its rows, number of rows.

    loss is the weighted sum that the student follows; feature, adversarial and discriminator are unweighted means, the last two
    None where no row was judged by a discriminator. Where rows were not drawn evenly, these and ``score`` estimate
    what the means over evenly drawn
    teachers and timesteps are. seconds: of the step; moved_bytes: of weights that this process sent to the device in it,
    for teachers that wait in RAM.
    """

    step: int
    steps: int
    loss: float
    feature: float
    score: dict[str, float]
    count: dict[str, int]
    lr: float
    grad_norm: float
    seconds: float = 0.0
    adversarial: float | None = None
    discriminator: float | None = None
    moved_bytes: int = 0


def on_cpu(micro_batches: Sequence[MicroBatch], norm: Tensor) -> tuple[list[MicroBatch], float]:
    """The same without gradients and on the CPU, and the gradients' norm: all in one copy, for which the device is waited for."""
    tables = [
        torch.stack([x.score, x.feature, x.adversarial, x.discriminator]).detach().float()
        for x in (one.losses for one in micro_batches)
    ]  # (4, B) each
    parts = [
        norm.detach().float().view(1),
        *(one.loss.float().view(1) for one in micro_batches),
        *map(torch.flatten, tables),
    ]
    first, *rest = torch.cat(parts).cpu().split([len(part) for part in parts])
    here = []
    for one, loss, table in zip(micro_batches, rest, rest[len(micro_batches) :]):
        score, feature, adversarial, discriminator = table.view(4, -1).unbind()
        losses = Losses(score, feature, adversarial, discriminator, one.losses.judged)
        here.append(MicroBatch(one.batch, losses, loss[0]))
    return here, first.item()


def measured(
    micro_batches: Sequence[MicroBatch], names: Sequence[str], *, step: int, steps: int, lr: float, grad_norm: float
) -> Metrics:
    """micro_batches: on the CPU; names: of the teachers; the rest as in Metrics, whose seconds and moved_bytes are left to the caller."""
    score, count = by_teacher(micro_batches, names)
    return Metrics(
        step=step,
        steps=steps,
        loss=torch.stack([one.loss for one in micro_batches]).mean().item(),
        feature=over_all(micro_batches, "feature") or 0.0,
        score=score,
        count=count,
        lr=lr,
        grad_norm=grad_norm,
        adversarial=over_all(micro_batches, "adversarial"),
        discriminator=over_all(micro_batches, "discriminator"),
    )


def over_all(micro_batches: Sequence[MicroBatch], name: str) -> float | None:
    """The mean of one loss over the rows that have it; None where no row has."""
    values, importance = [], []
    for batch, losses in ((one.batch, one.losses) for one in micro_batches):
        rows = losses.judged if name in ("adversarial", "discriminator") else torch.ones_like(losses.judged)
        values.append(getattr(losses, name)[rows])
        if batch.importance is not None:
            importance.append(batch.importance[rows])
    if not sum(map(len, values)):
        return None
    return mean(torch.cat(values), torch.cat(importance) if importance else None).item()


def by_teacher(micro_batches: Sequence[MicroBatch], names: Sequence[str]) -> tuple[dict[str, float], dict[str, int]]:
    """(mean eq. 9 loss of the rows, number of rows) by the teacher's name, of the teachers that have rows."""
    teacher = torch.cat([one.batch.teacher for one in micro_batches])
    score = torch.cat([one.losses.score for one in micro_batches])
    t_weights = [one.batch.t_importance for one in micro_batches if one.batch.t_importance is not None]
    if t_weights:
        score = score * torch.cat(t_weights)
    means, counts = {}, {}
    for i in teacher.unique().tolist():
        name = names[i] if i < len(names) else BASE
        mine = teacher == i
        means[name], counts[name] = score[mine].mean().item(), int(mine.sum())
    return means, counts
