"""A style bank that takes in more models, without data and without training; what it holds already stays as it is.

For each layer, D_j = (weight of new model j) - W, with W, U and V as they are in the file. The basis gains r directions that all new models
share: those that keep most of sum_j ||U'^T D_j V'||^2, where U' = [U U2] and V' = [V V2]. U2 and V2 are found by the alternating
iteration of ``bank_fit``, in what U and V leave over. The new cores are least squares in the grown basis, C_j = U'^+ D_j V'^+ (training
leaves no basis orthonormal); the old cores are padded with zeros, so that what they add is the same sum with zeros in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import BANK, MAX_RANK, PARTS, BankConfig, bank_key, split_key
from .bank_fit import ITERATIONS, OVERSAMPLING, SEED, check_stack, leading
from .bank_size import parse_budget
from .style import CODEBOOK, MLP_NAMES

USUAL_GROWTH = "2%"
SMALL = 1e-6
"""Singular values below this share of the largest are rounding, not a direction of the basis."""


# --- how much ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growth:
    """rank: directions that every layer gains (one that has fewer left: all of those). numbers: that the bank gains, new cores and biases
    and the padding of old cores included; share: the same as a share of the UNet's."""

    rank: int
    numbers: int
    share: float


def growth_of(budget: str, shapes: Mapping[str, Sequence[int]], bank: BankConfig, *, new: int, itemsize: int) -> Growth:
    """The largest growth within a budget for ``new`` styles together: "2%" of the UNet's numbers, or "10MB" (of 10^6 bytes). With "0%"
    they get what they cannot do without: a core in each layer, in the basis as it is.

    shapes: of the UNet's weights, without its style side. itemsize: bytes of a number. Raises ValueError for other words, and with the
    smallest size for a budget that does not hold the cores.
    """
    unet = sum(math.prod(shape) for shape in shapes.values())
    amount, unit = parse_budget(budget)
    numbers = int(amount / 100 * unet if unit == "%" else amount * {"MB": 1e6, "GB": 1e9}[unit] / itemsize)
    least = growth_size(shapes, bank, new, 0)
    if amount and numbers < least:
        raise ValueError(
            f"the budget {budget.strip()} is too small for {new} more style{'s' * (new > 1)}: the smallest is "
            f"{100 * least / unet:.3g}% of the model, {least * itemsize / 1e6:.3g} MB (or 0%, which is as much as that)"
        )
    low, high = 0, MAX_RANK if amount else 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if growth_size(shapes, bank, new, middle) <= numbers else (low, middle - 1)
    low = max(max(gained(shapes[f"{name}.weight"], (up, down), low, new)) for name, up, down in bank.ranks)
    held = growth_size(shapes, bank, new, low)
    return Growth(low, held, held / unet)


def growth_size(shapes: Mapping[str, Sequence[int]], bank: BankConfig, new: int, rank: int) -> int:
    """How many numbers a bank gains with ``new`` more styles and ``rank`` more directions in every layer."""
    total = 0
    for name, up, down in bank.ranks:
        shape = shapes[f"{name}.weight"]
        more_up, more_down = gained(shape, (up, down), rank, new)
        total += shape[0] * more_up + math.prod(shape[1:]) * more_down
        total += (bank.cores + new) * (up + more_up) * (down + more_down) - bank.cores * up * down
        if bank.bias and f"{name}.bias" in shapes:
            total += new * shape[0]
    return total


def gained(shape: Sequence[int], ranks: tuple[int, int], rank: int, new: int) -> tuple[int, int]:
    """Columns that U and rows that V of a layer gain, which has R and S of them: ``rank``, or as many as it has left, or as many as ``new``
    changes of it can have together."""
    out, inputs = shape[0], math.prod(shape[1:])
    up = min(rank, min(out, MAX_RANK) - ranks[0], new * inputs)
    return max(0, up), max(0, min(rank, min(inputs, MAX_RANK) - ranks[1], new * out))


# --- one layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerGrowth:
    """up, down, cores: of the layer's grown bank, in the dtype of the old one, the M new cores last. kept, before (M,): of the sum of
    squares of each model's change, what the grown bank holds, and what the old basis would have held; total (M,): all of it."""

    up: Tensor
    down: Tensor
    cores: Tensor
    kept: list[float]
    before: list[float]
    total: list[float]


