"""A tiny ControlNet (Zhang et al., arXiv:2302.05543) in the original key layout.

A trainable copy of the UNet's encoder and middle block reads a hint picture; 1x1 convolutions that start at zero hand its
features to the UNet's skip connections.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...dmm_core.unet import UNet, encoder_blocks, middle_block, time_embed, timestep_embedding

HINT_CHANNELS = (16, 16, 32, 32, 96, 96, 256)
"""Widths of the hint encoder's convolutions, fixed by the layout; every second one from the third halves the size."""


def zero_conv(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def hint_encoder(out_channels: int) -> nn.Sequential:
    """(B, 3, H, W) in [0, 1] -> (B, out, H/8, W/8)."""
    layers, ch = [], 3
    for i, width in enumerate(HINT_CHANNELS):
        layers += [nn.Conv2d(ch, width, 3, padding=1, stride=2 if i in (2, 4, 6) else 1), nn.SiLU()]
        ch = width
    last = nn.Conv2d(ch, out_channels, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class ControlNet(nn.Module):
    def __init__(self, unet: UNet):
        super().__init__()
        config = unet.config
        self.config = config
        self.time_embed = time_embed(config)
        self.input_blocks, channels = encoder_blocks(config)
        self.middle_block = middle_block(config)
        copied = {
            k: v
            for k, v in unet.state_dict().items()
            if k.split(".")[0] in ("time_embed", "input_blocks", "middle_block")
        }
        self.load_state_dict(copied, strict=True)
        self.input_hint_block = hint_encoder(config.model_channels)
        self.zero_convs = nn.ModuleList(nn.Sequential(zero_conv(ch)) for ch in channels)
        self.middle_block_out = nn.Sequential(zero_conv(channels[-1]))

    def forward(self, x: Tensor, hint: Tensor, t: Tensor, context: Tensor) -> tuple[list[Tensor], Tensor]:
        """x_t (B, 4, h, w) and hint (B, 3, 8h, 8w) in [0, 1] -> residuals for the skips and for the middle block."""
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        h, residuals = x, []
        for i, (block, out) in enumerate(zip(self.input_blocks, self.zero_convs)):
            h = block(h, emb, context, h.shape[2:])
            if i == 0:
                h = h + self.input_hint_block(hint)
            residuals.append(out(h))
        h = self.middle_block(h, emb, context, h.shape[2:])
        return residuals, self.middle_block_out(h)

    def file_state_dict(self) -> dict[str, Tensor]:
        """As a Control-LoRA with whole weights: the host then takes the sizes from the MODEL. Those of a ControlNet it looks up among the
        released ones and, as these are not there, would log an error at each load."""
        return {"lora_controlnet": torch.zeros(0)} | {k: v.detach().contiguous() for k, v in self.state_dict().items()}
