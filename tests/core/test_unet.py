"""Our UNet against diffusers' (same weights through its own conversion), and what the host tests cannot see: gradients."""

import dataclasses

import pytest
import torch
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.dmm_core.unet import (
    UNet,
    UNetConfig,
    init_style,
    load_unet,
    timestep_embedding,
    unet_config_from_state_dict,
)

DEMO = UNetConfig(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=(1, 1), depth_input=(0, 1), depth_output=(1, 1, 0, 0),
    context_dim=64, num_styles=3,
)  # fmt: skip
SDXL = UNetConfig(
    model_channels=64, channel_mult=(1, 2, 4), num_res_blocks=(2, 2, 2), depth_input=(0, 0, 2, 2, 3, 3), depth_middle=3,
    depth_output=(3, 3, 3, 2, 2, 2, 0, 0, 0), context_dim=128, linear_proj=True, adm_channels=96, num_styles=2, style_mlp="add_embedding2",
)  # fmt: skip
CONFIGS = {
    "demo": DEMO,
    "sdxl": SDXL,
    "sd15 layout": dataclasses.replace(DEMO, num_styles=0, depth_input=(1, 0), depth_output=(0, 2, 1, 1)),
}


def make(config, seed=0):
    torch.manual_seed(seed)
    unet = UNet(config).eval()
    if config.num_styles:
        init_style(unet, torch.Generator().manual_seed(seed))
    return unet


def inputs(config, batch=2, size=(16, 16)):
    g = torch.Generator().manual_seed(1)
    y = torch.randn(batch, config.adm_channels, generator=g) if config.adm_channels else None
    x = torch.randn(batch, 4, *size, generator=g)
    return x, torch.tensor([7, 903])[:batch], torch.randn(batch, 11, config.context_dim, generator=g), y


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_read_back_from_the_weights(name):
    config = CONFIGS[name]
    sd = make(config).state_dict()
    assert unet_config_from_state_dict(sd) == config
    again = load_unet(sd).state_dict()
    assert all(torch.equal(sd[k], again[k]) for k in sd)


def test_the_real_sd15_has_859_520_964_parameters():
    """The published count of SD1.5's UNet, from sizes alone."""
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_the_real_sdxl_has_2_567_463_684_parameters():
    with torch.device("meta"):
        unet = UNet(
            UNetConfig(
                channel_mult=(1, 2, 4), num_res_blocks=(2, 2, 2), depth_input=(0, 0, 2, 2, 10, 10), depth_middle=10,
                depth_output=(10, 10, 10, 2, 2, 2, 0, 0, 0), context_dim=2048, linear_proj=True, adm_channels=2816,
            )
        )  # fmt: skip
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684


