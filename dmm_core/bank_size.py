"""How large a style bank is, and may be: from a user's words to a rank."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .bank import MAX_RANK, PLACES, BankConfig, part_shapes

USUAL = "10%"
BIASES_SHARE = 0.1
"""Biases join a bank when they take at most this share of it. Of SD1.5 they take a hundredth; in very small models they cost more than they
give (docs/bank.md)."""
_BUDGET = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|MB|GB)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Size:
    """rank: of every layer. bias: whether there are biases. numbers: that the bank holds. share: the same as a share of the UNet's."""

    rank: int
    bias: bool
    numbers: int
    share: float


def bank_of(
    budget: str, shapes: Mapping[str, Sequence[int]], cores: int, itemsize: int, *, styles: int | None = None
) -> Size:
    """The largest bank within a budget: "10%" of the UNet's numbers, or "150MB", "0.2GB" (of 10^6 and 10^9 bytes).

    shapes: of the UNet's weights. itemsize: bytes of a number. styles: how many of the cores are styles' (None: all), another is the
    base's. Raises ValueError for other words, and with the smallest size for a
    budget into which not even rank 1 fits.
    """
    unet = sum(math.prod(shape) for shape in shapes.values())
    amount, unit = parse_budget(budget)
    numbers = int(amount / 100 * unet if unit == "%" else amount * {"MB": 1e6, "GB": 1e9}[unit] / itemsize)
    biases = bank_size(shapes, 1, cores, bias=True) - bank_size(shapes, 1, cores, bias=False)
    bias = biases <= BIASES_SHARE * numbers
    try:
        rank = rank_within(shapes, numbers, cores, bias=bias)
    except ValueError:
        smallest, count = bank_size(shapes, 1, cores, bias=False), cores if styles is None else styles
        said = f"{count} style{'s' * (count != 1)}{' and the base' * (cores > count)}"
        raise ValueError(
            f"the budget {budget.strip()} is too small for {said}: the smallest is {100 * smallest / unet:.3g}% of the model, "
            f"{smallest * itemsize / 1e6:.3g} MB"
        ) from None
    held = bank_size(shapes, rank, cores, bias=bias)
    return Size(rank, bias, held, held / unet)


def parse_budget(text: str) -> tuple[float, str]:
    """ "10%" -> (10.0, "%"), "0.2 gb" -> (0.2, "GB"). Raises ValueError for other words."""
    match = _BUDGET.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise ValueError(
            f"the size of the style bank is {str(text)[:40]!r}: expected a share of the model such as 10%, or a size such as 150MB"
        )
    return float(match[1]), match[2].upper()


def layout_of(shapes: Mapping[str, Sequence[int]], size: Size, cores: int) -> BankConfig:
    """The bank of this size for a UNet with these weights, as its state dict would show it."""
    ranks = (
        (key.removesuffix(".weight"), *ranks_of(shape, size.rank, cores))
        for key, shape in shapes.items()
        if is_banked(key, shape)
    )
    return BankConfig(tuple(sorted(ranks)), cores, size.bias)


def ranks_of(shape: Sequence[int], rank: int, cores: int) -> tuple[int, int]:
    """Columns of U and rows of V for a layer with a weight of this shape: the rank, or as many as its outputs or inputs, or as many as
    ``cores`` changes of it can have together."""
    out, inputs = shape[0], math.prod(shape[1:])
    return min(rank, out, cores * inputs), min(rank, inputs, cores * out)


def is_banked(key: str, shape: Sequence[int]) -> bool:
    """Whether a UNet's weight belongs to a layer that a bank has a part for: Linear and Conv2d."""
    return key.startswith(PLACES) and key.endswith(".weight") and len(shape) in (2, 4)


def bank_numbers(shape: Sequence[int], rank: int, cores: int) -> int:
    """How many numbers a bank of this rank holds for a layer with this weight, biases apart."""
    parts = part_shapes(shape, ranks_of(shape, rank, cores), cores)
    return sum(math.prod(parts[what]) for what in ("up", "down", "cores"))


def biases_of(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The keys of the biases of which a bank has one per core."""
    weights = [key for key, shape in shapes.items() if is_banked(key, shape)]
    return [bias for key in weights if (bias := key.removesuffix("weight") + "bias") in shapes]


def bank_size(shapes: Mapping[str, Sequence[int]], rank: int, cores: int, *, bias: bool = True) -> int:
    """How many numbers a bank holds that has this rank in every layer (where a layer is smaller, its largest)."""
    layers = sum(bank_numbers(shape, rank, cores) for key, shape in shapes.items() if is_banked(key, shape))
    return layers + (cores * sum(shapes[key][0] for key in biases_of(shapes)) if bias else 0)


def rank_within(shapes: Mapping[str, Sequence[int]], numbers: int, cores: int, *, bias: bool = True) -> int:
    """The largest rank for all layers whose bank holds at most so many numbers.

    One rank for all: on the demo family and without training, ranks by the energy that they keep did worse at the same size (docs/bank.md).
    Raises ValueError with the smallest size where not even rank 1 fits.
    """
    smallest = bank_size(shapes, 1, cores, bias=bias)
    if numbers < smallest:
        raise ValueError(f"a style bank of {numbers} numbers is too small: {cores} cores need {smallest} at least")
    layers = [shape for key, shape in shapes.items() if is_banked(key, shape)]
    low, high = 1, max(max(ranks_of(shape, MAX_RANK, cores)) for shape in layers)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bank_size(shapes, middle, cores, bias=bias) <= numbers else (low, middle - 1)
    return low
