"""How far an evaluation is, in forwards of a UNet."""

from __future__ import annotations

from ..progress import ProgressCallback
from .settings import EvaluationSettings

FEATURE_COST = 4
"""A guess at the cost of a picture's decoding and features, in forwards of the UNet. Only the progress bar depends on it."""


def painting_cost(settings: EvaluationSettings) -> int:
    """Forwards of the UNet for one picture: two a step with guidance."""
    return settings.steps * (1 if settings.cfg == 1 else 2)


class WorkCounter:
    """Adds up work that is done and reports it. The unit is one forward of the UNet for one picture; what is read from a folder counts as
    much as what is computed. total: all work of the evaluation."""

    def __init__(self, total: int, progress: ProgressCallback | None):
        self.total, self.done, self.progress = max(total, 1), 0, progress

    def __call__(self, forwards: int, what: str) -> None:
        self.done += forwards
        if self.progress:
            self.progress(min(self.done, self.total), self.total, what)
