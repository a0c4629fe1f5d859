"""The change that a LoRA file makes to one weight: LoRA, LoCon, LoHa, LoKr, differences, and DoRA on top.

LoRA: Hu et al., arXiv:2106.09685; LoCon, LoHa, LoKr: LyCORIS, Yeh et al., arXiv:2309.14859; DoRA: Liu et al.,
arXiv:2402.09353. The arithmetic is that of ComfyUI's loader, which decides what such a file looks like.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Entries = Mapping[str, tuple[str, Tensor]]
"""(key in the file, tensor in float32) by role: "up", "down", "alpha" and so on."""

ROLES = {
    ".lora_up.weight": "up",
    "_lora.up.weight": "up",
    ".lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora_B": "up",
    ".lora_down.weight": "down",
    "_lora.down.weight": "down",
    ".lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down",
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora_A": "down",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",  # LyCORIS' names for norm layers
    ".b_norm": "diff_b",
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{
        f".{name}": name
        for name in ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    },
}
"""What follows a weight's name in a key."""

REFUSED = {
    ".oft_blocks": "OFT or BOFT",
    ".oft_diag": "OFT",
    ".oft_R.weight": "OFT",
    ".rescale": "OFT",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    ".on_input": "IA3",
    ".lora_magnitude_vector": "DoRA as PEFT writes it",
    ".lora_magnitude_vector.weight": "DoRA as PEFT writes it",
    ".set_weight": "a replacement of weights",
    ".reshape_weight": "a change of sizes",
}

_ALGORITHMS = {"up": "LoRA", "hada_w1_a": "LoHa", "lokr": "LoKr", "diff": "a difference"}
_SCALES = {"alpha", "dora_scale"}
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_NEEDS = {
    "up": ("down",),
    "down": ("up",),
    "mid": ("up",),
    **dict.fromkeys(_HADA, _HADA),
    "hada_t1": (*_HADA, "hada_t2"),
    "hada_t2": (*_HADA, "hada_t1"),
    "lokr_w1_a": ("lokr_w1_b",),
    "lokr_w1_b": ("lokr_w1_a",),
    "lokr_w2_a": ("lokr_w2_b",),
    "lokr_w2_b": ("lokr_w2_a",),
    "lokr_t2": ("lokr_w2_a",),
}
"""What an entry cannot be read without."""


def check_entries(entries: Entries) -> None:
    """Raises ValueError naming the key of an entry without its counterpart, or of two algorithms for one weight."""
    for role, (key, _) in entries.items():
        if missing := [other for other in _NEEDS.get(role, ()) if other not in entries]:
            raise ValueError(f"'{key}' has no counterpart '{missing[0]}' in the file")
    roles = {"lokr" if role.startswith("lokr") else role for role in entries}
    algorithms = [name for role, name in _ALGORITHMS.items() if role in roles]
    if len(algorithms) > 1:
        raise ValueError(f"'{_first(entries)}': {' and '.join(algorithms)} for one weight")
    if "lokr" in roles:
        for side in ("lokr_w1", "lokr_w2"):
            if (side in entries) == (f"{side}_a" in entries):
                what = "in two forms" if side in entries else "missing"
                raise ValueError(f"'{_first(entries)}': '{side}' is {what}")
    if "dora_scale" in entries and algorithms not in (["LoRA"], ["LoHa"], ["LoKr"]):
        raise ValueError(f"'{entries['dora_scale'][0]}' has no LoRA, LoHa or LoKr to go with")


def changed_weight(entries: Entries, weight: Tensor, strength: float) -> Tensor:
    """``weight`` (float32, any rank) with one file's change at a strength, as a new tensor.

    Raises ValueError naming the keys of tensors whose shapes do not fit it.
    """
    delta = weight_change(entries, weight.shape)
    if delta is None:
        return weight
    if "dora_scale" in entries:
        return _decomposed(weight, delta, entries["dora_scale"], strength)
    return weight + strength * delta


def weight_change(entries: Entries, shape: torch.Size) -> Tensor | None:
    """The change (of ``shape``) at strength 1 and without DoRA; None when there is none, or only one for the bias."""
    values = {role: tensor for role, (_, tensor) in entries.items()}
    try:
        if "diff" in values:
            if values["diff"].shape != shape:
                raise _Misfit
            return values["diff"]
        factors = _factors(values)
        if not factors:
            return None
        extents, lokr = [factor.extent for factor in factors], any(role.startswith("lokr") for role in values)
        extent = tuple(math.prod(sizes) for sizes in zip(*extents)) if lokr else extents[0]
        # A Linear's LoRA may be for a 1x1 convolution, and LyCORIS flattens kernels: (out, in k k). Compared before anything is
        # multiplied: a wrong file may declare a product that fills the memory.
        if extent != (shape[0], math.prod(shape[1:])) or not (lokr or extents[0] == extents[-1]):
            raise _Misfit
        combine = _kronecker if lokr else _elementwise
        change = functools.reduce(combine, (factor.product() for factor in factors)).reshape(shape)
    except (_Misfit, IndexError) as error:  # an index beyond a tensor's dimensions
        raise ValueError(f"{_shapes(entries)} do not fit a weight of shape {tuple(shape)}") from error
    rank = _divisor(factors, lokr)
    if "alpha" in values and rank:
        change = change * (values["alpha"].item() / rank)
    return change


