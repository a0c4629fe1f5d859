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
    """Where each style is: ``styles`` for the background and then for each region; ``share`` as ``Rest.share``."""

    regions: Sequence[Region]
    styles: tuple[Style, ...]
    share: float = 0.0

    @property
    def changes(self) -> bool:
        """Whether any of the styles depends on the sampling progress."""
        return any(style.changes for style in self.styles)

    def shares(self, height: int, width: int) -> Tensor:
        """(B or 1, K, height, width), K = 1 + regions."""
        return style_map(self.regions, height, width, self.share)

    def rows(self, known: Vocabulary, progress: float, batch: int) -> Tensor:
        """Style rows (batch or 1, K, N+1)."""
        rows = [style_rows(style, known, progress, batch) for style in self.styles]
        size = max(len(r) for r in rows)
        return torch.stack([r.expand(size, -1) for r in rows], dim=1)


def with_map(conditioning: list, styles: StyleMap) -> list:
    """A CONDITIONING painted with a map of styles."""
    return [[context, {**entries, MAP: styles}] for context, entries in conditioning]


class Blender:
    """The styles of one forward: offsets (rows, K, D) of the time embedding and their shares (rows, K, h, w) by size, the largest first;
    smaller ones are added to it, for the next forward too."""

    def __init__(self, deltas: Tensor, shares: dict[tuple[int, int], Tensor]):
        self.deltas = deltas
        self.shares = shares
        self.active: Tensor | None = None

    def shares_at(self, size: tuple[int, int]) -> Tensor:
        """Shares at the size of a level of the UNet, computed once."""
        if size not in self.shares:
            largest = max(self.shares, key=lambda s: s[0] * s[1])
            self.shares[size] = F.interpolate(self.shares[largest], size=size, mode="area")
        return self.shares[size]

    def mean_shares(self) -> Tensor:
        """(rows, K) shares of the whole picture."""
        return next(iter(self.shares.values())).mean((2, 3))

    def size_of(self, tokens: int) -> tuple[int, int] | None:
        """The size of the level at hand, by its number of pixels: a ResBlock has asked for its shares before."""
        return next((size for size in self.shares if size[0] * size[1] == tokens), None)

    def activated(self, emb: Tensor) -> Tensor:
        """What every block's projection gets, SiLU(emb_k) (rows * K, D), computed once a forward."""
        if self.active is None:
            self.active = F.silu(emb[:, None] + self.deltas.to(emb.dtype)).flatten(0, 1)
        return self.active


def install(model_options: dict) -> None:
    """Let ResBlocks ask ``blend_styles``; ``model_options`` must be a copy that lasts for one sampling only."""
    options = model_options["transformer_options"] = dict(model_options["transformer_options"])
    patches = options["patches"] = dict(options.get("patches", {}))
    slot = "forward_timestep_embed_patch"
    patches[slot] = [*patches.get(slot, []), (ResBlock, blend_styles)]


def blend_styles(layer, x, emb, context, transformer_options, *_):
    """The host's ResBlock with another time embedding per pixel; a handler of the host's ``forward_timestep_embed_patch``.

    It calls the block's layers itself, in the order of the host's ``ResBlock._forward``, because a style has to come in between the
    projection of the time embedding and the normalisation, and the host has no patch point there:

    - this patch point and the block patches (input, middle, output) begin and end at whole blocks;
    - the emb_patch and the block's own argument take one embedding per batch item, none per pixel;
    - the block run once per style, its outputs mixed, costs K times the convolutions and mixes after them, which is another function;
    - an object patch or an injection could put a norm of ours in the block's place for one. That norm gets the features alone, so
      the styles of the forward would have to be kept on the shared model, and torch.compile, LoRAs and offloading find other modules.

    Only the plain block is followed, the one kind in SD1.x, SD2.x and SDXL: no up or down, no scale and shift, a time embedding.
    tests/host/test_style_map_block.py holds it against the host's own block, in whichever host is there.
    """
    blender: Blender | None = transformer_options.get(MAP)
    if blender is None:
        return layer(x, emb)
    h = layer.in_layers(x)
    _, project = layer.emb_layers  # the SiLU before it is the same in all blocks
    norm, *rest = layer.out_layers
    added = project(blender.activated(emb)).view(len(x), -1, h.shape[1])  # (B, K, C)
    h = styled_norm(norm, h, added, blender.shares_at(tuple(h.shape[-2:])).to(h.dtype))
    for part in rest:
        h = part(h)
    return layer.skip_connection(x) + h


def styled_norm(norm: torch.nn.GroupNorm, h: Tensor, added: Tensor, shares: Tensor) -> Tensor:
    """``sum_k shares_k * norm(h + added_k)`` for h (B, C, h, w), added (B, K, C) and shares (B, K, h, w).

    ``norm`` meets the statistics alone: two points per channel, a standard deviation to either side of its mean, have the same
    ones as all its pixels. On a channel it is a straight line, so a pixel that lies between the points keeps its place between
    the normalised points. Calls the module, whose weights the host may keep elsewhere, or cast, until then.
    """
    batch, channels, *size = h.shape
    half = h.new_full((channels,), 0.5)
    # A group per channel, with gain and bias 0.5: 0 at the lower point, 1 at the upper. The eps keeps 1 / deviation in float16.
    place, mean, gain = torch.native_group_norm(
        h.contiguous(), half, half, batch, channels, size[0] * size[1], channels, 1e-8
    )
    deviation = gain.reciprocal()  # (B, C)
    points = torch.stack((mean - deviation, mean + deviation), dim=-1)  # (B, C, 2)
    points = norm((added[..., None] + points[:, None]).flatten(0, 1))  # (B * K, C, 2)
    points = points.view(batch, -1, 2 * channels).transpose(1, 2) @ shares.flatten(2)  # (B, 2 C, K) @ (B, K, h w)
    lower, upper = points.view(batch, channels, 2, *size).unbind(2)
    return torch.lerp(lower, upper, place)
