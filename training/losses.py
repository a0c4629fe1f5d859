"""The distillation losses of DMM (arXiv:2504.12364, Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