def rank_of(entries: Entries) -> int | None:
    """The rank over which alpha is divided; None for a change without one, and for shapes that do not go together."""
    try:
        factors = _factors({role: tensor for role, (_, tensor) in entries.items()})
    except (_Misfit, IndexError, KeyError):
        return None
    return _divisor(factors, any(role.startswith("lokr") for role in entries))


def _divisor(factors: list[_LowRank | _FullMatrix], lokr: bool) -> int | None:
    """Of two low-rank factors ComfyUI takes the first one's rank for LoHa and the second one's for LoKr."""
    ranks = [factor.rank for factor in factors if factor.rank]
    return ranks[-1 if lokr else 0] if ranks else None


def changed_bias(entries: Entries, bias: Tensor, strength: float) -> Tensor:
    """``bias`` with one file's difference at a strength, as a new tensor. Raises ValueError for another shape."""
    key, difference = entries["diff_b"]
    if difference.shape != bias.shape:
        raise ValueError(f"'{key}' {tuple(difference.shape)} does not fit a bias of shape {tuple(bias.shape)}")
    return bias + strength * difference


class _Misfit(Exception):
    """Shapes that do not go together."""


@dataclass
class _LowRank:
    """a @ b, of (o, r) and (r, i); with a core (r, s, k, l) Tucker's product of (o, r), core and (s, i): (o, i, k,
    l)."""

    a: Tensor
    b: Tensor
    core: Tensor | None = None

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or not self.rank:
            raise _Misfit
        ranks = (self.a.shape[1], self.b.shape[0])
        if (self.core.ndim != 4 or self.core.shape[:2] != ranks) if self.core is not None else ranks[0] != ranks[1]:
            raise _Misfit

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    @property
    def extent(self) -> tuple[int, int]:
        """(o, i k l)"""
        kernel = 1 if self.core is None else self.core.shape[2:].numel()
        return self.a.shape[0], self.b.shape[1] * kernel

    def product(self) -> Tensor:
        if self.core is None:
            return self.a @ self.b
        return torch.einsum("or,rskl,si->oikl", self.a, self.core, self.b).contiguous()


@dataclass
class _FullMatrix:
    """A factor that the file has in full: (o, i) or (o, i, k, l)."""

    matrix: Tensor
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.matrix.ndim not in (2, 4):
            raise _Misfit

    @property
    def extent(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1:].numel()

    def product(self) -> Tensor:
        return self.matrix


def _factors(values: Mapping[str, Tensor]) -> list[_LowRank | _FullMatrix]:
    """The factors of a change: one (LoRA), two that are multiplied (LoHa, LoKr), or none."""
    if "up" in values:  # matrices, or kernels: up 1 x 1, down k x k, or 1 x 1 around a core
        return [_LowRank(values["up"].flatten(1), values["down"].flatten(1), values.get("mid"))]
    if "hada_w1_a" in values:
        return [_low_rank(values, f"hada_w{n}", f"hada_t{n}") for n in (1, 2)]
    if "lokr_w1" in values or "lokr_w1_a" in values:
        return [
            _FullMatrix(values[f"lokr_w{n}"])
            if f"lokr_w{n}" in values
            else _low_rank(values, f"lokr_w{n}", f"lokr_t{n}")
            for n in (1, 2)
        ]
    return []


def _low_rank(values: Mapping[str, Tensor], name: str, core: str) -> _LowRank:
    a = values[f"{name}_a"]  # around a core LyCORIS keeps it as (r, o)
    return _LowRank(a.T if core in values and a.ndim == 2 else a, values[f"{name}_b"], values.get(core))


def _elementwise(one: Tensor, two: Tensor) -> Tensor:
    if one.shape != two.shape:
        raise _Misfit
    return one * two


def _kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    if w1.ndim != 2:
        raise _Misfit
    return torch.kron(w1[:, :, None, None] if w2.ndim == 4 else w1, w2)


def _decomposed(weight: Tensor, delta: Tensor, dora: tuple[str, Tensor], strength: float) -> Tensor:
    """DoRA: the direction of the changed weight with a learned length (``dora``) along outputs or inputs.

    Along outputs the length is divided by that of the weight before the change: ComfyUI's reading
    (weight_adapter/base.py), which is what such a file looks like there.
    """
    key, scale = dora
    changed = weight + delta
    if scale.shape[:1] == weight.shape[:1]:
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    elif weight.ndim >= 2:
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    else:
        norm = None
    if norm is None or scale.shape != norm.shape:
        raise ValueError(f"'{key}' {tuple(scale.shape)} does not fit a weight of shape {tuple(weight.shape)}")
    changed = changed * (scale / (norm + torch.finfo(weight.dtype).eps))
    return weight + strength * (changed - weight)


def _first(entries: Entries) -> str:
    return next(iter(entries.values()))[0]


def _shapes(entries: Entries) -> str:
    shaped = [f"'{key}' {tuple(tensor.shape)}" for role, (key, tensor) in entries.items() if role not in _SCALES]
    return ", ".join(shaped)
