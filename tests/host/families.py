"""Random DMM checkpoints of every family that the pack supports, as small as the host's model detection allows, and smaller ones."""

import copy
import dataclasses

import torch
from comfyui_dmm.dmm_core.bank import BankConfig
from comfyui_dmm.dmm_core.bank_size import is_banked
from comfyui_dmm.dmm_core.checkpoint import Checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.sdxl import SIZE_CHANNELS
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig, init_style
from comfyui_dmm.dmm_core.vae import AutoencoderKL, VAEConfig
from comfyui_dmm.training.text import init_text
from torch import Tensor

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
# The shapes of SD2.x and SDXL at widths that only this pack's loader builds; contexts as wide as the text encoders of ``text_of``.
SMALL_SD20 = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    depth_input=(0, 1),
    depth_output=(1, 1, 0, 0),
    context_dim=128,
    linear_proj=True,
    num_styles=3,
)
SMALL_SDXL = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    depth_input=(0, 2),
    depth_middle=2,
    depth_output=(2, 2, 0, 0),
    context_dim=64 + 128,
    linear_proj=True,
    adm_channels=128 + SIZE_CHANNELS,
    num_styles=3,
    style_mlp="add_embedding2",
)
FAMILIES = {
    "demo": DEMO,
    "sd15": SD15,
    "sd20": SD20,
    "sdxl": SDXL,
    "small sd20": SMALL_SD20,
    "small sdxl": SMALL_SDXL,
}
KNOWN_AS = {"demo": "SD15", "sd15": "SD15", "sd20": "SD20", "sdxl": "SDXL", "small sd20": "SD20", "small sdxl": "SDXL"}
"""The host's name for each."""


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    """A UNet whose styles show: its style offsets are large beside the time embedding."""
    torch.manual_seed(seed)
    unet = UNet(config).eval().requires_grad_(False)
    if config.num_styles:
        init_style(unet, torch.Generator().manual_seed(seed))
        unet.style_mlp.linear_2.weight *= 60
    return unet


def with_bank(unet: UNet, rank: int = 3, seed: int = 5) -> UNet:
    """A UNet with the same weights and a random style bank, of which each style shows; the last core is that of no style."""
    layers = [key.removesuffix(".weight") for key, w in unet.state_dict().items() if is_banked(key, w.shape)]
    ranks = tuple((name, rank, rank + i % 2) for i, name in enumerate(sorted(layers)))
    bank = BankConfig(ranks, unet.config.num_styles + 1, True)
    banked = UNet(dataclasses.replace(unet.config, bank=bank)).eval().requires_grad_(False)
    banked.load_state_dict(unet.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(seed)
    for name, part in banked.style_bank.layers():
        size = unet.get_submodule(name).weight.std() / rank
        for p in part.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        part.cores.weight *= size
        if part.bias is not None:
            part.bias.weight *= 0.05
    return banked


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
        checkpoint.text = text_of(unet.config)
        vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1))
        checkpoint.vae = {k: v.detach() for k, v in vae.state_dict().items()}
    for part in (checkpoint.unet, checkpoint.text, checkpoint.vae):
        part.update({k: v.to(dtype) for k, v in part.items()})
    for name, value in changes.items():
        setattr(checkpoint, name, value)
    return checkpoint


# --- text encoders ----------------------------------------------------------------------------------------------------


def text_of(config: UNetConfig, seed: int = 0) -> dict[str, Tensor]:
    """The small text encoder that a small family's files hold: one of 64 (SD1.x), of 128 (SD2.x), or one of each (SDXL)."""
    if config.adm_channels:
        return sdxl_text(seed)
    return open_clip_text(128, 3, SD2_TEXT, seed) if config.linear_proj else init_text(64, 2, seed)


def sdxl_text(seed: int = 0) -> dict[str, Tensor]:
    clip_l = {
        k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in noisy(init_text(64, 3, seed)).items()
    }
    return clip_l | open_clip_text(128, 4, "conditioner.embedders.1.model.", seed + 1)


SD2_TEXT = "cond_stage_model.model."


def open_clip_text(width: int, layers: int, prefix: str, seed: int) -> dict[str, Tensor]:
    """Random weights in OpenCLIP's names: transformers' names and shapes, with query, key and value in one tensor."""
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.": "ln_final.",
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm": "ln_",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    sd, qkv = {}, {}
    for key, weight in noisy(init_text(width, layers, seed)).items():
        key = key.split("text_model.")[1]
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if "self_attn" in key:
            block, _, part = key.partition("self_attn.")
            qkv.setdefault(f"{block}attn.in_proj_{part.split('.')[1]}", {})[part[0]] = weight
        else:
            sd[key] = weight
    sd |= {key: torch.cat([parts[p] for p in "qkv"]) for key, parts in qkv.items()}
    generator = torch.Generator().manual_seed(seed)
    sd["text_projection"] = torch.randn(width, width, generator=generator) / width**0.5
    sd["logit_scale"] = torch.tensor(4.6)
    return {prefix + k: v for k, v in sd.items()}


def noisy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """No weight at its neutral value, so that a norm or a bias left out shows."""
    generator = torch.Generator().manual_seed(7)
    return {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
