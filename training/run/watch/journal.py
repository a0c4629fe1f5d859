"""The log of a run: a line of JSON per step in ``log.jsonl``, and TensorBoard's event files where tensorboard is installed."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...loop.metrics import Metrics
from ...loop.trainer import Trainer

logger = logging.getLogger(__name__)


class Journal:
    """``log.jsonl`` and ``tensorboard/`` in ``folder``, made with the first entry.

    A line is the Metrics of a step with ``samples`` (seen so far) and, on CUDA, ``peak_bytes``; or ``step`` and ``note``.
    every: steps between lines; the last one is always there. A resumed run goes on behind its last saved step: what the log says of
    later ones, which are done again, is removed. Whatever is wrong with the log or the disk is reported once and never ends the run.
    """

    def __init__(self, folder: str | Path, every: int = 1):
        self.folder, self.every = Path(folder), every
        self._file: FileIO | None = None
        self._board: Any = None
        self._reported: set[str] = set()

    def step(self, run: Trainer, metrics: Metrics) -> None:
        if metrics.step % self.every and metrics.step != metrics.steps:
            return
        line = dataclasses.asdict(metrics)
        line["samples"] = metrics.step * run.config.batch_size * run.config.accumulate
        if run.device.type == "cuda":
            line["peak_bytes"] = torch.cuda.max_memory_allocated(run.device)
        self._write(metrics.step - 1, line)
        self._show(lambda board: [board.add_scalar(name, value, metrics.step) for name, value in scalars(line)])

    def note(self, step: int, text: str) -> None:
        """Something that happened when ``step`` steps were done."""
        self._write(step, {"step": step, "note": text})
        self._show(lambda board: board.add_text("note", text, step))

    def picture(self, step: int, image: Image.Image) -> None:
        """For TensorBoard; the log has only words and numbers."""
        self._harmless("the log cannot be written", lambda: self._open(step))
        pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
        self._show(lambda board: board.add_image("pictures", pixels, step, dataformats="HWC"))

    def close(self) -> None:
        if self._file:
            self._file.close()
        self._show(lambda board: board.close())
        self._file = self._board = None

    def _write(self, done: int, line: dict) -> None:
        data = json.dumps(finite(line), ensure_ascii=False).encode() + b"\n"

        def write() -> None:
            file = self._open(done)
            end = file.seek(0, 2)
            written = file.write(data)  # unbuffered, and fewer bytes than given where the disk has no more room
            if written < len(data):
                file.truncate(end)
                raise OSError(errno.ENOSPC, "No space left on device")

        self._harmless("the log cannot be written", write)

    def _open(self, done: int) -> FileIO:
        """At the first entry: only then is it known how many steps are done, as runs resume after their Journal was made."""
        if self._file:
            return self._file
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        file = path.open("ab", buffering=0)
        file.truncate(end_of_steps(path, done))
        self._file = file
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return file
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=done + 1)
        return file

    def _show(self, work: Callable[[Any], object]) -> None:
        if self._board:
            self._harmless("TensorBoard's files cannot be written", lambda: work(self._board))

    def _harmless(self, problem: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001, the log is only for looking at
            if problem not in self._reported:
                self._reported.add(problem)
                logger.warning("%s: %s", problem, error)


def end_of_steps(path: Path, done: int) -> int:
    """The place in a log behind its last whole line about the first ``done`` steps. Lines that cannot be read count for nothing."""
    end = place = 0
    with path.open("rb") as file:
        for line in file:
            place += len(line)
            entry = _entry(line)
            if entry and entry["step"] <= done:
                end = place
    return end


def read_log(path: str | Path) -> Iterator[dict]:
    """The lines of a log; one that is being written at the moment or is damaged is left out."""
    with open(path, "rb") as file:
        yield from filter(None, map(_entry, file))


def _entry(line: bytes) -> dict | None:
    """What a line of a log says; None for one that is not whole or not as it was written."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: None; and 6 digits are enough for a log."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def scalars(line: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """("score/ink", 0.1) and the like, for every number of a line but its step."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif name not in ("step", "steps") and value is not None:
            yield prefix + name, value
