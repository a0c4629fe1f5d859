"""Distill Teachers: the trainer of ``training/`` as a node. Inputs are checked before anything is written."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management as mm
import torch
from comfy_api.latest import io, ui

from ..dmm_core.checkpoint import save_checkpoint
from ..training.config import check_names
from ..training.distill import student_checkpoint, train
from ..training.loop import Distillation
from ..training.report import eps_errors, format_table
from ..training.state import identity
from ..training.watch.controls import Controls, StopAndSave
from ..training.watch.progress import Progress
from ..training.watch.watch import Watch
from . import host_model, paths, training_inputs, training_routes
from .distill_settings import setting_inputs, train_config
from .preview import Screen, host_decoder, send_text
from .teacher import TeacherType

logger = logging.getLogger(__name__)


class DistillTeachers(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        teachers = io.Autogrow.TemplatePrefix(TeacherType.Input("teacher"), prefix="teacher", min=1, max=100)
        return io.Schema(
            node_id="DMMDistillTeachers",
            display_name="Distill Teachers",
            category="DMM/training",
            description=(
                "Trains one model that holds the looks of all teachers and saves it to output/dmm. Cancel keeps what was learnt; "
                "queueing the same graph again goes on from there. While it runs, buttons on the node pause it, show and save what "
                "it has learnt, or stop it and go on with the graph."
            ),
            search_aliases=["train dmm", "merge models", "distillation"],
            is_input_list=True,
            inputs=[
                io.Model.Input("base", tooltip="Where the student starts, and what it paints without a style."),
                io.Clip.Input("clip", tooltip="The text encoder of the base; it becomes the student's."),
                io.Vae.Input("vae", tooltip="Saved with the student, and shows the previews."),
                io.Autogrow.Input("teachers", template=teachers),
                io.Latent.Input("latents", tooltip="The training pictures: from VAE Encode, one by one or as batches."),
                io.String.Input("captions", force_input=True, tooltip="One text for each picture."),
                io.String.Input("name", default="my-dmm", tooltip="The file in output/dmm begins with this."),
                *setting_inputs(),
            ],
            outputs=[io.Model.Output(), io.Custom("LOSS_MAP").Output(display_name="loss")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, teachers, latents, captions, **lists) -> io.NodeOutput:
        one = {key: value[0] for key, value in lists.items()}  # is_input_list: every other input is a list of one
        name = file_stem(one["name"])
        config = train_config(one)
        teachers = [teacher for group in teachers.values() for teacher in group]
        check_names([teacher.name for teacher in teachers])
        base = training_inputs.clip_and_vae_parts(one["base"], one["clip"], one["vae"])
        inputs = (one["base"], one["clip"], teachers, latents, captions, config)
        # Nodes run in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(False), memory_given_back():
            path, losses, report = learn(inputs, base, name, one["vae"], one["preview_every"], cls.hidden.unique_id)
        model, *_ = host_model.load(str(path))
        return io.NodeOutput(model, {"loss": losses}, ui=ui.PreviewText(report))


def file_stem(name: str) -> str:
    """A file name from what the user typed. Raises ValueError for anything that is a path or empty."""
    name = name.strip()
    if not name or name != os.path.basename(name) or any(c in '\\/:*?"<>|' for c in name) or name.startswith("."):
        raise ValueError(f"name is '{name}': use a plain file name without folders")
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


def learn(inputs, base, name: str, vae, preview_every: int, node_id) -> tuple[Path, list[float], str]:
    """From the node's inputs to the checkpoint's path, the losses, and what the node says about the result."""
    run = training_inputs.gather(*inputs, lambda text: send_text(text, node_id))
    try:
        path, losses = distil(run, base, name, vae, preview_every, node_id)
        saved = f"saved dmm/{os.path.relpath(path, paths.output_folder())}"
        if run.step < run.config.all_steps:
            saved += f", stopped after {run.step} of {run.config.all_steps} steps"
        return path, losses, f"{saved}\n\n{comparison(run)}"
    finally:
        run.rack.close()
        # Whatever still holds the run, as the functions in an error's frames do, holds nothing with it.
        vars(run).clear()


def comparison(run: Distillation) -> str:
    """How near the student is to each teacher, as a table, or why there is none: the model is saved whatever happens here."""
    try:
        average, student = training_inputs.average_unet(run), training_inputs.student_unet(run)
        errors = eps_errors(run.teachers, run.base, average, student, run.data, rack=run.rack)
    except Exception as error:
        logger.warning("the student could not be compared with its teachers", exc_info=True)
        return f"not compared with its teachers: {error}"
    return f"eps error against each teacher\n{format_table(errors)}"


def distil(run: Distillation, base, name: str, vae, preview_every: int, node_id) -> tuple[Path, list[float]]:
    """Train and save; returns the checkpoint's path and the losses of this call's steps.

    The files' names contain a hash of everything that determines the run: the same graph goes on where it stopped, a changed one
    starts a run of its own and overwrites nothing.
    """
    parts = identity(run)
    short = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(paths.output_folder())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{short}.safetensors"
    # Beside the models' folder, not in it: Load DMM Model lists what lies there.
    run_dir = folder.with_name("dmm_runs") / f"{name}-{short}"
    progress, losses = Progress(), []
    screen = Screen(run, progress, node_id)

    def write_checkpoint() -> None:
        save_checkpoint(path, student_checkpoint(run, base, name, torch.float16))

    controls = Controls(screen.show_pause)

    def on_step(run: Distillation, metrics) -> None:
        losses.append(metrics.loss)
        progress.update(metrics)
        screen.show_step(metrics)

    def on_paint(done: int, total: int, what: str) -> None:
        """Teachers paint for the run's final stage."""
        send_text(f"{what}: {done} of {total}", node_id)
        mm.throw_exception_if_processing_interrupted()
        if controls.stopping:
            raise StopAndSave

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
    with training_routes.listed(node_id, controls, progress):
        try:
            with contextlib.suppress(StopAndSave):
                train(run, run_dir, watch, parts=parts)
        finally:  # finished, stopped, cancelled or failed: what was learnt becomes a file
            if run.step and not run.updating:
                write_checkpoint()
    return path, losses


NODES = [DistillTeachers]
