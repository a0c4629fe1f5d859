"""Distill Teachers: the trainer of ``training/`` as a node. Inputs are checked before anything is written."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..dmm_core.checkpoint import save_checkpoint
from ..training.config import INITS, PRECISIONS, TrainConfig, check_names
from ..training.distill import student_checkpoint, train
from ..training.loop import Distillation
from ..training.report import eps_errors, format_table
from ..training.state import identity
from . import host_model, paths, training_inputs
from .preview import PreviewPainter
from .teacher import TeacherType

logger = logging.getLogger(__name__)

DEFAULTS = TrainConfig(steps=1000, batch_size=8, lr=1e-5, ema_gamma=6.94, init="base")


class DistillTeachers(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        d = DEFAULTS
        teachers = io.Autogrow.TemplatePrefix(TeacherType.Input("teacher"), prefix="teacher", min=1, max=100)
        return io.Schema(
            node_id="DMMDistillTeachers",
            display_name="Distill Teachers",
            category="DMM/training",
            description=(
                "Trains one model that holds the looks of all teachers and saves it to output/dmm. Cancel keeps what was learnt; "
                "queueing the same graph again goes on from there."
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
                io.Int.Input("steps", default=d.steps, min=1, max=10_000_000),
                io.Int.Input(
                    "batch_size",
                    default=d.batch_size,
                    min=1,
                    max=4096,
                    tooltip="Pictures a step, shared by all teachers.",
                ),
                io.Float.Input("learning_rate", default=d.lr, min=1e-8, max=0.1, step=1e-8, round=False),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=False),
                io.Combo.Input(
                    "start_from",
                    options=list(INITS),
                    default=d.init,
                    advanced=True,
                    tooltip="soup: the teachers' average.",
                ),
                io.Float.Input(
                    "style_rate",
                    default=1.0,
                    min=0.01,
                    max=100,
                    step=0.1,
                    advanced=True,
                    tooltip="Times the learning rate, for the style vectors.",
                ),
                io.Float.Input(
                    "feature_weight", default=d.lambda_feat, min=0, max=1, step=1e-4, round=False, advanced=True
                ),
                io.Float.Input("caption_dropout", default=d.caption_dropout, min=0, max=0.9, step=0.01, advanced=True),
                io.Float.Input(
                    "no_style_share",
                    default=d.base_share,
                    min=0,
                    max=0.9,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of the pictures that teach 'no style' = the base.",
                ),
                io.Combo.Input("precision", options=list(PRECISIONS), default=d.precision, advanced=True),
                io.Boolean.Input(
                    "gradient_checkpointing", default=False, advanced=True, tooltip="Less memory, a third slower."
                ),
                io.Int.Input(
                    "preview_every",
                    default=100,
                    min=0,
                    max=1_000_000,
                    advanced=True,
                    tooltip="Steps between pictures; 0 for none.",
                ),
                io.Int.Input(
                    "save_every",
                    default=250,
                    min=1,
                    max=1_000_000,
                    advanced=True,
                    tooltip="Steps between saved run states.",
                ),
            ],
            outputs=[io.Model.Output(), io.Custom("LOSS_MAP").Output(display_name="loss")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, teachers, latents, captions, **lists) -> io.NodeOutput:
        one = {key: value[0] for key, value in lists.items()}  # is_input_list: every other input is a list of one
        name = file_stem(one["name"])
        config = TrainConfig(
            steps=one["steps"],
            batch_size=one["batch_size"],
            lr=one["learning_rate"],
            style_lr_scale=one["style_rate"],
            lambda_feat=one["feature_weight"],
            caption_dropout=one["caption_dropout"],
            base_share=one["no_style_share"],
            init=one["start_from"],
            ema_gamma=DEFAULTS.ema_gamma,
            precision=one["precision"],
            gradient_checkpointing=one["gradient_checkpointing"],
            seed=one["seed"],
            save_every=one["save_every"],
        )
        config.check()
        teachers = [teacher for group in teachers.values() for teacher in group]
        check_names([teacher.name for teacher in teachers])
        base = training_inputs.clip_and_vae_parts(one["base"], one["clip"], one["vae"])
        # Nodes run in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(False):
            run = training_inputs.gather(one["base"], one["clip"], teachers, latents, captions, config)
            path, losses = distil(run, base, name, one["vae"], one["preview_every"], cls.hidden.unique_id)
            table = format_table(
                eps_errors(
                    run.teachers,
                    run.base,
                    training_inputs.average_unet(run),
                    training_inputs.student_unet(run),
                    run.data,
                )
            )
        del run
        mm.soft_empty_cache()
        model, *_ = host_model.load(str(path))
        shown = os.path.relpath(path, paths.output_folder())
        return io.NodeOutput(
            model, {"loss": losses}, ui=ui.PreviewText(f"saved dmm/{shown}\n\neps error against each teacher\n{table}")
        )


def file_stem(name: str) -> str:
    """A file name from what the user typed. Raises ValueError for anything that is a path or empty."""
    name = name.strip()
    if not name or name != os.path.basename(name) or any(c in '\\/:*?"<>|' for c in name) or name.startswith("."):
        raise ValueError(f"name is '{name}': use a plain file name without folders")
    return name


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
    bar = comfy.utils.ProgressBar(run.config.steps, node_id=node_id)
    painter = PreviewPainter(run, vae)
    losses: list[float] = []
    started = time.monotonic()

    def on_step(run: Distillation, metrics) -> None:
        losses.append(metrics.loss)
        picture = (
            painter.picture() if preview_every and (metrics.step % preview_every == 0 or metrics.step == 1) else None
        )
        bar.update_absolute(metrics.step, metrics.steps, picture)
        if len(losses) % 5 == 1 or metrics.step == metrics.steps:
            left = (time.monotonic() - started) / len(losses) * (metrics.steps - metrics.step)
            scores = "  ".join(f"{n} {v:.4f}" for n, v in metrics.score.items())
            send_text(f"step {metrics.step} of {metrics.steps}, {left:.0f} s left\n{scores}", node_id)
        mm.throw_exception_if_processing_interrupted()

    try:
        # Beside the models' folder, not in it: Load DMM Model lists what lies there.
        train(run, folder.with_name("dmm_runs") / f"{name}-{short}", on_step)
    finally:  # finished, cancelled or failed: what was learnt becomes a file
        if run.step and not run.updating:
            save_checkpoint(path, student_checkpoint(run, base, name, torch.float16))
    return path, losses


def send_text(text: str, node_id) -> None:
    from server import PromptServer

    instance = getattr(PromptServer, "instance", None)  # absent when the host runs without its server
    if instance is not None and node_id is not None:
        instance.send_progress_text(text, node_id)


NODES = [DistillTeachers]
