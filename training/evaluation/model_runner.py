"""Loads an evaluation's models and paints with them. Results are kept in a folder, so that an interrupted evaluation goes on from there.

Work is split into parts of ``PART`` pictures with a file each. The file's name is a hash of everything that its content depends on (model,
prompts, settings), so results of different evaluations can share a folder.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...dmm_core.sampling import host_noise
from ...dmm_core.unet import load_unet
from ..files.hashing import repr_sha256, tensor_sha256
from ..files.pieces import read_piece, write_piece
from ..paint.paint_rows import paint_rows
from ..teachers.teacher import Teacher, check_text
from .features import FeatureNet, PixelDecoder
from .model_ref import ModelRef
from .settings import SECOND_BATCH, EvaluationSettings
from .work_counter import FEATURE_COST, WorkCounter, painting_cost

logger = logging.getLogger(__name__)

PART = 16
"""Pictures of a part."""
FORMAT = 1
SMALL_PICTURE = 256 * 256
"""Pixels up to which a CPU paints a whole part at a time; of larger ones it paints one."""


def in_style(teacher: Teacher, style: int | None) -> Teacher:
    """A DMM model in one of its styles; None leaves it as it is."""
    return teacher if style is None else dataclasses.replace(teacher, style=style)


def placed(teacher: Teacher, device: torch.device, dtype: torch.dtype) -> Teacher:
    """The model on a device in a dtype; a copy, unless it is there already."""
    if {(p.dtype, p.device) for p in teacher.unet.parameters()} == {(dtype, device)}:
        return teacher
    return dataclasses.replace(
        teacher, unet=load_unet(teacher.unet.state_dict(), dtype, heads=teacher.unet.config.num_heads).to(device)
    )


class ModelRunner:
    """Loads models onto the device, one at a time, and computes with them.

    prompts: of all text states, ``prompts[0]`` the empty one. folder: where finished parts are kept, None for nowhere. work: is told what
    has been done.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        settings: EvaluationSettings,
        *,
        folder: Path | None,
        device: torch.device,
        work: WorkCounter,
    ):
        self.prompts, self.settings, self.work = list(prompts), settings, work
        self.folder, self.device = folder, device
        self.dtype = settings.dtype(device)
        one = device.type == "cpu" and settings.width * settings.height > SMALL_PICTURE
        self.batch = settings.batch_size or (1 if one else PART)  # halved where it does not fit

    # --- models -------------------------------------------------------------------------------------------------------

    @contextmanager
    def loaded(self, ref: ModelRef) -> Iterator[Callable[[], Teacher]]:
        """A context with a function that returns the model on the device. The first call loads it; when the context ends it is freed."""

        @functools.cache
        def load() -> Teacher:
            teacher = ref.open()
            check_text([teacher])
            return placed(teacher, self.device, self.dtype)

        try:
            yield load
        finally:
            load.cache_clear()

    # --- parts --------------------------------------------------------------------------------------------------------

    def part(self, identity: tuple, count: int, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a part, ``count`` rows each: read from the folder, or computed by ``build`` and written there.

        identity: all that they depend on, with a faithful repr.
        """
        if self.folder is None:
            return build()
        path = self.folder / f"{repr_sha256(FORMAT, *identity)[:32]}.safetensors"
        found = read_piece(path, count)
        if found is None:
            write_piece(path, found := build())
        return found

    def rows(self, places: Sequence[int]) -> Tensor:
        """The prompts of pictures with these numbers, as rows (n,) of the text states: all but the empty one, in turn."""
        return torch.tensor([1 + k % (len(self.prompts) - 1) for k in places])

    def seeds(self, places: Sequence[int], second: bool) -> list[int]:
        """The noise seeds of pictures with these numbers. second: of the teachers' second batch."""
        return [self.settings.seed + k + (SECOND_BATCH if second else 0) for k in places]

    def batches(self, count: int) -> list[list[int]]:
        """The numbers 0..count-1 of the pictures, split into parts."""
        return [list(range(start, min(start + PART, count))) for start in range(0, count, PART)]

    # --- painting -----------------------------------------------------------------------------------------------------

    def paint(
        self,
        ref: ModelRef,
        load: Callable[[], Teacher],
        style: int | None = None,
        *,
        second: bool = False,
        name: str = "",
    ) -> Tensor:
        """``settings.count`` latents (n, C, h, w) float16 on the CPU by a model.

        load: gives the model, called only when something has to be painted. style: of a DMM model, None for a plain one. second: from the
        noise of the second batch. name: for the progress report, empty for the model's. Raises ValueError for a model that paints NaN.
        """
        s = self.settings
        parts = []
        for places in self.batches(s.count):
            rows, seeds = self.rows(places), self.seeds(places, second)
            texts = [self.prompts[row] for row in rows.tolist()]
            identity = ("paint", ref.key, style, second, places, texts, s.painting, str(self.dtype))

            def build(rows: Tensor = rows, seeds: list[int] = seeds) -> dict[str, Tensor]:
                teacher = in_style(load(), style)
                painted = self.split(
                    lambda part: self._paint(teacher, rows[part], seeds[part], name or ref.name), len(rows)
                )
                latents = painted.half()
                if not torch.isfinite(latents).all():
                    raise ValueError(
                        f"'{name or ref.name}' paints NaN or infinite numbers: use precision fp32, or look at what it paints in "
                        "ComfyUI"
                    )
                return {"latents": latents}

            parts.append(self.part(identity, len(places), build)["latents"])
            self.work(painting_cost(s) * len(places), f"'{name or ref.name}' paints")
        return torch.cat(parts)

    @torch.no_grad()
    def _paint(self, teacher: Teacher, rows: Tensor, seeds: Sequence[int], name: str) -> Tensor:
        """With every sampling step ``work`` is told, which may raise an interrupt."""
        s = self.settings
        size = (teacher.unet.config.in_channels, s.height // 8, s.width // 8)
        noise = torch.cat([host_noise((1, *size), seed) for seed in seeds]).to(self.device)
        latents = paint_rows(
            teacher.unet, teacher, rows, noise,
            steps=s.steps, cfg=s.cfg, style=teacher.style_row, sampler=s.sampler, scheduler=s.scheduler,
            callback=lambda *_: self.work(0, f"'{name}' paints"),
        )  # fmt: skip
        return latents.float().cpu()

    def split(self, work: Callable[[slice], Tensor], count: int) -> Tensor:
        """The results of ``work`` on slices of range(count), concatenated. The slices are halved when the device runs out of memory."""
        out, start = [], 0
        while start < count:
            try:
                out.append(work(slice(start, min(start + self.batch, count))))
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                torch.cuda.empty_cache()
                self.batch //= 2
                logger.info("out of memory: going on with %d pictures at a time", self.batch)
                continue
            start += self.batch
        return torch.cat(out)

    # --- features -----------------------------------------------------------------------------------------------------

    def features(self, latents: Tensor, network: FeatureNet, decoder: PixelDecoder, name: str) -> Tensor:
        """Latents (n, C, h, w) -> feature vectors (n, size) float32 on the CPU. name: for the progress report."""
        parts = []
        for places in self.batches(len(latents)):
            mine = latents[places[0] : places[-1] + 1]
            identity = ("features", tensor_sha256(mine), decoder.key, network.key, network.name)

            def build(mine: Tensor = mine) -> dict[str, Tensor]:
                return {"features": self.split(lambda part: network(self.decoded(mine[part], decoder)), len(mine))}

            parts.append(self.part(identity, len(places), build)["features"])
            self.work(FEATURE_COST * len(places), f"looking at '{name}'")
        return torch.cat(parts)

    @torch.no_grad()
    def decoded(self, latents: Tensor, decoder: PixelDecoder) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) in about [-1, 1], on the decoder's device."""
        return decoder.decode(latents.float().to(self.device))
