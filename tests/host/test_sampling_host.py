"""Our noise levels, samplers and guidance against the real host's, on the same functions and on the same files."""

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import save_checkpoint
from comfyui_dmm.dmm_core.sampling import SAMPLERS, SCHEDULERS, cfg_denoiser, host_noise, sample, sigmas_for
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.sdxl import sdxl_vector
from comfyui_dmm.dmm_core.style import no_style_row, style_row
from comfyui_dmm.dmm_core.style_value import PerItem, Strength, parse_style

from .families import FAMILIES, NAMES, checkpoint_of, random_unet
from .sampling import SIZE, conditioning

ZERO_SNR = pytest.mark.parametrize("zero_snr", [False, True])
STEPS = [*range(1, 61), 75, 99, 100, 250, 333, 500, 501, 999, 1000]


def host_sampling(host, kind="EPS", zero_snr=False):
    """The host's model_sampling of SD1.x (discrete) with the prediction ``EPS`` or ``V_PREDICTION``."""
    import comfy.model_sampling as ms

    return type("Sampling", (ms.ModelSamplingDiscrete, getattr(ms, kind)), {})(zsnr=zero_snr)


@ZERO_SNR
def test_tables_equal_the_host(host, zero_snr):
    """To the last bit of float32: relative 2e-7."""
    ours, theirs = NoiseSchedule(zero_snr), host_sampling(host, zero_snr=zero_snr)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-7, atol=0)
    t = torch.cat([torch.linspace(-2, 1001, 4001), torch.arange(1000.0)])
    sigma = ours.sigma_from_t(t)
    torch.testing.assert_close(sigma, theirs.sigma(t), rtol=5e-7, atol=0)
    assert torch.equal(ours.t_from_sigma(sigma), theirs.timestep(sigma))


@ZERO_SNR
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_levels_equal_the_host(host, scheduler, zero_snr):
    """Relative 5e-7; and the same timestep for each level, which ties between two timesteps would show."""
    import comfy.samplers

    ours, theirs = NoiseSchedule(zero_snr), host_sampling(host, zero_snr=zero_snr)
    for steps in STEPS:
        expected = comfy.samplers.calculate_sigmas(theirs, scheduler, steps)
        sigmas = sigmas_for(ours, steps, scheduler)
        assert sigmas.dtype == expected.dtype
        torch.testing.assert_close(sigmas, expected, rtol=5e-7, atol=0, msg=lambda m: f"{steps} steps: {m}")
        assert torch.equal(ours.t_from_sigma(sigmas[:-1]), theirs.timestep(expected[:-1])), f"{steps} steps"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "scheduler, steps", [("karras", 25), ("normal", 8), ("simple", 3), ("ddim_uniform", 7), ("karras", 1)]
)
def test_samplers_equal_the_host(host, sampler, scheduler, steps):
    """On a curved function of x and sigma, at most 2e-5 apart on values up to 2, every step's callback included."""
    import comfy.samplers

    def denoise(x, sigma, **_):
        s = sigma[:, None, None, None] ** 2
        return (0.1 * x + s * torch.tanh(x / (0.1 + s)).roll(1, -1)) / (0.1 + s)

    class Wrap:
        """What KSAMPLER asks of the guider around a model."""

        inner_model = type("Model", (), {"model_sampling": host_sampling(host)})
        model_patcher = inner_model
        model_patcher.model, cfg = None, 1.0

        def __call__(self, x, sigma, model_options=None, seed=None):
            return denoise(x, sigma)

    schedule, noise = NoiseSchedule(), host_noise((2, 4, SIZE, SIZE), 5)
    sigmas = sigmas_for(schedule, steps, scheduler)
    ours, theirs = [], []
    result = sample(denoise, schedule, noise, sigmas, sampler=sampler, callback=lambda *args: ours.append(args))
    expected = comfy.samplers.sampler_object(sampler).sample(
        *(Wrap(), sigmas, {}, lambda *args: theirs.append(args), noise.clone()),
        latent_image=torch.zeros_like(noise),
        disable_pbar=True,
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
    assert len(ours) == len(theirs) == len(sigmas) - 1
    for (i, denoised, x, total), (j, their_denoised, their_x, their_total) in zip(ours, theirs):
        assert (i, total) == (j, their_total)
        torch.testing.assert_close(denoised, their_denoised, rtol=0, atol=2e-5)
        torch.testing.assert_close(x, their_x, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 7, 2**64 - 1])
