"""A run as a terminal shows it: progress bars, and signals that ask it for things."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..parallel.ranks import Ranks
from ..run.watch.controls import signals
from ..run.watch.progress import Progress
from .progress_bar import ProgressBar, new_bar

if TYPE_CHECKING:
    from ..loop.metrics import Metrics
    from ..loop.trainer import Trainer
    from ..run.watch.watch import Watch


class Bar:
    """A progress bar with the smoothed loss of every teacher and the time left; another while teachers paint."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.progress = Progress()
        self.painting = ProgressBar()

    def __call__(self, run: Trainer, metrics: Metrics) -> None:
        if self.bar is None:
            self.bar = new_bar(metrics.steps, initial=metrics.step - 1, unit="step")
        self.progress.update(metrics)
        self.bar.set_postfix_str(self.progress.scores(), refresh=False)
        self.bar.update()
        if metrics.step == metrics.steps:
            self.bar.close()


@contextlib.contextmanager
def watched(picture_every: int = 0, ranks: Ranks | None = None) -> Iterator[Watch]:
    """A Watch with progress bars, whose run can be asked for things by signals (see ``controls.signals``). Of several processes the
    first one has bars."""
    from ..run.watch.watch import Watch

    watch = Watch(picture_every=picture_every)
    if not ranks or ranks.is_main:
        bar = Bar()
        watch.on_step, watch.on_paint = bar, bar.painting
    with signals(watch.controls):
        yield watch
