"""A style bank of finished models, without data and without training: the best shared basis in the sum of squares.

For each layer, D_k = (weight of model k) - (their mean), as a matrix (out, in * k * k). Wanted are U (out, R) and V (in * k * k, R) with
orthonormal columns that keep most of sum_k ||U^T D_k V||^2, and then the cores C_k = U^T D_k V: a Tucker-2 decomposition, found by
higher-order orthogonal iteration (De Lathauwer et al., SIAM J. Matrix Anal. Appl. 21(4), 2000): U from sum_k (D_k V)(D_k V)^T, V from
sum_k (D_k^T U)(D_k^T U)^T, and again. Models whose changes have ranks that add up to at most R are held exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bank import bank_key
from .bank_size import biases_of, is_banked, ranks_of
from .style import CODEBOOK

ITERATIONS = 2
OVERSAMPLING = 8
SEED = 0
EXACT = 512
"""Up to this many rows or columns all eigenvectors are computed."""


@dataclass(frozen=True)
class LayerFit:
    """up (out, R), down (S, in, ...) of the weight's shape, cores (K, R * S). kept, total: of the sum of squares of each model's change."""

    up: Tensor
    down: Tensor
    cores: Tensor
    kept: list[float]
    total: list[float]


def fit_layer(changes: Tensor, rank: int, iterations: int = ITERATIONS) -> LayerFit:
    """The shared basis of changes (K, out, in) or (K, out, in, k, k), float32, by orthogonal iteration from a random start (seeded).

    R and S are ``rank``, or what a layer with fewer outputs or inputs has. ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}: expected a whole number from 1")
    matrices = changes.flatten(2)  # (K, out, in * k * k)
    most_up, most_down = ranks_of(changes.shape[1:], rank, len(changes))
    g = torch.Generator().manual_seed(SEED)
    # More directions than are wanted at the start: what is kept then is soon near the best there is (arXiv:0909.4061, Sec. 4.2).
    down = torch.randn(matrices.shape[2], 2 * rank + OVERSAMPLING, generator=g).to(matrices)
    for _ in range(1 + iterations):
        up = leading(matrices @ down, most_up)  # from (K, out, S)
        down = leading(matrices.transpose(1, 2) @ up, most_down)  # from (K, in * k * k, R)
    cores = up.T @ matrices @ down  # (K, R, S)
    return LayerFit(
        up,
        down.T.reshape(most_down, *changes.shape[2:]),
        cores.flatten(1),
        cores.double().square().sum((1, 2)).tolist(),
        matrices.double().square().sum((1, 2)).tolist(),
    )


