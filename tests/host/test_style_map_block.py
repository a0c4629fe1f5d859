"""The block of a style map against the host's own ResBlock: where the map is uniform, both must compute the same.

``nodes.style_map.blend_styles`` calls the layers of the host's ResBlock one by one (its comment says why). These tests fail when a
host changes what that block computes. They go the way of a sampling: through the host's ``forward_timestep_embed``, with the patch
and without it.
"""

import pytest
import torch
import torch.nn.functional as F

from .families import FAMILIES, checkpoint_of, random_unet
from .test_sampling_equals_core import load

CLOSE = {torch.float32: 2e-6, torch.float16: 5e-3}
"""Largest difference over the largest output. Seen: 2e-7, and 9e-4 in float16. The smallest of CHANGES makes 0.011."""
ROWS, SIZE = 2, (5, 7)
EMB = 64


@torch.inference_mode()
def assert_same(block, dtype=torch.float32):
    """One host block on random features: the map paints one style everywhere, and the host has that style in its embedding."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
    from comfyui_dmm.nodes.style_map import MAP, Blender, install

    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x, emb = 2 * random(ROWS, block.channels, *SIZE) + 1, random(ROWS, block.emb_channels)
    style, other = random(2, ROWS, block.emb_channels)
    share = torch.rand(ROWS, *SIZE, generator=generator).to(dtype)
    everywhere, nowhere = torch.ones_like(share), torch.zeros_like(share)
    maps = {
        "one style": ((style,), (everywhere,)),
        "a style that is nowhere": ((other, style), (nowhere, everywhere)),
        "the same style in two regions": ((style, style), (share, 1 - share)),
    }
    blocks = TimestepEmbedSequential(block)
    own = blocks(x, emb + style)
    options = {"transformer_options": {}}
    install(options)
    for name, (deltas, shares) in maps.items():
        blender = Blender(
            torch.stack(deltas, dim=1), {SIZE: torch.stack(shares, dim=1)}
        )  # (ROWS, K, D), (ROWS, K, h, w)
        ours = blocks(x, emb, transformer_options={**options["transformer_options"], MAP: blender})
        scale = own.abs().max().item()
        torch.testing.assert_close(ours, own, rtol=0, atol=CLOSE[dtype] * scale, msg=lambda m, n=name: f"{n}: {m}")
    if block.out_channels > 32:  # else groups of one channel, whose normalisation takes any uniform offset away
        assert (blocks(x, emb) - own).abs().max() > 0.05 * scale, "the style does not show in this test"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_every_family(models, family):
    """The blocks as the pack's loader has the host build them, on our random weights. No kind but the plain one occurs."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    unet = load(models, checkpoint_of(random_unet(FAMILIES[family])), "blocks").model.diffusion_model
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    assert len(blocks) >= 2 * len(FAMILIES[family].channel_mult)
    for block in blocks:
        assert type(block) is ResBlock and plain(block)
        assert_same(block)
    widened = {block.channels != block.out_channels for block in blocks}
    assert widened == {False, True}, "both kinds of skip connection"


def plain(block) -> bool:
    """Whether a host block has none of the options that ``blend_styles`` leaves out."""
    return not (block.updown or block.use_scale_shift_norm or block.skip_t_emb or block.exchange_temb_dims)


def block_of(channels=64, out_channels=None, dtype=torch.float32, **options):
    """A host ResBlock with random weights, none at its neutral value."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    torch.manual_seed(0)
    ops = comfy.ops.disable_weight_init
    block = ResBlock(channels, EMB, 0.0, out_channels, dtype=dtype, operations=ops, **options).eval()
    for name, parameter in block.named_parameters():
        norm = name.endswith("layers.0.weight")
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.data = ((1 if norm else 0) + size * torch.randn(parameter.shape)).to(dtype)
    return block.requires_grad_(False)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"out_channels": 32},
        {"out_channels": 128},
        {"channels": 32},
    ],
    ids=str,
)
def test_every_width(host, options, dtype):
    assert_same(block_of(dtype=dtype, **options), dtype)


# --- a host that computes something else ------------------------------------------------------------------------------


def no_activation(block, x, emb):
    h = block.in_layers(x) + block.emb_layers[1](emb)[:, :, None, None]
    return block.skip_connection(x) + block.out_layers(h)


def added_after_the_norm(block, x, emb):
    h = block.out_layers[0](block.in_layers(x)) + block.emb_layers(emb)[:, :, None, None]
    return block.skip_connection(x) + block.out_layers[1:](h)


def added_before_the_convolution(block, x, emb):
    h = block.in_layers[:2](x) + block.emb_layers(emb)[:, : block.channels, None, None]
    return block.skip_connection(x) + block.out_layers(block.in_layers[2](h))


def scaled_sum(block, x, emb):
    h = block.in_layers(x) + block.emb_layers(emb)[:, :, None, None]
    return (block.skip_connection(x) + block.out_layers(h)) / 2**0.5


def no_skip(block, x, emb):
    return block.out_layers(block.in_layers(x) + block.emb_layers(emb)[:, :, None, None])


def rescaled_embedding(block, x, emb):
    h = block.in_layers(x) + 1.1 * block.emb_layers(emb)[:, :, None, None]
    return block.skip_connection(x) + block.out_layers(h)


def multiplied(block, x, emb):
    h = block.in_layers(x) * (1 + block.emb_layers(emb)[:, :, None, None])
    return block.skip_connection(x) + block.out_layers(h)


def clipped(block, x, emb):
    h = block.in_layers(x) + block.emb_layers(emb)[:, :, None, None]
    return F.hardtanh(block.skip_connection(x) + block.out_layers(h), -2, 2)


CHANGES = [
    no_activation,
    added_after_the_norm,
    added_before_the_convolution,
    scaled_sum,
    no_skip,
    rescaled_embedding,
    multiplied,
    clipped,
]


def as_it_is(block, x, emb):
    h = block.in_layers(x) + block.emb_layers(emb)[:, :, None, None]
    return block.skip_connection(x) + block.out_layers(h)


@pytest.mark.parametrize("change", CHANGES)
def test_a_host_with_another_block_is_noticed(host, change, monkeypatch):
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    block = block_of()
    monkeypatch.setattr(ResBlock, "forward", as_it_is)
    assert_same(block)
    monkeypatch.setattr(ResBlock, "forward", change)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(block)


@pytest.mark.parametrize("options", [{"up": True}, {"down": True}, {"use_scale_shift_norm": True}], ids=str)
def test_the_kinds_left_out_are_noticed_too(host, options):
    """Were a family to come with them, ``test_every_block_of_every_family`` could not pass by chance."""
    block = block_of(**options)
    assert not plain(block)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_same(block)
