"""The paper's last stage: pictures that the teachers paint, for the student to be fine-tuned on (arXiv:2504.12364, Sec. 3.4).

Finished parts stay in the run folder, so that an interrupted painting goes on where it stopped, and several processes paint together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...dmm_core.sampling import Callback, host_noise
from ..data.batches import CaptionedLatents
from ..files.pieces import read_piece, write_piece
from ..loop.trainer import Trainer
from ..paint.paint_rows import paint_rows
from ..progress import ProgressCallback
from ..seeds import hash_seed
from .watch.controls import StopAndSave


@torch.no_grad()
def painted_by_teachers(
    run: Trainer,
    folder: Path | None = None,
    progress: ProgressCallback | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> CaptionedLatents:
    """``final_images`` latents by each teacher, at the size of most of the run's data, with captions drawn from it.

    folder: where finished parts are kept, None for nowhere. The pictures follow from the run's seed, the teachers and the captions.
    progress: told after every part, and after every sampling step of one with what is done unchanged. What it raises goes on to the caller
    at once, so of several processes it must raise nothing. stopping: whether a stop was asked for, looked at by each of several processes
    between two parts: it paints no more of its share, waits for the others to end theirs, and all raise StopAndSave.
    """
    c, ranks = run.config, run.ranks
    parts = [(i, start) for i in range(run.num_styles) for start in range(0, c.final_images, c.batch_size)]

    def finish(mine: list[tuple[int, int]]) -> Iterator[tuple[int, Tensor, Tensor]]:
        for done, (i, start) in enumerate(mine):
            rows, what = caption_rows(run, i, start), f"'{run.teachers[i].name}' paints"

            def on_step(*_: object, done: int = done, what: str = what) -> None:
                if progress:
                    progress(done, len(mine), what)

            yield i, rows, _part(run, i, start, rows=rows, folder=folder, on_step=on_step)
            if progress:
                progress(done + 1, len(mine), what)

    if folder and ranks.world > 1:  # each process its share of the parts, and then all of them read all files
        with ranks.together():
            for _ in finish(parts[ranks.share(len(parts))]):
                if stopping():
                    break
        if ranks.any([stopping()])[0]:
            raise StopAndSave
        progress = None
    latents, captions, owner = [], [], []
    for i, rows, part in finish(parts):
        latents.append(part.half())
        captions += [run.data.prompts[row] for row in rows.tolist()]
        owner += [i] * len(rows)
    return CaptionedLatents(torch.cat(latents).float(), captions, torch.tensor(owner))


def _part(
    run: Trainer, teacher: int, start: int, *, rows: Tensor, folder: Path | None, on_step: Callback | None = None
) -> Tensor:
    """Latents of some captions by one teacher: out of the folder, or painted now and put there."""
    path = folder / f"{teacher:03d}-{start:06d}.safetensors" if folder else None
    done = read_piece(path, len(rows)) if path else None
    if done and "latents" in done:
        return done["latents"]
    part = paint(run, teacher, rows, hash_seed(run.config.seed, "paint", teacher, start), on_step=on_step)
    if not torch.isfinite(part).all():
        raise ValueError(
            f"teacher '{run.teachers[teacher].name}' paints NaN or infinite numbers: use teacher_dtype fp32 or bf16, or look "
            "at what it paints in ComfyUI"
        )
    if path:
        write_piece(path, {"latents": part.half()})
    return part


def caption_rows(run: Trainer, teacher: int, start: int) -> Tensor:
    """Which captions a teacher paints in one part: rows of the run's prompts, without the empty one, each equally often."""
    c = run.config
    known = len(run.data.prompts) - 1
    order = torch.randperm(known, generator=torch.Generator().manual_seed(hash_seed(c.seed, "captions", teacher)))
    places = torch.arange(start, min(start + c.batch_size, c.final_images))
    return 1 + order[places % known]


def paint(run: Trainer, teacher: int, rows: Tensor, seed: int, *, on_step: Callback | None = None) -> Tensor:
    """Captions (B,) -> latents (B, C, h, w) float32 on the CPU, painted with the run's final_cfg and final_sampling_steps."""
    c, text = run.config, run.teachers[teacher]
    noise = noise_for(run, len(rows), seed)
    latents = paint_rows(
        run.targets.pool.get(teacher), text, rows, noise,
        steps=c.final_sampling_steps, cfg=c.final_cfg, style=text.style_row, callback=on_step,
    )  # fmt: skip
    return latents.float().cpu()


def noise_for(run: Trainer, count: int, seed: int) -> Tensor:
    """Noise (count, C, h, w) on the run's device, at the size of most of its data."""
    return host_noise((count, *run.data.shape), seed).to(run.device)
