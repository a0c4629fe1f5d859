"""The style side of DMM: a codebook of learned styles and the MLP that turns a mix of them into a time-embedding
offset.

Song et al., arXiv:2504.12364, Sec. 3.2 and Suppl. A.1: ``emb = time_embed(t) + MLP(sum_i w_i e_i)``.

A style travels as a *style row* of N + 1 numbers: the weights over the N codes, then the strength s. The vectors are
computed where the model is, so a row does not depend on one checkpoint's codes, and s = 0 is exactly "no style".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

CODEBOOK = "model_embedding"
MLP_NAMES = ("add_embedding", "add_embedding2")
"""Module names of the style MLP: SD1.x / SD2.x, and SDXL (whose ``add_embedding`` is taken in the diffusers layout)."""


def mlp_name(pooled: bool) -> str:
    """Name of a new style MLP. pooled: of a UNet with pooled conditioning (SDXL)."""
    return MLP_NAMES[pooled]


class Operations(Protocol):
    """Where the class of a layer comes from: ``torch.nn``, or a host's module of the same names."""

    @property
    def Linear(self) -> type[nn.Linear]: ...


class StyleMLP(nn.Module):
    """Linear(D, D) -> SiLU -> Linear(D, D), under the key names of the authors' files (``linear_1``, ``linear_2``).

    operations: ``torch.nn``, or the host's ops, so that its casting and offloading reach these layers too.
    """

    def __init__(
        self,
        dim: int,
        operations: Operations = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.linear_1 = operations.Linear(dim, dim, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(dim, dim, dtype=dtype, device=device)

    def forward(self, e: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(e)))


def style_delta(model_embedding: nn.Embedding, add_embedding: nn.Module, style_rows: Tensor) -> Tensor:
    """Style rows (B, N+1) -> time-embedding offsets (B, D): ``s * MLP(w @ codebook)``.

    Calls only the modules' ``forward`` because a host may keep their weights elsewhere until they are called.
    Raises ValueError when the rows are not made for this codebook.
    """
    num_styles = model_embedding.num_embeddings
    if style_rows.ndim != 2 or style_rows.shape[1] != num_styles + 1:
        raise ValueError(
            f"style rows of shape {tuple(style_rows.shape)} do not fit a model with {num_styles} styles: "
            f"expected (batch, {num_styles + 1}); the style was made for another DMM model"
        )
    codes = model_embedding(torch.arange(num_styles, device=style_rows.device))  # (N, D)
    weights, strength = style_rows[:, :-1].to(codes.dtype), style_rows[:, -1:]
    mixed = weights @ codes  # (B, N) @ (N, D) -> (B, D)
    return strength.to(codes.dtype) * add_embedding(mixed)


def style_row(num_styles: int, weights: int | Mapping[int, float], strength: float = 1.0) -> Tensor:
    """One style row (1, N+1) from a style index or from {index: weight}; weights are used as given.

    Raises ValueError for an index outside the codebook and for numbers that are not finite.
    """
    if isinstance(weights, int):
        weights = {weights: 1.0}
    row = torch.zeros(1, num_styles + 1)
    for index, weight in weights.items():
        if not 0 <= index < num_styles:
            raise ValueError(f"style index {index} is outside 0..{num_styles - 1}")
        row[0, index] = weight
    row[0, -1] = strength
    if not math.isfinite(row.sum().item()):
        raise ValueError(f"style weights {dict(weights)} with strength {strength} are not finite numbers")
    return row


def no_style_row(num_styles: int) -> Tensor:
    """The row (1, N+1) that leaves the time embedding untouched (strength 0)."""
    return torch.zeros(1, num_styles + 1)
