"""A fixed check of the student during a run, by which the best of its states is known."""

from __future__ import annotations

import math

import torch

from ..data.batches import Draw
from ..loop.losses import score_loss
from ..loop.trainer import Distillation
from ..seeds import hash_seed


@torch.no_grad()
def validation_error(run: Distillation) -> float:
    """Mean eq. 9 loss of the averaged student on ``config.validation`` samples, the same every time, equal shares per teacher.

    The samples are of the run's data with noise of their own; no captions are dropped and none is style-less. Several processes
    share them out, so it is for all of them together.
    """
    c = run.config
    draw = Draw(hash_seed(c.seed, "validation"), c.batch_size, run.num_styles, 0.0, 0.0, run.schedule)
    total, count = 0.0, 0
    with run.averaged():
        for number in range(math.ceil(c.validation / c.batch_size)):
            batch = run.own_rows(run.data.batch(number, draw))
            x_t, t = batch.x_t.to(run.device), batch.t.to(run.device)
            target, _ = run.targets(batch, x_t, t, want_features=False)
            out, *_ = run.predict(batch, x_t, t, want_features=False)
            total += score_loss(out, target).sum().item()
            count += len(batch.t)
    total, count = run.ranks.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / count
