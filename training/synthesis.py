"""The paper's last stage: pictures that the teachers paint, for the student to be fine-tuned on (arXiv:2504.12364, Sec. 3.4).

Finished parts stay in the run folder, so that an interrupted painting goes on where it stopped, and several processes paint together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..dmm_core.files import atomic_write
from ..dmm_core.sampling import Callback, cfg_denoiser, host_noise, sample, sigmas_for
from ..dmm_core.unet import UNet
from .data import CaptionedLatents, hash_seed
from .loop import Distillation
from .teacher import Teacher

logger = logging.getLogger(__name__)

Tick = Callable[[int, int, str], None]
"""(done, total, what): called after every part; what it raises ends the painting."""


@torch.no_grad()
def painted_by_teachers(
    run: Distillation, folder: Path | None = None, progress: Tick | None = None
) -> CaptionedLatents:
    """``final_images`` latents by each teacher, at the size of most of the run's data, with captions drawn from it.

    folder: where finished parts are kept, None for nowhere. The pictures follow from the run's seed, the teachers and the captions.
    """
    c, ranks = run.config, run.ranks
    parts = [(i, start) for i in range(run.num_styles) for start in range(0, c.final_images, c.batch_size)]

    def finish(mine: list[tuple[int, int]]) -> Iterator[tuple[int, Tensor, Tensor]]:
        for done, (i, start) in enumerate(mine):
            rows = caption_rows(run, i, start)
            yield i, rows, _part(run, i, start, rows, folder)
            if progress:
                progress(done + 1, len(mine), f"'{run.teachers[i].name}' paints")

    if folder and ranks.world > 1:  # each process its share of the parts, and then all of them read all files
        with ranks.together():
            for _ in finish(parts[ranks.part(len(parts))]):
                pass
        progress = None
    latents, captions, owner = [], [], []
    for i, rows, part in finish(parts):
        latents.append(part.half())
        captions += [run.data.prompts[row] for row in rows.tolist()]
        owner += [i] * len(rows)
    return CaptionedLatents(torch.cat(latents).float(), captions, torch.tensor(owner))


def _part(run: Distillation, teacher: int, start: int, rows: Tensor, folder: Path | None) -> Tensor:
    """Latents of some captions by one teacher: out of the folder, or painted now and put there."""
    path = folder / f"{teacher:03d}-{start:06d}.safetensors" if folder else None
    part = _finished(path, len(rows))
    if part is not None:
        return part
    part = paint(run, teacher, rows, hash_seed(run.config.seed, "paint", teacher, start))
    if not torch.isfinite(part).all():
        raise ValueError(
            f"teacher '{run.teachers[teacher].name}' paints NaN or infinite numbers: use teacher_dtype fp32 or bf16, or look "
            "at what it paints in ComfyUI"
        )
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file({"latents": part.half().contiguous()}, temporary)
    return part


def caption_rows(run: Distillation, teacher: int, start: int) -> Tensor:
    """Which captions a teacher paints in one part: rows of the run's prompts, without the empty one, each equally often."""
    c = run.config
    known = len(run.data.prompts) - 1
    order = torch.randperm(known, generator=torch.Generator().manual_seed(hash_seed(c.seed, "captions", teacher)))
    places = torch.arange(start, min(start + c.batch_size, c.final_images))
    return 1 + order[places % known]


def paint(run: Distillation, teacher: int, rows: Tensor, seed: int) -> Tensor:
    """Captions (B,) -> latents (B, C, h, w) float32 on the CPU, painted with the run's final_cfg and final_sampling_steps."""
    c, text = run.config, run.teachers[teacher]
    latents = paint_captions(
        run, run.rack.get(teacher), text, rows, seed, c.final_sampling_steps, c.final_cfg, text.style_row
    )
    return latents.float().cpu()


def paint_captions(
    run: Distillation,
    unet: UNet,
    text: Teacher,
    rows: Tensor,
    seed: int,
    steps: int,
    cfg: float,
    style: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Captions (B,) -> latents (B, C, h, w) at the size of most of the run's data, by a UNet on the run's device whose text states and
    parameterisation are those of ``text``. style: (1, N+1) or None."""
    size = run.data.shape
    context, y = text.conditioning(rows, size[1:], run.device)
    empty, empty_y = text.conditioning(torch.zeros(1, dtype=torch.long), size[1:], run.device)
    style = None if style is None else style.to(run.device)
    denoiser = cfg_denoiser(
        unet, run.schedule, context, empty, cfg, style, y=y, uncond_y=empty_y, prediction=text.prediction
    )
    noise = host_noise((len(rows), *size), seed).to(run.device)
    sigmas = sigmas_for(run.schedule, steps, "karras").to(run.device)
    return sample(denoiser, run.schedule, noise, sigmas, "dpmpp_2m", callback)


def _finished(path: Path | None, count: int) -> Tensor | None:
    if path is None or not path.exists():
        return None
    try:
        part = load_file(path)["latents"]
    except (SafetensorError, OSError, KeyError) as error:
        logger.warning("%s cannot be read (%s): painted anew", path.name, error)
        return None
    return part if len(part) == count else None
