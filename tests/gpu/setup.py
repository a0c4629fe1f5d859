"""What a stage gets, and how it says what it found."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...dmm_core.files import atomic_write


class NotPossible(Exception):
    """What a stage needs is not on this machine; the message names it."""


@dataclass
class Setup:
    """device: "cuda" or "cpu". size: "tiny" or "sd15". seconds: the stage's whole time, of which ``left`` is left. folder: for what one
    stage leaves for another. ``figures`` and ``tables`` are the row's; after ``note`` they outlive a stage that is ended at its limit.
    """

    device: torch.device
    size: str
    seconds: float
    folder: Path
    result: Path
    figures: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.started)

    def note(self, **figures: Any) -> None:
        """Keep these figures, and whatever is in the tables by now. Names: underlines become spaces."""
        self.figures |= {name.replace("_", " "): value for name, value in figures.items()}
        self.write()

    def line(self, title: str, line: dict[str, Any]) -> None:
        """Add one line to a table."""
        self.tables.setdefault(title, []).append(line)
        self.write()

    def write(self, **ended: str) -> None:
        """ended: status and words, once they are known."""
        with atomic_write(self.result) as temporary:
            temporary.write_text(json.dumps({"figures": self.figures, "tables": self.tables, **ended}))