def test_noise_equals_the_host(host, seed):
    import comfy.sample

    expected = comfy.sample.prepare_noise(torch.zeros(3, 4, SIZE, SIZE), seed)
    assert torch.equal(host_noise((3, 4, SIZE, SIZE), seed), expected)


@pytest.mark.parametrize(
    "family, prediction, zero_snr, cfg, sampler, scheduler",
    [
        ("demo", "eps", False, 1.0, "euler", "normal"),
        ("demo", "eps", False, 4.0, "dpmpp_2m", "karras"),
        ("demo", "eps", False, 4.0, "ddim", "ddim_uniform"),
        ("demo", "v", False, 7.0, "dpmpp_2m", "sgm_uniform"),
        ("demo", "v", True, 4.0, "euler", "simple"),
        ("sd20", "v", False, 4.0, "dpmpp_2m", "normal"),
        ("sdxl", "eps", False, 4.0, "dpmpp_2m", "karras"),
    ],
)
def test_a_whole_painting_equals_the_host(models, family, prediction, zero_snr, cfg, sampler, scheduler):
    """KSampler with the pack's loader and style nodes, against dmm_core alone: latents within 2e-4 of the largest.

    Random networks amplify differences in the order of float32 sums; seen: 5e-5 on the zero-SNR schedule, 2e-6 else.
    """
    import comfy.sample
    from comfyui_dmm.nodes import host_model

    config, batch, seed = FAMILIES[family], 2, 11
    steps = 5 if family == "demo" else 3  # the others are large
    unet = random_unet(config)
    path = models / "dmm" / f"painting-{family}.safetensors"
    save_checkpoint(path, checkpoint_of(unet, prediction=prediction, zero_snr=zero_snr))
    rows = torch.cat([style_row(config.num_styles, 1, 0.75), no_style_row(config.num_styles)])
    positive, negative = conditioning(config, 1), conditioning(config, 2)
    with torch.inference_mode():
        style = PerItem((Strength(parse_style(NAMES[1]), 0.75), parse_style("none")))
        model = host_model.styled(host_model.load(str(path))[0], style)
        latent = torch.zeros(batch, 4, SIZE, SIZE)
        noise = comfy.sample.prepare_noise(latent, seed)
        expected = comfy.sample.sample(
            *(model, noise, steps, cfg, sampler, scheduler, positive, negative, latent), disable_pbar=True, seed=seed
        )
        expected = model.model.process_latent_in(expected)  # scaled again, as the UNet sees them

    def y_of(conds):
        return sdxl_vector(conds[0][1]["pooled_output"], 8 * SIZE, 8 * SIZE) if config.adm_channels else None

    schedule = NoiseSchedule(zero_snr)

    def paint(style):
        denoise = cfg_denoiser(
            *(unet, schedule, positive[0][0], negative[0][0]),
            cfg=cfg,
            style=style,
            y=y_of(positive),
            uncond_y=y_of(negative),
            prediction=prediction,
        )
        noise = host_noise((batch, 4, SIZE, SIZE), seed)
        return sample(denoise, schedule, noise, sigmas_for(schedule, steps, scheduler), sampler=sampler)

    scale = expected.abs().max().item()
    torch.testing.assert_close(paint(rows), expected, rtol=0, atol=2e-4 * scale)
    assert (paint(rows.flip(0)) - expected).abs().max() > 0.02 * scale, "the styles do not show in this test"
