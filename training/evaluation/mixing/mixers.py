"""Two styles as one model: a blend of codes, mixed predictions, merged weights (see ``mixing``)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ....dmm_core.sampling import to_one_length
from ....dmm_core.style import style_row
from ....dmm_core.unet import UNet, load_unet
from ...teachers.teacher import Teacher, without_styles
from ..model_ref import ModelRef


def blended(student: Teacher, shares: Mapping[int, float]) -> Teacher:
    """A DMM model that paints in a blend of its styles: shares of its codes."""
    return dataclasses.replace(student, style=shares)


def with_mixed_predictions(student: Teacher, shares: Mapping[int, float]) -> Teacher:
    """A DMM model that predicts in each of these styles and mixes what it predicts."""
    return dataclasses.replace(student, unet=cast(UNet, MixedPredictions(student.unet, shares)))


class MixedPredictions(nn.Module):
    """A DMM UNet asked once per style; seen from outside it has no styles. Its parameters are those of the UNet."""

    def __init__(self, unet: UNet, shares: Mapping[int, float]):
        super().__init__()
        self.unet, self.shares = unet, dict(shares)
        self.config = without_styles(unet.config)

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None, *, style: None = None) -> Tensor:
        """As of UNet, (B, C, h, w)."""
        total = torch.zeros_like(x)
        for index, share in self.shares.items():
            row = style_row(self.unet.config.num_styles, index).to(x.device)
            total += share * self.unet(x, t, context, y=y, style=row.expand(len(x), -1))
        return total


def merged(
    first: Teacher, second: Teacher, ratio: float, prompts: int, *, dtype: torch.dtype = torch.float32
) -> Teacher:
    """Two plain models as one: (1 - w) of the first's weights and w of the second's, computed in float32, and the same of their text
    states of ``prompts`` prompts. As ComfyUI's ModelMergeSimple(first, second, 1 - w); its CLIPMergeSimple merges the encoders instead.

    Raises ValueError for models that predict different things.
    """
    check_mergeable(first, second)
    a, b = first.unet.state_dict(), second.unet.state_dict()
    unet = load_unet(
        {key: torch.lerp(a[key].float(), b[key].float(), ratio).to(dtype) for key in a},
        dtype=None,
        copy=False,
        heads=first.unet.config.num_heads,
    )
    rows = torch.arange(prompts)
    contexts = torch.lerp(*to_one_length(first.contexts[rows], second.contexts[rows]), ratio)
    pooled = None
    if first.pooled is not None and second.pooled is not None:  # models of one architecture: both have it, or neither
        pooled = torch.lerp(first.pooled[rows], second.pooled[rows], ratio)
    return dataclasses.replace(
        first, name=f"{first.name} and {second.name}", unet=unet, contexts=contexts, pooled=pooled
    )


def check_mergeable(first: ModelRef | Teacher, second: ModelRef | Teacher) -> None:
    """Raises ValueError for two models of which one predicts eps and the other v."""
    if first.prediction != second.prediction:
        raise ValueError(
            f"'{first.name}' predicts {first.prediction} and '{second.name}' {second.prediction}: their weights cannot be merged"
        )


@contextmanager
def both(first: ModelRef, second: ModelRef) -> Iterator[list[Callable[[], Teacher]]]:
    """Inside, a function for each model that loads it at its first call; both are gone afterwards."""
    loads = [functools.cache(ref.open) for ref in (first, second)]
    try:
        yield [*loads]
    finally:
        for load in loads:
            load.cache_clear()
