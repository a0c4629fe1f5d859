"""What every training node does: learn with progress, pictures and buttons, survive a cancel, save, load, and compare."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..dmm_core.checkpoint import Checkpoint, save_checkpoint
from ..training.config import TrainConfig, check_names
from ..training.files.outputs import check_name, check_output
from ..training.loop.eps_table import eps_errors, format_table
from ..training.loop.new_student import goes_on
from ..training.loop.trainer import Trainer
from ..training.run.state import identity
from ..training.run.student_file import check_storable, student_checkpoint
from ..training.run.train import run_folder, train
from ..training.run.watch.controls import Controls, StopAndSave
from ..training.run.watch.progress import Progress
from ..training.run.watch.watch import Watch
from . import host_model, paths, training_inputs, training_routes
from .distill_settings import train_config
from .preview import Screen, host_decoder, send_text, told_with_file
from .teacher import TeacherInput, TeacherType

logger = logging.getLogger(__name__)

LONGEST_STEM = 200
"""Bytes of a file's name: file systems have room for 255, and a digest, a counter and an ending are added."""

Say = Callable[[str], None]
"""Shows a text on the node."""


def teachers_input():
    one = TeacherType.Input(
        "teacher", tooltip="A DMM Teacher, for one style. A new socket appears when you use the last one."
    )
    template = io.Autogrow.TemplatePrefix(one, prefix="teacher", min=1, max=100)
    return io.Autogrow.Input("teachers", template=template)


def data_inputs(name: str, optional: bool = False) -> list:
    """optional: the pictures and their captions, which a node can do without."""
    latents = "The training pictures: from VAE Encode, one by one or as batches."
    return [
        io.Latent.Input("latents", tooltip=latents, optional=optional),
        io.String.Input("captions", force_input=True, tooltip="One text for each picture.", optional=optional),
        io.String.Input("name", default=name, tooltip="The file in output/dmm begins with this."),
    ]


def outputs() -> list:
    return [io.Model.Output(), io.Custom("LOSS_MAP").Output(display_name="loss")]


def given(lists: Mapping[str, list]) -> tuple[dict[str, Any], TrainConfig]:
    """A node's inputs, which come as lists of one, and the settings among them. Raises ValueError for one that makes no sense."""
    one = {key: value[0] for key, value in lists.items()}
    file_stem(one["name"])
    return one, train_config(one)


def connected(teachers: Mapping[str, list[TeacherInput]]) -> list[TeacherInput]:
    """The teachers on a node's sockets. Raises ValueError for names that are missing or the same."""
    found = [teacher for group in teachers.values() for teacher in group]
    check_names([teacher.name for teacher in found])
    return found


def file_stem(name: str) -> str:
    """A file name from what the user typed. Raises ValueError for anything that is a path or empty."""
    name = name.strip()
    if not name or name != os.path.basename(name) or any(c in '\\/:*?"<>|' for c in name) or name.startswith("."):
        raise ValueError(f"name is '{name}': use a plain file name without folders")
    check_name(name, "name")
    if len(os.fsencode(name)) > LONGEST_STEM:
        raise ValueError(f"name has {len(os.fsencode(name))} bytes, at most {LONGEST_STEM} are possible: shorten it")
    return name


@contextlib.contextmanager
def memory_given_back() -> Iterator[None]:
    """After the block, however it ends, nothing that it made is on the device any more."""
    try:
        yield
    except BaseException as error:
        # The frames of an error hold the student and the teachers, and the host holds the error.
        cause = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        raise
    finally:
        gc.collect()
        mm.soft_empty_cache()


def learn(
    gather: Callable[[Say], Trainer],
    parts: Checkpoint,
    *,
    one: Mapping[str, Any],
    node_id,
    report: Callable[[Trainer, Say], str],
    beside: Callable[[Trainer, Path], object] = lambda run, path: None,
) -> io.NodeOutput:
    """A training node's work, from its inputs to its outputs: the student as a MODEL, and the losses.

    gather: makes the run (it is told where to say things); parts: what the student inherits; one: the node's inputs, of which name,
    vae and preview_every are read; report: what the node says about the finished run; beside: writes what belongs to the model's file,
    whenever that is written.
    """
    name = file_stem(one["name"])
    # Nodes run in inference mode, whose tensors autograd refuses.
    with torch.inference_mode(False), memory_given_back():
        path, losses, text = _learn(
            gather, parts, name=name, vae=one["vae"], preview_every=one["preview_every"], node_id=node_id, report=report, beside=beside,
        )  # fmt: skip
    model, *_ = host_model.load(str(path))
    return io.NodeOutput(model, {"loss": losses}, ui=told_with_file(text, path))


