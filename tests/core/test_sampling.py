"""The samplers against closed forms and diffusers; guidance against separate calls of the same UNet."""

import itertools
import math

import pytest
import torch
from comfyui_dmm.dmm_core.sampling import (
    SAMPLERS,
    SCHEDULERS,
    cfg_denoiser,
    host_noise,
    sample,
    sigmas_for,
)
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.style import no_style_row, style_row
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig, init_style
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

SCHEDULE = NoiseSchedule()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TINY = {  # arguments of UNetConfig
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": (1, 1),
    "depth_input": (0, 1),
    "depth_output": (1, 1, 0, 0),
    "context_dim": 16,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def two_peaks(x, sigma):
    """E[x0 | x] where every number is +-1.5 with a spread of 0.3: a curved ODE, in closed form."""
    peak, var = 1.5, 0.3**2
    sigma2 = sigma.to(x.dtype)[:, None, None, None] ** 2
    return (var * x + sigma2 * peak * torch.tanh(peak * x / (var + sigma2))) / (var + sigma2)


# --- noise levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_levels_fall_from_the_top_to_zero(scheduler, zero_snr):
    schedule = NoiseSchedule(zero_snr)
    for steps in (1, 2, 3, 7, 20, 25, 100, 999, 1000):
        sigmas = sigmas_for(schedule, steps, scheduler)
        assert (sigmas[:-1] > sigmas[1:]).all() and sigmas[-1] == 0
        if scheduler == "ddim_uniform":
            assert len(sigmas) - 1 == len(range(1, 1000, 1000 // steps))
        else:
            assert len(sigmas) == steps + 1
            assert sigmas[0].item() == pytest.approx(schedule.sigma_max, rel=1e-6)


def test_schedulers_by_hand():
    """Five steps each, from the formulas in float64. Relative 1e-6: float32 and one exp."""
    log_sigma = SCHEDULE.sigmas.double().log()

    def at(t):
        low = int(t)
        return math.exp(log_sigma[low] + (t - low) * (log_sigma[min(low + 1, 999)] - log_sigma[low]))

    low, high = SCHEDULE.sigma_min ** (1 / 7), SCHEDULE.sigma_max ** (1 / 7)
    expected = {
        "normal": [at(t) for t in (999, 749.25, 499.5, 249.75, 0)],
        "sgm_uniform": [at(t) for t in (999, 799.2, 599.4, 399.6, 199.8)],
        "simple": [at(t) for t in (999, 799, 599, 399, 199)],
        "ddim_uniform": [at(t) for t in (801, 601, 401, 201, 1)],
        "karras": [(high + i / 4 * (low - high)) ** 7 for i in range(5)],
    }
    assert expected.keys() == SCHEDULERS.keys()
    for name, levels in expected.items():
        assert sigmas_for(SCHEDULE, 5, name).tolist() == pytest.approx([*levels, 0], rel=1e-6), name
    rounded_down = [at(999 - i) for i in (0, 142, 285, 428, 571, 714, 857)]  # 1000 / 7 = 142.857
    assert sigmas_for(SCHEDULE, 7, "simple").tolist() == pytest.approx([*rounded_down, 0], rel=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 20, 50, 1000])
def test_ddim_levels_equal_diffusers(steps):
    theirs = DDIMScheduler(**BETAS, timestep_spacing="leading", steps_offset=1 if steps < 1000 else 0)
    theirs.set_timesteps(steps)
    if steps == 1000:  # an offset would leave the table; ours starts at 1
        assert torch.equal(sigmas_for(SCHEDULE, steps, "ddim_uniform")[:-1], SCHEDULE.sigmas[theirs.timesteps[:-1]])
    else:
        assert torch.equal(sigmas_for(SCHEDULE, steps, "ddim_uniform")[:-1], SCHEDULE.sigmas[theirs.timesteps])


def test_karras_levels_equal_diffusers():
    theirs = DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True)
    theirs.set_timesteps(25)
    torch.testing.assert_close(sigmas_for(SCHEDULE, 25, "karras"), theirs.sigmas, rtol=1e-4, atol=0)


def test_bad_names_and_steps():
    with pytest.raises(ValueError, match="unknown scheduler 'beta': choose one of normal, karras, simple, ddim_un"):
        sigmas_for(SCHEDULE, 5, "beta")
    for steps in (0, -3, 1001):
        with pytest.raises(ValueError, match=f"steps is {steps}: choose 1 to 1000"):
            sigmas_for(SCHEDULE, steps, "normal")
    noise, sigmas = torch.zeros(1, 4, 2, 2), sigmas_for(SCHEDULE, 2, "normal")
    with pytest.raises(ValueError, match="unknown sampler 'heun': choose one of dpmpp_2m, ddim, euler"):
        sample(two_peaks, SCHEDULE, noise, sigmas, sampler="heun")
    for bad in (sigmas[:1], sigmas.flip(0), torch.tensor([5.0, 5.0, 0.0]), torch.tensor([5.0, float("nan"), 0.0])):
        with pytest.raises(ValueError, match="falling noise levels"):
            sample(two_peaks, SCHEDULE, noise, bad)


# --- samplers ---------------------------------------------------------------------------------------------------------


END = 1e-4  # the last step, to 0, is first order in both samplers: its error (END / c)^2 / 2 must not show


def gaussian_error(sampler, steps):
    """Largest error against the exact ODE solution for data N(mu, c^2), whose denoiser is linear; float64."""
    mu, c = 0.7, 0.5
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    roots = SCHEDULE.sigma_max ** (1 / 7), END ** (1 / 7)
    sigmas = torch.cat([torch.linspace(*roots, steps, dtype=torch.float64) ** 7, torch.zeros(1)])

    def denoise(x, sigma):
        sigma2 = sigma[:, None, None, None] ** 2
        return (c**2 * x + sigma2 * mu) / (c**2 + sigma2)

    top = sigmas[0].item()
    start = noise * math.sqrt(1 + top**2)
    exact = mu + (start - mu) * c / math.sqrt(c**2 + top**2)  # dx/dsigma = (x - D) / sigma integrated from top to 0
    return (sample(denoise, SCHEDULE, noise, sigmas, sampler=sampler) - exact).abs().max().item()


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("ddim", 1), ("dpmpp_2m", 2)])
def test_convergence_to_the_exact_solution(sampler, order):
    """Halving the steps' length divides the error by 2^order (within 15%)."""
    errors = [gaussian_error(sampler, steps) for steps in (100, 200, 400)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)
    assert errors[-1] < {1: 2e-2, 2: 1e-4}[order]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_point_of_data_is_hit(sampler, scheduler):
    """The last step to sigma 0 gives the denoiser's own value, bit for bit."""
    point = torch.randn(1, 4, 6, 5)
    sigmas = sigmas_for(SCHEDULE, 7, scheduler)
    result = sample(lambda x, sigma: point.expand_as(x), SCHEDULE, torch.randn(3, 4, 6, 5), sigmas, sampler=sampler)
    assert torch.equal(result, point.expand(3, 4, 6, 5))


