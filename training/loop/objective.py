"""The objective of DMM (arXiv:2504.12364, Sec. 3.4): eq. 9 to 12, and what each row of a batch counts in them.

    L = mean over rows of importance * (w_t L_score + lambda_feat L_feat + lambda_adv L_adv)

with w_t and the importance 1 unless a run asks for them. Eq. 9 and 10 are means over elements where the paper has
sums: so the lambdas do not
depend on a model's size.

Pure: predictions in, losses out. There is no optimiser here, no process and no file. ``trainer`` has the loop around it, ``losses`` the
formulas of eq. 9 and 10, ``adversary`` those of eq. 11, ``dmm_core.schedule`` that of eq. 12.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dmm_core.schedule import NoiseSchedule
from ..config import TrainConfig
from ..data.batches import Batch
from ..parallel.devices import sent
from ..teachers.teacher import Prediction
from .adversary import View, discriminator_loss, generator_loss
from .losses import feature_loss, score_loss, timestep_weights


@dataclass
class Losses:
    """Of every row of a batch, before weighting: (B,) float32 each, zero where a row has none.

    score: eq. 9. feature: eq. 10, zero where it is off. adversarial, discriminator: the two sides of eq. 11, zero but for the rows that
    are ``judged`` (B,) bool on the CPU: those with a style, where there is a discriminator.
    """

    score: Tensor
    feature: Tensor
    adversarial: Tensor
    discriminator: Tensor
    judged: Tensor

    @property
    def any_judged(self) -> bool:
        return bool(self.judged.any())


@dataclass(frozen=True)
class Objective:
    """num_styles: N, the teacher index of rows without a style. prediction: what the student predicts, "eps" or "v". timestep_weights:
    (1000,) what eq. 9 counts at each timestep, None for the same everywhere. adv_start: the step from which the student follows eq. 11.
    corrected: whether rows that were drawn more often count for less."""

    num_styles: int
    prediction: str
    lambda_feat: float
    lambda_adv: float
    adv_start: int
    timestep_weights: Tensor | None
    corrected: bool

    @classmethod
    def of(cls, config: TrainConfig, num_styles: int, prediction: str, schedule: NoiseSchedule) -> Objective:
        c = config
        weights = timestep_weights(c.loss_weight, schedule, prediction, c.loss_clamp)
        return cls(num_styles, prediction, c.lambda_feat, c.lambda_adv, c.adv_start, weights, c.adaptive_correct)

    # --- what each row loses ------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, student: Prediction, teacher: Prediction, view: View | None = None) -> Losses:
        """eq. 9 to 11 of every row.

        student: its prediction, with gradients. teacher: of each row's own teacher, in the student's parameterisation. view: how the
        discriminator sees the rows that have a style, None where there is none.
        """
        score = score_loss(student.out, teacher.out)  # eq. 9
        zero = torch.zeros_like(score)
        feature = feature_loss(student.features, teacher.features) if self.lambda_feat else zero  # eq. 10
        losses = Losses(score, feature, zero, zero, torch.zeros(len(batch), dtype=torch.bool))
        return (
            losses if view is None else self._judged(losses, batch, student=student.out, teacher=teacher.out, view=view)
        )

    def _judged(self, losses: Losses, batch: Batch, *, student: Tensor, teacher: Tensor, view: View) -> Losses:
        """eq. 11 and 12: ``losses`` with what the discriminator says of the clean latents that student and teacher predict."""
        judged = batch.teacher < self.num_styles  # (B,)
        style, rows = (sent(x, student.device) for x in (batch.teacher[judged], judged.nonzero()[:, 0]))
        fake = view(view.x0(student[rows], self.prediction))  # eq. 12
        with torch.no_grad():
            real = view(view.x0(teacher[rows], self.prediction))
        generator = generator_loss(view.head, fake, style)  # CE(D(x0_stu), i)
        discriminator = discriminator_loss(view.head, fake, real, style)  # CE(D(x0_tea), i) + CE(D(x0_stu), N + i)
        return dataclasses.replace(
            losses,
            adversarial=losses.adversarial.index_copy(0, rows, generator),
            discriminator=losses.discriminator.index_copy(0, rows, discriminator),
            judged=judged,
        )

    # --- what the batch loses -----------------------------------------------------------------------------------------

    def total(self, losses: Losses, batch: Batch, step: int) -> Tensor:
        """What the student follows at ``step``: the weighted sum, a mean over all rows; those without a style count as zero in eq. 11."""
        importance = self.loss_importance(batch)
        loss = mean(self.weighted_score(losses, batch), importance)
        loss = loss + self.lambda_feat * mean(losses.feature, importance)
        if losses.any_judged and step >= self.adv_start:
            adversarial = of_rows(losses.adversarial, losses.judged)
            if importance is not None:
                adversarial = adversarial * sent(importance[losses.judged], adversarial.device)
            loss = loss + self.lambda_adv * adversarial.sum() / len(losses.score)
        return loss

    def discriminator_total(self, losses: Losses, batch: Batch) -> Tensor:
        """What the discriminator follows: a mean over the rows that it judged."""
        importance = self.loss_importance(batch)
        judged = of_rows(losses.discriminator, losses.judged)
        return mean(judged, None if importance is None else importance[losses.judged])

    def weighted_score(self, losses: Losses, batch: Batch) -> Tensor:
        """eq. 9 (B,), as much as it counts at each row's timestep."""
        if self.timestep_weights is None:
            return losses.score
        return losses.score * sent(self.timestep_weights[batch.t], losses.score.device)

    def loss_importance(self, batch: Batch) -> Tensor | None:
        """What each row counts in the objective (B,); None for all the same."""
        return batch.importance if self.corrected else None


def mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Of values (B,), each times its weight (B,); the weights' own mean is 1 on average."""
    return values.mean() if weight is None else (values * sent(weight.to(values.dtype), values.device)).mean()


def of_rows(values: Tensor, rows: Tensor) -> Tensor:
    """The values (B,) of the rows that are marked in ``rows`` (B,), bool on the CPU, so that no device has to say how many these are."""
    return values[sent(rows.nonzero()[:, 0], values.device)]
