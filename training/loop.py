"""The distillation loop of DMM (arXiv:2504.12364, Sec. 3.4 and Alg. 1) on one device.

Contract of a step: a batch mixes styles; the student runs ONCE on the whole batch with one style row per sample; each teacher
runs on its own rows only. Student and teacher see the same x_t, t and the same dropped captions. The loop yields metrics;
progress bars, pictures and files are the caller's.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..dmm_core.schedule import NoiseSchedule
from ..dmm_core.unet import UNet, UNetConfig, init_style
from .config import TrainConfig, check_names
from .data import Batch, CaptionedLatents, draw_batch, hash_seed
from .ema import PowerEMA
from .losses import feature_loss, score_loss
from .teacher import Teacher, check_architectures, soup

BASE = "(no style)"
"""The name under which style-less rows are reported."""


@dataclass
class Metrics:
    """What one step did. ``score`` and ``count`` are per teacher name: mean eq. 9 loss of its rows, number of rows."""

    step: int
    steps: int
    loss: float
    feature: float
    score: dict[str, float]
    count: dict[str, int]
    lr: float
    grad_norm: float
    seconds: float = 0.0


@dataclass
class Distillation:
    """N teachers -> one student with N styles.

    base: the model that style-less rows are distilled to and, with init "base", the student's start; its contexts are the
    student's. Raises ValueError for teachers of another architecture, bad names or a bad config.
    """

    base: Teacher
    teachers: Sequence[Teacher]
    data: CaptionedLatents
    config: TrainConfig
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.config.check()
        check_names([teacher.name for teacher in self.teachers])
        check_architectures(self.base.unet.config, [(t.name, t.unet.config) for t in self.teachers])
        if self.data.latents.shape[1] != self.base.unet.config.in_channels:
            raise ValueError(
                f"latents have {self.data.latents.shape[1]} channels, the models take {self.base.unet.config.in_channels}"
            )
        other = [t.name for t in self.teachers if t.zero_snr != self.base.zero_snr]
        if other:  # the same timestep would mean another noise level to them
            raise ValueError(
                f"teachers with another noise schedule (zero terminal SNR or not) than the base: {', '.join(other)}"
            )
        self.schedule = NoiseSchedule(self.base.zero_snr)
        self.step = 0
        self.updating = False  # true while weights and step do not belong together: such a state must not be saved
        self.student = self._new_student().to(self.device)
        self.student.gradient_checkpointing = self.config.gradient_checkpointing
        for teacher in (self.base, *self.teachers):
            teacher.unet.to(self.device)
        style = {id(p) for p in self.student.style_parameters()}
        named = list(self.student.named_parameters())
        groups = [
            {"params": [p for _, p in named if id(p) not in style], "scale": 1.0},
            {"params": [p for _, p in named if id(p) in style], "scale": self.config.style_lr_scale},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.config.lr, betas=tuple(self.config.betas), weight_decay=self.config.weight_decay
        )
        self.ema = PowerEMA(named, self.config.ema_gamma) if self.config.ema_gamma else None
        fp16 = self.config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)

    @property
    def num_styles(self) -> int:
        return len(self.teachers)

    def _new_student(self) -> UNet:
        sizes = {**vars(self.base.unet.config), "num_styles": self.num_styles}
        if sizes["adm_channels"]:
            sizes["style_mlp"] = "add_embedding2"  # in SDXL's diffusers layout add_embedding is taken
        student = UNet(UNetConfig(**sizes))
        source = self.base.unet.state_dict()
        if self.config.init == "soup":
            source = soup([teacher.unet.state_dict() for teacher in self.teachers])
        student.load_state_dict(source, strict=False)  # all but the style side
        init_style(student, torch.Generator().manual_seed(hash_seed(self.config.seed, "style")))
        return student.float()

    def learning_rate(self, step: int) -> float:
        """Of the step that follows ``step`` finished ones: linear warm-up, then the schedule."""
        c = self.config
        if step < c.warmup:
            return c.lr * (step + 1) / c.warmup
        done = (step - c.warmup) / max(1, c.steps - c.warmup)
        if c.lr_schedule == "cosine":
            return c.lr * 0.5 * (1 + math.cos(math.pi * done))
        return c.lr * (1 - done) if c.lr_schedule == "linear" else c.lr

    def run(self) -> Iterator[Metrics]:
        """Train from ``self.step`` to the last step, yielding after each. Raises ValueError on a non-finite loss."""
        while self.step < self.config.steps:
            yield self.train_step()

    def train_step(self) -> Metrics:
        started = time.perf_counter()
        c = self.config
        batch = draw_batch(c.seed, self.step, self.data, c.batch_size, self.num_styles, c.base_share, c.caption_dropout)
        with torch.enable_grad():
            score, feature = self.losses(batch)
            loss = score.mean() + c.lambda_feat * feature.mean()
            by_name = self._per_teacher(score.detach(), batch)
            if not torch.isfinite(loss):
                bad = [name for name, value in by_name[0].items() if not math.isfinite(value)] or ["the feature loss"]
                raise ValueError(
                    f"the loss is not finite at step {self.step + 1} (teacher: {', '.join(bad)}): "
                    "lower the learning rate or use precision fp32 or bf16"
                )
            lr = self.learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), c.grad_clip or math.inf)
            self.updating = True
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.step += 1
        if self.ema:
            self.ema.update(self.student.named_parameters())
        self.updating = False
        return Metrics(
            step=self.step,
            steps=c.steps,
            loss=loss.item(),
            feature=feature.mean().item(),
            score=by_name[0],
            count=by_name[1],
            lr=lr,
            grad_norm=float(norm),
            seconds=time.perf_counter() - started,
        )

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """eq. 9 and eq. 10 per sample, (B,) each; the second is zero where lambda_feat is."""
        c, device = self.config, self.device
        want_features = c.lambda_feat > 0
        x0, eps, t = self.data.latents[batch.index].to(device), batch.eps.to(device), batch.t.to(device)
        rows = torch.where(batch.drop, 0, self.data.rows[batch.index])  # row 0 is the empty prompt
        x_t = self.schedule.add_noise(x0, eps, t)
        targets, target_features = [], []
        with torch.no_grad(), self.autocast():
            for i, teacher in enumerate((*self.teachers, self.base)):
                mine = (batch.teacher == i).to(device)
                if not mine.any():
                    continue
                out = self._forward(teacher.unet, teacher, x_t[mine], t[mine], rows[mine.cpu()], None, want_features)
                out, features = out if want_features else (out, [])
                targets.append(self._as_student(out.float(), x_t[mine], t[mine], teacher))
                target_features.append(features)
        with self.autocast():
            style = self.style_rows(batch.teacher).to(device)
            out = self._forward(self.student, self.base, x_t, t, rows, style, want_features)
        out, features = out if want_features else (out, [])
        score = score_loss(out, torch.cat(targets))
        if not want_features:
            return score, torch.zeros_like(score)
        return score, feature_loss(features, [torch.cat(block) for block in zip(*target_features)])

    def style_rows(self, teacher: Tensor) -> Tensor:
        """Teacher indices (B,) -> style rows (B, N+1); index N (the base) gives the row of zeros, "no style"."""
        hot = torch.nn.functional.one_hot(teacher, self.num_styles + 1).float()
        rows = hot.clone()
        rows[:, -1] = 1.0 - hot[:, -1]  # the last column is the strength
        return rows

    def _forward(
        self, unet: UNet, text: Teacher, x_t: Tensor, t: Tensor, rows: Tensor, style: Tensor | None, features: bool
    ):
        context = text.contexts[rows].to(self.device)
        y = None if text.y is None else text.y[rows].to(self.device)
        return unet(x_t, t, context.to(x_t.dtype), y=y, style=style, features=features)

    def _as_student(self, out: Tensor, x_t: Tensor, t: Tensor, teacher: Teacher) -> Tensor:
        """A teacher's output in the student's parameterisation (the base's), so that eps and v teachers can be mixed."""
        if teacher.prediction == self.base.prediction:
            return out
        if self.base.prediction == "eps":
            return self.schedule.to_eps(out, x_t, t, teacher.prediction)
        return self.schedule.to_v(out, x_t, t, teacher.prediction)

    def _per_teacher(self, score: Tensor, batch: Batch) -> tuple[dict[str, float], dict[str, int]]:
        means, counts = {}, {}
        for i, teacher in enumerate((*self.teachers, self.base)):
            mine = batch.teacher == i
            if mine.any():
                name = teacher.name if i < self.num_styles else BASE
                means[name], counts[name] = score[mine.to(score.device)].mean().item(), int(mine.sum())
        return means, counts

    def autocast(self):
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.config.precision not in kinds:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, kinds[self.config.precision])

    def student_weights(self, averaged: bool = True) -> dict[str, Tensor]:
        """The student's state dict on the CPU, its average where there is one and ``averaged`` is set."""
        weights = {k: v.detach().float().cpu().clone() for k, v in self.student.state_dict().items()}
        if averaged and self.ema and self.ema.step:
            weights.update({k: v.cpu().clone() for k, v in self.ema.average.items()})
        return weights

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the student holds its averaged weights (if there are any): for pictures on the way."""
        if not (self.ema and self.ema.step):
            yield
            return
        raw = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        try:
            self._put(self.ema.average)
            yield
        finally:
            self._put(raw)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.student.named_parameters():
            p.copy_(weights[name])
