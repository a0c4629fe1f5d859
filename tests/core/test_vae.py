"""The autoencoder against diffusers' (other code, other key names) on the same random weights."""

import pytest
import torch
from comfyui_dmm.dmm_core.vae import AutoencoderKL, VAEConfig, load_vae, vae_config_from_state_dict
from diffusers import AutoencoderKL as DiffusersVAE
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

DEMO = VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)
UNEVEN = VAEConfig(ch=32, ch_mult=(1, 3, 2), num_res_blocks=2, z_channels=8, embed_dim=6)


def random_vae(config: VAEConfig) -> AutoencoderKL:
    """Random weights everywhere, norms included: an affine map that is left out must show."""
    torch.manual_seed(0)
    vae = AutoencoderKL(config).eval()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return vae


def diffusers_vae(vae: AutoencoderKL) -> DiffusersVAE:
    config = vae.config
    widths = [config.ch * m for m in config.ch_mult]
    theirs = DiffusersVAE(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
    ).eval()
    converted = convert_ldm_vae_checkpoint({k: v.clone() for k, v in vae.state_dict().items()}, theirs.config)
    theirs.load_state_dict(converted, strict=True)
    return theirs


@torch.no_grad()
def test_equals_diffusers_in_both_directions():
    vae = random_vae(DEMO)
    theirs = diffusers_vae(vae)
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    mean, logvar = vae.encode_moments(images)
    oracle = theirs.encode(images).latent_dist
    torch.testing.assert_close(mean, oracle.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(logvar, oracle.logvar, rtol=0, atol=1e-4)
    torch.testing.assert_close(vae.encode(images), oracle.mean, rtol=0, atol=1e-4)
    latents = torch.randn(2, 4, 8, 12)
    torch.testing.assert_close(vae.decode(latents), theirs.decode(latents).sample, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [DEMO, UNEVEN, VAEConfig()])
def test_sizes_are_read_back_from_the_weights(config):
    with torch.device("meta"):
        sd = AutoencoderKL(config).state_dict()
    assert vae_config_from_state_dict(sd) == config


def test_sd15_has_its_published_size():
    """83 653 863 parameters in 248 tensors, as in the published SD1.5 VAE file."""
    with torch.device("meta"):
        sd = AutoencoderKL(VAEConfig()).state_dict()
    assert (len(sd), sum(v.numel() for v in sd.values())) == (248, 83_653_863)


@torch.no_grad()
def test_load_copies_converts_and_ignores_training_leftovers():
    vae = random_vae(DEMO)
    sd = {k: v.half() for k, v in vae.state_dict().items()} | {
        "loss.logvar": torch.zeros(()),
        "model_ema.decay": torch.ones(()),
    }
    loaded = load_vae(sd)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    latents = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(loaded.decode(latents), vae.decode(latents), rtol=0, atol=2e-2)  # float16 weights
    loaded.quant_conv.weight.zero_()
    assert sd["quant_conv.weight"].any() and "loss.logvar" in sd
    assert load_vae(sd, dtype=None).quant_conv.weight.dtype == torch.float16


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda sd: sd.pop("encoder.conv_in.weight"), "'encoder.conv_in.weight' is missing"),
        (lambda sd: sd.pop("post_quant_conv.weight"), "'post_quant_conv.weight' is missing"),
        (lambda sd: sd.pop("decoder.mid.attn_1.q.bias"), r"missing \['decoder.mid.attn_1.q.bias'\]"),
        (lambda sd: sd.update({"encoder.extra": torch.zeros(1)}), r"unexpected \['encoder.extra'\]"),
        (lambda sd: sd.update({"quant_conv.bias": torch.zeros(3)}), r"wrong shape \['quant_conv.bias'\]"),
        (lambda sd: sd.clear(), "not a Stable Diffusion VAE"),
    ],
)
def test_a_wrong_file_is_refused_by_name(break_it, message):
    sd = random_vae(DEMO).state_dict()
    break_it(sd)
    with pytest.raises(ValueError, match=message):
        load_vae(sd)


@pytest.mark.parametrize("shape", [(1, 3, 60, 64), (1, 3, 64, 65), (3, 64, 64)])
def test_images_off_the_latent_grid_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 8"):
        random_vae(DEMO).encode(torch.zeros(shape))


def test_every_weight_trains():
    vae = random_vae(DEMO).train()
    mean, logvar = vae.encode_moments(torch.rand(2, 3, 32, 32))
    (vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)) ** 2).mean().backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []
