"""The diffusers layout against diffusers itself: its UNet and VAE load the renamed weights and compute the same."""

import inspect
from dataclasses import replace

import pytest
import torch
from comfyui_dmm.dmm_core.diffusers_layout import (
    check_diffusers_config,
    unet_config_to_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
    vae_from_diffusers,
)
from comfyui_dmm.dmm_core.style import style_delta, style_row
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig, timestep_embedding, unet_config_from_state_dict
from comfyui_dmm.dmm_core.vae import load_vae
from diffusers import AutoencoderKL, UNet2DConditionModel

N, POOLED, SIZES = 3, 24, 6 * 256
SD1 = UNetConfig(
    model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=(1, 1, 1), depth_input=(1, 1, 0), depth_middle=1,
    depth_output=(0, 0, 1, 1, 1, 1), context_dim=32, num_styles=N,
)  # fmt: skip
SD2 = UNetConfig(
    in_channels=9, model_channels=32, channel_mult=(1, 4), num_res_blocks=(2, 1), depth_input=(1, 1, 0), depth_middle=1,
    depth_output=(0, 0, 1, 1, 1), context_dim=48, linear_proj=True, num_styles=N,
)  # fmt: skip
SDXL = UNetConfig(
    model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=(1, 1, 1), depth_input=(0, 2, 3), depth_middle=3,
    depth_output=(3, 3, 2, 2, 0, 0), context_dim=32, linear_proj=True, adm_channels=POOLED + SIZES, num_styles=N,
    style_mlp="add_embedding2",
)  # fmt: skip
FAMILIES = {"SD1": SD1, "SD2": SD2, "SDXL": SDXL}


def random_unet(config: UNetConfig) -> UNet:
    """Norms included: an affine map that is left out, or two that are swapped, must show."""
    torch.manual_seed(0)
    unet = UNet(config).eval()
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return unet


def is_style(key: str, config: UNetConfig) -> bool:
    return key.startswith(("model_embedding.", f"{config.style_mlp}."))


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_diffusers_computes_the_same(config):
    unet = random_unet(config)
    weights = unet_to_diffusers(unet.state_dict())
    described = unet_config_to_diffusers(config)
    assert described.pop("num_models") == N
    assert described["addition_embed_type"] == ("model_merge_xl" if config.adm_channels else "model_merge")
    described["addition_embed_type"] = "text_time" if config.adm_channels else None  # diffusers knows no styles
    assert described.keys() - {"_class_name"} <= inspect.signature(UNet2DConditionModel.__init__).parameters.keys()
    theirs = UNet2DConditionModel.from_config(described).eval()
    theirs.load_state_dict({k: v for k, v in weights.items() if not is_style(k, config)}, strict=True)

    x, t = torch.randn(2, config.in_channels, 16, 24), torch.tensor([7, 701])
    context = torch.randn(2, 5, config.context_dim)
    y, added = None, None
    if config.adm_channels:
        sizes = torch.tensor([[128.0, 192, 0, 3, 128, 192], [64, 64, 5, 0, 128, 96]])
        pooled = torch.randn(2, POOLED)
        y = torch.cat([pooled, timestep_embedding(sizes.flatten(), 256).reshape(2, -1)], dim=1)
        added = {"text_embeds": pooled, "time_ids": sizes}
    ours = unet(x, t, context, y)
    error = (theirs(x, t, context, added_cond_kwargs=added).sample - ours).abs().max()
    assert error < 1e-4 and ours.std() > 0.05

    # With a style, as the authors' fork adds it: behind the time embedding.
    row = style_row(N, {0: 0.3, 2: 0.7}).repeat(2, 1)
    delta = style_delta(unet.model_embedding, unet.style_mlp, row)
    theirs.time_embedding.register_forward_hook(lambda module, inputs, out: out + delta)
    styled = unet(x, t, context, y, style=row)
    assert (theirs(x, t, context, added_cond_kwargs=added).sample - styled).abs().max() < 1e-4
    assert (styled - ours).abs().max() > 1e-2


@pytest.mark.parametrize("styles", [0, N])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_there_and_back_changes_nothing(config, styles):
    sd = UNet(replace(config, num_styles=styles)).state_dict()
    weights = unet_to_diffusers(sd)
    back = unet_from_diffusers(weights)
    assert back.keys() == sd.keys() and all(back[k] is sd[k] for k in sd)
    assert unet_to_diffusers(back).keys() == weights.keys()
    assert ("model_embedding.weight" in weights) == bool(styles)
    assert ("add_embedding.linear_1.weight" in weights) == bool(styles or config.adm_channels)