def to_diffusers(unet, config):
    """diffusers' UNet with our weights, through diffusers' own LDM conversion."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    down = [
        "DownBlock2D" if not any(d) else "CrossAttnDownBlock2D"
        for d in _by_level(config.depth_input, config.num_res_blocks)
    ]
    up = [
        "UpBlock2D" if not any(d) else "CrossAttnUpBlock2D"
        for d in _by_level(config.depth_output, [n + 1 for n in reversed(config.num_res_blocks)])
    ]
    depths = [max(d[0], 1) for d in _by_level(config.depth_input, config.num_res_blocks)]
    channels = [m * config.model_channels for m in config.channel_mult]
    extra = (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": config.adm_channels}
        if config.adm_channels
        else {}
    )
    model = diffusers.UNet2DConditionModel(
        block_out_channels=channels, layers_per_block=config.num_res_blocks[0], down_block_types=down, up_block_types=up,
        cross_attention_dim=config.context_dim, attention_head_dim=list(config.all_heads),
        transformer_layers_per_block=depths, use_linear_projection=config.linear_proj, **extra,
    )  # fmt: skip
    plain = {
        f"model.diffusion_model.{k}": v
        for k, v in unet.state_dict().items()
        if not k.startswith(("model_embedding", "add_embedding"))
    }
    converted = convert_ldm_unet_checkpoint(
        plain,
        {
            **model.config,
            "layers_per_block": config.num_res_blocks[0],
            "class_embed_type": extra.get("class_embed_type"),
            "addition_embed_type": None,
        },
    )
    missing, unexpected = model.load_state_dict(converted, strict=False)
    assert not missing and not unexpected, (missing[:5], unexpected[:5])
    return model.eval()


def _by_level(depths, counts):
    depths = list(depths)
    return [[depths.pop(0) for _ in range(n)] for n in counts]


@pytest.mark.parametrize("name", ["demo", "sdxl"])
@torch.no_grad()
def test_equals_diffusers(name):
    """Same weights, same inputs, without a style: within 2e-5 of the output's scale."""
    config = CONFIGS[name]
    unet = make(config)
    x, t, context, y = inputs(config)
    theirs = to_diffusers(unet, config)(x, t, context, class_labels=y).sample
    ours = unet(x, t, context, y=y)
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_timestep_embedding_formula():
    got = timestep_embedding(torch.tensor([3.0]), 8)[0].double()
    freqs = [10000 ** (-i / 4) for i in range(4)]
    want = [torch.tensor(3 * f).cos().item() for f in freqs] + [torch.tensor(3 * f).sin().item() for f in freqs]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_style_is_an_offset_to_the_time_embedding():
    """The same eps as from a plain UNet whose time embedding's last bias is shifted by the style's delta."""
    unet = make(DEMO)
    x, t, context, _ = inputs(DEMO)
    row = style_row(3, {0: 0.5, 2: 0.5}, 1.3)
    styled = unet(x, t, context, style=row.expand(2, -1))
    e = 0.5 * unet.model_embedding.weight[0] + 0.5 * unet.model_embedding.weight[2]
    unet.time_embed[2].bias += 1.3 * unet.add_embedding(e)
    torch.testing.assert_close(styled, unet(x, t, context), atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_row_has_its_own_style():
    unet = make(DEMO)
    x, t, context, _ = inputs(DEMO)
    rows = torch.cat([style_row(3, 0), style_row(3, 2)])
    both = unet(x, t, context, style=rows)
    for i in range(2):
        alone = unet(x[i : i + 1], t[i : i + 1], context[i : i + 1], style=rows[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=0)
    assert (both - unet(x, t, context, style=rows.flip(0))).abs().max() > 1e-3


@torch.no_grad()
def test_features_are_the_blocks_outputs():
    unet = make(DEMO)
    seen = []
    for block in (*unet.input_blocks, unet.middle_block, *unet.output_blocks):
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    x, t, context, _ = inputs(DEMO)
    out, features = unet(x, t, context, features=True)
    assert len(features) == len(unet.input_blocks) + 1 + len(unet.output_blocks) == 9
    assert all(torch.equal(a, b) for a, b in zip(seen, features, strict=True))
    assert torch.equal(out, unet(x, t, context))


@pytest.mark.parametrize("name", ["demo", "sdxl"])
def test_checkpointing_changes_nothing_but_memory(name):
    config = CONFIGS[name]
    unet = make(config)
    x, t, context, y = inputs(config)
    rows = style_row(config.num_styles, 1).expand(2, -1)
    grads = []
    for flag in (False, True):
        unet.gradient_checkpointing = flag
        unet.zero_grad()
        unet(x, t, context, y=y, style=rows).square().mean().backward()
        grads.append({k: p.grad.clone() for k, p in unet.named_parameters()})
    for key in grads[0]:
        torch.testing.assert_close(grads[0][key], grads[1][key], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_odd_sizes():
    unet = make(DEMO)
    x, t, context, _ = inputs(DEMO, size=(15, 9))
    assert unet(x, t, context).shape == x.shape


def test_errors_name_what_is_wrong():
    unet = make(dataclasses.replace(DEMO, num_styles=0))
    x, t, context, _ = inputs(DEMO)
    with pytest.raises(ValueError, match="no styles"):
        unet(x, t, context, style=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="does not take pooled"):
        unet(x, t, context, y=torch.zeros(2, 5))
    sd = dict(unet.state_dict())
    removed = sd.pop("middle_block.0.in_layers.0.weight")
    with pytest.raises(ValueError, match=r"missing \['middle_block.0.in_layers.0.weight'\]"):
        load_unet(sd)
    with pytest.raises(ValueError, match=r"unexpected \['extra'\]"):
        load_unet({**sd, "middle_block.0.in_layers.0.weight": removed, "extra": removed})
    with pytest.raises(ValueError, match=r"wrong shape \['middle_block.0.in_layers.0.weight'\]"):
        load_unet({**sd, "middle_block.0.in_layers.0.weight": removed[:3]})
    with pytest.raises(ValueError, match="'input_blocks.0.0.weight' is missing"):
        unet_config_from_state_dict({})