def grow_layer(parts: Mapping[str, Tensor], changes: Tensor, rank: int) -> LayerGrowth:
    """The bank of a layer (``up``, ``down``, ``cores`` of ``parts``) with a core for each of the changes (M, out, in) or
    (M, out, in, k, k), float32, and ``rank`` more directions. Old columns, rows and cores keep every bit."""
    up, down, old = (parts[what] for what in ("up", "down", "cores"))
    matrices = changes.flatten(2)  # (M, out, in * k * k)
    ranks = (up.shape[1], down.shape[0])
    more_up, more_down = gained(changes.shape[1:], ranks, rank, len(changes))
    known_up, known_down = orthonormal(up.float()), orthonormal(down.float().flatten(1).T)
    new_up, new_down = free_directions(matrices, known_up, known_down, (more_up, more_down))
    up = torch.cat([up, new_up.to(up.dtype)], 1)
    down = torch.cat([down, new_down.T.reshape(more_down, *down.shape[1:]).to(down.dtype)])
    # Of the basis as it is stored, rounded: the cores take up what rounding left of orthogonality.
    inverse_up, inverse_down = pinv(up), pinv(down.flatten(1))
    cores = (inverse_up @ matrices @ inverse_down).to(old.dtype)  # (M, R', S')
    padded = F.pad(old.view(-1, *ranks), (0, more_down, 0, more_up))
    total = matrices.double().square().sum((1, 2))
    missed = torch.stack(
        [
            (matrix - up.float() @ core.float() @ down.float().flatten(1)).double().square().sum()
            for matrix, core in zip(matrices, cores)
        ]
    )
    before = (known_up.T @ matrices @ known_down).double().square().sum((1, 2))
    return LayerGrowth(
        up, down, torch.cat([padded, cores]).flatten(1), (total - missed).tolist(), before.tolist(), total.tolist()
    )


