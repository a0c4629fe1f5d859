"""A fixed check of the student during a run, by which the best of its states is known."""

from __future__ import annotations

import math

import torch

from ..data.batches import Draw
from ..loop.losses import score_loss
from ..loop.student import style_rows
from ..loop.trainer import Trainer
from ..seeds import hash_seed


@torch.no_grad()
def validation_error(run: Trainer) -> float:
    """Mean eq. 9 loss of the averaged student on ``config.validation`` samples, the same every time, equal shares per teacher.

    The samples are of the run's data with noise of their own; no captions are dropped and none is style-less. Several processes
    share them out, so it is for all of them together. A run's kind may have a check of its own.
    """
    if (own := run.kind.check_error(run)) is not None:
        return own
    c = run.config
    draw = Draw(hash_seed(c.seed, "validation"), c.batch_size, run.num_styles, 0.0, 0.0, run.schedule)
    total, count = 0.0, 0
    with run.student.averaged():
        for number in range(math.ceil(c.validation / c.batch_size)):
            batch = run.draws.local(run.data.batch(number, draw))
            x_t, t = batch.x_t.to(run.device), batch.t.to(run.device)
            student = run.student.predict(x_t, t, batch.caption, style_rows(batch.teacher, run.num_styles))
            total += score_loss(student.out, run.targets(batch, x_t, t).out).sum().item()
            count += len(batch.t)
    total, count = run.ranks.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / count