def in_diffusers(scheduler, noise, sigmas):
    """Run a diffusers scheduler on ``two_peaks`` as an eps model over x_t; its timestep i has noise level sigmas[i]."""
    x_t = noise * scheduler.init_noise_sigma
    for sigma, t in zip(sigmas, scheduler.timesteps):
        x = x_t * (1 + sigma**2).sqrt()
        eps = (x - two_peaks(x, sigma.expand(len(x)))) / sigma
        x_t = scheduler.step(eps, t, x_t).prev_sample
    return x_t


@pytest.mark.parametrize("steps", [1, 4, 25, 50])
def test_ddim_equals_diffusers(steps):
    """At most 2e-4 apart (values up to 2): both in float32, diffusers on x_t."""
    theirs = DDIMScheduler(**BETAS, timestep_spacing="leading", steps_offset=1, clip_sample=False)
    assert theirs.final_alpha_cumprod == 1  # it ends at x0
    theirs.set_timesteps(steps)
    noise, sigmas = torch.randn(2, 4, 8, 8), sigmas_for(SCHEDULE, steps, "ddim_uniform")
    # Below the schedule's top the host adds the noise to empty latents, diffusers takes it as x_t.
    scale = (1 + sigmas[0] ** 2).sqrt() / sigmas[0]
    expected = in_diffusers(theirs, noise, sigmas)
    torch.testing.assert_close(
        sample(two_peaks, SCHEDULE, noise * scale, sigmas, sampler="ddim"), expected, rtol=0, atol=2e-4
    )
    assert expected.std() > 1


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25])
@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_2m_equals_diffusers(steps, karras):
    """At most 2e-4 apart on diffusers' own levels, for both of its spacings."""
    theirs = DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=karras, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    # diffusers' float32 sum of betas puts its top level a few digits off ours.
    assert theirs.sigmas[0].item() == pytest.approx(SCHEDULE.sigma_max, rel=1e-4)
    sigmas = theirs.sigmas.clone()
    sigmas[0] = max(sigmas[0].item(), SCHEDULE.sigma_max)
    noise = torch.randn(2, 4, 8, 8)
    expected = in_diffusers(theirs, noise, theirs.sigmas)
    ours = sample(two_peaks, SCHEDULE, noise, sigmas, sampler="dpmpp_2m")
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)


