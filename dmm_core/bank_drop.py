"""A style bank that loses styles, without training: what deleting takes out of a file, and what stays in it.

A style's code, cores and biases go. Two traces of it would stay, and are taken out as far as that is possible:

- The mean gives it away. In a merge W is the mean of all teachers, so their cores sum to zero, and a deleted one is minus the sum of the
  others, to the last digit. Therefore W moves to the mean of the styles that stay, W' = W + U mean(C_j) V and C_j' = C_j - mean(C_j): they
  paint what they painted, up to rounding, and their cores say of the one that went what they are like it. The core of "no style" says more:
  the base lies near the mean of all.
  A merge centred at the base (``keep_centre``) stays there: W is a model of its own, which never held a share of the styles.
- Directions that only it used, as those of a style that ``bank_grow`` added, go with it.

What stays: the directions of U and V that it shared, that core, and its share of what the bank never held (norms, the part of W outside of
the basis). An attack that looks for codes and cores finds how much that is (``training.loop.forget``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bank import BANK, PARTS, bank_key, banked_layers, layer_change, layer_parts, split_key
from .style import CODEBOOK

WORTH = 0.1
"""The mean moves when the others' cores then say so much less of a deleted one (of its sum of squares)."""


@dataclass(frozen=True)
class Told:
    """What a linear combination of the cores that stay says of a deleted one, as a share of its sum of squares: as the file was, and around
    the mean of the styles that stay."""

    before: float
    around: float


@dataclass(frozen=True)
class Dropped:
    """unet: the state dict that is left. told: of each style that went, in their order; [] without a bank. moved: W is now the mean of the
    styles that stay."""

    unet: dict[str, Tensor]
    told: list[Told]
    moved: bool


def drop_styles(model: Mapping[str, Tensor], gone: Sequence[int], keep_centre: bool = False) -> Dropped:
    """A UNet's state dict without the styles of these indices, in the dtypes it had; of a model without a bank, without their codes.

    keep_centre: W is no mean of the styles, but the base, and stays as it is.

    Where the mean did not move, the styles that stay compute bitwise what they computed (``folded_bank``). Raises ValueError when no style
    would stay.
    """
    stay = remaining(model, gone)
    told = what_is_told(model, gone)
    moved = moves(told) and not keep_centre
    if moved:
        model = recentred(model, stay)
    styles = model[f"{CODEBOOK}.weight"].shape[0]
    left = {key: without_rows(value, gone, styles) if has_style_rows(key) else value for key, value in model.items()}
    return Dropped(without_unused(left), told, moved)


def remaining(model: Mapping[str, Tensor], gone: Collection[int]) -> list[int]:
    """The indices of the styles that stay. Raises ValueError where none would."""
    stay = [i for i in range(model[f"{CODEBOOK}.weight"].shape[0]) if i not in gone]
    if not stay:
        raise ValueError("all styles would be forgotten: a DMM model keeps at least one")
    return stay


def moves(told: Sequence[Told]) -> bool:
    """Whether W has to move to the mean of the styles that stay."""
    return any(one.before - one.around > WORTH for one in told)


def has_style_rows(key: str) -> bool:
    """Whether a weight has a row for each style (and in a bank perhaps one more, for "no style")."""
    return key == f"{CODEBOOK}.weight" or (key.startswith(f"{BANK}.") and split_key(key)[1] in PARTS[2:])


def without_rows(value: Tensor, gone: Collection[int], styles: int) -> Tensor:
    """A weight with a row for each of N ``styles`` without some of them."""
    return value[[i for i in range(len(value)) if i >= styles or i not in gone]]


# --- the mean ---------------------------------------------------------------------------------------------------------


def what_is_told(model: Mapping[str, Tensor], gone: Sequence[int]) -> list[Told]:
    """Of each style that goes, what the cores and biases that stay say of its own. [] for a model without a bank."""
    layers = banked_layers(model)
    if not layers:
        return []
    styles = model[f"{CODEBOOK}.weight"].shape[0]
    products = torch.stack([changes_product(layer_parts(model, name)) for name in layers]).sum(0)
    stay = remaining(model, gone)
    centre = torch.eye(len(products), dtype=products.dtype, device=products.device)
    centre[:, stay] -= 1 / len(stay)
    known = [*stay, *range(styles, len(products))]
    around = centre @ products @ centre.T
    return [Told(explained(products, i, known), explained(around, i, known)) for i in gone]


def changes_product(parts: Mapping[str, Tensor]) -> Tensor:
    """(K, K) float64, the inner products of what each core (and bias) adds to a layer."""
    up, down = parts["up"].double(), parts["down"].double().flatten(1)
    cores = parts["cores"].double()
    seen = ((up.T @ up) @ cores.view(len(cores), up.shape[1], -1) @ (down @ down.T)).flatten(1)
    bias = parts["bias"].double() if "bias" in parts else cores.new_zeros(len(cores), 1)
    return seen @ cores.T + bias @ bias.T


def explained(products: Tensor, one: int, others: Sequence[int]) -> float:
    """The share of vector ``one``'s sum of squares that lies in what ``others`` span; products (K, K): inner products of all."""
    own = products[one, one].item()
    if own <= 0:
        return 0.0
    across = products[list(others), one]
    inverse = torch.linalg.pinv(products[list(others)][:, list(others)], rtol=1e-9, hermitian=True)
    return min(1.0, max(0.0, (across @ inverse @ across).item() / own))


def recentred(model: Mapping[str, Tensor], stay: Sequence[int]) -> dict[str, Tensor]:
    """The state dict of the same model, up to rounding, around the mean of the styles ``stay`` instead of W.

    With a core of "no style" all styles, blends and strengths paint as before. Without one, W itself is "no style", and becomes the mean of
    those that stay.
    """
    out = dict(model)
    for name in banked_layers(model):
        parts = layer_parts(model, name)
        masses = mean_masses(len(parts["cores"]), stay).to(parts["cores"].device)
        change, bias = layer_change(parts, masses)
        for key, added in ((f"{name}.weight", change), (f"{name}.bias", bias)):
            if added is not None:
                out[key] = (model[key].float() + added).to(model[key].dtype)
        out |= {bank_key(name, what): around(parts[what], masses) for what in PARTS[2:] if what in parts}
    return out


def mean_masses(cores: int, stay: Sequence[int]) -> Tensor:
    """(K,) the mean of the styles ``stay``, as masses."""
    masses = torch.zeros(cores)
    masses[list(stay)] = 1 / len(stay)
    return masses


def around(rows: Tensor, masses: Tensor) -> Tensor:
    """Rows (K, n) of a bank less their mean by these masses (K,)."""
    return (rows.float() - masses @ rows.float()).to(rows.dtype)


# --- directions -------------------------------------------------------------------------------------------------------


def without_unused(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the directions of the bank that no core uses; at least one stays in each layer."""
    out = dict(model)
    for name in banked_layers(model):
        up, down, cores = (model[bank_key(name, part)] for part in PARTS[:3])
        square = cores.view(len(cores), up.shape[1], -1)
        rows, columns = (used(square.transpose(1, 2)), used(square))
        if not (rows.all() and columns.all()):
            new = (up[:, rows], down[columns], square[:, rows][:, :, columns].flatten(1))
            out |= {bank_key(name, part): value.contiguous() for part, value in zip(PARTS[:3], new)}
    return out


def used(cores: Tensor) -> Tensor:
    """(S,) which of the columns of cores (K, R, S) are not zero everywhere; the first counts where all are."""
    found = cores.flatten(0, 1).ne(0).any(0)
    found[0] |= not found.any()
    return found
