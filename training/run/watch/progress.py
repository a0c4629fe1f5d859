"""How a run is going, in words: the same in the terminal and on the node."""

from __future__ import annotations

from ...loop.metrics import Metrics
from .curve import Curve

MEMORY = 0.95
"""Share of the old value in a smoothed one: about 20 steps."""


class Progress:
    """Each teacher's loss and a step's seconds, smoothed. Pauses and pictures are no part of a step's seconds."""

    def __init__(self) -> None:
        self.step = self.steps = 0
        self.losses: dict[str, float] = {}
        self.curve = Curve()
        self._seconds: float | None = None

    def update(self, metrics: Metrics) -> None:
        self.step, self.steps = metrics.step, metrics.steps
        for name, value in metrics.score.items():  # a teacher without rows in this batch is not in it
            self.losses[name] = smooth(self.losses.get(name), value)
        self.curve.add(metrics.step, self.losses)
        self._seconds = smooth(self._seconds, metrics.seconds)

    @property
    def seconds_left(self) -> float | None:
        """None before the first step."""
        return None if self._seconds is None else self._seconds * (self.steps - self.step)

    def scores(self) -> str:
        return "  ".join(f"{name} {value:.4f}" for name, value in self.losses.items())

    def text(self) -> str:
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"step {self.step} of {self.steps}{left}\n{self.scores()}"


def smooth(old: float | None, new: float) -> float:
    return new if old is None else MEMORY * old + (1 - MEMORY) * new


def duration(seconds: float) -> str:
    """ "8 s", "3 min 20 s", "2 h 05 min" """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
