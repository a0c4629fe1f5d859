"""One-pass regional styling: another style at every pixel of one forward.

In arXiv:2504.12364 a style acts through the time embedding alone, which every ResBlock adds to its features and then normalises.
Here the addition differs from pixel to pixel, by shares m_k(p) of K styles, and each style is normalised with the statistics that it
would have if it were everywhere: ``sum_k m_k(p) GroupNorm(h + W(emb_k))``. Mixed before the normalisation, one style's offset would
pass for contrast of the picture; a network whose groups are one channel wide then shows no style at all. The convolutions run once.
The blocks' inputs and the attention still see the whole mixed picture: near to, and not the same as, a pass per style.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor

from ..dmm_core.regions import Region, style_map
from ..dmm_core.style_value import Style, Vocabulary, style_rows

MAP = "dmm_map"
"""A StyleMap in a CONDITIONING's entries, its shares in ``model_conds``, a Blender in the UNet's transformer options."""
MAP_ROWS = "dmm_map_rows"


@dataclass(frozen=True, eq=False)
class StyleMap:
    """Where each style is: ``styles`` for the background and then for each region."""

    regions: Sequence[Region]
    styles: tuple[Style, ...]

    def shares(self, height: int, width: int) -> Tensor:
        """(B or 1, K, height, width), K = 1 + regions."""
        return style_map(self.regions, height, width)

    def rows(self, known: Vocabulary, progress: float, batch: int) -> Tensor:
        """Style rows (batch or 1, K, N+1)."""
        rows = [style_rows(style, known, progress, batch) for style in self.styles]
        size = max(len(r) for r in rows)
        return torch.stack([r.expand(size, -1) for r in rows], dim=1)


def with_map(conditioning: list, styles: StyleMap) -> list:
    """A CONDITIONING painted with a map of styles."""
    return [[context, {**entries, MAP: styles}] for context, entries in conditioning]


class Blender:
    """The styles of one forward: offsets (rows, K, D) of the time embedding and their shares (rows, K, h, w)."""

    def __init__(self, deltas: Tensor, shares: Tensor):
        self.deltas = deltas
        self.shares = {tuple(shares.shape[-2:]): shares}

    def shares_at(self, size: tuple[int, int]) -> Tensor:
        """Shares at the size of a level of the UNet, computed once a forward."""
        if size not in self.shares:
            largest = max(self.shares, key=lambda s: s[0] * s[1])
            self.shares[size] = F.interpolate(self.shares[largest], size=size, mode="area")
        return self.shares[size]


def install(model_options: dict) -> None:
    """Let ResBlocks ask ``blend_styles``; ``model_options`` must be a copy that lasts for one sampling only."""
    options = model_options["transformer_options"] = dict(model_options["transformer_options"])
    patches = options["patches"] = dict(options.get("patches", {}))
    slot = "forward_timestep_embed_patch"
    patches[slot] = [*patches.get(slot, []), (ResBlock, blend_styles)]


def blend_styles(layer, x, emb, context, transformer_options, *_):
    """The host's ResBlock with another time embedding per pixel."""
    blender: Blender | None = transformer_options.get(MAP)
    if blender is None:
        return layer(x, emb)
    h = layer.in_layers(x)
    deltas = blender.deltas.to(emb.dtype)  # (rows, K, D)
    added = layer.emb_layers((emb[:, None] + deltas).flatten(0, 1)).unflatten(0, deltas.shape[:2])  # (rows, K, C)
    scale, shift = normalised(layer.out_layers[0], h, added.float())
    shares = blender.shares_at(tuple(h.shape[-2:])).to(h.dtype)
    scale, shift = (torch.einsum("bkc,bkhw->bchw", part.to(h.dtype), shares) for part in (scale, shift))
    return layer.skip_connection(x) + layer.out_layers[1:](torch.addcmul(shift, h, scale))


def normalised(norm: torch.nn.GroupNorm, h: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """GroupNorm(h + added_k) for h (B, C, h, w) and each of added (B, K, C), as ``scale * h + shift``, both (B, K, C)."""
    var, mean = torch.var_mean(h.float(), dim=(2, 3), unbiased=False)  # (B, C)
    groups = (*added.shape[:2], norm.num_groups, -1)
    means = (mean[:, None] + added).view(groups)  # of every channel, (B, K, G, C/G)
    centre = means.mean(-1, keepdim=True)
    spread = var[:, None].expand_as(added).reshape(groups).mean(-1, keepdim=True)
    spread = spread + (means - centre).square().mean(-1, keepdim=True)
    gain, bias = affine(norm, h)
    scale = gain * (spread + norm.eps).rsqrt().expand(means.shape).reshape(added.shape)
    return scale, (added - centre.expand(means.shape).reshape(added.shape)) * scale + bias


def affine(norm: torch.nn.GroupNorm, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and bias (C,) of a GroupNorm, asked by a call: the host may keep its weights elsewhere, or cast, until then."""
    probe = like.new_tensor([1.0, -1.0]).expand(1, norm.num_channels, 2)  # mean 0 and variance 1 in every group
    plus, minus = norm(probe).float()[0].unbind(-1)
    return (plus - minus) / 2 * (1 + norm.eps) ** 0.5, (plus + minus) / 2
