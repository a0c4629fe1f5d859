"""The training loop of DMM (arXiv:2504.12364, Sec. 3.4 and Alg. 1), of one process or of one among several.

A step: draw a batch that mixes styles; ask each row's own teacher about it; run the student ONCE on all rows, one style row per sample;
compare (``objective``: eq. 9 to 12); update. Student and teachers see the same x_t, t and the same dropped captions.

``Trainer.run`` yields what each step did. Progress bars, pictures, files and stopping are the caller's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...dmm_core.schedule import NoiseSchedule
from ..config import TrainConfig
from ..data.batches import Batch, TrainingData, bad_rows
from ..parallel.devices import sent
from ..parallel.ranks import AgreedError, Ranks
from ..parallel.sharding import average_gradients, full_tensor, without_sync
from ..teachers.teacher import Teacher
from .adversary import Discriminator
from .checks import check_run
from .draws import Draws, difficulty_of
from .gathered import gathered
from .kinds import RunKind, kind_of
from .metrics import Metrics, MicroBatch, by_teacher, measured, on_cpu
from .objective import Losses, Objective
from .optimizers import learning_rate, make_optimizer, parameter_groups
from .precision import autocast
from .student import Student, style_rows
from .targets import Targets

CPU = torch.device("cpu")


class Trainer:
    """N teachers -> one student with N styles.

    base: the teacher of the rows without a style and, with init "base", where the student starts; the student uses its text states.
    Where it is a DMM model, the student goes on from it, and teachers that are its own styles are guarded by it (``kinds.Grow``).
    kind: what differs from plain distillation, None to see it from the teachers. ranks: the processes of the run, which draw the same
    batches and work on their shares of the rows: however many there are, it is one step. Raises ValueError as ``check_run`` does.
    """

    def __init__(
        self,
        base: Teacher,
        teachers: Sequence[Teacher],
        data: TrainingData,
        config: TrainConfig,
        *,
        device: torch.device = CPU,
        kind: RunKind | None = None,
        ranks: Ranks | None = None,
    ):
        c, ranks = config, ranks or Ranks()
        check_run(base, teachers, data, config=c, world=ranks.world)
        self.base, self.teachers = base, teachers
        self.data, self.config, self.device, self.ranks = data, c, device, ranks
        self.step = 0
        self.updating = False  # true while weights and step do not belong together: such a state must not be saved
        self.num_styles = len(teachers)
        self.kind = kind or kind_of(base, teachers)
        self.schedule = NoiseSchedule(base.zero_snr)
        self.objective = Objective.of(c, self.num_styles, base.prediction, self.schedule)
        self.difficulty = difficulty_of(data, c, self.num_styles, self.schedule)
        shares = self.kind.shares(self.num_styles, c.guard)
        self.draws = Draws(data, c, self.num_styles, self.schedule, shares, self.difficulty, ranks)
        self.student = Student(base, teachers, c, device, ranks=ranks, autocast=self.autocast, stays=self.kind.stays)
        self.optimizer = make_optimizer(parameter_groups(self.student.unet, c), c, device)
        self.discriminator: Discriminator | None = None
        self.discriminator_optimizer: torch.optim.Optimizer | None = None
        if c.lambda_adv:
            self.discriminator = Discriminator(
                base, self.num_styles, self.schedule, c.seed, device, c.gradient_checkpointing, self.autocast
            )
            self.discriminator_optimizer = torch.optim.AdamW(self.discriminator.head.parameters(), lr=c.adv_lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=c.precision == "fp16")
        self.targets = Targets(
            base, teachers, c, device, autocast=self.autocast,
            stored=data.has_targets, base_stays=self.discriminator is not None, late=ranks.world > 1,
        )  # fmt: skip

    # --- the loop, top to bottom --------------------------------------------------------------------------------------

    def run(self) -> Iterator[Metrics]:
        """Train from ``self.step`` to the last step, yielding after each. The caller sets ``draws.final_data`` before the final stage.

        Raises ValueError where the student's loss or gradient is not finite, before its weights change. With fp16 a gradient that is not
        finite skips the update, and the step still counts. The discriminator is not checked.
        """
        while self.step < self.config.all_steps:
            yield self.train_step()

    def train_step(self) -> Metrics:
        """batch -> teachers, student -> losses -> backward -> clip -> numbers to the CPU -> rows of other processes -> finite? -> update ->
        running average."""
        started, moved, c = time.perf_counter(), self.targets.pool.moved_bytes, self.config
        self.kind.before_step(self)
        self._zero_grad()
        micro_batches: list[MicroBatch] = []
        with torch.enable_grad():
            for k in range(c.accumulate):
                number = self.step * c.accumulate + k
                batch = self.draws(number)
                with without_sync(self.student.forward, last=k + 1 == c.accumulate):
                    losses = self.losses(batch, number)
                    loss = self.objective.total(losses, batch, self.step)
                    self._backward(loss, len(batch), len(batch.global_batch))
                if losses.any_judged:
                    everyone = int((batch.global_batch.teacher < self.num_styles).sum())
                    judged = self.objective.discriminator_total(losses, batch)
                    self._backward(judged, int(losses.judged.sum()), everyone)
                micro_batches.append(MicroBatch(batch, losses, loss.detach()))
                if (
                    not self.difficulty or k + 1 < c.accumulate
                ):  # adaptive sampling draws the next step's batches after the update
                    self._look_ahead(number + 1)  # the device is still busy
        micro_batches, norm = on_cpu(micro_batches, self._clip())  # the one moment at which the device is waited for
        micro_batches = gathered(micro_batches, self.objective, self.step, self.ranks)
        for one in micro_batches:
            self._check_finite(one)
        self._check_norm(norm)
        lr = learning_rate(c, self.step)
        with self.kind.around_update(self):
            self._update(micro_batches, lr)
        if self.difficulty:  # only now it is known how the next rows are drawn
            self._look_ahead(self.step * c.accumulate)
        metrics = measured(micro_batches, self.names, step=self.step, steps=c.all_steps, lr=lr, grad_norm=norm)
        metrics.seconds = time.perf_counter() - started
        metrics.moved_bytes = self.targets.pool.moved_bytes - moved
        return metrics

    def losses(self, batch: Batch, number: int = 0) -> Losses:
        """eq. 9 to 11 of every row of a batch, or what the run's kind has instead; ``number`` chooses the noise that the discriminator
        sees."""
        if (own := self.kind.losses(self, batch, number)) is not None:
            return own
        features = self.config.lambda_feat > 0
        x_t, t = sent(batch.x_t, self.device), sent(batch.t, self.device)
        teacher = self.targets(batch, x_t, t, features)
        style = style_rows(batch.teacher, self.num_styles)
        student = self.student.predict(x_t, t, batch.caption, style, features=features)
        view = None
        if self.discriminator:
            view = self.discriminator.view(batch, number, x_t=x_t, t=t, backbone=self.targets.pool.get(self.num_styles))
        return self.objective.losses(batch, student, teacher, view)

    def _backward(self, loss: Tensor, rows: int, of_all: int) -> None:
        """Gradients are averaged over the processes, whose shares of the rows may differ."""
        share = self.ranks.world * (rows / of_all)
        self.scaler.scale(share * loss / self.config.accumulate).backward()

    def _check_finite(self, one: MicroBatch) -> None:
        if torch.isfinite(one.loss):
            return
        score, _ = by_teacher([one], self.names)
        bad = [name for name, value in score.items() if not math.isfinite(value)]
        raise AgreedError(
            f"the loss is not finite at step {self.step + 1} (teacher: {', '.join(bad) or 'all, in the feature or adversarial loss'}): "
            + (
                self._not_the_students(one.batch.global_batch)
                or "lower the learning rate or use precision fp32 or bf16"
            )
        )

    @torch.no_grad()
    def _not_the_students(self, batch: Batch) -> str:
        """What else than the student is to blame for a loss that is not finite: the data, or a teacher. "" for nothing that is seen.
        With several processes only the data are looked at, which each of them has whole."""
        names = [*self.names, "the base"]

        def row(i: int) -> str:
            caption = self.data.prompts[int(batch.caption[i])]
            return f"row {i} of the batch ('{names[int(batch.teacher[i])]}', timestep {int(batch.t[i])}, caption {caption[:60]!r})"

        if bad := bad_rows(batch.x_t):
            return f"the data have NaN or infinite numbers in {row(bad[0])}: check the latents"
        if batch.target is not None and (bad := bad_rows(batch.target)):
            return f"the stored predictions have NaN or infinite numbers in {row(bad[0])}: make the rollouts again"
        if self.ranks.world > 1:
            return ""
        target = self.targets(batch, batch.x_t.to(self.device), batch.t.to(self.device)).out
        if bad := bad_rows(target):
            where = row(bad[0])
            return f"the teacher itself predicts NaN or infinite numbers in {where}: set teacher_dtype to fp32, or get its file again"
        return ""

    def _clip(self) -> Tensor:
        """Limit the gradients (in place); returns their norm before that, a number on the device."""
        self.scaler.unscale_(self.optimizer)
        longest = self.config.grad_clip or math.inf
        return full_tensor(torch.nn.utils.clip_grad_norm_(self.student.trained.values(), longest))

    def _check_norm(self, norm: float) -> None:
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # fp16's scaler skips such a step by itself
            raise AgreedError(
                f"the gradients are not finite at step {self.step + 1}: lower the learning rate or use precision fp32"
            )

    def _update(self, micro_batches: Sequence[MicroBatch], lr: float) -> None:
        """Step, average, note what was hard. micro_batches: of all processes, on the CPU."""
        if self.discriminator and self.ranks.world > 1 and any(one.losses.any_judged for one in micro_batches):
            average_gradients(self.discriminator.head.parameters(), self.ranks)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.updating = True
        self.scaler.step(self.optimizer)
        if self.discriminator_optimizer and any(one.losses.any_judged for one in micro_batches):
            self.scaler.step(self.discriminator_optimizer)
        self.scaler.update()
        self.step += 1
        self.student.update_average()
        if self.difficulty:
            for batch, losses in ((one.batch, one.losses) for one in micro_batches):
                self.difficulty.see(batch.teacher, batch.t, self.objective.weighted_score(losses, batch))
        self.updating = False

    # --- what the loop needs ------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager:
        return autocast(self.config, self.device)

    @property
    def names(self) -> list[str]:
        """The teachers' names."""
        return [teacher.name for teacher in self.teachers]

    def student_weights(self, averaged: bool = True) -> dict[str, Tensor]:
        """Of the finished student's file: see ``Student.state_dict``."""
        return self.kind.finished(self.student.state_dict(averaged))

    def _zero_grad(self) -> None:
        for optimizer in (self.optimizer, self.discriminator_optimizer):
            if optimizer:
                optimizer.zero_grad(set_to_none=True)

    def _look_ahead(self, number: int) -> None:
        """Read the next batch and send for its first teacher."""
        batch = self.draws.look_ahead(number)
        if batch is not None and (batch.target is None or self.config.lambda_feat):
            self.targets.prefetch(batch)
