"""The Stable Diffusion UNet with a style input, for training and headless sampling.

Rombach et al., arXiv:2112.10752 (SD1.x, SD2.x) and Podell et al., arXiv:2307.01952 (SDXL), in the key names of the
single files (time_embed, label_emb, input_blocks, middle_block, output_blocks, out), so no key is ever renamed. All
sizes are read from a state dict. The style enters as in DMM (arXiv:2504.12364, Sec. 3.2): an offset to the time
embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .bank import BANK, BankConfig, StyleBank, bank_config, bank_masses
from .loading import load_strictly
from .style import CODEBOOK, MLP_NAMES, StyleMLP, style_delta

MAX_LAYERS = 1000
"""Transformer layers in a UNet; SDXL's has 70. A file of a few megabytes could name any number, and each takes time to
build."""


@dataclass(frozen=True)
class UNetConfig:
    """Every size of a UNet. Depths count transformer layers behind each residual block, in block order.

    ``linear_proj``: the transformers' projections are Linear (SD2.x, SDXL), not 1x1 convolutions (SD1.x). ``num_heads``: attention heads
    of each level, which no weight shows (``heads.py``); () for the usual ones.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: tuple[int, ...] = (2, 2, 2, 2)
    depth_input: tuple[int, ...] = (1, 1, 1, 1, 1, 1, 0, 0)
    depth_middle: int = 1
    depth_output: tuple[int, ...] = (0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    context_dim: int = 768
    linear_proj: bool = False
    adm_channels: int = 0
    num_styles: int = 0
    style_mlp: str = "add_embedding"
    bank: BankConfig | None = None
    num_heads: tuple[int, ...] = ()

    @property
    def embed_dim(self) -> int:
        """Width D of the time embedding and of a style code."""
        return 4 * self.model_channels

    @property
    def usual_heads(self) -> tuple[int, ...]:
        """Attention heads of each level where nothing else is said: 8 in SD1.x, 64 channels a head in SD2.x, SDXL and the demo family."""
        if not self.linear_proj and self.model_channels >= 320:
            return (8,) * len(self.channel_mult)
        return tuple(max(1, mult * self.model_channels // 64) for mult in self.channel_mult)

    @property
    def all_heads(self) -> tuple[int, ...]:
        """Attention heads of each level, levels without attention included."""
        return self.num_heads or self.usual_heads

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """The levels that have transformers, the finest first."""
        last, down, up = len(self.channel_mult) - 1, iter(self.depth_input), iter(self.depth_output)
        found = {last} if self.depth_middle else set()
        for level, blocks in enumerate(self.num_res_blocks):
            found |= {level for _ in range(blocks) if next(down)}
        for level in reversed(range(last + 1)):
            found |= {level for _ in range(self.num_res_blocks[level] + 1) if next(up)}
        return tuple(sorted(found))

    def heads(self, level: int) -> int:
        """Attention heads of a level. Raises ValueError for a number that does not divide its channels."""
        heads, channels = self.all_heads[level], self.channel_mult[level] * self.model_channels
        if channels % heads:
            guessed = (
                ""
                if self.num_heads
                else ", the usual number, of which the file says nothing: say num_heads (docs/files.md)"
            )
            raise ValueError(f"{heads} attention heads do not divide the {channels} channels of a level{guessed}")
        return heads


def with_heads(config: UNetConfig, heads: Sequence[int]) -> UNetConfig:
    """``config`` with the attention heads of each level; with none, it is left as it is. The usual ones are the same as ().

    Raises ValueError for another number of levels, and for heads that do not divide the channels.
    """
    if not heads:
        return config
    if len(heads) != len(config.channel_mult):
        raise ValueError(f"attention heads of {len(heads)} levels, and the UNet has {len(config.channel_mult)}")
    levels = config.attention_levels
    # A level without attention has none to say.
    told = replace(config, num_heads=tuple(heads[i if i in levels else levels[0]] for i in range(len(heads))))
    if any(told.heads(level) != config.usual_heads[level] for level in levels):
        return told
    return replace(config, num_heads=())


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps (B,) -> (B, dim), cosines first, in float32 (arXiv:1706.03762)."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    args = t.float()[:, None] * freqs  # (B,) -> (B, half)
    return torch.cat([args.cos(), args.sin()], dim=-1)


class ResBlock(nn.Module):
    def __init__(self, channels: int, embed_dim: int, out_channels: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, out_channels))
        # Index 2 is the dropout of the original layout: it keeps the last convolution's key at out_layers.3.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Identity())

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(a, "b l (n d) -> b n l d", n=self.heads) for a in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "b n l d -> b l (n d)"))


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context_dim: int, *, heads: int, depth: int, linear: bool):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        height = x.shape[2]
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        if self.linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            h = self.proj_out(h)
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        if not self.linear:
            h = self.proj_out(h)
        return x + h


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Sequential):
    """One numbered entry of input_blocks / middle_block / output_blocks; ``size`` is where an Upsample must land."""

    def forward(  # type: ignore[override]  # a Sequential takes one input, and these layers more
        self, h: Tensor, emb: Tensor, context: Tensor, size: torch.Size
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, (ResBlock, SpatialTransformer)):
                h = layer(h, emb, context)
            elif isinstance(layer, Upsample):
                h = layer(h, size)
            else:
                h = layer(h)
        return h


