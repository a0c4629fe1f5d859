"""What the student paints beside its teachers while it learns: one contact sheet, always from the same noise and captions."""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ....dmm_core.files import atomic_write
from ....dmm_core.style import style_row
from ....dmm_core.unet import UNet
from ...loop.trainer import Trainer
from ...paint.images import grid
from ...paint.paint_rows import paint_rows
from ...teachers.teacher import Teacher
from ..synthesis import noise_for
from .journal import Journal

logger = logging.getLogger(__name__)

Decoder = Callable[[Tensor], Sequence[Image.Image]]
"""Latents (B, C, h, w), scaled as the UNet sees them, -> B pictures."""

STYLES = 16
"""A run with more teachers shows the first of them."""
SEED = 0
FIRST_SECONDS, FEWEST_STEPS = 60.0, 4
"""The sheet before the first step may take so long. Where it would take longer it has fewer styles, then fewer steps; then there is none.
"""
LARGEST_CELL = 512
"""Pixels of the longer side of one picture on the sheet."""


class GivenUp(Exception):
    """A stop was asked for while a sheet was painted."""


class TooSlow(Exception):
    """A painting would take longer than it may; ``steps``: as many would fit."""

    def __init__(self, steps: int):
        super().__init__(steps)
        self.steps = steps


class Pictures:
    """Paints a row per style and, for each of ``prompts`` captions of the data, what the teacher paints and what the student does.

    A sheet is written to ``folder``/step-00000100.png if there is a folder and goes to the journal if there is one. Nothing that
    fails here ends the run or changes what it learns: each kind of error is reported once, and the next sheet is tried
    again. Only what is no Exception passes, such as the interrupt that ``check_interrupt`` may raise.

    stopping: whether a stop was asked for; looked at with every sampling step and before a style's pictures are decoded. The sheet is then
    given up, nothing of it is written, and the caller is the one that stops. Of several processes the first one paints alone, looks at what
    it was asked itself, and all stop together at their next look; where the student is shared out, all paint, and agree between two styles.

    Before the first step, for which somebody waits, a sheet that would take more than ``FIRST_SECONDS`` is cut down, and the journal says
    so. clock: seconds.
    """

    def __init__(
        self,
        run: Trainer,
        decode: Decoder,
        *,
        folder: Path | None = None,
        journal: Journal | None = None,
        prompts: int = 1,
        check_interrupt: Callable[[], object] = lambda: None,
        stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.run, self.decode, self.folder, self.journal = run, decode, folder, journal
        self.check_interrupt, self.stopping, self.clock = check_interrupt, stopping, clock
        self.rows = torch.tensor(spread(len(run.data.prompts), prompts))
        self.of_student: list[Image.Image] = []
        """What the last sheet shows of the student: a picture per style, of the first caption."""
        self._of_teachers: dict[int, list[Image.Image]] = {}  # painted once: they do not learn
        self._reported: set[str] = set()

    def paint(self) -> Image.Image | None:
        """The sheet of this moment, or None if it could not be made or was given up."""
        image = self._safely(self._sheet)
        if image is not None and self.folder is not None:
            self._safely(functools.partial(self._write, image, self.folder))
        if image is not None and self.journal is not None:
            self.journal.picture(self.run.step, image)
        return image

    def _safely(self, work: Callable[[], Image.Image | None]) -> Image.Image | None:
        try:
            return work()
        except GivenUp:
            return None
        except Exception as error:  # noqa: BLE001, whatever it is: it is reported, and training goes on
            kind, problem = type(error).__name__, (str(error).strip() or "no message").splitlines()[0]
        # Only now, without the error and the frames it held, can the failed painting's memory be freed.
        gc.collect()
        if self.run.device.type == "cuda":
            torch.cuda.empty_cache()
        if kind not in self._reported:
            self._reported.add(kind)
            text = f"no pictures at step {self.run.step}, training goes on: {kind}: {problem}"
            logger.warning(text)
            if self.journal is not None:
                self.journal.note(self.run.step, text)
        return None

    @torch.no_grad()
    def _sheet(self) -> Image.Image | None:
        run, began = self.run, self.clock()
        everyone = min(run.num_styles, STYLES)
        devices = [run.device] if run.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # nothing here draws from the global generators, but a decoder might
            with run.student.averaged():  # first, as of several processes some do only this
                latents, steps = self._of_student(everyone, began)
            if not run.ranks.is_main:
                return None
            full = run.kind.paints(student=True)["steps"]
            kept = self._of_teachers if steps == full else {}
            for i in range(len(latents)):
                if i not in kept:
                    teacher = run.teachers[i]
                    settings = run.kind.paints(student=False)
                    settings = settings if steps == full else {**settings, "steps": steps}
                    of_teacher = self._latents(
                        run.targets.pool.get(i), teacher, teacher.style_row, settings, alone=True
                    )
                    kept[i] = self._decoded(of_teacher)
                if self._first and self.clock() - began > FIRST_SECONDS:
                    del latents[i + 1 :]
                    break
            of_student = [self._decoded(latent) for latent in latents]
        styles = range(len(of_student))
        sheet = [[small(picture) for pair in zip(kept[i], of_student[i]) for picture in pair] for i in styles]
        self.of_student = [pictures[0] for pictures in of_student]
        if len(styles) < everyone or steps < full:
            self._say(
                f"the first pictures show {len(styles)} of {everyone} styles after {steps} of {full} steps, so that training begins soon; "
                "the next ones show all"
            )
        captions = [run.data.prompts[row] for row in self.rows.tolist()]
        columns = [f"{who}: {caption}" for caption in captions for who in ("teacher", "student")]
        return grid(sheet, [run.teachers[i].name for i in styles], columns, title=f"step {run.step}")

    @property
    def _first(self) -> bool:
        """Whether training has not begun, and waits."""
        return self.run.step == 0

    def _of_student(self, everyone: int, began: float) -> tuple[list[Tensor], int]:
        """The student's latents, a tensor for each style, and the sampling steps that were taken: before the first step of training as many
        as fit, as far as the first ones tell. A teacher takes as long as the student.

        Raises GivenUp, having said so, where not even ``FEWEST_STEPS`` for one style fit.
        """
        run, latents = self.run, []
        settings = run.kind.paints(student=True)
        first = self._first and not run.student.sharded  # several processes would have to agree
        for i in range(everyone):
            self._agree()
            style = style_row(run.num_styles, i)
            try:
                limited = first and i == 0
                latents.append(self._latents(run.student.unet, run.base, style, settings, limited=limited))
            except TooSlow as slow:
                settings = {**settings, "steps": slow.steps}
                if slow.steps < FEWEST_STEPS:
                    self._say("no pictures before the first step: they would take more than a minute on this device")
                    raise GivenUp from None
                latents.append(self._latents(run.student.unet, run.base, style, settings))
            if first and 2 * (self.clock() - began) / (i + 1) * (i + 2) > FIRST_SECONDS:
                break
        return latents, settings["steps"]

    def _say(self, text: str) -> None:
        logger.info(text)
        if self.journal is not None:
            self.journal.note(self.run.step, text)

    def _agree(self) -> None:
        """Between two styles of a student that is shared out: all processes give up, or none does."""
        if self.run.student.sharded and self.run.ranks.any([self.stopping()])[0]:
            raise GivenUp

    def _check(self, alone: bool) -> None:
        """Between two steps or pictures. alone: no other process waits for this one to go on."""
        self.check_interrupt()
        if alone and self.stopping():
            raise GivenUp

    def _decoded(self, latents: Tensor) -> list[Image.Image]:
        """By the first process alone."""
        self._check(alone=True)
        return list(self.decode(latents))

    def _latents(
        self,
        unet: UNet,
        text: Teacher,
        style: Tensor | None,
        settings: dict[str, Any],
        *,
        alone: bool = False,
        limited: bool = False,
    ) -> Tensor:
        """(P, C, h, w) for P captions, by a UNet whose text states and parameterisation are those of ``text``. settings: of ``paint_rows``.
        alone: by the first process even where the student is shared out. limited: raise TooSlow after a step that tells that two such
        paintings take too long."""
        alone = alone or not self.run.student.sharded
        began = self.clock()

        def after_step(step: int, *_: object) -> None:
            self._check(alone)
            if limited and step == 0:
                fit = int(FIRST_SECONDS / 2 / max(self.clock() - began, 1e-9))
                if fit < settings["steps"]:
                    raise TooSlow(fit)

        noise = noise_for(self.run, len(self.rows), SEED)
        with self.run.autocast():
            return paint_rows(unet, text, self.rows, noise, **settings, style=style, callback=after_step)

    def _write(self, image: Image.Image, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / f"step-{self.run.step:08d}.png") as temporary:
            image.save(temporary, "PNG")


def spread(count: int, wanted: int) -> list[int]:
    """Up to ``wanted`` of the rows 1..count-1, evenly spread; row 0, the empty prompt, where there is no other."""
    captions = count - 1
    wanted = min(wanted, captions)
    return [1 + i * captions // wanted for i in range(wanted)] if wanted else [0]


def small(picture: Image.Image) -> Image.Image:
    if max(picture.size) > LARGEST_CELL:
        picture = picture.copy()
        picture.thumbnail((LARGEST_CELL, LARGEST_CELL))
    return picture
