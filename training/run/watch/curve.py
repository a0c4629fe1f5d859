"""The losses of a run for a small chart: as many points as a chart has room for, however long the run is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .journal import finite

MOST = 240
"""Points; the chart on the node is about as many pixels wide."""


class Curve:
    """Points (step, {name: loss}), evenly spread over the steps so far. Every ``stride``-th step is kept; when there are MOST points, every
    second one goes and the stride doubles."""

    def __init__(self) -> None:
        self.stride = 1
        self.points: list[tuple[int, dict[str, float]]] = []

    def add(self, step: int, losses: Mapping[str, float]) -> None:
        if self.points and step - self.points[-1][0] < self.stride:
            return
        self.points.append((step, dict(losses)))
        if len(self.points) >= MOST:
            self.points = self.points[1::2]
            self.stride *= 2

    def as_lists(self) -> dict[str, Any]:
        """{"steps": [...], "losses": {name: [loss, or None where that teacher had not had its turn yet]}}, as JSON takes it."""
        names = list(self.points[-1][1]) if self.points else []
        rows = [losses for _, losses in self.points]
        return {
            "steps": [step for step, _ in self.points],
            "losses": {name: [finite(losses.get(name)) for losses in rows] for name in names},
        }
