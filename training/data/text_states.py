"""The states of a run's prompts under the text encoder of each of its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..teachers.teacher import Rows
from ..text import ClipText, encoder_key


class StoredTexts(Protocol):
    """``text_of`` of a cache: (contexts, pooled) under a text encoder; ValueError where the cache lacks it."""

    def __call__(
        self, weights: Mapping[str, Tensor], who: str, file: str, clip_skip: int | None
    ) -> tuple[Rows, Rows | None]: ...


class TextStates:
    """Text states of the prompts, a row each: from a cache's files where ``stored`` is given, else encoded once for each encoder."""

    def __init__(self, prompts: Sequence[str], stored: StoredTexts | None = None):
        self.prompts, self.stored = list(prompts), stored
        self._encoded: dict[str, tuple[Rows, Rows | None]] = {}

    def of(
        self,
        weights: Mapping[str, Tensor],
        who: str = "the model",
        file: str = "FILE",
        clip_skip: int | None = None,
    ) -> tuple[Rows, Rows | None]:
        """Contexts (P, L, d) and, for SDXL, pooled texts (P, p) under the text encoder with these weights; clip_skip: see ``ClipText``.

        who, file: the model's name and file in the message of the ValueError that a cache without this encoder raises.
        """
        if self.stored is not None:
            return self.stored(weights, who, file, clip_skip)
        key = encoder_key(weights, clip_skip)  # most fine-tunes have the text encoder of their base
        if key not in self._encoded:
            self._encoded[key] = ClipText(weights, clip_skip).encode_pooled(self.prompts)
        return self._encoded[key]
