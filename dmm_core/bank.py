"""The style bank: each style's own small change of the weights, all of them in one basis that the styles share.

    y = W x + U (sum_k m_k C_k) (V x) + sum_k m_k b_k        for each row of a batch

for all Linear and Conv2d layers of a UNet. V (the ``down``) is a layer from the inputs to R channels, with the layer's own
kernel, stride and padding; U (the ``up``) goes from R channels to the outputs; C_k (R, R) is the *core* of style k, b_k its bias. (Where
a layer has fewer than R inputs or outputs, V or U is complete and the core is no square.) The masses m_k are those of ``bank_masses``:
strength times the weight of each style, so that cores blend as codes do. The code on the time embedding (``style``) stays as in
arXiv:2504.12364; bank and code act together.

W is what all styles share, the mean of the teachers if the bank was made of them. Sharing a basis is what saves: a separate low-rank
change of rank r for each of N styles needs as much as one basis of R = N r, which holds them all. (Compare Compress-then-Serve,
arXiv:2407.00066, for LoRAs of language models.) Here are the layers; ``bank_fit`` makes a bank of models without training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import style

BANK = "style_bank"
"""Name of the module beside a UNet's blocks, and of its keys: ``style_bank.<layer>.up.weight`` and so on."""
PLACES = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.", "output_blocks.", "out.")
"""Only layers in here have a place in a bank."""
TEXT_LAYERS = (".attn2.to_k", ".attn2.to_v")
"""Ends of the names of layers whose input are the text states."""
MAX_RANK = 4096
PARTS = ("up", "down", "cores", "bias")


class Operations(style.Operations, Protocol):
    """Where the classes of layers come from: ``torch.nn``, or a host's module of the same names."""

    @property
    def Conv2d(self) -> type[nn.Conv2d]: ...
    @property
    def Embedding(self) -> type[nn.Embedding]: ...


@dataclass(frozen=True)
class BankConfig:
    """ranks: (name of the layer, columns of U, rows of V), in the order of the names. cores: K, the number of styles, or one more: then the
    last core is that of painting without a style. bias: whether layers with a bias have one for each core."""

    ranks: tuple[tuple[str, int, int], ...]
    cores: int
    bias: bool


class PixelShares(Protocol):
    """Shares of M styles that differ from pixel to pixel and sum to 1."""

    def shares_at(self, size: tuple[int, int]) -> Tensor:
        """(B, M, h, w) for features of the size (h, w)."""
        ...

    def size_of(self, tokens: int) -> tuple[int, int] | None:
        """The size (h, w) of a level that has so many pixels; None where none has."""
        ...


@dataclass(frozen=True)
class PixelMasses:
    """Masses that differ from pixel to pixel: M styles with masses (B, M, K), and their shares of each pixel."""

    masses: Tensor
    shares: PixelShares
    mean: Tensor
    """(B, K), for what has no pixels: text states and the time embedding."""

    def at(self, y: Tensor) -> Tensor | None:
        """Shares (B, M, L) of the pixels of features (B, C, h, w), or of tokens (B, L, C) that are pixels; else None."""
        if y.ndim == 4:
            size: tuple[int, int] | None = (y.shape[2], y.shape[3])
        else:
            size = self.shares.size_of(y.shape[1]) if y.ndim == 3 else None
        return None if size is None else self.shares.shares_at(size).flatten(2)