def test_starts_below_the_top_from_empty_latents():
    """The first model call sees noise * sigma, and at the top noise * sqrt(1 + sigma^2): the host's two cases."""
    noise, seen = torch.randn(2, 4, 4, 4), []

    def denoise(x, sigma):
        seen.append((x, sigma))
        return x

    for levels in ([SCHEDULE.sigma_max, 0], [20.0, 0], [3.0, 0]):
        sample(denoise, SCHEDULE, noise, torch.tensor(levels))
    assert torch.equal(seen[0][0], noise * math.sqrt(1 + SCHEDULE.sigma_max**2))
    assert torch.equal(seen[1][0], noise * math.sqrt(401))
    assert torch.equal(seen[2][0], noise * 3)
    assert [sigma.shape for _, sigma in seen] == [(2,)] * 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_callback_sees_every_step_and_can_stop(sampler):
    class Cancelled(BaseException):
        """As the host's InterruptProcessingException, not an Exception."""

    sigmas, calls, evaluated = sigmas_for(SCHEDULE, 6, "karras"), [], []
    noise = torch.randn(2, 4, 4, 4)

    def denoise(x, sigma):
        evaluated.append((x, sigma))
        return two_peaks(x, sigma)

    result = sample(denoise, SCHEDULE, noise, sigmas, sampler=sampler, callback=lambda *args: calls.append(args))
    assert [(i, total) for i, _, _, total in calls] == [(i, 6) for i in range(6)]
    for i, (_, denoised, x, _) in enumerate(calls):
        assert torch.equal(x, evaluated[i][0]) and evaluated[i][1].tolist() == [sigmas[i].item()] * 2
        assert torch.equal(denoised, two_peaks(*evaluated[i]))
    assert torch.equal(result, calls[-1][1])  # the last step ends on the denoised latents
    evaluated.clear()

    def stop(i, *_):
        if i == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        sample(denoise, SCHEDULE, noise, sigmas, sampler=sampler, callback=stop)
    assert len(evaluated) == 3


# --- the model --------------------------------------------------------------------------------------------------------


