"""One distillation from start to file: what ``dmm distill`` and the "Distill Teachers" node both call."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import platform
from collections.abc import Iterator
from pathlib import Path
from types import NoneType

import torch
from PIL import Image
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint, save_checkpoint
from ...dmm_core.files import atomic_write
from ...dmm_core.unet import UNetConfig
from ...dmm_core.vae import latent_scale, load_vae
from ..config import DistillConfig
from ..loop.codes import warm_start
from ..loop.trainer import Distillation
from ..paint.images import decode_to_pil
from ..parallel.devices import own_device, pick_device
from ..parallel.ranks import LostProcess, Ranks
from .load import load_run
from .state import fork, identity, resume, same_everywhere, save_state, states
from .synthesis import painted_by_teachers
from .validation import validation_error
from .watch.controls import StopAndSave
from .watch.pictures import Decoder
from .watch.watch import Watch, Watching

logger = logging.getLogger(__name__)


def train(
    run: Distillation,
    run_dir: Path | None,
    watch: Watch | None = None,
    fork_from: Path | None = None,
    parts: dict[str, str] | None = None,
) -> None:
    """Train to the end, resuming from and saving to ``run_dir``. Whatever ends it early, the state is saved first.

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
    saved = run.step

    def save() -> None:
        nonlocal saved
        if run_dir:
            save_state(run, run_dir, parts, validation_error(run) if c.validation else None)
        saved = run.step

    watching, ended_by = Watching(watch, run, run_dir), None
    try:
        with tf32(c.tf32), run.ranks.watching():
            if c.warm_start and run.guarded and not run.step and not fork_from:
                warm_start(run, watch.on_paint)
            watching.begin()
            while run.step < c.all_steps:
                if run.step >= c.steps and run.final_data is None:
                    run.final_data = painted_by_teachers(run, run_dir and run_dir / "painted", watch.on_paint)
                metrics = run.train_step()
                if run.step % c.save_every == 0 or run.step in (c.steps, c.all_steps):
                    save()
                watching.step(metrics, save)
    except BaseException as error:
        ended_by = error
        raise
    finally:
        watching.end()
        if run_dir and run.step > saved and readable(run, ended_by):
            save_state(run, run_dir, parts)


