"""One distillation from start to file: what ``dmm distill`` and the "Distill Teachers" node both call."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.files import atomic_write
from ...dmm_core.unet import UNetConfig
from ...dmm_core.vae import latent_scale, load_vae
from ..config import DistillConfig
from ..loop.trainer import Trainer
from ..paint.images import decode_to_pil
from ..parallel.devices import local_device, pick_device
from ..parallel.ranks import LostProcess, Ranks
from .load import load_run
from .state import states
from .student_file import check_storable, lora_file, save_lora, save_student
from .train import readable, run_folder, train
from .watch.pictures import Decoder
from .watch.watch import Watch

logger = logging.getLogger(__name__)


def distill(
    config: DistillConfig,
    watch: Watch | None = None,
    *,
    fork_from: Path | None = None,
    grown: bool = False,
    ranks: Ranks | None = None,
) -> Trainer:
    """``dmm distill``: load, save the resolved config, train (or go on), write the checkpoint. Returns the finished run. With ``grown``
    (``dmm add-teacher``, ``dmm forget``, ``dmm fewstep``) the base is a DMM model whose styles stay, are forgotten, or learn few steps; the
    last writes a LoRA beside the checkpoint too (``lora_file``).

    The checkpoint holds the averaged weights; where there is an average, the raw ones are beside it as ``<output>-raw.safetensors``.
    However training ends, the checkpoints of what was learnt so far are written, before an interrupt goes on.
    Raises ValueError for files that do not fit, before anything is written, and where another process has the run folder. ranks: the
    processes of the run, which are connected (``parallel.ranks.joined``); the first of them writes.
    """
    ranks = ranks or Ranks()
    with run_folder(Path(config.run_dir), ranks):
        return _distill(config, watch, fork_from=fork_from, grown=grown, ranks=ranks)


def _distill(
    config: DistillConfig, watch: Watch | None, *, fork_from: Path | None, grown: bool, ranks: Ranks
) -> Trainer:
    output, run_dir = Path(config.output), Path(config.run_dir)
    with ranks.together():
        loaded = load_run(config, local_device(pick_device(config.train.device), ranks), grown, ranks)
    run, base = loaded.start(), loaded.parts
    with ranks.together():
        check_storable(run, base, config.title)
    if loaded.plan:
        logger.info("%s", loaded.plan.describe())
    if ranks.is_main:
        output.parent.mkdir(parents=True, exist_ok=True)
        settings = {**config.to_dict(), "train": dataclasses.asdict(run.config)}
        with atomic_write(run_dir / "config.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if watch and base.vae and not watch.decode:
        watch.decode = decoder(base, run.base.unet.config, run.device)
    ended_by = None
    try:
        train(run, run_dir, watch, fork_from=fork_from)
        if (report := run.kind.final_report(run, watch.beside_steps(run.ranks) if watch else None)) and ranks.is_main:
            logger.info("\n%s", report)
            with atomic_write(run_dir / "report.txt") as temporary:
                temporary.write_text(report + "\n", encoding="utf-8")
    except BaseException as error:
        ended_by = error
        raise
    finally:
        try:
            if run.step and readable(run, ended_by):
                save_student(run, base, output, config.title, pictures=watch.student_pictures if watch else ())
                if config.few_steps:
                    save_lora(run, lora_file(output), f"{config.title}, {config.few_steps.steps} steps")
        finally:
            run.targets.pool.close()
            if isinstance(ended_by, LostProcess):
                explain(ended_by, run, run_dir)
    return run


def explain(error: LostProcess, run: Trainer, run_dir: Path) -> None:
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


def decoder(base: Checkpoint, config: UNetConfig, device: torch.device) -> Decoder:
    """Latents to pictures by a checkpoint's VAE, which is on the device only while it works. config: of the UNet."""
    vae, scale = load_vae(base.vae).eval(), latent_scale(config)

    def decode(latents: Tensor) -> list[Image.Image]:
        try:
            return decode_to_pil(vae.to(device), latents, scale, batch=1)
        finally:
            vae.to("cpu")

    return decode
