"""Who looks at a run while it trains, and what may be asked of it: the same for the command line and the node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ...loop.metrics import Metrics
from ...loop.trainer import Trainer
from ...parallel.ranks import Ranks
from ...progress import ProgressCallback
from .controls import Controls, StopAndSave
from .journal import Journal
from .pictures import Decoder, Pictures


def nothing(*args: object) -> None:
    pass


@dataclass
class Watch:
    """on_step: called after every step. on_picture: with every contact sheet. on_paint: in long work beside the steps (teachers that
    paint for the final stage, searches for codes).
    on_save: after a save that was asked for.

    decode: latents to pictures; without it there are none. picture_every: steps between sheets, beginning before the first; 0 for none
    but those that are asked for. check_interrupt: may raise the host's interrupt. controls: what is asked of the run from outside.
    Whatever any of them raises ends the run, after it has been saved.

    student_pictures: filled by the run: what the student painted on the last sheet, a picture per style. They become the thumbnails of
    the model's file.
    """

    on_step: Callable[[Trainer, Metrics], None] = nothing
    on_picture: Callable[[Image.Image], None] = nothing
    on_paint: ProgressCallback = nothing
    on_save: Callable[[], None] = nothing
    decode: Decoder | None = None
    picture_every: int = 0
    check_interrupt: Callable[[], None] = nothing
    controls: Controls = field(default_factory=Controls)
    student_pictures: list[Image.Image] = field(default_factory=list)

    def beside_steps(self, ranks: Ranks) -> ProgressCallback:
        """``on_paint``, which also raises the host's interrupt, and StopAndSave when a stop was asked for. Of several processes none raises
        it here, where the others would wait for it: they stop together at their next look."""

        def tick(done: int, total: int, what: str) -> None:
            self.on_paint(done, total, what)
            self.check_interrupt()
            if ranks.world == 1 and self.controls.stopping:
                raise StopAndSave

        return tick


class Watching:
    """A Watch at work on one run: its journal and pictures, in ``folder`` if there is one.

    Of several processes the first one has them; the others help to paint where the student is shared out.
    """

    def __init__(self, watch: Watch, run: Trainer, folder: Path | None):
        self.watch, self.run = watch, run
        folder = folder if run.ranks.is_main else None
        self.journal = Journal(folder) if folder else None
        self.pictures = None
        if watch.decode and (run.ranks.is_main or run.student.sharded):
            place = folder / "pictures" if folder else None
            self.pictures = Pictures(
                run, watch.decode, folder=place, journal=self.journal,
                check_interrupt=watch.check_interrupt, stopping=lambda: watch.controls.stopping,
            )  # fmt: skip

    def begin(self) -> None:
        """The first sheet. Raises StopAndSave, in all processes, when a stop was asked for before the first step."""
        if self.watch.picture_every:
            self.show()
        if self.run.ranks.any([self.watch.controls.stopping])[0]:
            raise StopAndSave

    def show(self) -> None:
        image = self.pictures.paint() if self.pictures else None
        if self.pictures and image is not None:
            if self.run.step:  # before the first it has no style yet
                self.watch.student_pictures = self.pictures.of_student
            self.watch.on_picture(image)

    def step(self, metrics: Metrics, save: Callable[[], None]) -> None:
        """After each step, in this order: log, tell, paint, answer what was asked for."""
        if self.journal:
            self.journal.step(self.run, metrics)
        self.watch.on_step(self.run, metrics)
        every = self.watch.picture_every
        if every and (metrics.step % every == 0 or metrics.step == metrics.steps):
            self.show()
        controls, check = self.watch.controls, self.watch.check_interrupt
        controls.after_step(lambda: self.save(save), self.show, check, self.run.ranks)

    def save(self, save: Callable[[], None]) -> None:
        save()
        self.watch.on_save()

    def end(self) -> None:
        if self.journal:
            self.journal.close()