def tiny_unet(**sizes) -> UNet:
    """Random weights with styles that show: their offsets are large beside the time embedding."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**TINY, **{"num_styles": 3, **sizes})).eval().requires_grad_(False)
    if unet.config.num_styles:
        init_style(unet, torch.Generator().manual_seed(0))
        unet.style_mlp.linear_2.weight *= 60
    return unet


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture
def forwards(unet):
    """The number of rows of every forward of ``unet``."""
    rows = []
    handle = unet.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    yield rows
    handle.remove()


def inputs(batch=2, length=5):
    """x and sigma of one call, two contexts."""
    x, sigma = 5 * torch.randn(batch, 4, 8, 8), torch.linspace(9, 1, batch)
    return x, sigma, torch.randn(batch, length, 16), torch.randn(batch, length, 16)


def by_hand(unet, x, sigma, context, style=None, y=None, kind="eps", schedule=SCHEDULE):
    """The denoised latents, one row of the UNet at a time (eq. 7 of EDM with the coefficients of eps and v)."""
    result = []
    for i in range(len(x)):
        s = sigma[i].item()
        t = (schedule.sigmas.double().log() - math.log(s)).abs().argmin()[None]
        row = {"y": None if y is None else y[i : i + 1], "style": None if style is None else style[i : i + 1]}
        out = unet(x[i : i + 1] / math.sqrt(s**2 + 1), t, context[i : i + 1], **row)
        skip, scale = {"eps": (1, -s), "v": (1 / (s**2 + 1), -s / math.sqrt(s**2 + 1)), "x0": (0, 1)}[kind]
        result.append(skip * x[i : i + 1] + scale * out)
    return torch.cat(result)


def close(actual, expected):
    """1e-4 of the largest value: float32 sums in another order, and the cancellation in x - sigma * eps."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_guidance_and_prediction(unet, kind, zero_snr):
    schedule = NoiseSchedule(zero_snr)
    x, sigma, context, other = inputs(4)
    cond, uncond = (by_hand(unet, x, sigma, c, kind=kind, schedule=schedule) for c in (context, other))
    denoise = cfg_denoiser(unet, schedule, context, other, cfg=4.5, prediction=kind)
    close(denoise(x, sigma), uncond + 4.5 * (cond - uncond))
    close(cfg_denoiser(unet, schedule, context, other, cfg=0.0, prediction=kind)(x, sigma), uncond)
    close(cfg_denoiser(unet, schedule, context, prediction=kind)(x, sigma), cond)
    assert (cond - uncond).abs().max() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_forward_a_step(unet, forwards, sampler):
    x, _, context, other = inputs(3)
    sigmas = sigmas_for(SCHEDULE, 5, "karras")
    sample(cfg_denoiser(unet, SCHEDULE, context, other, cfg=3.0), SCHEDULE, x, sigmas, sampler=sampler)
    assert forwards == [6] * 5
    forwards.clear()
    sample(cfg_denoiser(unet, SCHEDULE, context, other, cfg=1.0), SCHEDULE, x, sigmas, sampler=sampler)
    sample(cfg_denoiser(unet, SCHEDULE, context), SCHEDULE, x, sigmas, sampler=sampler)
    assert forwards == [3] * 10


def test_each_picture_keeps_its_style(unet):
    """Also in the unconditional half, which has the same styles unless it is given others."""
    x, sigma, context, other = inputs(3)
    rows = torch.cat([style_row(3, 2), no_style_row(3), style_row(3, {0: 0.3, 1: 0.7}, 1.5)])
    reverse = rows.flip(0)

    def guided(style, uncond_style):
        cond, uncond = by_hand(unet, x, sigma, context, style), by_hand(unet, x, sigma, other, uncond_style)
        return uncond + 3 * (cond - uncond)

    def ours(**styles):
        return cfg_denoiser(unet, SCHEDULE, context, other, cfg=3.0, **styles)(x, sigma)

    close(ours(style=rows), guided(rows, rows))
    close(ours(style=rows, uncond_style=reverse), guided(rows, reverse))
    close(ours(style=rows, uncond_style=no_style_row(3)), guided(rows, None))
    close(ours(uncond_style=rows), guided(None, rows))
    close(ours(style=style_row(3, 1)), guided(*[style_row(3, 1).expand(3, -1)] * 2))
    close(ours(style=no_style_row(3)), guided(None, None))
    close(cfg_denoiser(unet, SCHEDULE, context, style=rows)(x, sigma), by_hand(unet, x, sigma, context, rows))
    close(cfg_denoiser(unet, SCHEDULE, context, uncond_style=rows)(x, sigma), by_hand(unet, x, sigma, context))
    base = guided(rows, rows)
    for wrong in (guided(reverse, reverse), guided(rows, None), guided(rows, reverse)):
        assert (base - wrong).abs().max() > 0.05 * base.abs().max()  # these mistakes would show


def test_pooled_conditioning():
    unet = tiny_unet(adm_channels=12, style_mlp="add_embedding2")
    x, sigma, context, other = inputs(3)
    y, other_y, rows = 20 * torch.randn(3, 12), 20 * torch.randn(3, 12), torch.cat([style_row(3, i) for i in range(3)])
    cond, uncond = by_hand(unet, x, sigma, context, rows, y), by_hand(unet, x, sigma, other, rows, other_y)
    denoise = cfg_denoiser(unet, SCHEDULE, context, other, cfg=5.0, style=rows, y=y, uncond_y=other_y)
    close(denoise(x, sigma), uncond + 5 * (cond - uncond))
    close(cfg_denoiser(unet, SCHEDULE, context, style=rows, y=y)(x, sigma), cond)
    swapped = by_hand(unet, x, sigma, context, rows, other_y)
    assert (cond - swapped).abs().max() > 0.01 * cond.abs().max()
    with pytest.raises(ValueError, match="needs uncond_y"):
        cfg_denoiser(unet, SCHEDULE, context, other, cfg=5.0, y=y)


