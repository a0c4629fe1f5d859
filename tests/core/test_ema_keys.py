"""Files whose only UNet is the averaged one of Stable Diffusion's trainer, whose keys have no dots."""

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, read_info
from comfyui_dmm.dmm_core.ema_keys import ema_key
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig
from safetensors.torch import save_file

from .test_checkpoint import bits, plain_file, unet_weights
from .test_diffusers_layout import SD2

SDXL = UNetConfig(
    channel_mult=(1, 2, 4), num_res_blocks=(2, 2, 2), depth_input=(0, 0, 2, 2, 10, 10), depth_middle=10,
    depth_output=(10, 10, 10, 2, 2, 2, 0, 0, 0), context_dim=2048, linear_proj=True, adm_channels=2816,
)  # fmt: skip


def flat(key):
    """As ldm/modules/ema.py names a weight of ``model``."""
    return "model_ema." + f"diffusion_model.{key}".replace(".", "")


def plain():
    return {k: v for k, v in unet_weights().items() if not k.startswith(("model_embedding", "add_embedding"))}


@pytest.mark.parametrize("config", [UNetConfig(), SD2, SDXL], ids=["SD1", "SD2", "SDXL"])
def test_every_name_is_found_again(config):
    with torch.device("meta"):
        keys = [k for k in UNet(config).state_dict() if not k.startswith(("model_embedding", "add_embedding"))]
    assert len(keys) > 100 and [ema_key(flat(key)) for key in keys] == keys


@pytest.mark.parametrize(
    "name", [flat, lambda key: f"model_ema.diffusion_model.{key}"], ids=["without dots", "with dots"]
)
def test_the_averaged_unet_is_the_unet(tmp_path, name):
    path = tmp_path / "ema.safetensors"
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3, dtype=torch.int32)}
    save_file(
        {
            **{name(k): v for k, v in plain().items()},
            **counters,
            "first_stage_model.decoder.conv_in.bias": torch.ones(2),
        },
        path,
    )
    read = load_checkpoint(path)
    assert bits(read.unet) == bits(plain()) and not read.other and list(read.vae) == ["decoder.conv_in.bias"]
    assert read_info(path).shapes == read.shapes


def test_beside_the_trained_weights_it_is_left_alone(tmp_path):
    averaged = {flat(k): v + 1 for k, v in plain().items()}
    read = load_checkpoint(plain_file(tmp_path / "both.safetensors", **averaged))
    assert bits(read.unet) == bits(unet_weights()) and bits(read.other) == bits(averaged)


def test_what_is_no_weight_of_the_unet_is_named(tmp_path):
    path = tmp_path / "ema.safetensors"
    save_file(
        {**{flat(k): v for k, v in plain().items()}, "model_ema.diffusion_modeldouble_blocks0": torch.ones(1)}, path
    )
    with pytest.raises(ValueError, match="ema.safetensors.*double_blocks0' is no averaged weight"):
        load_checkpoint(path)
