"""One distillation from start to file: what ``dmm distill`` and the "Distill Teachers" node both call."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..dmm_core.files import file_sha256
from ..dmm_core.metadata import StyleInfo
from .config import DistillConfig, check_names
from .data import CaptionedLatents, load_latents
from .loop import Distillation, Metrics
from .state import identity, resume, save_state
from .teacher import Teacher, check_architectures, plain_unet
from .text import ClipText, sdxl_vector

logger = logging.getLogger(__name__)


def text_states(
    text: dict[str, Tensor], prompts: Sequence[str], image_size: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Contexts (U, 77, d) of prompts and, for SDXL, the vectors y (U, adm)."""
    encoder = ClipText(text)
    contexts, pooled = [], []
    for start in range(0, len(prompts), 64):
        context, pool = encoder.encode_pooled(prompts[start : start + 64])
        contexts.append(context)
        if pool is not None:
            pooled.append(sdxl_vector(pool, *image_size))
    return torch.cat(contexts), torch.cat(pooled) if pooled else None


def load_run(config: DistillConfig, device: torch.device) -> tuple[Distillation, Checkpoint]:
    """Read base, teachers and data from files and check that they belong together, before anything is written."""
    base = load_checkpoint(config.base)
    if config.parts_from:
        parts = load_checkpoint(config.parts_from)
        base.text, base.vae = base.text or parts.text, base.vae or parts.vae
    checkpoints = [load_checkpoint(spec.file) for spec in config.teachers]
    base_unet = plain_unet(base.unet, "the base model")
    unets = [plain_unet(c.unet, f"teacher '{spec.name}'") for spec, c in zip(config.teachers, checkpoints)]
    check_architectures(base_unet.config, [(spec.name, unet.config) for spec, unet in zip(config.teachers, unets)])
    if not base.text:
        raise ValueError(f"'{config.base}' has no text encoder: name a full checkpoint to take it from as parts_from")
    data = load_data(config, base)
    size = tuple(8 * n for n in data.latents.shape[2:])
    cache: dict[int, tuple[Tensor, Tensor | None]] = {}

    def states(checkpoint: Checkpoint) -> tuple[Tensor, Tensor | None]:
        text = checkpoint.text or base.text
        if text.keys() == base.text.keys() and all(torch.equal(text[k], base.text[k]) for k in text):
            text = base.text  # most fine-tunes share the base's text encoder: encode once
        if id(text) not in cache:
            cache[id(text)] = text_states(text, data.prompts, size)
        return cache[id(text)]

    def teacher(name: str, file: str, unet, checkpoint: Checkpoint, **info) -> Teacher:
        contexts, y = states(checkpoint)
        path = Path(file)
        return Teacher(
            name,
            unet,
            contexts,
            y,
            checkpoint.prediction,
            checkpoint.zero_snr,
            file=path.name,
            sha256=file_sha256(path),
            **info,
        )

    teachers = [
        teacher(spec.name, spec.file, unet, checkpoint, description=spec.description, licence=spec.licence)
        for spec, unet, checkpoint in zip(config.teachers, unets, checkpoints)
    ]
    base_teacher = teacher("base", config.base, base_unet, base)
    return Distillation(base_teacher, teachers, data, config.train, device), base


def load_data(config: DistillConfig, base: Checkpoint) -> CaptionedLatents:
    if config.data.kind == "latents":
        return load_latents(config.data.file)
    from .demo.bank import demo_latents

    return demo_latents(base, config.data.count, config.data.seed)


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU; anything else is a torch device name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: use auto, cpu, cuda or cuda:0") from error


def train(
    run: Distillation,
    run_dir: Path | None,
    on_step: Callable[[Distillation, Metrics], None] | None = None,
) -> None:
    """Train to the end, resuming from and saving to ``run_dir``. Whatever ends it early, the state is saved first.

    ``on_step`` is called after every step; what it raises (an interrupt, say) ends the run like any other exception: it is
    passed on after the state has been written.
    """
    parts = identity(run) if run_dir else {}
    if run_dir and resume(run, run_dir, parts):
        logger.info("going on from step %d of %d", run.step, run.config.steps)
    saved = run.step
    try:
        for metrics in run.run():
            if run_dir and (run.step % run.config.save_every == 0 or run.step == run.config.steps):
                save_state(run, run_dir, parts)
                saved = run.step
            if on_step:
                on_step(run, metrics)
    finally:
        if run_dir and run.step > saved and not run.updating:
            save_state(run, run_dir, parts)


def student_checkpoint(run: Distillation, base: Checkpoint, title: str, dtype: torch.dtype | None = None) -> Checkpoint:
    """The student as a DMM checkpoint with the base's text encoder and VAE, style names and recipe.

    dtype: of the UNet's weights, None for float32.
    """
    weights = run.student_weights()
    styles = [
        StyleInfo(name=t.name.strip(), description=t.description, teacher=t.file, sha256=t.sha256, licence=t.licence)
        for t in run.teachers
    ]
    recipe = {
        "train": json.loads(json.dumps(dataclasses.asdict(run.config))),
        "steps_done": run.step,
        "samples_seen": run.step * run.config.batch_size,
        "base": {"file": run.base.file, "sha256": run.base.sha256},
        "data": {"count": len(run.data.latents), "sha256": run.data.fingerprint()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    return Checkpoint(
        unet={k: v.to(dtype or v.dtype) for k, v in weights.items()},
        text=base.text,
        vae=base.vae,
        styles=styles,
        recipe=recipe,
        metadata={"modelspec.title": title},
        prediction=run.base.prediction,
        zero_snr=run.base.zero_snr,
    )


def distill(config: DistillConfig, on_step: Callable[[Distillation, Metrics], None] | None = None) -> Distillation:
    """``dmm distill``: load, save the resolved config, train (or go on), write the checkpoint. Returns the finished run.

    On an interrupt the checkpoint of what was learnt so far is written too, before the interrupt goes on.
    Raises ValueError for files that do not fit, before anything is written.
    """
    check_names([t.name for t in config.teachers])
    output, run_dir = Path(config.output), Path(config.run_dir)
    run, base = load_run(config, pick_device(config.train.device))
    run_dir.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    try:
        train(run, run_dir, on_step)
    finally:
        if run.step and not run.updating:
            save_checkpoint(output, student_checkpoint(run, base, config.title, torch.float16))
    return run