def readable(run: Distillation, ended_by: BaseException | None) -> bool:
    """Whether the weights can be saved now: they belong to the step, and where they are shared out, all processes are here for it."""
    return not run.updating and (not run.sharded or isinstance(ended_by, (NoneType, StopAndSave)))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, CUDA may round the inputs of float32 products to 10 bits, or not; afterwards what the host had set."""
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = allowed
        yield
    finally:
        for kind, old in zip(kinds, before):
            kind.allow_tf32 = old


def student_checkpoint(
    run: Distillation, base: Checkpoint, title: str, dtype: torch.dtype | None = None, averaged: bool = True
) -> Checkpoint:
    """The student as a DMM checkpoint with the base's text encoder and VAE, style names and recipe.

    dtype: of the UNet's weights, None for float32.
    """
    weights = run.student_weights(averaged)
    recipe = {
        "train": json.loads(json.dumps(dataclasses.asdict(run.config))),
        "steps_done": run.step,
        "samples_seen": run.step * run.config.batch_size * run.config.accumulate,
        "base": {"file": run.base.file, "sha256": run.base.sha256},
        "data": {"count": len(run.data), "sha256": run.data.fingerprint()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    if run.guarded:  # a model that grew: what was learnt now, and how it came to what it knew before
        recipe |= run.what_changed()
        before = {k: v for k, v in base.recipe.items() if k != "history"}
        recipe["history"] = [*base.recipe.get("history", []), {"styles": [s.name for s in base.styles], **before}]
    return Checkpoint(
        unet={k: v.to(dtype or v.dtype) for k, v in weights.items()},
        text=base.text,
        vae=base.vae,
        styles=run.styles(),
        recipe=recipe,
        metadata={"modelspec.title": title},
        prediction=run.base.prediction,
        zero_snr=run.base.zero_snr,
    )


def distill(
    config: DistillConfig,
    watch: Watch | None = None,
    fork_from: Path | None = None,
    grown: bool = False,
    ranks: Ranks | None = None,
) -> Distillation:
    """``dmm distill``: load, save the resolved config, train (or go on), write the checkpoint. Returns the finished run. With ``grown``
    (``dmm add-teacher``, ``dmm forget``) the base is a DMM model whose styles stay, or are forgotten.

    The checkpoint holds the averaged weights; where there is an average, the raw ones are beside it as ``<output>-raw.safetensors``.
    However training ends, the checkpoints of what was learnt so far are written, before an interrupt goes on.
    Raises ValueError for files that do not fit, before anything is written. ranks: the processes of the run, which are connected
    (``distributed.joined``); the first of them writes.
    """
    output, run_dir, ranks = Path(config.output), Path(config.run_dir), ranks or Ranks()
    with ranks.together():
        loaded = load_run(config, own_device(pick_device(config.train.device), ranks), grown, ranks)
    run, base = loaded.start(), loaded.parts
    if loaded.plan:
        logger.info("%s", loaded.plan.describe())
    if ranks.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        settings = {**config.to_dict(), "train": dataclasses.asdict(run.config)}
        with atomic_write(run_dir / "config.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if watch and base.vae and not watch.decode:
        watch.decode = decoder(base, run.base.unet.config, run.device)
    ended_by = None
    try:
        train(run, run_dir, watch, fork_from)
        if (report := run.last_word(watch and watch.on_paint)) and ranks.is_main:
            logger.info("\n%s", report)
            with atomic_write(run_dir / "report.txt") as temporary:
                temporary.write_text(report + "\n", encoding="utf-8")
    except BaseException as error:
        ended_by = error
        raise
    finally:
        try:
            if run.step and readable(run, ended_by):
                save_student(run, base, output, config.title)
        finally:
            run.rack.close()
            if isinstance(ended_by, LostProcess):
                explain(ended_by, run, run_dir)
    return run


def explain(error: LostProcess, run: Distillation, run_dir: Path) -> None:
    """Say what is left of the run, in the process that is the first one left (in place)."""
    gone, error.speak = run.ranks.left()
    who = f"process {gone[0]}" if len(gone) == 1 else "another process"
    if len(gone) > 1:  # one that waits inside of a sum for this one may not have noticed
        who = f"processes {', '.join(map(str, gone))} gave no answer: at least one"
    newest = next((path.name for path in reversed(states(run_dir))), None)
    kept = f"{newest} is in {run_dir}: the same command goes on from there" if newest else "there is no state yet"
    error.args = (
        f"{who} of the {run.ranks.world} of this run ended: stopped after step {run.step}; {kept}, with any number of processes",
    )


def save_student(run: Distillation, base: Checkpoint, path: Path, title: str) -> None:
    """The student as a file in half precision, and its raw weights beside it where there is an average. Of several processes the first
    one writes; where the student is shared out, this is for all of them together."""
    main = run.ranks.is_main
    if not main and not run.sharded:
        return
    checkpoint = student_checkpoint(run, base, title, torch.float16)
    if main:
        save_checkpoint(path, checkpoint)
    if run.ema and run.ema.ready:
        raw = student_checkpoint(run, base, f"{title} (raw)", torch.float16, averaged=False)
        if main:
            save_checkpoint(path.with_name(f"{path.stem}-raw.safetensors"), raw)


def decoder(base: Checkpoint, config: UNetConfig, device: torch.device) -> Decoder:
    """Latents to pictures by a checkpoint's VAE, which is on the device only while it works. config: of the UNet."""
    vae, scale = load_vae(base.vae).eval(), latent_scale(config)

    def decode(latents: Tensor) -> list[Image.Image]:
        try:
            return decode_to_pil(vae.to(device), latents, scale, batch=1)
        finally:
            vae.to("cpu")

    return decode
