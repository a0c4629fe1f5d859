"""A step of several processes: what each of them knows of its own rows, known of all rows by all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..parallel.ranks import Ranks
from ..parallel.rows import gather_rows
from .metrics import MicroBatch
from .objective import Losses, Objective


def gathered(micro_batches: Sequence[MicroBatch], objective: Objective, step: int, ranks: Ranks) -> list[MicroBatch]:
    """Every process's rows in place of this one's, without gradients: what one process alone would have.

    For all processes together; nothing to do where there is one.
    """
    if ranks.world == 1:
        return list(micro_batches)
    tables = gather_rows(
        [
            torch.stack([x.score, x.feature, x.adversarial, x.discriminator], dim=1)
            for x in (one.losses for one in micro_batches)
        ],
        [one.batch.start for one in micro_batches],
        [len(one.batch.global_batch) for one in micro_batches],
        ranks,
    )
    everyone = []
    for batch, table in zip((one.batch.global_batch for one in micro_batches), tables):
        judged = (batch.teacher < objective.num_styles) & (objective.lambda_adv > 0)
        score, feature, adversarial, discriminator = table.unbind(dim=1)
        losses = Losses(score, feature, adversarial, discriminator, judged)
        everyone.append(MicroBatch(batch, losses, objective.total(losses, batch, step)))
    return everyone