def encoder_blocks(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The input_blocks and the channel count that each of them leaves behind (shared with ControlNets)."""
    embed_dim, ch = config.embed_dim, config.model_channels
    blocks, skips = nn.ModuleList([Block(nn.Conv2d(config.in_channels, ch, 3, padding=1))]), [ch]
    depths = iter(config.depth_input)
    for level, mult in enumerate(config.channel_mult):
        out = mult * config.model_channels
        for _ in range(config.num_res_blocks[level]):
            blocks.append(Block(ResBlock(ch, embed_dim, out), *transformer(config, level, next(depths))))
            ch = out
            skips.append(ch)
        if level < len(config.channel_mult) - 1:
            blocks.append(Block(Downsample(ch)))
            skips.append(ch)
    return blocks, skips


def middle_block(config: UNetConfig) -> Block:
    """Residual block, transformer, residual block, at the lowest resolution."""
    ch = config.channel_mult[-1] * config.model_channels
    attention = transformer(config, len(config.channel_mult) - 1, config.depth_middle)
    return Block(ResBlock(ch, config.embed_dim, ch), *attention, ResBlock(ch, config.embed_dim, ch))


def transformer(config: UNetConfig, level: int, depth: int) -> list[nn.Module]:
    """The transformer behind a residual block of a level, as a list of one; empty for depth 0."""
    if depth == 0:
        return []
    channels, heads = config.channel_mult[level] * config.model_channels, config.heads(level)
    return [SpatialTransformer(channels, config.context_dim, heads=heads, depth=depth, linear=config.linear_proj)]


def time_embed(config: UNetConfig) -> nn.Sequential:
    """Sinusoidal features (B, model_channels) -> time embedding (B, D)."""
    embed_dim = config.embed_dim
    return nn.Sequential(nn.Linear(config.model_channels, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))


class UNet(nn.Module):
    """eps (or v) prediction network with an optional style per row.

    With ``gradient_checkpointing`` set, every block is recomputed in the backward pass: the activations kept are one
    tensor per block.
    """

    model_embedding: nn.Embedding  # of a config with styles, as is the MLP under the name ``config.style_mlp``
    style_bank: StyleBank  # of a config with a bank

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        embed_dim = config.embed_dim
        self.time_embed = time_embed(config)
        if config.adm_channels:
            self.label_emb = nn.Sequential(
                nn.Sequential(nn.Linear(config.adm_channels, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
            )
        if config.num_styles:
            self.add_module(CODEBOOK, nn.Embedding(config.num_styles, embed_dim))
            self.add_module(config.style_mlp, StyleMLP(embed_dim))
        self.input_blocks, skips = encoder_blocks(config)
        self.middle_block = middle_block(config)
        ch = skips[-1]
        self.output_blocks = nn.ModuleList()
        depths = iter(config.depth_output)
        for level in reversed(range(len(config.channel_mult))):
            out = config.channel_mult[level] * config.model_channels
            for i in range(config.num_res_blocks[level] + 1):
                layers = [ResBlock(ch + skips.pop(), embed_dim, out), *transformer(config, level, next(depths))]
                if level and i == config.num_res_blocks[level]:
                    layers.append(Upsample(out))
                self.output_blocks.append(Block(*layers))
                ch = out
        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, config.out_channels, 3, padding=1))
        if config.bank:
            self.add_module(BANK, StyleBank(self, config.bank))
            self.style_bank.attach(self)

    @property
    def style_mlp(self) -> StyleMLP:
        """The module under the name that the config gives it; AttributeError for a network without styles."""
        return getattr(self, self.config.style_mlp)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; outside of autocast the inputs must have it too."""
        return next(self.parameters()).dtype

    def style_parameters(self) -> list[nn.Parameter]:
        """Codebook and MLP, which turn a style into an offset of the time embedding."""
        if not self.config.num_styles:
            return []
        return [*self.model_embedding.parameters(), *self.style_mlp.parameters()]

    def bank_parameters(self) -> list[nn.Parameter]:
        """Those of the style bank; none without one."""
        return list(self.style_bank.parameters()) if self.config.bank else []

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        *,
        style: Tensor | None = None,
        control: tuple[list[Tensor], Tensor] | None = None,
        features: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Predict the noise (or v) in x_t.

        x: (B, C, h, w) noisy latents in the model's scaled space; t: (B,) timesteps 0..999; context: (B, L,
        context_dim) text states; y: (B, adm_channels) pooled text and sizes (SDXL only); style: (B, N+1) style rows or
        None for no style; control: residuals for the skip connections (one per input block) and for the middle block,
        as a ControlNet gives. Returns (B, C, h, w), and with ``features`` also the outputs of all blocks in order (eq.
        10 of arXiv:2504.12364). Raises ValueError for a style or a y that the model has no place for.
        """
        masses = self._masses(style, len(x))
        if masses is None:
            return self._forward(x, self._embed(x, t, y, style), context, None, control, features)
        self.style_bank.masses = masses
        try:
            return self._forward(x, self._embed(x, t, y, style), context, masses, control, features)
        finally:
            self.style_bank.masses = None

    def _forward(  # noqa: PLR0917
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor,
        masses: Tensor | None,
        control: tuple[list[Tensor], Tensor] | None,
        features: bool,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        h, skips = self._encode(x, emb, context, masses)
        outputs = [*skips, h]
        if control is not None:
            residuals, middle = control
            skips = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
            h = h + middle
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            size = skips[-1].shape[2:] if skips else h.shape[2:]
            h = self._run(block, h, emb, context, size=size, masses=masses)
            outputs.append(h)
        out = self.out(h)
        return (out, outputs) if features else out

    def middle(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        """The middle block's output (B, C, h', w') without a style; inputs as of ``forward``, at half of its cost."""
        masses = self._masses(None, len(x))
        if masses is None:
            return self._encode(x, self._embed(x, t, y, None), context, None)[0]
        self.style_bank.masses = masses
        try:
            return self._encode(x, self._embed(x, t, y, None), context, masses)[0]
        finally:
            self.style_bank.masses = None

    def _embed(self, x: Tensor, t: Tensor, y: Tensor | None, style: Tensor | None) -> Tensor:
        if (y is not None) != bool(self.config.adm_channels):
            wanted = "needs" if self.config.adm_channels else "does not take"
            raise ValueError(f"this model {wanted} pooled conditioning (y)")
        if style is not None and not self.config.num_styles:
            raise ValueError("this model has no styles: load a DMM checkpoint, or pass no style")
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))  # (B,) -> (B, D)
        if style is not None:
            emb = emb + style_delta(self.model_embedding, self.style_mlp, style)
        if y is not None:
            emb = emb + self.label_emb(y)
        return emb

    def _masses(self, style: Tensor | None, batch: int) -> Tensor | None:
        """What the cores of the bank count in each row (B, K); None without a bank."""
        if not self.config.bank:
            return None
        if style is None:
            style = self.model_embedding.weight.new_zeros(batch, self.config.num_styles + 1)
        return bank_masses(style, self.config.bank.cores)

    def _encode(self, h: Tensor, emb: Tensor, context: Tensor, masses: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The middle block's output (B, C', h', w'), and those of the input blocks."""
        skips = []
        for block in self.input_blocks:
            h = self._run(block, h, emb, context, masses=masses)
            skips.append(h)
        return self._run(self.middle_block, h, emb, context, masses=masses), skips

    def _run(
        self,
        block: nn.Module,
        h: Tensor,
        emb: Tensor,
        context: Tensor,
        *,
        masses: Tensor | None,
        size: torch.Size | None = None,
    ) -> Tensor:
        """A ``Block``'s output; size: (h, w) of it where the block is one that enlarges."""
        size = h.shape[2:] if size is None else size
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run_block, block, h, emb, context, size, masses, use_reentrant=False)
        return self._run_block(block, h, emb, context, size, masses)

    def _run_block(  # noqa: PLR0917, as checkpoint() calls it
        self, block: nn.Module, h: Tensor, emb: Tensor, context: Tensor, size: torch.Size, masses: Tensor | None
    ) -> Tensor:
        if masses is None:
            return block(h, emb, context, size)
        # Set here too, so that a block that is computed once more in the backward pass meets the masses again.
        before, self.style_bank.masses = self.style_bank.masses, masses
        try:
            return block(h, emb, context, size)
        finally:
            self.style_bank.masses = before


