"""The autoencoder of latent diffusion: images to 4-channel latents and back, for caching data and showing pictures.

Rombach et al., arXiv:2112.10752 (the KL-regularised first stage of SD1.x, SD2.x and SDXL), in the key names of the
single files (encoder, decoder, quant_conv, post_quant_conv) without ``first_stage_model.``. Sizes are read from a state
dict.

Latents here are UNSCALED. What a UNet sees is ``SCALE_SD * latent`` (``SCALE_SDXL`` for SDXL); callers apply it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loading import load_strictly
from .unet import UNetConfig

SCALE_SD = 0.18215
SCALE_SDXL = 0.13025
IGNORED_PREFIXES = ("loss.", "model_ema.")
"""What published VAE files carry besides the autoencoder: the training loss's networks and the EMA's counters."""


def latent_scale(config: UNetConfig) -> float:
    """The factor from a VAE's latents to those that a UNet of these sizes sees."""
    return SCALE_SDXL if config.adm_channels else SCALE_SD


@dataclass(frozen=True)
class VAEConfig:
    """Every size of an autoencoder; the defaults are those of SD1.x, SD2.x and SDXL.

    Level i has ``ch * ch_mult[i]`` channels; ``num_res_blocks`` blocks a level in the encoder, one more in the decoder.
    """

    in_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    embed_dim: int = 4

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel."""
        return 2 ** (len(self.ch_mult) - 1)

    def ddconfig(self) -> dict:
        """These sizes as LDM-style code takes them (the host's ``AutoencoderKL(ddconfig=...)``)."""
        return {
            "double_z": True,
            "z_channels": self.z_channels,
            "resolution": 256,
            "in_channels": self.in_channels,
            "out_ch": self.in_channels,
            "ch": self.ch,
            "ch_mult": list(self.ch_mult),
            "num_res_blocks": self.num_res_blocks,
            "attn_resolutions": [],
            "dropout": 0.0,
        }


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels; the projections are 1x1 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT[:, None] for conv in (self.q, self.k, self.v))  # (B, C, h, w) -> (B, 1, hw, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)  # (B, 1, hw, C) -> (B, C, h, w)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # One row below and one column to the right only: that is how the published weights were trained.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution and, except at the far end, the step to the next one."""

    def __init__(self, channels: int, out_channels: int, blocks: int, resample: tuple[str, nn.Module] | None):
        super().__init__()
        widths = [channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in itertools.pairwise(widths))
        self.resample = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self.resample)(x) if self.resample else x


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, 2 z_channels, H/f, W/f)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        steps = [("downsample", Downsample(width)) for width in widths[:-1]] + [None]
        self.down = nn.ModuleList(
            Level(before, width, config.num_res_blocks, step)
            for before, width, step in zip([config.ch, *widths], widths, steps)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> images (B, 3, f h, f w). ``up`` is numbered from the finest level and run backwards."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        steps = [None] + [("upsample", Upsample(width)) for width in widths[1:]]
        self.up = nn.ModuleList(
            Level(before, width, config.num_res_blocks + 1, step)
            for before, width, step in zip([*widths[1:], widths[-1]], widths, steps)
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder with the 1x1 convolutions between them and the latent."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (B, embed_dim, H/f, W/f), of the latent of images (B, 3, H, W) in [-1, 1].

        Raises ValueError for sizes that are not multiples of the factor f.
        """
        f = self.config.factor
        if images.ndim != 4 or images.shape[2] % f or images.shape[3] % f:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected (B, channels, H, W), H and W multiples of {f}"
            )
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> mean latents (B, embed_dim, H/f, W/f), unscaled."""
        return self.encode_moments(images)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, embed_dim, h, w) -> images (B, 3, f h, f w), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents))


def vae_config_from_state_dict(sd: Mapping[str, Tensor]) -> VAEConfig:
    """Read every size from an autoencoder's state dict in the LDM layout (keys without ``first_stage_model.``).

    Raises ValueError naming the missing key when this is not one.
    """

    def shape(key: str) -> torch.Size:
        if key not in sd:
            raise ValueError(f"not a Stable Diffusion VAE in the LDM layout: key '{key}' is missing")
        return sd[key].shape

    def count(pattern: str) -> int:
        n = 0
        while pattern.format(n) in sd:
            n += 1
        return n

    ch, in_channels = shape("encoder.conv_in.weight")[:2]
    shape("encoder.down.0.block.0.conv1.weight")  # at least one level
    levels = count("encoder.down.{}.block.0.conv1.weight")
    return VAEConfig(
        in_channels=in_channels,
        ch=ch,
        ch_mult=tuple(shape(f"encoder.down.{i}.block.0.conv1.weight")[0] // ch for i in range(levels)),
        num_res_blocks=count("encoder.down.0.block.{}.conv1.weight"),
        z_channels=shape("decoder.conv_in.weight")[1],
        embed_dim=shape("post_quant_conv.weight")[1],
    )


def load_vae(sd: Mapping[str, Tensor], dtype: torch.dtype | None = torch.float32) -> AutoencoderKL:
    """Build the autoencoder that a state dict describes and load it strictly (copies; ``sd`` is left alone).

    ``dtype`` None keeps the file's. SDXL's published VAE overflows in float16: leave it at float32.
    Raises ValueError with the sorted missing / unexpected / misshapen keys.
    """
    sd = {k: v for k, v in sd.items() if not k.startswith(IGNORED_PREFIXES)}
    config = vae_config_from_state_dict(sd)
    return load_strictly(lambda: AutoencoderKL(config), sd, "VAE", dtype=dtype)