def free_directions(
    matrices: Tensor, known_up: Tensor, known_down: Tensor, ranks: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Orthonormal directions (out, r), (in, s) apart from the known ones, with which matrices (M, out, in) are held best."""
    g = torch.Generator().manual_seed(SEED)
    start = torch.randn(matrices.shape[2], 2 * ranks[1] + OVERSAMPLING, generator=g).to(matrices)
    new_down = without(start, known_down)
    new_up = matrices.new_zeros(matrices.shape[1], 0)
    for _ in range(2 + ITERATIONS):
        new_up = most(without(matrices @ torch.cat([known_down, new_down], 1), known_up), ranks[0])
        rows = matrices.transpose(1, 2) @ torch.cat([known_up, new_up], 1)
        new_down = most(without(rows, known_down), ranks[1])
    return new_up, new_down


def most(columns: Tensor, rank: int) -> Tensor:
    """``bank_fit.leading`` for any rank, 0 too; zeros where the columns are fewer."""
    found = leading(columns, max(rank, 1))[:, :rank]
    return F.pad(found, (0, rank - found.shape[1]))


def without(columns: Tensor, known: Tensor) -> Tensor:
    """What orthonormal ``known`` (n, r) leave of columns (..., n, c)."""
    for _ in range(2):  # once more takes out what the first time left by rounding
        columns = columns - known @ (known.T @ columns)
    return columns


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis (n, r') of what columns (n, r) span, r' <= r."""
    vectors, values, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    return vectors[:, values > SMALL * values.max()].to(columns.dtype)


def pinv(matrix: Tensor) -> Tensor:
    """The pseudo-inverse, computed in float64, in float32."""
    return torch.linalg.pinv(matrix.double(), rtol=SMALL).float()


# --- a whole UNet -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grown:
    """One weight of a UNet that grows, in the order of ``grow_bank``, as the new models are seen from it.

    weights: what changes in the UNet's state dict: the parts of the layer's bank. kept, before, total: as of ``LayerGrowth``, [] for what
    the bank has no part of. apart (N+M, N+M): the inner products of the changes from W of the N old styles and the M new models, float64;
    of an old style, what its bank says. shared: the sum of squares of W.
    """

    key: str
    weights: dict[str, Tensor]
    kept: list[float]
    before: list[float]
    total: list[float]
    apart: Tensor
    shared: float


def grow_bank(
    model: Mapping[str, Tensor],
    teachers: Sequence[Mapping[str, Tensor]],
    rank: int,
    *,
    shapes: Mapping[str, Sequence[int]],
    device: torch.device | None = None,
) -> Iterator[Grown]:
    """The bank of ``model`` with more styles, layer by layer; of each, only one weight of every teacher is in memory.

    model: a UNet's state dict with N styles and a bank. teachers: M UNets by key, alike it. shapes: of its weights without the style
    side. rank: see ``growth_of``. New styles are N .. N+M-1; a core of "no style" stays the last. Codebook and MLP: ``grow_codes``.
    Raises NotFinite for weights of teachers that are not.
    """
    device = device or torch.device("cpu")
    styles = model[f"{CODEBOOK}.weight"].shape[0]
    layers = {split_key(key)[0] for key in model if key.startswith(f"{BANK}.")}
    for key in shapes:
        weight = model[key].to(device, torch.float32)
        changes = torch.stack([teacher[key].to(device, torch.float32) for teacher in teachers])
        check_stack(key, changes)
        changes -= weight
        flat, shared = changes.flatten(1), weight.double().square().sum().item()
        name, _, what = key.rpartition(".")
        weights, fit, old = {}, None, None
        if name in layers and what == "weight":
            parts = {part: model[bank_key(name, part)].to(device) for part in PARTS[:3]}
            fit = grow_layer(parts, changes, rank)
            cores = insert(fit.cores[: -len(teachers)], fit.cores[-len(teachers) :], styles)
            weights = {bank_key(name, part): value for part, value in zip(PARTS[:3], (fit.up, fit.down, cores))}
            apart = inner_products(parts, flat, styles)
        elif name in layers and what == "bias" and bank_key(name, "bias") in model:
            old = model[bank_key(name, "bias")].to(device)
            weights = {bank_key(name, "bias"): insert(old, flat.to(old.dtype), styles)}
            every = torch.cat([old[:styles].float(), flat])
            apart = every @ every.T
        else:
            apart = torch.zeros(styles + len(teachers), styles + len(teachers))
            apart[styles:, styles:] = flat @ flat.T
        weights = {bank_key: value.cpu() for bank_key, value in weights.items()}
        figures = (fit.kept, fit.before, fit.total) if fit else ([], [], [])
        yield Grown(key, weights, *figures, apart.double().cpu(), shared)


def insert(old: Tensor, new: Tensor, at: int) -> Tensor:
    """Rows ``new`` between the first ``at`` rows of ``old`` and the others, of which there is at most one: of "no style"."""
    return torch.cat([old[:at], new, old[at:]])


def inner_products(parts: Mapping[str, Tensor], changes: Tensor, styles: int) -> Tensor:
    """(N+M, N+M) of U C_k V, the changes of the old styles, and of new changes (M, out * in), without making the former."""
    up, down = parts["up"].float(), parts["down"].float().flatten(1)
    cores = parts["cores"][:styles].float().view(styles, up.shape[1], -1)
    seen = (up.T @ changes.view(len(changes), up.shape[0], -1) @ down.T).flatten(1)  # (M, R S)
    metric = ((up.T @ up) @ cores @ (down @ down.T)).flatten(1)  # (N, R S)
    old, across = metric @ cores.flatten(1).T, cores.flatten(1) @ seen.T
    return torch.cat([torch.cat([old, across], 1), torch.cat([across.T, changes @ changes.T], 1)])


def grow_codes(model: Mapping[str, Tensor], new: int) -> tuple[dict[str, Tensor], Tensor]:
    """What ``new`` styles more change beside the layers, and what is left over: the codebook, and (M, D) the offsets of the time embedding
    by their codes, float32.

    Cores are fitted on W alone, so a code should add nothing. Where the MLP makes nothing of any code, as in a fresh merge, they are
    random; where it was trained, codes are looked for of which it makes as little as possible (L-BFGS on their own numbers).
    """
    book = model[f"{CODEBOOK}.weight"]
    offset = code_offsets(model)
    g = torch.Generator().manual_seed(SEED)
    codes = torch.randn(len(book) + new, book.shape[1], generator=g)[len(book) :].double().to(book.device)
    start = offset(codes)
    if start.any():  # a trained MLP
        codes = searched_codes(offset, codes, torch.zeros_like(start))
    codes = codes.to(book.dtype)
    return {f"{CODEBOOK}.weight": torch.cat([book, codes])}, offset(codes.double()).float()


def code_offsets(model: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Codes (M, D) float64 -> what the model's style MLP makes of them, the offsets of the time embedding."""
    mlp = next(name for name in MLP_NAMES if f"{name}.linear_1.weight" in model)
    w1, b1, w2, b2 = (
        model[f"{mlp}.linear_{i}.{what}"].detach().double() for i in (1, 2) for what in ("weight", "bias")
    )
    return lambda codes: F.silu(codes @ w1.T + b1) @ w2.T + b2


def searched_codes(offset: Callable[[Tensor], Tensor], codes: Tensor, target: Tensor, pull: float = 0.0) -> Tensor:
    """Codes near ``codes`` (M, D) whose offsets are as near to ``target`` as can be (L-BFGS on their own numbers), both float64. pull:
    weight of a code's squared distance from where it began."""
    with torch.enable_grad():
        found = codes.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([found], max_iter=200, history_size=20, line_search_fn="strong_wolfe")
        scale = (offset(codes) - target).detach().square().sum().clamp_min(1e-12)

        def error() -> Tensor:
            optimizer.zero_grad()
            loss = (offset(found) - target).square().sum() / scale + pull * (found - codes).square().sum()
            loss.backward()
            return loss

        optimizer.step(error)
    return found.detach()


def take_up_offsets(weights: dict[str, Tensor], offsets: Tensor, styles: int) -> bool:
    """Let the new styles' biases of the time embedding's last layer cancel their codes' offsets (M, D), in place. False where the bank has
    none.

    It is exact (up to rounding) where a style is painted alone, and an approximation in blends, whose codes go through the MLP together.
    """
    key = bank_key("time_embed.2", "bias")
    if key not in weights:
        return False
    value = weights[key].clone()
    value[styles : styles + len(offsets)] -= offsets.to(value)
    weights[key] = value
    return True


def grown_unet(
    model: Mapping[str, Tensor],
    teachers: Sequence[Mapping[str, Tensor]],
    rank: int,
    *,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """The whole state dict of a model with M more styles: what ``grow_bank``, ``grow_codes`` and ``take_up_offsets`` make of it."""
    changed = {
        key: value for one in grow_bank(model, teachers, rank, shapes=shapes) for key, value in one.weights.items()
    }
    codes, offsets = grow_codes(model, len(teachers))
    take_up_offsets(changed, offsets, len(model[f"{CODEBOOK}.weight"]))
    return {**model, **changed, **codes}