class BankLayer(nn.Module):
    """What one layer has in the bank. ranks: R, S. Weights: up (out, R); down (S, in) or (S, in, k, k); cores (K, R * S); bias (K, out), or
    none.

    of_text: its input are text states, which have no pixels. operations: ``torch.nn``, or the host's ops, so that casting and offloading
    reach these layers too; for the same reason only ``forward`` of them is called.
    """

    bias: nn.Embedding | None

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        ranks: tuple[int, int],
        cores: int,
        *,
        bias: bool,
        of_text: bool = False,
        operations: Operations = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        where: Any = {"dtype": dtype, "device": device}
        out = layer.weight.shape[0]
        if isinstance(layer, nn.Conv2d):
            kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
            inputs = layer.in_channels
            self.down: nn.Module = operations.Conv2d(inputs, ranks[1], kernel, stride, padding, bias=False, **where)  # type: ignore[arg-type]
        else:
            self.down = operations.Linear(layer.in_features, ranks[1], bias=False, **where)
        self.up = operations.Linear(ranks[0], out, bias=False, **where)
        self.cores = operations.Embedding(cores, ranks[0] * ranks[1], **where)
        self.bias = operations.Embedding(cores, out, **where) if bias and layer.bias is not None else None
        self.ranks = ranks
        self.of_text = of_text

    def forward(self, x: Tensor, y: Tensor, masses: Tensor | PixelMasses) -> Tensor:
        """What the layer makes of x, ``y``, with what the bank adds. x: (B, in), (B, L, in) or (B, in, h, w); masses (B, K), or of each
        pixel."""
        if isinstance(masses, PixelMasses):
            shares = None if self.of_text else masses.at(y)
            if shares is not None:
                return self._by_pixel(x, y, masses.masses, shares)
            # A time embedding for each of the M styles, or one thing for the whole picture.
            each = masses.masses.flatten(0, 1)
            masses = each if len(each) == len(y) else masses.mean
        every = torch.arange(masses.shape[1], device=masses.device)
        cores = self.cores(every)
        masses = masses.to(cores.dtype)
        core = (masses @ cores).view(-1, *self.ranks)  # (B, R, S)
        z = self.down(x).to(y.dtype)
        if self._core_first(y):
            z = z.flatten(2).transpose(1, 2) if y.ndim == 4 else z if y.ndim == 3 else z[:, None]  # (B, L, S)
            each = self.up(z @ core.transpose(1, 2).to(y.dtype)).to(y.dtype)  # (B, L, out)
            out = y + (each.transpose(1, 2) if y.ndim == 4 else each).reshape(y.shape)
        else:
            up = self.up(core.transpose(1, 2)).to(y.dtype)  # (B, S, out), the transpose of U C
            if y.ndim == 4:
                out = torch.baddbmm(y.flatten(2), up.transpose(1, 2), z.flatten(2)).view(y.shape)
            else:
                out = torch.baddbmm(y, z, up)
        if self.bias is None:
            return out
        added = (masses @ self.bias(every)).to(out.dtype)  # (B, out)
        return out + (added[:, :, None, None] if y.ndim == 4 else added[:, None] if y.ndim == 3 else added)

    def _core_first(self, y: Tensor) -> bool:
        """Whether U (C z) takes fewer products than (U C) z: with few pixels or tokens, and for the time embedding, which is one."""
        rank_up, rank_down = self.ranks
        tokens, out = (
            (y.shape[2] * y.shape[3], y.shape[1]) if y.ndim == 4 else (y[0].numel() // y.shape[-1], y.shape[-1])
        )
        return y.ndim == 2 or tokens * rank_up * (rank_down + out) < rank_down * out * (rank_up + tokens)

    def _by_pixel(self, x: Tensor, y: Tensor, masses: Tensor, shares: Tensor) -> Tensor:
        """The same with masses (B, M, K) of M styles and their shares (B, M, L) of each pixel: sum_m shares_m U C_m V x."""
        every = torch.arange(masses.shape[2], device=masses.device)
        cores = self.cores(every)
        masses, shares = masses.to(cores.dtype), shares.to(cores.dtype)
        z = self.down(x)
        z = z.flatten(2) if y.ndim == 4 else z.transpose(1, 2)  # (B, S, L)
        core = (masses @ cores).view(len(masses), -1, self.ranks[1])  # (B, M R, S)
        each = (core @ z.to(core.dtype)).unflatten(1, (masses.shape[1], -1))  # (B, M, R, L)
        added = self.up((each * shares[:, :, None]).sum(1).transpose(1, 2))  # (B, L, out)
        if self.bias is not None:
            added = added + shares.transpose(1, 2) @ (masses @ self.bias(every))  # (B, L, M) @ (B, M, out)
        added = added.to(y.dtype)
        return y + (added.transpose(1, 2).reshape(y.shape) if y.ndim == 4 else added)


class StyleBank(nn.Module):
    """The bank of a UNet: a ``BankLayer`` for each of its layers, under the layer's own name.

    ``masses`` (B, K) are those of the forward at hand; None adds nothing. Whoever calls the UNet's layers sets them.
    """

    def __init__(
        self,
        unet: nn.Module,
        config: BankConfig,
        operations: Operations = nn,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.cores = config.cores
        self.masses: Tensor | PixelMasses | None = None
        for name, up, down in config.ranks:
            layer = unet.get_submodule(name)
            assert isinstance(layer, (nn.Linear, nn.Conv2d)), "bank_config() refuses other layers"
            size: Any = {"bias": config.bias, "of_text": name.endswith(TEXT_LAYERS), "dtype": dtype, "device": device}
            put_submodule(self, name, BankLayer(layer, (up, down), config.cores, operations=operations, **size))

    def layers(self) -> Iterator[tuple[str, BankLayer]]:
        """(the layer's name in the UNet, what the bank has for it)"""
        for name, module in self.named_modules():
            if isinstance(module, BankLayer):
                yield name, module

    def attach(self, unet: nn.Module) -> None:
        """Let the layers of a UNet add their part of the bank to what they make of their input."""
        for layer, hook in self.hooks(unet):
            layer.register_forward_hook(hook)

    def hooks(self, unet: nn.Module) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
        """The layers of a UNet, and what adds their part of the bank as a forward hook of torch."""
        return [(unet.get_submodule(name), functools.partial(_add, self, part)) for name, part in self.layers()]


def _add(  # noqa: PLR0917, as torch calls hooks
    bank: StyleBank, part: BankLayer, layer: nn.Module, args: tuple[Tensor], y: Tensor
) -> Tensor:
    return y if bank.masses is None else part(args[0], y, bank.masses)


def put_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    """``module`` under a name with dots; the modules on the way are made where they lack."""
    *path, last = name.split(".")
    for step in path:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = getattr(root, step)
    root.add_module(last, module)


def bank_masses(style_rows: Tensor, cores: int) -> Tensor:
    """Style rows (B, N+1) -> masses (B, K) of the cores: strength times weight; of a last core for "no style", what is left to 1."""
    masses = style_rows[:, :-1] * style_rows[:, -1:]
    if cores == masses.shape[1]:
        return masses
    return torch.cat([masses, 1 - masses.sum(1, keepdim=True)], dim=1)


# --- a bank in a state dict -------------------------------------------------------------------------------------------


def has_bank(sd: Mapping[str, Tensor]) -> bool:
    """Whether a UNet's state dict has keys of a bank, sound or not."""
    return any(key.startswith(f"{BANK}.") for key in sd)


def bank_config(sd: Mapping[str, Tensor], num_styles: int) -> BankConfig | None:
    """The sizes of the bank in a UNet's state dict; None where there is no bank.

    Raises ValueError naming the key for a bank that is not complete, does not fit its layers, or has cores for another number of styles.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key in sd:  # names first: in a mapping that computes its weights, only those of a bank are asked for
        if key.startswith(f"{BANK}."):
            name, what = split_key(key)
            parts.setdefault(name, {})[what] = sd[key]
    if not parts:
        return None
    cores = {tensors["cores"].shape[0] for tensors in parts.values() if "cores" in tensors and tensors["cores"].ndim}
    if len(cores) != 1 or not cores <= {num_styles, num_styles + 1} or not num_styles:
        said = ", ".join(map(str, sorted(cores))) or "no"
        raise ValueError(f"the style bank has {said} cores for {num_styles} styles: they belong to different models")
    (count,) = cores
    bias = any("bias" in tensors for tensors in parts.values())
    for name, tensors in parts.items():
        _check_layer(sd, name, tensors, cores=count, bias=bias)
    ranks = ((name, tensors["up"].shape[1], tensors["down"].shape[0]) for name, tensors in parts.items())
    return BankConfig(tuple(sorted(ranks)), count, bias)


def split_key(key: str) -> tuple[str, str]:
    """ "style_bank.input_blocks.1.1.proj_in.up.weight" -> ("input_blocks.1.1.proj_in", "up"). ValueError for another kind of key."""
    name, _, what = key.removeprefix(f"{BANK}.").removesuffix(".weight").rpartition(".")
    if key != bank_key(name, what) or what not in PARTS:
        raise ValueError(f"'{key}' is no weight of a style bank: the file is damaged, or of a newer version")
    return name, what


def bank_key(name: str, what: str) -> str:
    """The key of a weight of the bank: ``what`` of ``PARTS`` for the layer ``name``."""
    return f"{BANK}.{name}.{what}.weight"


def _check_layer(sd: Mapping[str, Tensor], name: str, tensors: Mapping[str, Tensor], *, cores: int, bias: bool) -> None:
    weight = sd.get(f"{name}.weight")
    if weight is None or not name.startswith(PLACES) or weight.ndim not in (2, 4):
        raise ValueError(f"the style bank has a part for '{name}', which is no layer of this UNet")
    needed = {"up", "down", "cores"} | ({"bias"} if bias and f"{name}.bias" in sd else set())
    if needed != tensors.keys():
        missing, more = sorted(needed - tensors.keys()), sorted(tensors.keys() - needed)
        raise ValueError(f"the style bank of '{name}' is not complete: missing {missing}, unexpected {more}")
    ranks = tensors["up"].shape[-1:] + tensors["down"].shape[:1]
    if len(ranks) != 2 or not all(0 < rank <= MAX_RANK for rank in ranks):
        raise ValueError(f"the style bank of '{name}' has ranks {tuple(ranks)}, expected two from 1 to {MAX_RANK}")
    for what, shape in part_shapes(tuple(weight.shape), ranks, cores).items():
        if what in tensors and tuple(tensors[what].shape) != shape:
            raise ValueError(
                f"style weight '{bank_key(name, what)}' has shape {tuple(tensors[what].shape)}, expected {shape}"
            )


def check_alone(side: Mapping[str, Tensor], num_styles: int) -> None:
    """Raise ValueError naming the layer unless the parts of a bank fit together, as far as that can be told without the UNet's layers."""
    bank = {key: tensor for key, tensor in side.items() if key.startswith(f"{BANK}.")}
    layers: dict[str, Tensor] = {}
    for name in banked_layers(bank):
        parts = layer_parts(bank, name)
        up, down = parts.get("up"), parts.get("down")
        if up is None or down is None or up.ndim != 2 or down.ndim not in (2, 4):
            raise ValueError(f"the style bank of '{name}' is not complete: it has {', '.join(parts)}")
        layers[f"{name}.weight"] = torch.empty(up.shape[0], *down.shape[1:], device="meta")
        if "bias" in parts:
            layers[f"{name}.bias"] = torch.empty(up.shape[0], device="meta")
    bank_config({**layers, **bank}, num_styles)


def part_shapes(weight: Sequence[int], ranks: Sequence[int], cores: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what a bank holds for a layer with a weight of this shape."""
    up, down = ranks
    return {"up": (weight[0], up), "down": (down, *weight[1:]), "cores": (cores, up * down), "bias": (cores, weight[0])}


def banked_layers(model: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers that have a part in the bank, sorted."""
    return sorted({split_key(key)[0] for key in model if key.startswith(f"{BANK}.")})


def layer_parts(model: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What the bank holds for a layer, by the names of ``PARTS``."""
    return {part: model[key] for part in PARTS if (key := bank_key(name, part)) in model}


def folded_bank(sd: Mapping[str, Tensor], masses: Tensor) -> dict[str, Tensor]:
    """A UNet's state dict without its bank, whose layers have in their weights what the bank adds at the masses (K,)."""
    out = {key: value for key, value in sd.items() if not key.startswith(f"{BANK}.")}
    for name in banked_layers(sd):
        change, bias = layer_change(layer_parts(sd, name), masses)
        for key, added in ((f"{name}.weight", change), (f"{name}.bias", bias)):
            if added is not None:
                out[key] = (out[key].float() + added).to(out[key].dtype)
    return out


def layer_change(parts: Mapping[str, Tensor], masses: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a layer's weight and bias (None without one) get at the masses (K,), in float32 and the weight's shape."""
    up, down, bias = layer_change_parts(parts, masses)
    return (up @ down.flatten(1)).view(-1, *down.shape[1:]), bias


def layer_change_parts(parts: Mapping[str, Tensor], masses: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same as a LoRA has it: up (out, S) and down (S, in, ...), whose product the weight gets, and what the bias gets; float32."""
    masses = masses.float()
    up, down = parts["up"].float(), parts["down"].float()
    core = (masses @ parts["cores"].float()).view(up.shape[1], -1)
    # Without the directions that the core does not use: a style's weights keep every bit when its bank grows (``bank_grow``).
    rows, columns = core.any(1), core.any(0)
    if not (rows.all() and columns.all()):
        up, core, down = up[:, rows], core[rows][:, columns], down[columns]
    bias = masses @ parts["bias"].float() if "bias" in parts else None
    return up @ core, down, bias


def with_blends(sd: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """A UNet's state dict whose bank (if it has one) has blends as further styles: weights (M, N) over its N styles. Exact: cores add up as
    codes do."""
    out, styles = dict(sd), weights.shape[1]
    for key, value in sd.items():
        if key.startswith(f"{BANK}.") and split_key(key)[1] in ("cores", "bias"):
            made = (weights @ value[:styles].float()).to(value.dtype)
            out[key] = torch.cat([value[:styles], made, value[styles:]])  # the core of "no style" stays the last
    return out
