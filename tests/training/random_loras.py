"""Random entries of LoRA files, one function for each kind that trainers write, and files of them."""

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK = 3


def entries_of(kind: str, shape: tuple[int, ...], generator: torch.Generator, size: float = 0.02) -> dict[str, Tensor]:
    """What follows the weight's name -> tensor, for a weight of ``shape``. size: roughly of the change."""
    out, inner, *kernel = shape

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator) * scale

    ones, flat = [1] * len(kernel), inner * torch.Size(kernel).numel()
    lora = {".lora_up.weight": normal(out, RANK, *ones, scale=size), ".lora_down.weight": normal(RANK, inner, *kernel)}
    loha = {
        f".hada_w{n}_{part}": normal(*sizes, scale=size**0.5)
        for n in (1, 2)
        for part, sizes in zip("ab", ((out, RANK), (RANK, flat)))
    }
    loha = {k: v * (1.0 if k.endswith("a") else 1 / size**0.5) for k, v in loha.items()}
    alpha, half = {".alpha": torch.tensor(1.7)}, (out // 2, inner // 2)
    if kind == "lora":
        return lora | alpha
    if kind == "lora without alpha":
        return lora
    if kind == "locon with mid":
        core = {".lora_mid.weight": normal(RANK, RANK, *kernel, scale=0.5)}
        down = {".lora_down.weight": normal(RANK, inner, *ones)}
        return lora | down | core | alpha
    if kind == "loha":
        return loha | alpha
    if kind == "loha with core":
        cores = {f".hada_t{n}": normal(RANK, RANK, *kernel, scale=0.5) for n in (1, 2)}
        sides = {
            f".hada_w{n}_{part}": normal(RANK, sizes, scale=0.4)
            for n in (1, 2)
            for part, sizes in (("a", out), ("b", inner))
        }
        sides[".hada_w1_a"] *= 10 * size
        return sides | cores | alpha
    if kind == "lokr":
        return {".lokr_w1": normal(2, 2), ".lokr_w2": normal(*half, *kernel, scale=size)} | alpha
    if kind == "lokr of low rank":
        w2 = {".lokr_w2_a": normal(half[0], RANK, scale=size), ".lokr_w2_b": normal(RANK, flat // 2)}
        return {".lokr_w1_a": normal(2, 1), ".lokr_w1_b": normal(1, 2)} | w2 | alpha
    if kind == "lokr with core":
        w2 = {".lokr_w2_a": normal(RANK, half[0], scale=size), ".lokr_w2_b": normal(RANK, half[1])}
        return {".lokr_w1": normal(2, 2), ".lokr_t2": normal(RANK, RANK, *kernel)} | w2 | alpha
    if kind == "difference":
        return {".diff": normal(*shape, scale=size), ".diff_b": normal(out, scale=size)}
    if kind == "dora":
        return lora | alpha | {".dora_scale": 1 + normal(out, *[1] * (len(shape) - 1), scale=0.2).abs()}
    if kind == "dora of inputs":
        return lora | alpha | {".dora_scale": 1 + normal(1, inner, *ones, scale=0.2).abs()}
    if kind == "loha with dora":
        return loha | alpha | {".dora_scale": 1 + normal(out, *[1] * (len(shape) - 1), scale=0.2).abs()}
    assert kind == "lokr with dora"
    return {".lokr_w1": normal(2, 2), ".lokr_w2": normal(*half, *kernel, scale=size)} | {
        ".dora_scale": 1 + normal(out, *[1] * (len(shape) - 1), scale=0.2).abs()
    }


LINEAR = (
    "lora",
    "lora without alpha",
    "loha",
    "lokr",
    "lokr of low rank",
    "difference",
    "dora",
    "dora of inputs",
    "loha with dora",
    "lokr with dora",
)
"""Kinds for every weight; the others are for convolutions."""
CONVOLUTION = (*LINEAR, "locon with mid", "loha with core")
"""Not "lokr with core": there ComfyUI v0.33.0 logs an error (torch.kron of a strided tensor) and leaves the weight as it is."""


def norm_entries(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    names = (".w_norm", ".b_norm")
    return {name: torch.randn(size, generator=generator) * 0.1 for name in names}


def mixed_lora(
    names: dict[str, tuple[int, ...]], seed: int = 0, only: tuple[str, ...] = (), biases: set[str] | None = None
) -> dict[str, Tensor]:
    """One file that changes all weights (name in the file -> shape), of every kind in turn, or of the kinds ``only``.

    biases: names of weights with a bias beside them, None for all.
    """
    generator, turn, tensors = torch.Generator().manual_seed(seed), {1: seed, 2: seed, 4: seed}, {}
    for name, shape in names.items():
        if len(shape) == 1:
            entries = norm_entries(shape[0], generator)
        else:
            kernel = len(shape) == 4 and shape[-1] > 1
            kinds = only or (CONVOLUTION if kernel else LINEAR)
            # The first and last convolutions have 4 channels of latents, which kinds with halves can halve too.
            entries = entries_of(kinds[turn[len(shape)] % len(kinds)], shape, generator)
            turn[len(shape)] += 1
        if biases is not None and name not in biases:
            entries.pop(".diff_b", None)
        tensors |= {name + end: tensor for end, tensor in entries.items()}
    return tensors


def save_lora(path, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> str:
    save_file({k: v.to(dtype).contiguous().clone() for k, v in tensors.items()}, path)
    return str(path)