def unet_config_from_state_dict(sd: Mapping[str, Tensor], heads: Sequence[int] = ()) -> UNetConfig:
    """Read every size from a UNet state dict in the LDM layout (keys without ``model.diffusion_model.``). heads: the attention heads of
    each level, which it does not show; () for the usual ones.

    Raises ValueError naming the key that is missing, or of another shape than such a UNet's.
    """

    def shape(key: str, *dimensions: int) -> torch.Size:
        if key not in sd:
            raise ValueError(f"not a Stable Diffusion UNet in the LDM layout: key '{key}' is missing")
        size = sd[key].shape
        if len(size) not in dimensions or not all(size):
            raise ValueError(f"not a Stable Diffusion UNet in the LDM layout: '{key}' has shape {tuple(size)}")
        return size

    def depth(block: str) -> int:
        n = 0
        while f"{block}.1.transformer_blocks.{n}.norm1.weight" in sd:
            n += 1
        return n

    model_channels, in_channels = shape("input_blocks.0.0.weight", 4)[:2]
    width = shape("time_embed.0.weight", 2)
    if width != (4 * model_channels, model_channels):
        raise ValueError(
            f"not a Stable Diffusion UNet in the LDM layout: 'time_embed.0.weight' has shape {tuple(width)}, expected "
            f"{(4 * model_channels, model_channels)} for {model_channels} channels"
        )
    mults, res_blocks, depth_input = [], [0], []
    index = 1
    while f"input_blocks.{index}.0.op.weight" in sd or f"input_blocks.{index}.0.in_layers.0.weight" in sd:
        block = f"input_blocks.{index}"
        if f"{block}.0.op.weight" in sd:
            res_blocks.append(0)
        else:
            res_blocks[-1] += 1
            depth_input.append(depth(block))
            mult = max(1, shape(f"{block}.0.out_layers.3.weight", 4)[0] // model_channels)
            if res_blocks[-1] == 1:
                mults.append(mult)
        index += 1
    num_output = sum(res_blocks) + len(res_blocks)
    depth_output = [depth(f"output_blocks.{i}") for i in range(num_output)]
    depth_middle = depth("middle_block")
    if sum(depth_input) + depth_middle + sum(depth_output) > MAX_LAYERS:
        raise ValueError(f"not a Stable Diffusion UNet: it has more than {MAX_LAYERS} transformer layers")
    transformers = [k for k in sd if k.endswith(".1.transformer_blocks.0.attn2.to_k.weight")]
    if not transformers or len(mults) != len(res_blocks):
        raise ValueError(
            "not a text-to-image Stable Diffusion UNet: it has no cross-attention blocks to read sizes from"
        )
    first = transformers[0].removesuffix("transformer_blocks.0.attn2.to_k.weight")
    mlp = next((name for name in MLP_NAMES if f"{name}.linear_1.weight" in sd), MLP_NAMES[0])
    adm = shape("label_emb.0.0.weight", 2)[1] if "label_emb.0.0.weight" in sd else 0
    num_styles = shape(f"{CODEBOOK}.weight", 2)[0] if f"{CODEBOOK}.weight" in sd else 0
    config = UNetConfig(
        in_channels=in_channels,
        out_channels=shape("out.2.weight", 4)[0],
        model_channels=model_channels,
        channel_mult=tuple(mults),
        num_res_blocks=tuple(res_blocks),
        depth_input=tuple(depth_input),
        depth_middle=depth_middle,
        depth_output=tuple(depth_output),
        context_dim=shape(transformers[0], 2)[1],
        linear_proj=len(shape(first + "proj_in.weight", 2, 4)) == 2,
        adm_channels=adm,
        num_styles=num_styles,
        style_mlp=mlp,
        bank=bank_config(sd, num_styles),
    )
    return with_heads(config, heads)


def load_unet(
    sd: Mapping[str, Tensor], dtype: torch.dtype | None = torch.float32, copy: bool = True, heads: Sequence[int] = ()
) -> UNet:
    """Build the UNet that a state dict describes and load it strictly (copies; ``sd`` is left alone; see
    ``load_strictly``). heads: as of ``unet_config_from_state_dict``; ``config.num_heads`` of a network whose weights these are.

    Raises ValueError with the sorted missing / unexpected / misshapen keys.
    """
    config = unet_config_from_state_dict(sd, heads)
    return load_strictly(lambda: UNet(config), sd, "UNet", dtype=dtype, copy=copy)


def missing_weights(sd: Mapping[str, Tensor], heads: Sequence[int] = ()) -> list[str]:
    """Keys of the UNet that a state dict describes which it does not hold, sorted. heads: as of ``unet_config_from_state_dict``.

    Raises ValueError where it describes none.
    """
    # A bank that is not complete is no description, and was refused.
    config = replace(unet_config_from_state_dict(sd, heads), bank=None)
    with torch.device("meta"):
        return sorted(UNet(config).state_dict().keys() - sd.keys())


def init_style(unet: UNet, generator: torch.Generator | None = None) -> None:
    """Random codes ~ N(0, 1) and a default-initialised MLP, reproducibly from ``generator`` (in place)."""
    with torch.no_grad():
        unet.model_embedding.weight.normal_(generator=generator)
        for linear in (unet.style_mlp.linear_1, unet.style_mlp.linear_2):
            bound = 1 / math.sqrt(linear.in_features)
            linear.weight.uniform_(-bound, bound, generator=generator)
            linear.bias.uniform_(-bound, bound, generator=generator)
