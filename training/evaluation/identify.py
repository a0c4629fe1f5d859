"""The student as its own classifier: in which style would it have painted this picture?

A picture is noised, and the model is asked for the noise in each of its styles: the style under which it errs least is the one that
explains the picture best (arXiv:2303.16203, there for captions). Timesteps and noise are shared by all styles, so that what is
compared are differences, which vary much less than the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dmm_core.schedule import NoiseSchedule
from ...dmm_core.style import no_style_row, style_row
from ...dmm_core.style_value import NO_STYLE
from ...dmm_core.unet import UNetConfig
from ..data.buckets import bucket_sizes, choose_bucket, default_resolution, size_multiple
from ..loop.losses import score_loss
from ..seeds import hash_seed
from ..teachers.teacher import Teacher

LOWEST, HIGHEST = 50, 950
"""Timesteps between which pictures are judged: below nothing is hidden, above nothing is left of the picture."""
SURE, LIKELY = 4.0, 2.0
"""From this z of the best candidate against the second on, the answer is called sure or likely."""


@dataclass
class Verdict:
    """In which style the model would have painted one picture.

    names: of the candidates, the model's styles and perhaps "none". errors (K, candidates): mean squared error in eps of each of K draws
    of (t, eps), the same draws for all candidates.
    """

    names: list[str]
    errors: Tensor

    @property
    def means(self) -> Tensor:
        """Mean error of each candidate, (candidates,)."""
        return self.errors.mean(0)

    @property
    def order(self) -> list[int]:
        """Candidates from the best to the worst."""
        return self.means.argsort().tolist()

    @property
    def name(self) -> str:
        """Of the best candidate."""
        return self.names[self.order[0]]

    def z(self, other: int) -> float:
        """How many standard errors the best candidate is better than another, from the differences draw by draw."""
        difference = self.errors[:, other] - self.errors[:, self.order[0]]
        spread = difference.std() / len(difference) ** 0.5
        return (difference.mean() / spread).item() if spread > 0 else 0.0

    @property
    def confidence(self) -> str:
        """ "sure", "likely" or "unsure", by ``z`` of the best candidate against the second."""
        if len(self.names) == 1:
            return "the only candidate"
        z = self.z(self.order[1])
        return "sure" if z >= SURE else "likely" if z >= LIKELY else "unsure"

    def text(self) -> str:
        """The verdict and every candidate's score, best first."""
        best, *rest = self.order
        width = max(len(name) for name in self.names)
        second = f", before {self.names[rest[0]]}" if rest else ""
        lines = [f"{self.name} ({self.confidence}{second})"]
        lines.append(f"{self.names[best]:<{width}}  error {self.means[best]:.5f}")
        for i in rest:
            lines.append(
                f"{self.names[i]:<{width}}  error {self.means[i]:.5f}  worse by {self.z(i):.1f} standard errors"
            )
        return "\n".join(lines)


@torch.no_grad()
def identify(
    student: Teacher,
    styles: Sequence[str],
    latents: Tensor,
    rows: Tensor,
    *,
    draws: int = 32,
    seed: int = 0,
    with_none: bool = True,
    batch: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[Verdict]:
    """The model's answer for each of B pictures.

    student: a DMM model, on the device where it is to compute. styles: the names of all its styles. latents: (B, C, h, w) float, scaled
    as the UNet sees them. rows: (B,) captions, as rows of its text states. draws: (t, eps) for each picture, 2 or more. with_none: "none",
    no style, is a candidate too. batch: rows of one forward. on_batch: called after each forward with its number of rows; an exception
    that it raises ends the work. Raises ValueError where the names do not fit the model.
    """
    count = student.unet.config.num_styles
    if len(styles) != count:
        raise ValueError(f"{len(styles)} names for a model with {count} styles")
    names = [*styles, NO_STYLE] if with_none else list(styles)
    candidates = torch.cat([style_row(count, i) for i in range(count)] + [no_style_row(count)])[: len(names)]
    schedule = NoiseSchedule(student.zero_snr)
    g = torch.Generator().manual_seed(hash_seed(seed, "identify"))
    t = spread_timesteps(draws, g)
    eps = torch.randn(draws, *latents.shape[1:], generator=g)
    asked = [(k, i) for k in range(draws) for i in range(len(names))]  # all that one picture is asked
    errors = torch.empty(len(latents), draws, len(names))
    for picture, (x0, row) in enumerate(zip(latents.float(), rows)):
        for start in range(0, len(asked), batch):
            k, i = torch.tensor(asked[start : start + batch]).T
            error = _errors(
                student, schedule, x0.expand(len(k), -1, -1, -1), t[k], eps=eps[k], row=row, style=candidates[i]
            )
            errors[picture, k, i] = error.cpu()
            if on_batch:
                on_batch(len(k))
    return [Verdict(list(names), one) for one in errors]


def spread_timesteps(count: int, g: torch.Generator, low: int = LOWEST, high: int = HIGHEST) -> Tensor:
    """(count,) int64, rising: one drawn from each of so many equal parts of the timesteps from ``low`` to below ``high``."""
    t = low + (torch.arange(count) + torch.rand(count, generator=g)) * (high - low) / count
    return t.long().clamp(max=high - 1)


def _errors(
    student: Teacher, schedule: NoiseSchedule, x0: Tensor, t: Tensor, *, eps: Tensor, row: Tensor, style: Tensor
) -> Tensor:
    """Mean squared error in eps (B,), on the model's device. row: () the caption of all, a row of the text states."""
    device = next(student.unet.parameters()).device
    x_t, t, eps = (v.to(device) for v in (schedule.add_noise(x0, eps, t), t, eps))
    out = student.predict(x_t, t, row.expand(len(t)), style).out
    return score_loss(schedule.to_eps(out, x_t, t, student.prediction), eps)


def judged_size(config: UNetConfig, prediction: str, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels to which a picture of ``size`` (width, height) is scaled and cropped before it is judged: the bucket of
    its shape at the resolution that the model was trained at."""
    return choose_bucket(size, bucket_sizes(default_resolution(config, prediction), size_multiple(config)))


@dataclass
class Confusion:
    """What the student takes the teachers' pictures for. counts[i][j]: pictures by teacher i taken for candidate j (styles, "none").

    own: share of each teacher's that were recognised.
    """

    names: list[str]
    candidates: list[str]
    counts: list[list[int]]
    own: list[float]
    mean: float


def confusion(names: Sequence[str], verdicts: Sequence[Sequence[Verdict]]) -> Confusion:
    """From the verdicts on each teacher's pictures. names: the teachers', which are styles of the student."""
    candidates = verdicts[0][0].names
    counts = [[sum(v.name == candidate for v in group) for candidate in candidates] for group in verdicts]
    own = [row[candidates.index(name)] / sum(row) for name, row in zip(names, counts)]
    return Confusion(list(names), list(candidates), counts, own, sum(own) / len(own))
