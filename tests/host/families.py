"""Random DMM checkpoints of every family that the pack supports, as small as the host's model detection allows."""

import copy

import torch
from comfyui_dmm.dmm_core.checkpoint import Checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig, init_style
from comfyui_dmm.dmm_core.vae import AutoencoderKL, VAEConfig
from comfyui_dmm.training.text import init_text

NAMES = ["ink", "Neon lines", "paper: cut-out", "墨"]

DEMO = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    depth_input=(0, 1),
    depth_output=(1, 1, 0, 0),
    context_dim=64,
    num_styles=4,
)
SD15 = UNetConfig(
    channel_mult=(1, 1), num_res_blocks=(1, 1), depth_input=(0, 1), depth_output=(1, 0, 0, 0), num_styles=3
)
SD20 = UNetConfig(
    channel_mult=(1, 1),
    num_res_blocks=(1, 1),
    depth_input=(0, 1),
    depth_output=(1, 0, 0, 0),
    context_dim=1024,
    linear_proj=True,
    num_styles=2,
)
# The host knows SDXL by the depths of its input blocks; everything that it does not look at is cut.
SDXL = UNetConfig(
    channel_mult=(1, 1, 1),
    num_res_blocks=(2, 2, 2),
    depth_input=(0, 0, 2, 2, 10, 10),
    depth_middle=1,
    depth_output=(0,) * 9,
    context_dim=2048,
    linear_proj=True,
    adm_channels=2816,
    num_styles=2,
    style_mlp="add_embedding2",
)
FAMILIES = {"demo": DEMO, "sd15": SD15, "sd20": SD20, "sdxl": SDXL}


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    """A UNet whose styles show: its style offsets are large beside the time embedding."""
    torch.manual_seed(seed)
    unet = UNet(config).eval().requires_grad_(False)
    if config.num_styles:
        init_style(unet, torch.Generator().manual_seed(seed))
        unet.style_mlp.linear_2.weight *= 60
    return unet


def checkpoint_of(unet: UNet, dtype: torch.dtype = torch.float32, whole: bool = False, **changes) -> Checkpoint:
    """The checkpoint of a UNet, with names for its styles; ``whole`` adds a small text encoder and VAE."""
    checkpoint = Checkpoint(
        unet=copy.deepcopy(dict(unet.state_dict())),
        styles=[StyleInfo(name, description=f"about {name}") for name in NAMES[: unet.config.num_styles]],
        recipe={"steps": 7},
        metadata={"modelspec.title": "a test"},
    )
    if whole:
        torch.manual_seed(1)
        checkpoint.text = init_text(64, 2)
        vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1))
        checkpoint.vae = {k: v.detach() for k, v in vae.state_dict().items()}
    for part in (checkpoint.unet, checkpoint.text, checkpoint.vae):
        part.update({k: v.to(dtype) for k, v in part.items()})
    for name, value in changes.items():
        setattr(checkpoint, name, value)
    return checkpoint