def test_an_sdxl_style_mlp_of_the_other_name_makes_room():
    """In a single file it may be called ``add_embedding``; in the diffusers layout that is SDXL's own."""
    sd = UNet(replace(SDXL, style_mlp="add_embedding")).state_dict()
    weights = unet_to_diffusers(sd)
    assert weights["add_embedding2.linear_1.weight"] is sd["add_embedding.linear_1.weight"]
    assert weights["add_embedding.linear_1.weight"] is sd["label_emb.0.0.weight"]


@pytest.mark.parametrize(
    "context, linear, adm, depths, heads",
    [
        (768, False, 0, (1, 1, 1, 0), 8),
        (1024, True, 0, (1, 1, 1, 0), [5, 10, 20, 20]),
        (2048, True, 2816, (0, 2, 10), [5, 10, 20]),
    ],
)
def test_config_of_the_published_models(context, linear, adm, depths, heads):
    """As their config.json on the hub: types, heads, depths."""
    config = UNetConfig(
        channel_mult=(1, 2, 4, 4)[: len(depths)],
        num_res_blocks=(2,) * len(depths),
        depth_input=tuple(d for d in depths for _ in range(2)),
        depth_middle=depths[-1] or 1,
        depth_output=tuple(d for d in reversed(depths) for _ in range(3)),
        context_dim=context,
        linear_proj=linear,
        adm_channels=adm,
    )
    described = unet_config_to_diffusers(config, 64)
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths]
    assert described["down_block_types"] == down
    assert described["up_block_types"] == [kind.replace("Down", "Up") for kind in reversed(down)]
    assert described["block_out_channels"] == [320, 640, 1280, 1280][: len(depths)]
    assert described["attention_head_dim"] == heads and described["layers_per_block"] == 2
    assert described["transformer_layers_per_block"] == ([1, 2, 10] if adm else 1)
    assert described["projection_class_embeddings_input_dim"] == (2816 if adm else None)
    assert "num_models" not in described
    with torch.device("meta"):
        names = set(UNet2DConditionModel.from_config(described).state_dict())
        sd = UNet(config).state_dict()
    assert set(unet_to_diffusers(sd)) == names and unet_config_from_state_dict(sd) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depth_input": (1, 0, 0), "num_res_blocks": (2, 1), "depth_output": (0, 0, 1, 1, 1)}, "only some blocks"),
        ({"depth_input": (2, 2, 0)}, "different transformer depths"),
        ({"depth_middle": 0}, "only some blocks"),
    ],
)
def test_what_diffusers_cannot_describe(change, message):
    with pytest.raises(ValueError, match=message):
        unet_config_to_diffusers(replace(SD2, **change))


def test_foreign_keys_are_named():
    sd = unet_to_diffusers(UNet(SD1).state_dict())
    with pytest.raises(ValueError, match=r"1 keys.*down_blocks.0.motion_modules.0.weight"):
        unet_from_diffusers({**sd, "down_blocks.0.motion_modules.0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="class embedding"):
        unet_from_diffusers({**sd, "class_embedding.linear_1.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="not a UNet in the diffusers layout"):
        unet_from_diffusers({"conv_in.weight": torch.ones(1)})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_models": 8}, "num_models 8, but the weights hold 3"),
        ({"freq_shift": 1}, "other time features"),
    ],
)
def test_a_config_that_contradicts_is_refused(change, message):
    described = unet_config_to_diffusers(SD1)
    check_diffusers_config(described, SD1)
    with pytest.raises(ValueError, match=message):
        check_diffusers_config({**described, **change}, SD1)


@torch.no_grad()
def test_vae_decodes_and_encodes_as_diffusers_does():
    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=(32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, sample_size=32,
    ).eval()  # fmt: skip
    for p in theirs.parameters():
        p.add_(0.1 * torch.randn_like(p))
    weights = theirs.state_dict()
    ours = load_vae(vae_from_diffusers(weights))
    images, latents = torch.rand(1, 3, 32, 48) * 2 - 1, torch.randn(1, 4, 8, 12)
    torch.testing.assert_close(ours.encode(images), theirs.encode(images).latent_dist.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, rtol=0, atol=1e-4)

    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # before diffusers 0.17
    old = {}
    for key, tensor in weights.items():
        for new, former in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        old[key] = tensor
    assert old.keys() != weights.keys()
    again = vae_from_diffusers(old)
    assert all(torch.equal(again[k], v) for k, v in vae_from_diffusers(weights).items())
