"""Training to the end: resume, save, paint what the final stage needs, and let others watch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import NoneType

import torch

from ..files.folder_lock import locked
from ..loop.trainer import Trainer
from ..parallel.ranks import Ranks
from .state import check_room, fork, identity, resume, same_everywhere, save_state
from .synthesis import painted_by_teachers
from .validation import validation_error
from .watch.controls import StopAndSave
from .watch.watch import Watch, Watching

logger = logging.getLogger(__name__)


def train(
    run: Trainer,
    run_dir: Path | None,
    watch: Watch | None = None,
    *,
    fork_from: Path | None = None,
    parts: dict[str, str] | None = None,
) -> None:
    """Train to the end, resuming from and saving to ``run_dir``. Whatever ends it early, the state is saved first,
    where it can be (``readable``).

    Where the weights come from: a state in ``run_dir``; else the run ``fork_from``; else the run's own start. What the ``watch``
    raises (an interrupt, say, or StopAndSave) ends the run like any other exception: it is passed on after the state has been written.
    parts: ``identity(run)``, where the caller has it already: it reads all weights and data. Several processes of a run all call it;
    raises LostProcess when one of the others is gone.
    """
    c, watch = run.config, watch or Watch()
    parts = parts or (identity(run) if run_dir else {})
    same_everywhere(run, parts)
    if run_dir and resume(run, run_dir, parts):
        logger.info("going on from step %d of %d", run.step, c.all_steps)
    elif fork_from:
        logger.info("starting from the weights of '%s' at its step %d", fork_from, fork(run, fork_from))
    if run_dir and run.step < c.all_steps:
        with run.ranks.together():
            if run.ranks.is_main:
                check_room(run, run_dir)
    saved = run.step

    def save() -> None:
        nonlocal saved
        if run_dir:
            save_state(run, run_dir, parts, validation_error(run) if c.validation else None)
        saved = run.step

    def prepare_final_stage() -> None:
        if c.steps <= run.step < c.all_steps and run.draws.final_data is None:
            run.draws.final_data = painted_by_teachers(
                run, run_dir and run_dir / "painted", tick, lambda: watch.controls.stopping
            )

    watching, tick, ended_by = Watching(watch, run, run_dir), watch.beside_steps(run.ranks), None
    try:
        with tf32(c.tf32), run.ranks.watching():
            if not run.step and not fork_from:
                run.kind.begin(run, tick)
            if not run.kind.prepare(run, run_dir, tick, lambda: watch.controls.stopping):
                raise StopAndSave
            watching.begin()
            prepare_final_stage()
            for metrics in run.run():
                if run.step % c.save_every == 0 or run.step in (c.steps, c.all_steps):
                    save()
                watching.step(metrics, save)
                prepare_final_stage()
    except BaseException as error:
        ended_by = error
        raise
    finally:
        watching.end()
        if run_dir and run.step > saved and readable(run, ended_by):
            save_state(run, run_dir, parts)


@contextlib.contextmanager
def run_folder(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, the run folder is this run's alone (the first process has the lock). Raises ValueError naming the process that has it."""
    with contextlib.ExitStack() as stack:
        with ranks.together():
            if ranks.is_main:
                stack.enter_context(locked(folder, "the run folder"))
        yield


def readable(run: Trainer, ended_by: BaseException | None) -> bool:
    """Whether the weights can be saved now: they belong to the step, and where they are shared out, all processes are here for it."""
    return not run.updating and (not run.student.sharded or isinstance(ended_by, (NoneType, StopAndSave)))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, CUDA may round the inputs of float32 products to 10 bits, or not; afterwards what the host had set."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    try:
        matmul.allow_tf32 = convolutions.allow_tf32 = allowed
        yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32 = before
