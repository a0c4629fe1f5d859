"""What kind of run it is: plain distillation, a DMM model that grows, one that forgets (``forget``), or one that learns to paint in a few
steps (``few_steps``).

A kind is a value that the trainer asks at fixed moments of a run. It has no loop of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...dmm_core.metadata import StyleInfo
from ..data.batches import Batch
from ..progress import ProgressCallback
from ..teachers.teacher import Teacher
from .codes import warm_start

if TYPE_CHECKING:
    from .objective import Losses
    from .trainer import Trainer

PICTURES = {"steps": 8, "cfg": 4.0}
"""With which teachers and student paint during a run: arguments of ``paint.paint_rows``."""


@dataclass(frozen=True)
class RunKind:
    """What a kind decides, and the moments at which the trainer asks it. As written here: N teachers -> a student with N styles."""

    # --- what a kind decides ------------------------------------------------------------------------------------------

    def shares(self, styles: int, guard: float) -> tuple[float, ...] | None:
        """Of the rows with a style, by teacher (they sum to 1); None for equal ones. guard: see ``TrainConfig``."""
        return None

    def identity(self) -> dict[str, str]:
        """What must be the same for a run to go on, beside config, teachers and data."""
        return {}

    def styles(self, teachers: Sequence[Teacher]) -> list[StyleInfo]:
        """Of the finished student, in the order of its codebook."""
        return [teacher.info() for teacher in teachers]

    def finished(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The finished student's weights from the trained ones."""
        return weights

    def recipe_changes(self, teachers: Sequence[Teacher]) -> dict[str, Any] | None:
        """For the recipe of a model that had styles before; None where it had none."""
        return None

    def stays(self, name: str) -> bool:
        """Whether a parameter of the student, by name, does not learn, whatever ``TrainConfig.trainable`` says."""
        return False

    def paints(self, student: bool) -> dict[str, Any]:
        """With which settings the student, or a teacher, paints during the run: arguments of ``paint.paint_rows``."""
        return PICTURES

    def losses(self, run: Trainer, batch: Batch, number: int) -> Losses | None:
        """What the rows of batch ``number`` lose, where that is not eq. 9 to 11; None where it is."""
        return None

    def check_error(self, run: Trainer) -> float | None:
        """Of the fixed check, where that is not eq. 9; None where it is. For all processes together."""
        return None

    # --- moments of a run ---------------------------------------------------------------------------------------------

    def begin(self, run: Trainer, tick: ProgressCallback | None = None) -> None:
        """Before the first step of a run that begins anew."""

    def prepare(
        self, run: Trainer, folder: Path | None, tick: ProgressCallback | None, stopping: Callable[[], bool]
    ) -> bool:
        """Before the first step of every start: what training needs that follows from the run's seed. folder: of the run; stopping: whether
        a stop was asked for. False where a stop came first."""
        return True

    def before_step(self, run: Trainer) -> None: ...

    def around_update(self, run: Trainer) -> contextlib.AbstractContextManager:
        """Around the optimiser's step."""
        return contextlib.nullcontext()

    def final_report(self, run: Trainer, tick: ProgressCallback | None = None) -> str:
        """What there is to say about the finished student, in lines of text."""
        return ""


@dataclass(frozen=True)
class Distil(RunKind):
    """N teachers -> a student with N styles: nothing differs."""


@dataclass(frozen=True)
class Grow(RunKind):
    """A DMM model learns more styles (arXiv:2504.12364, Sec. 3.5): its own styles, ``guarded`` by teacher index, have the frozen model as
    their teacher, so that they stay."""

    guarded: tuple[int, ...]

    def shares(self, styles: int, guard: float) -> tuple[float, ...] | None:
        return guarded_shares(self.guarded, styles, guard)

    def recipe_changes(self, teachers: Sequence[Teacher]) -> dict[str, Any]:
        return {"added": [teacher.name for i, teacher in enumerate(teachers) if i not in self.guarded]}

    def begin(self, run: Trainer, tick: ProgressCallback | None = None) -> None:
        if run.config.warm_start:
            warm_start(run, self.guarded, tick)


def kind_of(base: Teacher, teachers: Sequence[Teacher]) -> RunKind:
    """Grow where some teachers are styles that the base has already, else Distil."""
    guarded = tuple(i for i, t in enumerate(teachers) if t.unet is base.unet and t.style is not None)
    return Grow(guarded) if guarded else Distil()


def guarded_shares(guarded: Sequence[int], styles: int, guard: float) -> tuple[float, ...] | None:
    """``guard`` of the rows for the guarded styles together, the rest for the others; None, for equal ones, where there are no others."""
    new = styles - len(guarded)
    if not new:
        return None
    return tuple(guard / len(guarded) if i in guarded else (1 - guard) / new for i in range(styles))
