"""What stays the same over one sampling is computed once: style rows and shares as tensors that the host gets again at every step, and
what was made of such a tensor.

The host asks each conditioning's entry for a tensor at every step and joins those of one forward. The entries here answer with the very
tensor of the step before, so that a tensor itself can be the key to what was computed of it. Nothing outlives the sampling: all of it hangs
on the copy of the options that the host makes for one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import comfy.conds
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")
MOST = 8
"""Joined tensors that an entry keeps: the forwards of one step differ by how many prompts fit into them."""


class Lasting(comfy.conds.CONDRegular):
    """A host's entry that gives the same tensors again when it is asked the same again."""

    def __init__(self, cond: Tensor):
        super().__init__(cond)
        self._processed: dict[Hashable, Lasting] = {}
        self._joined: dict[tuple[Lasting, ...], Tensor] = {}

    def process_cond(self, batch_size, area=None, **kwargs):
        key = self.key(batch_size, area)
        if key not in self._processed:
            self._processed[key] = super().process_cond(batch_size, area=area, **kwargs)
        return self._processed[key]

    def key(self, batch_size: int, area) -> Hashable:
        """What the processed tensor depends on."""
        return batch_size

    def concat(self, others):
        key = tuple(others)
        if key not in self._joined:
            if len(self._joined) >= MOST:
                self._joined.clear()
            self._joined[key] = super().concat(others)
        return self._joined[key]


class LastingShares(Lasting, comfy.conds.CONDNoiseShape):
    """The same for shares of pixels, which the host cuts to an area."""

    def key(self, batch_size: int, area) -> Hashable:
        return batch_size, None if area is None else tuple(area)


class OfSampling:
    """Of one sampling: the rows of its styles, and what was computed of tensors.

    rows: {(style, pictures): the style's rows (1 or B, N+1) as they were at the last step, and the entry made of them}.
    """

    def __init__(self):
        self.rows: dict[Hashable, tuple[Tensor, Lasting]] = {}
        self._made = WeakTensorKeyDictionary()

    def entry(self, key: Hashable, rows: Tensor, device: torch.device) -> Lasting:
        """Of these rows, on the device; the one that ``key`` had before, if its rows are equal."""
        before = self.rows.get(key)
        if before is None or not torch.equal(before[0], rows):
            self.rows[key] = before = rows, Lasting(rows.to(device))
        return before[1]

    def once(self, source: Tensor, what: Hashable, make: Callable[[], Made]) -> Made:
        """``make()``, or what it gave before for this very tensor, as long as that lives. what: what is made of it."""
        made = self._made.get(source)
        if made is None:
            self._made[source] = made = {}
        if what not in made:
            made[what] = make()
        return made[what]