def leading(columns: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors of all columns together, (K, n, R) -> (n, rank) orthonormal, in the order of their size.

    By the eigenvectors of the smaller Gram matrix, in double precision, which keeps what is 1e-7 of the largest. Where that would take
    longer than all else (``EXACT``), of the columns in the subspace that a randomized range finder with one power iteration finds
    (arXiv:0909.4061, Alg. 4.4): the orthogonal iteration around it makes up for what is missed.
    """
    wide = columns.transpose(0, 1).flatten(1)  # (n, K R)
    if min(wide.shape) > max(EXACT, 2 * (rank + OVERSAMPLING)):
        g = torch.Generator().manual_seed(SEED)
        subspace = torch.linalg.qr(wide @ torch.randn(wide.shape[1], rank + OVERSAMPLING, generator=g).to(wide))[0]
        subspace = torch.linalg.qr(wide @ (wide.T @ subspace))[0]
        within = leading((subspace.T @ wide)[None], rank)
        return subspace @ within
    wide = wide.double()
    if wide.shape[0] <= wide.shape[1]:
        _, vectors = torch.linalg.eigh(wide @ wide.T)  # rising
        return vectors[:, -rank:].flip(1).to(columns.dtype)
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    main = wide @ vectors[:, -rank:].flip(1)
    # Where the columns have fewer directions than are asked for, QR fills up with directions of its own: orthonormal, with cores of zero.
    return torch.linalg.qr(main / main.norm(dim=0).clamp(min=1e-30))[0].to(columns.dtype)


# --- a whole UNet -----------------------------------------------------------------------------------------------------


class NotFinite(ValueError):
    """A weight that holds NaN or infinity. key: of the weight; model: the index of the model that holds it, None where all models are sound
    and their mean is not, in the numbers that it would be written in."""

    def __init__(self, key: str, model: int | None):
        super().__init__(f"weight '{key}' of model {model} holds NaN or infinity")
        self.key, self.model = key, model

    def explained(self, names: Sequence[str]) -> str:
        """For users. names: of the models, in their order."""
        if self.model is None:
            return f"weight '{self.key}' is outside of the range of these numbers: choose another precision (fp32)"
        return f"weight '{self.key}' of {names[self.model]} holds NaN or infinity: the file is damaged"


def check_stack(key: str, stack: Tensor) -> None:
    """Raise NotFinite unless a weight, stacked (K, ...) of K models, is finite in each."""
    for i, weight in enumerate(stack):
        if not weight.isfinite().all():
            raise NotFinite(key, i)


@dataclass(frozen=True)
class Fitted:
    """One weight of a merged UNet, in the order of ``fit_bank``.

    key: of the weight. weights: what the merged UNet holds for it, the mean and, of a layer of the bank, its parts. kept, total (K,): as of
    ``LayerFit``, [] of what is no layer of the bank. apart (K, K): the inner products of the models' changes from the centre, float64.
    shared: the sum of squares of the centre.
    """

    key: str
    weights: dict[str, Tensor]
    kept: list[float]
    total: list[float]
    apart: Tensor
    shared: float


def fit_bank(
    teachers: Sequence[Mapping[str, Tensor]],
    none: Mapping[str, Tensor] | None,
    rank: int,
    *,
    shapes: Mapping[str, Sequence[int]],
    bias: bool = True,
    centre: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | None = None,
) -> Iterator[Fitted]:
    """The weights of a merged UNet, one after the other; of each, only the teachers' is in memory.

    teachers: their UNets by key, alike. none: what painting without a style is, which gets a core of its own; None: the centre is that.
    shapes: of the weights to merge, all or some; a layer's weight and bias belong together. bias: whether the bank has biases. centre:
    what the changes are of, which the result holds bit for bit; None for the teachers' mean. dtype: of the result, a centre's weights
    apart. device: where it is computed.

    The result's styles are rows 0 .. N-1 in the order of the teachers; it has no codebook and no MLP (``neutral_style``).
    Raises NotFinite for weights that are not; the models are the teachers, then ``none`` or ``centre``.
    """
    device = device or torch.device("cpu")
    biases = set(biases_of(shapes)) if bias else set()
    models = [*teachers, *([none] if none is not None else [])]
    for key, shape in shapes.items():
        stack = torch.stack([model[key].to(device, torch.float32) for model in models])
        held = stack[: len(teachers)].mean(0).to(dtype) if centre is None else centre[key].to(device)
        check_stack(key, stack)
        if not held.isfinite().all():
            raise NotFinite(key, None if centre is None else len(models))
        weights = {key: held.cpu()}
        shared = held.float()
        changes = stack.sub_(shared)  # of the rounded one, so that the bank takes up what rounding left
        flat, kept, total = changes.flatten(1), [], []
        if is_banked(key, shape):
            name, fit = key.removesuffix(".weight"), fit_layer(changes, rank)
            found = {"up": fit.up, "down": fit.down, "cores": fit.cores}
            # Singular vectors are as small as 1 / sqrt(width), cores as large as a weight: in half precision both keep their digits.
            weights |= {bank_key(name, what): part.to(dtype).cpu() for what, part in found.items()}
            kept, total = fit.kept, fit.total
        elif key in biases:
            weights[bank_key(key.removesuffix(".bias"), "bias")] = changes.to(dtype).cpu()
        yield Fitted(key, weights, kept, total, (flat @ flat.T).double().cpu(), shared.double().square().sum().item())


def neutral_style(num_styles: int, dim: int, mlp: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codebook and MLP of a model whose styles are in its bank alone: random codes, and an MLP that makes nothing of them until it is
    trained (its last layer is zero)."""
    g = torch.Generator().manual_seed(SEED)
    bound = dim**-0.5
    return {
        f"{CODEBOOK}.weight": torch.randn(num_styles, dim, generator=g).to(dtype),
        f"{mlp}.linear_1.weight": ((2 * torch.rand(dim, dim, generator=g) - 1) * bound).to(dtype),
        f"{mlp}.linear_1.bias": ((2 * torch.rand(dim, generator=g) - 1) * bound).to(dtype),
        f"{mlp}.linear_2.weight": torch.zeros(dim, dim, dtype=dtype),
        f"{mlp}.linear_2.bias": torch.zeros(dim, dtype=dtype),
    }
