"""Rows of a batch that several processes share: gathered from each process's local rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ranks import Ranks


def gather_rows(tables: Sequence[Tensor], starts: Sequence[int], counts: Sequence[int], ranks: Ranks) -> list[Tensor]:
    """This process's rows of each table (b, K) -> every process's (count, K), float32 on the CPU, the same bits
    everywhere.

    starts: where this process's rows begin in each; counts: rows of all processes together. For all processes together.
    """
    every = []
    for table, start, count in zip(tables, starts, counts):
        full = torch.zeros(count, table.shape[1])
        full[start : start + len(table)] = table.detach().float().cpu()
        every.append(full)
    return list(ranks.sum(torch.cat(every)).split(list(counts)))
