"""Phased consistency distillation in closed form: a denoiser that is exact for a Gaussian, whose paths are known."""

import pytest
import torch
from comfyui_dmm.dmm_core.sampling import euler_step, sgm_uniform_sigmas
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.training.loop.phased import CLEAN, Phases, guided, huber_loss

PREDICTIONS = pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("eps", False), ("v", False), ("v", True)], ids=["eps", "v", "v, zero snr"]
)
MEAN, STD = 0.3, 0.7


def exact(phases, x_t, t):
    """What the exact denoiser of x0 ~ N(MEAN, STD^2) predicts."""
    alpha, sigma = phases.coefficients(t, x_t)
    spread = (alpha * STD) ** 2 + sigma**2
    x0 = MEAN + alpha * STD**2 / spread * (x_t - alpha * MEAN)
    eps = sigma / spread * (x_t - alpha * MEAN)
    return eps if phases.prediction == "eps" else alpha * eps - sigma * x0


def path(phases, x_t, t, s):
    """Where the probability flow takes x_t: the number of standard deviations from the mean stays."""
    alpha, sigma = phases.coefficients(t, x_t)
    alpha_s, sigma_s = phases.coefficients(s, x_t)
    z = (x_t - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2).sqrt()
    return alpha_s * MEAN + ((alpha_s * STD) ** 2 + sigma_s**2).sqrt() * z


def states(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 3, 3, generator=g), torch.tensor([999, 998, 750, 749, 250, 0])[:count]


def test_the_edges_of_four_phases_and_the_edge_below_each_timestep():
    phases = Phases(NoiseSchedule(), 4)
    assert phases.edges == [999, 749, 500, 250, CLEAN] or phases.edges == [999, 749, 499, 250, CLEAN]
    t = torch.tensor([999, 750, 749, phases.edges[2] + 1, phases.edges[2], 250, 249, 0])
    middle = phases.edges[2]
    assert phases.below(t).tolist() == [749, 749, middle, middle, 250, CLEAN, CLEAN, CLEAN]
    assert phases.next(t, 20).tolist() == [979, 749, 729, middle, middle - 20, 230, 229, CLEAN], (
        "t' never leaves its phase"
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 16])
def test_there_are_as_many_phases_as_asked_for_and_they_cover_every_timestep(count):
    phases = Phases(NoiseSchedule(), count)
    assert len(phases.edges) == count + 1 and phases.edges == sorted(set(phases.edges), reverse=True)
    below = phases.below(torch.arange(1000))
    assert set(below.tolist()) == set(phases.edges[1:]) and bool((below < torch.arange(1000)).all())


@PREDICTIONS
def test_a_step_is_one_step_of_the_samplers_euler(prediction, zero_snr):
    schedule = NoiseSchedule(zero_snr)
    phases = Phases(schedule, 4, prediction)
    x_t, _ = states(2)
    out = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    for high, low in ((749, 500), (500, 250), (250, CLEAN)):
        t, s = torch.full((2,), high), torch.full((2,), low)
        sigmas = [schedule.sigmas[high].item(), 0.0 if low == CLEAN else schedule.sigmas[low].item()]
        x = x_t * (1 + sigmas[0] ** 2) ** 0.5
        stepped = euler_step(x, schedule.to_x0(out, x_t, t, prediction), sigmas, 0, last=None)
        torch.testing.assert_close(
            phases.step(x_t, out, t, s), stepped / (1 + sigmas[1] ** 2) ** 0.5, atol=2e-5, rtol=2e-4
        )


@PREDICTIONS
def test_many_short_steps_of_the_exact_denoiser_follow_the_exact_path(prediction, zero_snr):
    phases = Phases(NoiseSchedule(zero_snr), 4, prediction)
    x, _ = states(3)
    for high, low in zip(phases.edges, phases.edges[1:]):
        start, at = x, torch.full((3,), high)
        while int(at[0]) > low:
            after = phases.next(at, 1)
            x = phases.step(x, exact(phases, x, at), at, after)
            at = after
        want = path(phases, start, torch.full((3,), high), at)
        torch.testing.assert_close(x, want, atol=0.02, rtol=0.02)
        x = want


