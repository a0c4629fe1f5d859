"""The distillation loop of DMM (arXiv:2504.12364, Sec. 3.4 and Alg. 1), of one process or of one among several.

Contract of a step: a batch mixes styles; the student runs ONCE on the whole batch with one style row per sample; each teacher
runs on its own rows only. Student and teacher see the same x_t, t and the same dropped captions. The loop yields metrics;
progress bars, pictures and files are the caller's.

Several processes (``ranks``) draw the same batch, and each works on its share of the rows: whoever they are, it is one step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...dmm_core.metadata import StyleInfo
from ...dmm_core.schedule import NoiseSchedule
from ...dmm_core.unet import UNet
from ..config import TrainConfig, check_names
from ..data.batches import Batch, Draw, TrainingData
from ..data.difficulty import Difficulty
from ..parallel.ranks import AgreedError, Ranks
from ..parallel.sharding import add_up, check_parallel, own, replicate, share, to_file, whole, without_sync
from ..progress import Tick
from ..seeds import hash_seed
from ..teachers.pool import Rack
from ..teachers.teacher import Teacher, check_architectures, check_predictions, check_schedules, check_text
from .adapters import folded
from .adversary import Adversary, draw_renoise
from .ema import PowerEMA
from .losses import feature_loss, score_loss, timestep_weights
from .optimizers import make_optimizer
from .student import new_student, parameter_groups, trained

logger = logging.getLogger(__name__)

BASE = "(no style)"
"""The name under which style-less rows are reported."""
EMA_EVERY_ON_CPU = 8
"""Steps between updates of an average that is kept in RAM: each one copies the student there."""


@dataclass
class Losses:
    """Of one forward, before weighting. score (eq. 9) and feature (eq. 10): (B,), ``feature`` zero where it is off.

    adversarial and discriminator (the two sides of eq. 11): of the rows with a style, or None without a discriminator.
    """

    score: Tensor
    feature: Tensor
    adversarial: Tensor | None = None
    discriminator: Tensor | None = None


@dataclass
class Metrics:
    """What one step did. ``score`` and ``count`` are per teacher name: mean eq. 9 loss of its rows, number of rows.

    loss is the weighted sum that the student follows; feature, adversarial and discriminator are unweighted means, the last two
    None without a discriminator. Where rows were not drawn evenly, these and ``score`` estimate what the means over evenly drawn
    teachers and timesteps are. seconds: of the step.
    """

    step: int
    steps: int
    loss: float
    feature: float
    score: dict[str, float]
    count: dict[str, int]
    lr: float
    grad_norm: float
    seconds: float = 0.0
    adversarial: float | None = None
    discriminator: float | None = None


@dataclass
class Distillation:
    """N teachers -> one student with N styles.

    base: the model that style-less rows are distilled to and, with init "base", the student's start; its contexts are the
    student's. Where it is a DMM model, the student goes on from it: teachers that are its own styles are the *guarded* ones, and
    the frozen base speaks for them (Sec. 3.5). final_data: what the steps after ``config.steps`` train on; it can be set until they
    begin. Raises ValueError for teachers of another architecture, bad names or a bad config.
    """

    base: Teacher
    teachers: Sequence[Teacher]
    data: TrainingData
    config: TrainConfig
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    final_data: TrainingData | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        c = self.config
        c.check()
        check_parallel(c, self.ranks.world)
        check_names([teacher.name for teacher in self.teachers])
        check_architectures(self.base.unet.config, [(t.name, t.unet.config) for t in self.teachers])
        if self.data.shape[0] != self.base.unet.config.in_channels:
            raise ValueError(
                f"latents have {self.data.shape[0]} channels, the models take {self.base.unet.config.in_channels}"
            )
        check_schedules(self.base.zero_snr, [(t.name, t.zero_snr) for t in self.teachers])
        check_predictions(self.base, self.teachers)
        check_text((self.base, *self.teachers))
        self.schedule = NoiseSchedule(self.base.zero_snr)
        self.loss_weights = timestep_weights(c.loss_weight, self.schedule, self.base.prediction, c.loss_clamp)
        self.difficulty = None
        if c.sampling == "adaptive" and self.data.has_targets:
            # Not refused: presets have it, and are for all data.
            logger.info("rollouts bring their teachers and timesteps with them: sampling is uniform")
        elif c.sampling == "adaptive":
            self.difficulty = Difficulty(self.num_styles, len(self.schedule), c.adaptive_power, c.adaptive_floor)
        self.step = 0
        self.updating = False  # true while weights and step do not belong together: such a state must not be saved
        self.sharded = c.parallel == "fsdp" and self.ranks.world > 1
        self.student = new_student(self.base.unet, self.teachers, c)
        if self.sharded:
            share(self.student, c.precision, self.device, self.ranks.world)
        self.student.to(self.device)
        self.trained = trained(self.student)
        self.optimizer = make_optimizer(parameter_groups(self.student, c), c, self.device)
        on_cpu = c.ema_device == "cpu" and self.device.type != "cpu"
        place = {"device": "cpu", "every": EMA_EVERY_ON_CPU} if on_cpu else {}
        self.ema = PowerEMA(self.own_weights(), c.ema_gamma, **place) if c.ema_gamma else None
        self.adversary = None
        if c.lambda_adv:
            channels = self.base.unet.config.channel_mult[-1] * self.base.unet.config.model_channels
            self.adversary = Adversary(channels, self.num_styles, c.adv_lr, c.seed, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=c.precision == "fp16")
        for teacher in (self.base, *self.teachers):
            teacher.weights_sha256  # noqa: B018  (remembered: the rack converts weights in place)
        self.rack = Rack(
            [*(t.unet for t in self.teachers), self.base.unet],
            self.device,
            # Data that bring the targets with them need no teacher on the device, unless its blocks are looked at.
            "offload" if self.data.has_targets and not c.lambda_feat else c.residency,
            self._teacher_dtype(),
            resident=self._needed_always(),
            slots=c.teacher_slots,
            late=self.ranks.world > 1,
        )
        self._old_rows = self._rows_of_old_styles()
        several = self.ranks.world > 1 and not self.sharded
        forward = replicate(self.student, self.device) if several else self.student
        self._forward_student = torch.compile(forward) if c.compile else forward
        self._drawn: tuple[int, Batch] | None = None

    @property
    def num_styles(self) -> int:
        return len(self.teachers)

    def styles(self) -> list[StyleInfo]:
        """Of the finished student, in the order of its codebook."""
        return [teacher.info() for teacher in self.teachers]

    def own_identity(self) -> dict[str, str]:
        """What else must be the same for a state to be gone on from: settings of another kind of run than this one."""
        return {}

    def what_changed(self) -> dict[str, list[str]]:
        """For the recipe of a model that had styles before."""
        old = set(self.guarded)
        return {"added": [teacher.name for i, teacher in enumerate(self.teachers) if i not in old]}

    def last_word(self, tick: Tick | None = None) -> str:
        """What a kind of run has to say about its finished student, in lines of text."""
        return ""

    @property
    def guarded(self) -> list[int]:
        """Styles that the base has already and keeps."""
        return [i for i, t in enumerate(self.teachers) if t.unet is self.base.unet and t.style is not None]

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Of the rows that have a style, by teacher (they sum to 1): ``config.guard`` of them for the guarded styles together, if some
        are and some are not; else None, which is equal shares."""
        old, c = set(self.guarded), self.config
        new = self.num_styles - len(old)
        if not old or not new:
            return None
        return tuple(c.guard / len(old) if i in old else (1 - c.guard) / new for i in range(self.num_styles))

    def _needed_always(self) -> list[int]:
        """Models that stay on the device: the discriminator looks through the base, and a DMM model speaks in every batch."""
        if self.base.unet.config.num_styles:
            return [i for i, t in enumerate((*self.teachers, self.base)) if t.unet is self.base.unet]
        return [self.num_styles] if self.adversary else []

    def _teacher_dtype(self) -> torch.dtype | None:
        """None keeps what the files have."""
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        kind = self.config.teacher_dtype
        if kind == "auto":
            kind = self.config.precision if self.device.type == "cuda" else "fp32"
        return kinds[kind]

    def learning_rate(self, step: int) -> float:
        """Of the step that follows ``step`` finished ones: linear warm-up, then the schedule, then the final stage's own."""
        c = self.config
        if c.final_steps and step >= c.steps:
            return c.final_lr or c.lr
        if step < c.warmup:
            return c.lr * (step + 1) / c.warmup
        done = (step - c.warmup) / max(1, c.steps - c.warmup)
        if c.lr_schedule == "cosine":
            return c.lr * 0.5 * (1 + math.cos(math.pi * done))
        return c.lr * (1 - done) if c.lr_schedule == "linear" else c.lr

    def run(self) -> Iterator[Metrics]:
        """Train from ``self.step`` to the last step, yielding after each. Raises ValueError on a non-finite loss."""
        while self.step < self.config.all_steps:
            yield self.train_step()

    def train_step(self) -> Metrics:
        started = time.perf_counter()
        c = self.config
        self.optimizer.zero_grad(set_to_none=True)
        if self.adversary:
            self.adversary.optimizer.zero_grad(set_to_none=True)
        parts: list[tuple[Batch, Losses, Tensor]] = []
        with torch.enable_grad():
            for k in range(c.accumulate):
                number = self.step * c.accumulate + k
                batch = self._batch(number)
                # Gradients are averaged over the processes, whose shares of the rows may differ.
                rows, styled = (self.ranks.world * part for part in self._part_of_rows(batch))
                with without_sync(self._forward_student, last=k + 1 == c.accumulate):
                    losses = self.losses(batch, number)
                    loss = self._weighted(losses, batch)
                    self.scaler.scale(rows * loss / c.accumulate).backward()
                if losses.discriminator is not None and len(losses.discriminator):
                    weight = self._weight(batch, styled=True)
                    self.scaler.scale(styled * mean(losses.discriminator, weight) / c.accumulate).backward()
                parts.append((batch, losses, loss.detach()))
                if not self.difficulty or k + 1 < c.accumulate:
                    self._look_ahead(number + 1)  # the device is still busy
        parts = self._of_all(parts)
        for part in parts:
            self._check_finite(*part)
        if self.adversary and self.ranks.world > 1 and any(len(losses.discriminator) for _, losses, _ in parts):
            add_up(self.adversary.head.parameters(), self.ranks)
        lr = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        norm = self._update(parts)
        if self.difficulty:  # only now it is known how the next rows are drawn
            self._look_ahead(self.step * c.accumulate)
        metrics = self._metrics(parts, lr, norm)
        metrics.seconds = time.perf_counter() - started
        return metrics

    def _part_of_rows(self, batch: Batch) -> tuple[float, float]:
        """This process's share of a batch's rows, and of those with a style: 1 and 1 where it is alone."""
        styled, of_all = (int((b.teacher < self.num_styles).sum()) for b in (batch, batch.of_all))
        return len(batch) / len(batch.of_all), styled / max(1, of_all)

    def _of_all(self, parts: list[tuple[Batch, Losses, Tensor]]) -> list[tuple[Batch, Losses, Tensor]]:
        """Every process's rows in place of this one's, so that all of them know what one process would know."""
        if self.ranks.world == 1:
            return parts
        tables = []  # (B, 4) of each forward: score, feature, adversarial, discriminator; zero in the others' rows
        for batch, losses, _ in parts:
            table = torch.zeros(len(batch.of_all), 4)
            mine = table[batch.start : batch.start + len(batch)]
            mine[:, 0], mine[:, 1] = losses.score.detach().cpu(), losses.feature.detach().cpu()
            if losses.discriminator is not None:
                styled = batch.teacher < self.num_styles
                mine[styled, 2] = losses.adversarial.detach().float().cpu()
                mine[styled, 3] = losses.discriminator.detach().float().cpu()
            tables.append(table)
        self.ranks.sum(every := torch.cat(tables))
        everyone = []
        for (batch, losses, _), table in zip(parts, every.split([len(table) for table in tables])):
            styled = batch.of_all.teacher < self.num_styles
            pair = (table[styled, 2], table[styled, 3]) if losses.discriminator is not None else (None, None)
            losses = Losses(table[:, 0], table[:, 1], *pair)
            everyone.append((batch.of_all, losses, self._weighted(losses, batch.of_all)))
        return everyone

    def _weighted(self, losses: Losses, batch: Batch) -> Tensor:
        c, weight = self.config, self._weight(batch)
        loss = mean(self._score(losses, batch), weight) + c.lambda_feat * mean(losses.feature, weight)
        if losses.adversarial is not None and len(losses.adversarial) and self.step >= c.adv_start:
            # A mean over the whole batch, as of the other losses: rows without a style count as zero.
            adversarial, weight = losses.adversarial, self._weight(batch, styled=True)
            if weight is not None:
                adversarial = adversarial * weight.to(adversarial)
            loss = loss + c.lambda_adv * adversarial.sum() / len(losses.score)
        return loss

    def _score(self, losses: Losses, batch: Batch) -> Tensor:
        """eq. 9 per row, as much as it counts at its timestep."""
        if self.loss_weights is None:
            return losses.score
        return losses.score * self.loss_weights[batch.t].to(losses.score.device)

    def _weight(self, batch: Batch, styled: bool = False) -> Tensor | None:
        """What rows, or those with a style, count in the objective; None for all the same."""
        return self._even(batch, styled) if self.config.adaptive_correct else None

    def _even(self, batch: Batch, styled: bool = False) -> Tensor | None:
        """What rows, or those with a style, count in a mean over evenly drawn ones; None for all the same."""
        if batch.weight is None:
            return None
        return batch.weight[batch.teacher < self.num_styles] if styled else batch.weight

    def _check_finite(self, batch: Batch, losses: Losses, loss: Tensor) -> None:
        if torch.isfinite(loss):
            return
        score, _ = self._per_teacher([(batch, losses, loss)])
        bad = [name for name, value in score.items() if not math.isfinite(value)]
        raise AgreedError(
            f"the loss is not finite at step {self.step + 1} (teacher: {', '.join(bad) or 'all, outside of the score'}): "
            "lower the learning rate or use precision fp32 or bf16"
        )

    def _update(self, parts: list[tuple[Batch, Losses, Tensor]]) -> float:
        """Clip, step, average, note what was hard. Raises ValueError, before anything changes, for gradients that are not finite."""
        c = self.config
        self.scaler.unscale_(self.optimizer)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.trained.values(), c.grad_clip or math.inf)))
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # fp16's scaler skips such a step by itself
            raise AgreedError(
                f"the gradients are not finite at step {self.step + 1}: lower the learning rate or use precision fp32"
            )
        self.updating = True
        self.scaler.step(self.optimizer)
        if self.adversary:
            self.scaler.step(self.adversary.optimizer)
        self.scaler.update()
        self.step += 1
        if self.ema:
            self.ema.update(self.own_weights())
        if self.difficulty:
            for batch, losses, _ in parts:
                self.difficulty.see(batch.teacher, batch.t, self._score(losses, batch).detach().cpu())
        self.updating = False
        return norm

    def _metrics(self, parts: list[tuple[Batch, Losses, Tensor]], lr: float, norm: float) -> Metrics:
        def over_all(name: str, styled: bool = False) -> float | None:
            values, weights = [], []
            for batch, losses, _ in parts:
                value = getattr(losses, name)
                if value is not None and len(value):
                    values.append(value.detach())
                    weights.append(self._even(batch, styled))
            if not values:
                return None
            return mean(torch.cat(values), None if weights[0] is None else torch.cat(weights)).item()

        score, count = self._per_teacher(parts)
        return Metrics(
            step=self.step,
            steps=self.config.all_steps,
            loss=torch.stack([loss for *_, loss in parts]).mean().item(),
            feature=over_all("feature"),
            score=score,
            count=count,
            lr=lr,
            grad_norm=norm,
            adversarial=over_all("adversarial", styled=True),
            discriminator=over_all("discriminator", styled=True),
        )

    def _per_teacher(self, parts: list[tuple[Batch, Losses, Tensor]]) -> tuple[dict[str, float], dict[str, int]]:
        teacher = torch.cat([batch.teacher for batch, *_ in parts])
        score = torch.cat([losses.score.detach() for _, losses, _ in parts]).cpu()
        if parts[0][0].t_weight is not None:
            score = score * torch.cat([batch.t_weight for batch, *_ in parts])
        means, counts = {}, {}
        for i in teacher.unique().tolist():
            name = self.teachers[i].name if i < self.num_styles else BASE
            mine = teacher == i
            means[name], counts[name] = score[mine].mean().item(), int(mine.sum())
        return means, counts

    # --- batches ------------------------------------------------------------------------------------------------------

    def _batch(self, number: int) -> Batch:
        """Batch ``number``, counted over forwards, from the data of its stage."""
        if self._drawn and self._drawn[0] == number:
            return self._drawn[1]
        c = self.config
        data, seed, first = self.data, c.seed, 0
        if number >= c.steps * c.accumulate:
            data, seed, first = self.final_data, hash_seed(c.seed, "final stage"), c.steps * c.accumulate
        chances = self.difficulty.chances(self.shares) if self.difficulty else None
        draw = Draw(
            seed, c.batch_size, self.num_styles, c.base_share, c.caption_dropout, self.schedule, self.shares, chances
        )
        return self.own_rows(data.batch(number - first, draw))

    def own_rows(self, batch: Batch) -> Batch:
        """Those of a batch that this process works on: all, where it is alone."""
        return batch if self.ranks.world == 1 else batch.part(self.ranks.part(len(batch)))

    def _look_ahead(self, number: int) -> None:
        """Read the next batch and send for its first teacher."""
        c = self.config
        last = (c.all_steps if self.final_data else c.steps) * c.accumulate
        if number >= last:
            return
        batch = self._batch(number)
        self._drawn = (number, batch)
        if batch.target is None or c.lambda_feat:
            self.rack.prefetch(int(batch.teacher[0]))

    def load_difficulty(self, state: dict[str, Tensor]) -> None:
        """Go on with the running losses of a saved state."""
        self.difficulty.load_state_dict(state)
        self._drawn = None  # by other chances

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, number: int = 0) -> Losses:
        """All losses of a batch; ``number`` chooses the noise that the discriminator sees."""
        want_features = self.config.lambda_feat > 0
        x_t, t = batch.x_t.to(self.device), batch.t.to(self.device)
        target, target_features = self.targets(batch, x_t, t, want_features)
        out, features = self.predict(batch, x_t, t, want_features)
        score = score_loss(out, target)
        losses = Losses(score, feature_loss(features, target_features) if want_features else torch.zeros_like(score))
        if self.adversary:
            self._add_adversarial(losses, batch, number, x_t, t, out, target)
        return losses

    def predict(self, batch: Batch, x_t: Tensor, t: Tensor, want_features: bool) -> tuple[Tensor, list[Tensor]]:
        """What the student says to a batch, each row in its teacher's style (B, C, h, w), and its blocks' outputs."""
        with self.autocast():
            context, y = self.base.conditioning(batch.rows, x_t.shape[2:], self.device)
            style = self.style_rows(batch.teacher).to(self.device)
            out = self._forward_student(x_t, t, context, y=y, style=style, features=want_features)
        out, features = out if want_features else (out, [])
        return out.float(), features

    @torch.no_grad()
    def targets(self, batch: Batch, x_t: Tensor, t: Tensor, want_features: bool) -> tuple[Tensor, list[Tensor]]:
        """What the teachers predict, as the student would say it (B, C, h, w), and their blocks' outputs."""
        everyone = (*self.teachers, self.base)
        needed = batch.teacher.unique().tolist()
        if batch.target is not None and not want_features:
            whole = batch.target.to(self.device)
            mine = [(batch.teacher == i).to(self.device) for i in needed]
            return torch.cat([self._as_student(whole[m], x_t[m], t[m], everyone[i]) for i, m in zip(needed, mine)]), []
        order, targets, features = [], [], []
        groups = self._by_unet(needed)
        for i, unet in self.rack.visit(list(groups)):
            mine = torch.isin(batch.teacher, torch.tensor(groups[i]))
            there, kind = mine.to(self.device), unet.dtype
            context, y = everyone[i].conditioning(batch.rows[mine], x_t.shape[2:], self.device)
            with self.autocast():
                out = unet(
                    x_t[there].to(kind),
                    t[there],
                    context.to(kind),
                    y=None if y is None else y.to(kind),
                    style=self._old_style(batch.teacher[mine]) if unet.config.num_styles else None,
                    features=want_features,
                )
            out, blocks = out if want_features else (out, [])
            targets.append(self._as_student(out.float(), x_t[there], t[there], everyone[i]))
            features.append(blocks)
            order.append(mine.nonzero()[:, 0])
        target, blocks = torch.cat(targets), [torch.cat(block) for block in zip(*features)]
        places = torch.cat(order)
        if torch.equal(places, torch.arange(len(places))):
            return target, blocks
        back = places.argsort().to(self.device)  # the rows of a UNet with several styles were not neighbours
        return target[back], [block[back] for block in blocks]

    def _by_unet(self, needed: Sequence[int]) -> dict[int, list[int]]:
        """Indices of models that answer in one forward, by the first of them: they share UNet and text states."""
        everyone, groups = (*self.teachers, self.base), {}
        for i in needed:
            mate = next((j for j in groups if everyone[j].unet is everyone[i].unet), None)
            if mate is None or everyone[mate].contexts is not everyone[i].contexts:
                groups[i] = [i]
            else:
                groups[mate].append(i)
        return groups

    def _rows_of_old_styles(self) -> Tensor:
        """(N+1, n+1): how the base is asked for what a teacher index stands for; zeros where another model answers."""
        rows = [teacher.style_row for teacher in (*self.teachers, self.base)]
        empty = torch.zeros(1, self.base.unet.config.num_styles + 1)
        return torch.cat([empty if row is None else row for row in rows]).to(self.device)

    def _old_style(self, teacher: Tensor) -> Tensor:
        """Teacher indices (B,), all of styles of the base -> its style rows (B, n+1)."""
        return self._old_rows[teacher.to(self.device)]

    def _add_adversarial(
        self, losses: Losses, batch: Batch, number: int, x_t: Tensor, t: Tensor, out: Tensor, target: Tensor
    ) -> None:
        """eq. 11 for the rows that have a style; eq. 12 turns predictions into clean latents."""
        styled = (batch.teacher < self.num_styles).to(self.device)
        style = batch.teacher.to(self.device)[styled]
        if not len(style):
            losses.adversarial = losses.discriminator = losses.score.new_zeros(0)
            return
        noise = draw_renoise(self.config.seed, number, tuple(batch.of_all.x_t.shape), self.schedule)
        mine = slice(batch.start, batch.start + len(batch))
        noise.t, noise.eps = noise.t[mine].to(self.device)[styled], noise.eps[mine].to(self.device)[styled]
        context, y = self.base.conditioning(batch.rows[styled.cpu()], x_t.shape[2:], self.device)
        backbone = self.rack.get(self.num_styles)
        seen = []
        for prediction, gradients in ((out, True), (target, False)):
            x0 = self.schedule.to_x0(prediction[styled], x_t[styled], t[styled], self.base.prediction)
            with torch.set_grad_enabled(gradients), self.autocast():
                backbone.gradient_checkpointing = self.config.gradient_checkpointing
                seen.append(self.adversary.features(backbone, x0, noise, self.schedule, context, y))
        student, teacher = seen
        losses.adversarial = self.adversary.generator_loss(student, style)
        losses.discriminator = self.adversary.discriminator_loss(student, teacher, style)

    def style_rows(self, teacher: Tensor) -> Tensor:
        """Teacher indices (B,) -> style rows (B, N+1); index N (the base) gives the row of zeros, "no style"."""
        hot = torch.nn.functional.one_hot(teacher, self.num_styles + 1).float()
        rows = hot.clone()
        rows[:, -1] = 1.0 - hot[:, -1]  # the last column is the strength
        return rows

    def _as_student(self, out: Tensor, x_t: Tensor, t: Tensor, teacher: Teacher) -> Tensor:
        """A teacher's output in the student's parameterisation (the base's), so that eps and v teachers can be mixed."""
        if teacher.prediction == self.base.prediction:
            return out
        if self.base.prediction == "eps":
            return self.schedule.to_eps(out, x_t, t, teacher.prediction)
        return self.schedule.to_v(out, x_t, t, teacher.prediction)

    def autocast(self):
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.config.precision not in kinds:
            return contextlib.nullcontext()
        # Its copies of the weights would outlive the blocks that are recomputed to save memory.
        cache = not self.config.gradient_checkpointing
        return torch.autocast(self.device.type, kinds[self.config.precision], cache_enabled=cache)

    # --- weights ------------------------------------------------------------------------------------------------------

    def own_weights(self) -> list[tuple[str, Tensor]]:
        """The parameters that learn, by name; of those that are shared out this process's part, in their memory."""
        return [(name, own(p)) for name, p in self.trained.items()]

    def student_weights(self, averaged: bool = True) -> dict[str, Tensor]:
        """The student's state dict on the CPU, adapters folded in; its average where there is one and ``averaged`` is set.

        Where the student is shared out, this is for all processes together, and the first one gets it (the others nothing).
        """
        main = self.ranks.is_main
        with self.averaged() if averaged else contextlib.nullcontext():
            state = {k: to_file(v, main) for k, v in self.student.state_dict().items()}
            if self.sharded and not main:
                return {}
            return {k: v.float().cpu().clone() for k, v in folded(self.student, state).items()}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[UNet]:
        """Inside, the student holds its averaged weights (if there are any): for pictures on the way."""
        if not (self.ema and self.ema.ready):
            yield self.student
            return
        raw = {name: p.to("cpu", copy=True) for name, p in self.own_weights()}
        try:
            self._put_own(self.ema.average)
            yield self.student
        finally:
            self._put_own(raw)

    def _put_own(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.own_weights():
            p.copy_(weights[name])


def mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Of values (B,), each times its weight (B,); the weights' own mean is 1 on average."""
    return values.mean() if weight is None else (values * weight.to(values)).mean()
