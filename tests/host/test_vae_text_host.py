"""Our autoencoder and prompt encoding against the real host's, on the same random weights."""

import pytest
import torch
from comfyui_dmm.dmm_core.sdxl import sdxl_vector
from comfyui_dmm.dmm_core.vae import AutoencoderKL, VAEConfig
from comfyui_dmm.training.text import ClipText, init_text

from .families import SD2_TEXT, noisy, open_clip_text, sdxl_text

PROMPTS = [
    "",
    "a red star on hills",
    "A Photo of a CAT, 35mm; f/1.8 -- don't crop!  ",
    "naïve café, 日本語 ✨ “quoted” &amp; ﬁne",
    "two\nlines\tand a tab",
    "!!! 1234567890 ___ #tag @home [brackets] {braces} <lora>",
    "word " * 74 + "end",  # exactly the 75 tokens of one window
    "word " * 75 + "end",
    ", ".join(["a tall tree by the sea"] * 30),
]


@torch.no_grad()
@pytest.mark.parametrize(
    "config, pixels",
    [(VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1), 128), (VAEConfig(), 64)],
    ids=["demo", "sd15"],
)
def test_vae_equals_the_host(host, config, pixels):
    """Max difference 3e-5 in [0, 1] pixels and in latents (float32 sums in another order; seen: 7e-6)."""
    torch.manual_seed(0)
    vae = AutoencoderKL(config).eval()
    sd = {k: v.clone() for k, v in vae.state_dict().items()}
    params = {"ddconfig": config.ddconfig(), "embed_dim": config.embed_dim}
    theirs = host.sd.VAE(sd=sd, config={"params": params}, dtype=torch.float32)
    images = torch.rand(2, pixels, pixels, 3)
    latents = vae.encode(images.movedim(-1, 1) * 2 - 1)
    torch.testing.assert_close(latents, theirs.encode(images), rtol=0, atol=3e-5)
    latents = 3 * torch.randn_like(latents)
    decoded = (vae.decode(latents).movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    assert decoded.std() > 0.05
    torch.testing.assert_close(decoded, theirs.decode(latents), rtol=0, atol=3e-5)


def host_clip(host, target, text, configs):
    """The host's CLIP from a checkpoint's text keys (converted by the host), at sizes that it does not know."""
    sd = target.process_clip_state_dict({k: v.clone() for k, v in text.items()})
    options = {"dtype": torch.float32, **configs}
    return host.sd.CLIP(target.clip_target(), state_dict=sd, model_options=options, parameters=1)


def small(width, layers):
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
    }


def target(host, family):
    """A host model configuration, for its text methods only."""
    return object.__new__(getattr(host.supported_models, family))


def compare(ours, clip, prompts=PROMPTS):
    """Prompt by prompt: contexts of the same length, within 1e-4 of values of order 4 (seen: 2.3e-5)."""
    for prompt in prompts:
        context, pooled = ours.encode_pooled([prompt])
        theirs, their_pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
        assert context.shape == theirs.shape, prompt
        torch.testing.assert_close(context, theirs, rtol=0, atol=1e-4, msg=lambda m: f"{prompt!r}: {m}")
        if pooled is not None:
            torch.testing.assert_close(pooled, their_pooled, rtol=0, atol=1e-4, msg=lambda m: f"{prompt!r}: {m}")


@pytest.mark.parametrize("width, layers", [(64, 2), (128, 3)])
def test_sd1_text_equals_the_host(host, width, layers):
    text = noisy(init_text(width, layers))
    theirs = host_clip(host, target(host, "SD15"), text, {"clip_l_model_config": small(width, layers)})
    ours = ClipText(text)
    compare(ours, theirs)
    theirs.clip_layer(-2)
    compare(ClipText(text, clip_skip=2), theirs, PROMPTS[:3])
    assert ours.encode(PROMPTS[-1:]).shape[1] > 77


def test_sd2_text_equals_the_host(host):
    text = open_clip_text(128, 3, SD2_TEXT, seed=1)
    theirs = host_clip(host, target(host, "SD20"), text, {"clip_h_model_config": small(128, 3)})
    compare(ClipText(text), theirs)


def test_sdxl_text_equals_the_host(host):
    text = sdxl_text(seed=2)
    configs = {"clip_l_model_config": small(64, 3), "clip_g_model_config": small(128, 4)}
    theirs = host_clip(host, target(host, "SDXL"), text, configs)
    ours = ClipText(text)
    assert ours.width == 192
    compare(ours, theirs)
    theirs.clip_layer(-1)
    compare(ClipText(text, clip_skip=1), theirs, PROMPTS[:3])


def test_sdxl_vector_equals_the_host(host):
    pooled = torch.randn(2, 1280)
    model = object.__new__(host.model_base.SDXL)
    torch.nn.Module.__init__(model)
    model.embedder = host.model_base.Timestep(256)
    model.noise_augmentor = None  # only read for unCLIP conditionings
    theirs = model.encode_adm(pooled_output=pooled, width=832, height=1216)
    torch.testing.assert_close(sdxl_vector(pooled, height=1216, width=832), theirs, rtol=0, atol=1e-4)
