"""The noise schedule against its definition in float64 and against diffusers."""

import math

import pytest
import torch
from comfyui_dmm.dmm_core.schedule import PREDICTIONS, NoiseSchedule
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

T = torch.tensor([0, 1, 500, 998, 999])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def abar(t: int) -> float:
    """The definition, term by term in Python's floats: prod of (1 - beta), sqrt(beta) linear from 0.00085 to 0.012."""
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    return math.prod(1 - (low + (high - low) * i / 999) ** 2 for i in range(t + 1))


@pytest.fixture
def schedule():
    return NoiseSchedule()


def diffusers_schedule(**options) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


def test_tables_are_the_definition_to_float32(schedule):
    """Relative 1e-7: the last bit of float32. (sigma from a float32 abar would be wrong by 3e-5 at t = 0.)"""
    truth = torch.tensor([abar(t) for t in range(1000)], dtype=torch.float64)
    for table, expected in ((schedule.alphas_cumprod, truth), (schedule.sigmas, ((1 - truth) / truth).sqrt())):
        assert table.dtype == torch.float32 and table.shape == (1000,)
        torch.testing.assert_close(table.double(), expected, rtol=1e-7, atol=0)
    assert (schedule.sigma_min, schedule.sigma_max) == (schedule.sigmas[0].item(), schedule.sigmas[999].item())
    assert schedule.sigma_max == pytest.approx(14.6146, abs=1e-4)  # the number known from k-diffusion


def test_tables_equal_diffusers(schedule):
    """Relative 1e-5: diffusers multiplies in float32."""
    theirs = diffusers_schedule()
    torch.testing.assert_close(schedule.betas, theirs.betas, rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=0)


def test_zero_snr_equals_diffusers_and_ends_in_noise():
    schedule = NoiseSchedule(zero_snr=True)
    theirs = rescale_zero_terminal_snr(diffusers_schedule().betas)
    torch.testing.assert_close(schedule.betas[:-1], theirs[:-1], rtol=1e-3, atol=0)  # differences of float32
    torch.testing.assert_close(schedule.alphas_cumprod[:-1], (1 - theirs).cumprod(0)[:-1], rtol=1e-3, atol=1e-7)
    assert theirs[-1] == 1 and 0 < schedule.alphas_cumprod[-1] < 1e-7
    assert schedule.alphas_cumprod[0] == NoiseSchedule().alphas_cumprod[0]
    assert 4000 < schedule.sigma_max < math.inf


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_add_noise_in_every_dtype(schedule, dtype, tolerance, device):
    x0, eps = torch.randn(2, len(T), 4, 8, 6, dtype=torch.float64).to(device, dtype)
    x_t = schedule.add_noise(x0, eps, T.to(device))
    assert (x_t.dtype, x_t.device, x_t.shape) == (dtype, x0.device, x0.shape)
    for row, t in enumerate(T.tolist()):
        expected = math.sqrt(abar(t)) * x0[row].double() + math.sqrt(1 - abar(t)) * eps[row].double()
        torch.testing.assert_close(x_t[row].double(), expected, rtol=0, atol=tolerance * 5)


def test_add_noise_equals_diffusers(schedule):
    x0, eps = torch.randn(2, 7, 4, 8, 8)
    t = torch.randint(1000, (7,))
    torch.testing.assert_close(
        schedule.add_noise(x0, eps, t), diffusers_schedule().add_noise(x0, eps, t), rtol=0, atol=2e-5
    )