def _learn(gather, parts, *, name, vae, preview_every, node_id, report, beside) -> tuple[Path, list[float], str]:
    def say(text: str) -> None:
        send_text(text, node_id)

    run = gather(say)
    try:
        path, losses = distil(
            run, parts, name=name, vae=vae, preview_every=preview_every, node_id=node_id, beside=beside
        )
        saved = f"saved dmm/{os.path.relpath(path, paths.output_folder())}"
        if run.step < run.config.all_steps:
            saved += f", stopped after {run.step} of {run.config.all_steps} steps"
        return path, losses, f"{saved}\n\n{told(report, run, say)}"
    finally:
        run.targets.pool.close()
        # Whatever still holds the run, as the functions in an error's frames do, holds nothing with it.
        vars(run).clear()


def told(report: Callable[[Trainer, Say], str], run: Trainer, say: Say) -> str:
    """The report, or why there is none: the model is saved whatever happens here."""
    try:
        return report(run, say)
    except Exception as error:
        logger.warning("the student could not be compared with its teachers", exc_info=True)
        return f"not compared with its teachers: {error}"


def comparison(run: Trainer, say: Say | None = None) -> str:
    """How near the student is to each teacher, as a table. Of a DMM model that grew, its styles are compared with what it painted before;
    where a merged model went on, it stands beside the student."""
    old = any(teacher.unet is run.base.unet for teacher in run.teachers)
    average = None if old else training_inputs.average_unet(run)
    student = training_inputs.student_unet(run)
    teachers = run.teachers[: student.config.num_styles]
    pool = run.targets.pool
    merged = pool.get(run.num_styles) if goes_on(run.base.unet, run.teachers) else None
    errors = eps_errors(teachers, run.base, average, student, data=run.data, pool=pool, merged=merged)
    against = "each teacher, old styles against the model before" if old else "each teacher"
    return f"eps error against {against}\n{format_table(errors)}"


def run_hash(parts: Mapping[str, str]) -> str:
    """8 hexadecimal digits of a run's identity, in the names of its files."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def distil(
    run: Trainer, base, *, name: str, vae, preview_every: int, node_id, beside: Callable[[Trainer, Path], object]
) -> tuple[Path, list[float]]:
    """Train and save; returns the checkpoint's path and the losses of this call's steps.

    The files' names contain a hash of everything that determines the run: the same graph goes on where it stopped, a changed one
    starts a run of its own and overwrites nothing.
    """
    parts = identity(run)
    short = run_hash(parts)
    folder = Path(paths.output_folder())
    path = folder / f"{name}-{short}.safetensors"
    check_output(path)
    check_storable(run, base, name)
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the models' folder, not in it: Load DMM Model lists what lies there.
    run_dir = folder.with_name("dmm_runs") / f"{name}-{short}"
    progress, losses = Progress(), []
    screen = Screen(run, progress, node_id)

    def write_checkpoint() -> None:
        student = student_checkpoint(run, base, name, dtype=torch.float16, pictures=watch.student_pictures)
        save_checkpoint(path, student)
        beside(run, path)

    controls = Controls(screen.show_pause)

    def on_step(run: Trainer, metrics) -> None:
        losses.append(metrics.loss)
        progress.update(metrics)
        screen.show_step(metrics)

    def on_paint(done: int, total: int, what: str) -> None:
        """Teachers paint for the run's final stage."""
        send_text(f"{what}: {done} of {total}", node_id)

    watch = Watch(
        on_step,
        screen.show_picture,
        on_paint,
        on_save=write_checkpoint,  # in a graph the model's file is what there is to use
        decode=host_decoder(run, vae),
        picture_every=preview_every,
        check_interrupt=mm.throw_exception_if_processing_interrupted,
        controls=controls,
    )
    with run_folder(run_dir, run.ranks), training_routes.listed(node_id, controls, progress):
        try:
            with contextlib.suppress(StopAndSave):
                train(run, run_dir, watch, parts=parts)
        finally:  # finished, stopped, cancelled or failed: what was learnt becomes a file
            if run.step and not run.updating:
                write_checkpoint()
    return path, losses