@PREDICTIONS
def test_of_two_step_sizes_the_shorter_errs_half_as_much(prediction, zero_snr):
    phases = Phases(NoiseSchedule(zero_snr), 4, prediction)
    x_t, t = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2)), torch.full((8,), 700)

    def error(skip):
        x, at, end = x_t, t, torch.full((8,), 540)
        while int(at[0]) > 540:
            after = torch.maximum(phases.next(at, skip), end)
            x, at = phases.step(x, exact(phases, x, at), at, after), after
        return (x - path(phases, x_t, t, end)).abs().mean().item()

    assert error(20) / error(40) == pytest.approx(0.5, abs=0.1), "euler is of first order"


@PREDICTIONS
def test_a_network_that_jumps_along_the_exact_path_loses_nothing(prediction, zero_snr):
    """The fixpoint: f(x_t) is the exact path's point at the edge, from x_t and from the exact x' alike; also where x' is the target."""
    phases = Phases(NoiseSchedule(zero_snr), 4, prediction)
    x_t, t = states()
    s, after = phases.below(t), phases.next(t, 20)
    assert bool((after == s).any()) and bool((after > s).any()), "both kinds of targets occur"

    def jump(x, at):
        """The output with which ``step`` lands on the path's point at the edge."""
        zero = phases.step(x, torch.zeros_like(x), at, s)
        one = phases.step(x, torch.ones_like(x), at, s)
        return (path(phases, x, at, s) - zero) / (one - zero)

    mine = phases.step(x_t, jump(x_t, t), t, s)
    x_after = path(phases, x_t, t, after)
    edge = after == s
    inside = phases.step(x_after, jump(x_after, torch.where(edge, t, after)), torch.where(edge, t, after), s)
    target = torch.where(edge.view(-1, 1, 1, 1), x_after, inside)
    loss = huber_loss(mine, target, phases.slope(t, s, x_t), 0.0)
    assert loss.max().item() < 3e-3
    wrong = phases.step(x_t, exact(phases, x_t, t), t, s)
    assert huber_loss(wrong, target, phases.slope(t, s, x_t), 0.0)[[3, 4]].min().item() > 0.01, (
        "one euler step is not it"
    )


@PREDICTIONS
def test_the_slope_is_the_derivative(prediction, zero_snr):
    phases = Phases(NoiseSchedule(zero_snr), 4, prediction)
    x_t, t = states()
    out = torch.randn_like(x_t).requires_grad_()
    phases.step(x_t, out, t, phases.below(t)).sum().backward()
    slope = phases.slope(t, phases.below(t), x_t)
    torch.testing.assert_close(out.grad.abs(), slope.expand_as(out), atol=1e-6, rtol=1e-5)
    assert slope.min().item() > 0 and bool(slope.isfinite().all())


def test_errors_are_counted_in_the_networks_output_in_every_phase():
    phases = Phases(NoiseSchedule(), 4)
    x_t, t = states()
    s = phases.below(t)
    out, off = torch.randn_like(x_t), 0.5
    ours, target = phases.step(x_t, out + off, t, s), phases.step(x_t, out, t, s)
    torch.testing.assert_close(
        huber_loss(ours, target, phases.slope(t, s, x_t), 0.0), torch.full((6,), off), atol=5e-3, rtol=0
    )
    near = huber_loss(x_t + 1e-3, x_t, torch.ones(6, 1, 1, 1), 0.1)
    torch.testing.assert_close(near, torch.full((6,), 1e-6 / 0.2), atol=1e-7, rtol=0.05)


def test_guidance_is_each_rows_own():
    cond, null = torch.ones(2, 4, 1, 1), torch.zeros(2, 4, 1, 1)
    assert guided(cond, null, torch.tensor([1.0, 4.0])).flatten(1)[:, 0].tolist() == [1.0, 4.0]


def test_euler_with_as_many_steps_visits_the_edges():
    schedule = NoiseSchedule()
    for count in (1, 4, 8):
        told = schedule.t_from_sigma(sgm_uniform_sigmas(schedule, count)).tolist()
        assert Phases(schedule, count).edges[:-1] == told