def test_rows_keep_their_own_timestep(schedule):
    x0, eps = torch.randn(2, 5, 4, 8, 8)
    together = schedule.add_noise(x0, eps, T)
    alone = torch.cat([schedule.add_noise(x0[i : i + 1], eps[i : i + 1], T[i : i + 1]) for i in range(5)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_predictions_convert_into_each_other(zero_snr, kind):
    """Each kind from the same x0 and eps. In float64, on float32 tables: off by their last bits, times sigma (or its
    inverse) where eps or x0 is divided out of x_t."""
    schedule = NoiseSchedule(zero_snr)
    t = T[:-1] if zero_snr else T  # the end of zero_snr holds nothing of x0 that an eps prediction could give back
    x0, eps = torch.randn(2, len(t), 4, 8, 8, dtype=torch.float64)
    signal, noise = (c[:, None, None, None] for c in _signal_and_noise(schedule, t))
    x_t = signal * x0 + noise * eps
    truth = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}
    converted = {"eps": schedule.to_eps, "x0": schedule.to_x0, "v": schedule.to_v}
    for name, convert in converted.items():
        result = convert(truth[kind], x_t, t, kind)
        worst = schedule.sigmas[t].max().item()
        torch.testing.assert_close(result, truth[name], rtol=0, atol=1e-6 * max(worst, 1 / schedule.sigma_min))
        assert (result is truth[kind]) == (name == kind)


def _signal_and_noise(schedule, t):
    abar = 1 / (schedule.sigmas.double()[t] ** 2 + 1)
    return abar.sqrt(), (1 - abar).sqrt()


def test_v_at_zero_snr_is_exact():
    """Where x_t is all noise, v is -x0 (arXiv:2305.08891, Sec. 3.2)."""
    schedule = NoiseSchedule(zero_snr=True)
    t, x0, x_t = torch.tensor([999]), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(schedule.to_x0(-x0, x_t, t, "v"), x0, rtol=0, atol=2e-3)
    torch.testing.assert_close(schedule.to_eps(-x0, x_t, t, "v"), x_t, rtol=0, atol=2e-3)


def test_v_equals_diffusers(schedule):
    x0, eps = torch.randn(2, 5, 4, 8, 8)
    x_t, v = schedule.add_noise(x0, eps, T), diffusers_schedule().get_velocity(x0, eps, T)
    torch.testing.assert_close(schedule.to_v(eps, x_t, T, "eps"), v, rtol=0, atol=1e-4)
    torch.testing.assert_close(schedule.to_x0(v, x_t, T, "v"), x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_conversions_keep_half_precision_and_device(schedule, device):
    """A bf16 output of a network beside float32 latents, as under autocast."""
    x0, eps = torch.randn(2, 5, 4, 8, 8, device=device)
    t = T.to(device)
    x_t = schedule.add_noise(x0, eps, t)
    v = schedule.to_v(eps.bfloat16(), x_t, t, "eps")
    assert (v.dtype, v.device) == (torch.bfloat16, x0.device)
    x_t, t, v = x_t[:3], t[:3], v[:3]
    x0_again, eps_again = schedule.to_x0(v, x_t, t, "v"), schedule.to_eps(v, x_t, t, "v")
    assert x0_again.dtype == eps_again.dtype == torch.bfloat16
    torch.testing.assert_close(x0_again.float(), x0[:3], rtol=0, atol=0.1)
    torch.testing.assert_close(eps_again.float(), eps[:3], rtol=0, atol=0.1)


def test_conversions_pass_gradients(schedule):
    out, x_t = torch.randn(5, 4, 8, 8, requires_grad=True), torch.randn(5, 4, 8, 8)
    schedule.to_x0(out, x_t, T, "eps").sum().backward()
    expected = torch.tensor([-math.sqrt((1 - abar(t)) / abar(t)) for t in T.tolist()])
    torch.testing.assert_close(out.grad, expected[:, None, None, None].expand_as(out), rtol=1e-5, atol=0)


def test_unknown_prediction_names_the_known_ones(schedule):
    x = torch.zeros(1, 4, 8, 8)
    for convert in (schedule.to_eps, schedule.to_x0, schedule.to_v):
        with pytest.raises(ValueError, match="unknown prediction 'epsilon': choose one of eps, v, x0"):
            convert(x, x, T[:1], "epsilon")


@pytest.mark.parametrize("zero_snr", [False, True])
def test_sigma_and_t_are_inverse(zero_snr):
    schedule = NoiseSchedule(zero_snr)
    every = torch.arange(1000)
    torch.testing.assert_close(schedule.sigma_from_t(every), schedule.sigmas, rtol=1e-6, atol=0)
    assert torch.equal(schedule.t_from_sigma(schedule.sigmas), every)
    assert torch.equal(schedule.t_from_sigma(schedule.sigmas.view(20, 50)), every.view(20, 50))
    between = schedule.sigma_from_t(every[:-1] + 0.4)
    assert torch.equal(schedule.t_from_sigma(between), every[:-1])  # nearest in log sigma, by rounding
    assert torch.equal(schedule.t_from_sigma(schedule.sigma_from_t(every[:-1] + 0.6)), every[1:])


def test_interpolation_and_rounding_are_in_log_sigma(schedule):
    """Near t = 0, where neighbours are far apart in ratio: geometric and arithmetic mean differ by 1.5%."""
    low, high = schedule.sigmas[0].item(), schedule.sigmas[1].item()
    geometric, arithmetic = math.sqrt(low * high), (low + high) / 2
    assert schedule.sigma_from_t(torch.tensor([0.5])).item() == pytest.approx(geometric, rel=1e-6)
    assert schedule.t_from_sigma(torch.tensor((geometric + arithmetic) / 2)).item() == 1
    assert schedule.t_from_sigma(torch.tensor(geometric * 0.99)).item() == 0


def test_ends_are_clamped(schedule):
    assert schedule.sigma_from_t(torch.tensor([-3.0, 1200.0])).tolist() == pytest.approx(
        [schedule.sigma_min, schedule.sigma_max], rel=1e-6
    )
    assert schedule.t_from_sigma(torch.tensor([0.0, 1e-4, 1e6])).tolist() == [0, 0, 999]
