"""What the teachers predict for a batch: each asked about its own rows, wherever its weights wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...dmm_core.schedule import NoiseSchedule
from ..config import TrainConfig
from ..data.batches import Batch
from ..parallel.devices import sent
from ..teachers.pool import TeacherPool
from ..teachers.teacher import Prediction, Teacher

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Targets:
    """The teachers of a run by index, N being the base. ``pool``: where their UNets are.

    autocast: makes the context in which they compute. base_stays: the base is needed in every step, whatever the rows are.
    late: see ``TeacherPool``; for one process of several, which meets few of the teachers.
    """

    def __init__(
        self,
        base: Teacher,
        teachers: Sequence[Teacher],
        config: TrainConfig,
        device: torch.device,
        *,
        autocast: Callable[[], AbstractContextManager],
        stored: bool = False,
        base_stays: bool = False,
        late: bool = False,
    ):
        self.models, self.base, self.device, self.autocast = [*teachers, base], base, device, autocast
        self.schedule, self.slots = NoiseSchedule(base.zero_snr), config.teacher_slots
        for teacher in self.models:
            teacher.weights_sha256  # noqa: B018  (remembered: the pool converts weights in place)
        self.pool = TeacherPool(
            [teacher.unet for teacher in self.models],
            device,
            # Predictions that are stored with the data need no teacher on the device, unless its blocks are looked at.
            "offload" if stored and not config.lambda_feat else config.residency,
            teacher_dtype(config, device),
            resident=self._always_needed(base_stays),
            slots=config.teacher_slots,
            late=late,
        )
        self._style_rows = self._rows_of_old_styles()

    @torch.no_grad()
    def __call__(self, batch: Batch, x_t: Tensor, t: Tensor, features: bool = False) -> Prediction:
        """Every row's own teacher, in the student's parameterisation (the base's). x_t (B, C, h, w) and t (B,) are the batch's, on the
        device; what the data have stored is taken from there."""
        if batch.target is not None and not features:
            return Prediction(self._stored(sent(batch.target, self.device), batch.teacher, x_t, t), [])
        places: list[Tensor] = []
        targets: list[Tensor] = []
        features_of: list[Sequence[Tensor]] = []
        groups = self._by_unet(batch.teacher.unique().tolist())
        for i, unet in self.pool.loaded(list(groups)):
            rows = torch.isin(batch.teacher, torch.tensor(groups[i])).nonzero()[:, 0]
            there, teacher = sent(rows, self.device), self.models[i]
            style = self._style_rows[sent(batch.teacher[rows], self.device)] if unet.config.num_styles else None
            with self.autocast():
                said = teacher.predict(x_t[there], t[there], batch.caption[rows], style, features=features, unet=unet)
            targets.append(self.as_student(said.out, x_t[there], t[there], teacher))
            features_of.append(said.features)
            places.append(rows)
        out, blocks = torch.cat(targets), [torch.cat(block) for block in zip(*features_of)]
        order = torch.cat(places)
        if torch.equal(order, torch.arange(len(order))):
            return Prediction(out, blocks)
        back = sent(order.argsort(), self.device)  # the rows of a UNet with several styles were not neighbours
        return Prediction(out[back], [block[back] for block in blocks])

    def prefetch(self, batch: Batch) -> None:
        """Send for the first teachers of a batch that is to come, as many as there are places."""
        needed = self._by_unet(batch.teacher.unique().tolist())
        for i in [i for i in needed if i not in self.pool.resident][: self.slots]:
            self.pool.prefetch(i)

    def as_student(self, out: Tensor, x_t: Tensor, t: Tensor, teacher: Teacher) -> Tensor:
        """A teacher's output in the student's parameterisation, so that eps and v teachers can be mixed."""
        if teacher.prediction == self.base.prediction:
            return out
        if self.base.prediction == "eps":
            return self.schedule.to_eps(out, x_t, t, teacher.prediction)
        return self.schedule.to_v(out, x_t, t, teacher.prediction)

    def _stored(self, target: Tensor, teacher: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The data's predictions (B, C, h, w), each in its own teacher's parameterisation, in the student's."""
        out = []
        for i in teacher.unique().tolist():  # sorted, as the rows are
            rows = sent((teacher == i).nonzero()[:, 0], self.device)
            out.append(self.as_student(target[rows], x_t[rows], t[rows], self.models[i]))
        return torch.cat(out)

    def _always_needed(self, base_stays: bool) -> list[int]:
        """Models that stay on the device: the discriminator looks through the base, and a DMM model is asked in every batch."""
        if self.base.unet.config.num_styles:
            return [i for i, teacher in enumerate(self.models) if teacher.unet is self.base.unet]
        return [len(self.models) - 1] if base_stays else []

    def _by_unet(self, needed: Sequence[int]) -> dict[int, list[int]]:
        """Indices of models that answer in one forward, by the first of them: they share UNet and text states."""
        groups: dict[int, list[int]] = {}
        for i in needed:
            mate = next((j for j in groups if self.models[j].unet is self.models[i].unet), None)
            if mate is None or self.models[mate].contexts is not self.models[i].contexts:
                groups[i] = [i]
            else:
                groups[mate].append(i)
        return groups

    def _rows_of_old_styles(self) -> Tensor:
        """(N+1, n+1): how a base with n styles is asked for what a teacher index stands for; zeros where another model answers."""
        rows = [teacher.style_row for teacher in self.models]
        empty = torch.zeros(1, self.base.unet.config.num_styles + 1)
        return torch.cat([empty if row is None else row for row in rows]).to(self.device)


def teacher_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Of the teachers' weights: "auto" is the precision of the arithmetic on a GPU, float32 elsewhere."""
    name = config.teacher_dtype
    if name == "auto":
        name = config.precision if device.type == "cuda" else "fp32"
    return DTYPES[name]
