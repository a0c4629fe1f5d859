"""The distillation losses of DMM (arXiv:2504.12364, Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...dmm_core.schedule import NoiseSchedule


def score_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """eq. 9 per sample: mean over (C, h, w) of (eps_stu - eps_tea)^2. (B, C, h, w) x 2 -> (B,) float32."""
    return (student.float() - teacher.float()).square().mean(dim=(1, 2, 3))


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """eq. 10 per sample: over all UNet blocks j the sum of the mean of (F_stu^j - F_tea^j)^2. -> (B,) float32.

    The mean within a block (rather than the sum of squares that eq. 10 prints) keeps the weight lambda_feat independent of
    resolution and width, as in the authors' released trainer.
    """
    if len(student) != len(teacher):
        raise ValueError(f"the student has {len(student)} blocks, the teacher {len(teacher)}: not one architecture")
    return torch.stack([score_loss(s, t) for s, t in zip(student, teacher)]).sum(dim=0)


def timestep_weights(kind: str, schedule: NoiseSchedule, prediction: str, clamp: float) -> Tensor | None:
    """What eq. 9 of a student that predicts ``prediction`` counts at each timestep: (1000,) float32, mean 1; None for "plain".

    As weights of the squared eps error, with SNR = abar / (1 - abar) = 1 / sigma^2 and at one x_t:

    - "eps": 1;
    - "v": min((SNR + 1) / SNR, clamp), as the squared v error is that many squared eps errors;
    - "x0": min(1 / SNR, clamp), likewise;
    - "min_snr": min(SNR, clamp) / SNR (arXiv:2303.09556, Sec. 3.4).

    A squared v error counts SNR / (SNR + 1) of that. Raises ValueError for another kind.
    """
    if kind == "plain":
        return None
    per_snr = schedule.sigmas.double().square()  # 1 / SNR
    kinds = {
        "eps": torch.ones_like(per_snr),
        "v": (1 + per_snr).clamp(max=clamp),
        "x0": per_snr.clamp(max=clamp),
        "min_snr": (clamp * per_snr).clamp(max=1),
    }
    if kind not in kinds:
        raise ValueError(f"loss_weight is {kind!r}: choose one of plain, {', '.join(kinds)}")
    weights = kinds[kind] / (1 + per_snr) if prediction == "v" else kinds[kind]
    return (weights / weights.mean()).float()