def test_contexts_of_two_lengths_share_a_forward(unet, forwards):
    """Two windows of tokens against one, and lengths without a common factor."""
    for length in (10, 7):
        x, sigma, context, _ = inputs(2, length)
        other = torch.randn(1, 5, 16)
        denoised = cfg_denoiser(unet, SCHEDULE, context, other, cfg=2.0)(x, sigma)
        assert forwards == [4]
        cond, uncond = by_hand(unet, x, sigma, context), by_hand(unet, x, sigma, other.expand(2, -1, -1))
        close(denoised, uncond + 2 * (cond - uncond))
        forwards.clear()


def test_one_row_serves_the_batch(unet):
    x, sigma, context, other = inputs(1)
    x, sigma = x.repeat(3, 1, 1, 1), sigma.repeat(3)
    denoised = cfg_denoiser(unet, SCHEDULE, context, other, cfg=2.0, style=style_row(3, 0))(x, sigma)
    close(denoised[1:], denoised[:1].expand(2, -1, -1, -1))


def test_rows_that_do_not_fit_are_refused(unet):
    x, sigma, context, other = inputs(3)
    styles = torch.cat([style_row(3, 0), style_row(3, 1)])
    for name, arguments in {
        "style": {"style": styles},
        "context": {"context": context[:2]},
    }.items():
        arguments = {"context": context, "uncond_context": other, "cfg": 2.0, **arguments}
        with pytest.raises(ValueError, match=f"{name} has 2 rows for a batch of 3"):
            cfg_denoiser(unet, SCHEDULE, **arguments)(x, sigma)
    with pytest.raises(ValueError, match="do not fit a model with 3 styles"):
        cfg_denoiser(unet, SCHEDULE, context, style=style_row(4, 0))(x, sigma)
    with pytest.raises(ValueError, match="has no styles"):
        cfg_denoiser(tiny_unet(num_styles=0), SCHEDULE, context, style=style_row(3, 0))(x, sigma)
    with pytest.raises(ValueError, match="needs an unconditional context"):
        cfg_denoiser(unet, SCHEDULE, context, cfg=7.0)
    with pytest.raises(ValueError, match="unknown prediction 'epsilon': choose one of eps, v, x0"):
        cfg_denoiser(unet, SCHEDULE, context, prediction="epsilon")


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_half_precision_unet_samples_in_float32(unet, device):
    """The chain stays in float32: the result is within 5% of its largest value of the float32 network's."""
    half = tiny_unet().to(device, torch.bfloat16)
    noise, sigmas = host_noise((2, 4, 8, 8), 3), sigmas_for(SCHEDULE, 4, "karras")
    _, _, context, other = inputs(2)
    rows = torch.cat([style_row(3, 0), style_row(3, 1)])
    arguments = {"cfg": 2.0, "style": rows}
    expected = sample(cfg_denoiser(unet, SCHEDULE, context, other, **arguments), SCHEDULE, noise, sigmas)
    arguments["style"] = rows.to(device)
    denoise = cfg_denoiser(half, SCHEDULE, context.to(device), other.to(device), **arguments)
    result = sample(denoise, SCHEDULE, noise.to(device), sigmas)
    assert (result.dtype, result.device.type) == (torch.float32, device)
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_guidance_is_not_rounded_to_the_unets_precision():
    """A cfg of 30 on a bf16 UNet: its two outputs are combined in float32, to 1e-5 of the largest value."""
    half, outputs = tiny_unet().bfloat16(), []
    half.register_forward_hook(lambda module, args, out: outputs.append(out))
    x, sigma, context, other = inputs(2)
    denoised = cfg_denoiser(half, SCHEDULE, context, other, cfg=30.0)(x, sigma)
    cond, uncond = outputs[0].double().chunk(2)
    expected = x - sigma[:, None, None, None] * (uncond + 30 * (cond - uncond))
    torch.testing.assert_close(denoised.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_noise_is_the_seeds_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    noise = host_noise((2, 4, 8, 8), 1234)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1234)
    assert torch.equal(noise, torch.randn(2, 4, 8, 8))
    assert host_noise([1, 4, 2, 2], 2**64 - 1).shape == (1, 4, 2, 2)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed is {seed}"):
            host_noise((1, 4, 2, 2), seed)
