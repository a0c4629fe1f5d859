"""Rows drawn where the loss is high, and what a loss counts at each timestep: by closed forms, by counting, and resumed bit for bit."""

import dataclasses
import hashlib
import math

import pytest
import torch
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.data.batches import CaptionedLatents, Draw
from comfyui_dmm.training.data.difficulty import BINS, MEMORY, Difficulty
from comfyui_dmm.training.loop.losses import timestep_weights
from comfyui_dmm.training.run.state import identity, resume
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.watch.watch import Watch

from .families import small_data, small_run
from .test_forget import forgetting
from .test_grow import growing

SCHEDULE = NoiseSchedule()
STEPS, WIDTH = 1000, 1000 // BINS


def learnt(teachers=3, power=1.0, floor=0.25, seed=0, seen=5) -> Difficulty:
    """A table in which every cell was seen, with losses between 0.05 and 5."""
    made = Difficulty(teachers, STEPS, power, floor)
    loss = 0.05 * 100 ** torch.rand(made.loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made.load_state_dict({"loss": loss, "rows": torch.full(loss.shape, seen)})
    return made


def expected(table: Difficulty) -> list[list[float]]:
    """q by the formula, cell by cell: the styled rows' share, one per teacher and bin."""
    loss = table.loss[:-1].tolist()
    whole = sum(x**table.power for row in loss for x in row)
    count = len(loss) * BINS
    return [[table.floor / count + (1 - table.floor) * x**table.power / whole for x in row] for row in loss]


def batches(chances, count: int, size=16, base_share=0.2, shares=None, owner=None, seed=5, data=None):
    data = data or small_data(12)
    if owner is not None:
        data = CaptionedLatents(data.buckets[0], data.captions, owner)
    teachers = len(chances.shares)
    return [data.batch(n, Draw(seed, size, teachers, base_share, 0.1, SCHEDULE, shares, chances)) for n in range(count)]


def together(drawn, name: str) -> torch.Tensor:
    return torch.cat([getattr(batch, name) for batch in drawn])


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_running_loss_by_hand():
    """One row after the other: the mean of the first 20, from then on a twentieth of the way to each. Tolerance 1e-12."""
    table = Difficulty(2, STEPS, 1.0, 0.25)
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()
    want = 0.0
    for n, value in enumerate(values, start=1):
        table.see(torch.tensor([1]), torch.tensor([250]), torch.tensor([value]))
        want += (value - want) / min(n, MEMORY)
    assert math.isclose(table.loss[1, 2].item(), want, rel_tol=1e-6) and table.rows[1, 2] == 50
    assert table.loss.count_nonzero() == 1 and table.rows.sum() == 50


def test_many_rows_at_once():
    """The first rows' mean; later k rows count 1 - (19/20)^k. The last timestep of a bin is in it, the next is not; N is the base."""
    table = Difficulty(2, STEPS, 1.0, 0.25)
    table.see(
        torch.tensor([0, 0, 0, 2, 0]), torch.tensor([0, 99, 50, 999, 100]), torch.tensor([1.0, 2.0, 6.0, 7.0, 8.0])
    )
    assert table.loss[0, 0] == 3 and table.loss[0, 1] == 8 and table.loss[2, 9] == 7
    assert table.rows[0, :2].tolist() == [3, 1] and table.rows[2, 9] == 1 and table.rows.sum() == 5
    table.see(torch.zeros(100, dtype=torch.long), torch.full((100,), 10), torch.full((100,), 5.0))
    share = max(100 / 103, 1 - 0.95**100)
    assert math.isclose(table.loss[0, 0].item(), 3 + share * 2, rel_tol=1e-9)
    assert table.loss[0, 1] == 8


@pytest.mark.parametrize("power, floor", [(1.0, 0.25), (0.5, 0.1), (2.0, 1.0)])
def test_chances_follow_the_formula(power, floor):
    """Tolerance 1e-12; the importance weights stay below 1 / floor."""
    table = learnt(power=power, floor=floor)
    chances = table.chances()
    torch.testing.assert_close(chances.cells, torch.tensor(expected(table), dtype=torch.float64), rtol=1e-12, atol=0)
    hard = table.loss[3] ** power
    torch.testing.assert_close(chances.given[3], floor / BINS + (1 - floor) * hard / hard.sum(), rtol=1e-12, atol=0)
    assert math.isclose(chances.cells.sum().item(), 1, rel_tol=1e-12)
    batch = batches(chances, 200)
    assert together(batch, "importance").max() <= 1 / floor * 1.0001


def test_chances_are_even_until_every_cell_was_seen():
    table = learnt()
    table.rows[1, 4] = 0
    chances = table.chances()
    assert (chances.cells == 1 / (3 * BINS)).all() and (chances.given[1] == 1 / BINS).all()
    assert chances.given[0].std() > 0 and chances.given[3].std() > 0
    fresh = Difficulty(3, STEPS, 1.0, 0.25).chances()
    drawn = batches(fresh, 50)
    assert (together(drawn, "importance") == 1).all() and (together(drawn, "t_importance") == 1).all()
    table = learnt()
    table.loss[3] = 0  # a student that begins as the base has no error there
    assert (table.chances().given[3] == 1 / BINS).all()


# --- the rows ---------------------------------------------------------------------------------------------------------


def test_rows_fall_into_cells_as_often_as_their_chances_say():
    """Of N multiples of the golden ratio, every interval gets its length times N to within 3 + (1/ln g + 1/ln 2) ln N, g the golden ratio
    (Kuipers and Niederreiter, Uniform Distribution of Sequences, ch. 2, thm. 3.4, partial quotients 1), wherever they begin."""
    chances, size, count = learnt(5).chances(), 64, 2000
    u = torch.cat([Draw(1, size, 5, 0.0, 0.0, SCHEDULE).uniform_points(n) for n in range(count)])
    teacher, place, weight, t_importance = chances.pick(u, torch.zeros(len(u), dtype=torch.bool))
    total = len(u)
    bound = 3 + (1 / math.log((1 + math.sqrt(5)) / 2) + 1 / math.log(2)) * math.log(total)
    counts = torch.bincount(teacher * BINS + place, minlength=5 * BINS).view(5, BINS)
    assert (counts - total * chances.cells).abs().max() < bound
    for cut in (64, 640, 6400):  # at any length, too
        counts = torch.bincount(teacher[:cut], minlength=5)
        bound = 3 + (1 / math.log((1 + math.sqrt(5)) / 2) + 1 / math.log(2)) * math.log(cut)
        assert (counts - cut * chances.cells.sum(1)).abs().max() < bound
    want = torch.tensor(expected(learnt(5)))
    torch.testing.assert_close(weight, 1 / 50 / want[teacher, place], rtol=1e-5, atol=0)
    torch.testing.assert_close(t_importance, want.sum(1)[teacher] / 10 / want[teacher, place], rtol=1e-5, atol=0)


def test_over_all_seeds_a_row_has_its_chances():
    """The only row of a run's first batch, over 4000 seeds: 5 sigma of each teacher's count."""
    chances, data = learnt(3).chances(), small_data(2)
    drawn = [data.batch(0, Draw(seed, 1, 3, 0.0, 0.0, SCHEDULE, chances=chances)) for seed in range(4000)]
    want = 4000 * chances.cells.sum(1)
    assert ((torch.bincount(together(drawn, "teacher"), minlength=3) - want).abs() < 5 * want.sqrt()).all()


def test_timesteps_are_even_inside_of_a_bin():
    """Each of the 100 of a bin: within 5 sigma of 1/100 of its rows; first and last are met."""
    chances = learnt().chances()
    place = torch.full((100_000,), 7)
    t = chances.timesteps(place, torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=STEPS)
    assert counts[:700].sum() == counts[800:].sum() == 0
    assert (counts[700:800] - 1000).abs().max() < 5 * math.sqrt(1000)


@pytest.mark.parametrize("kind", ["free", "shares", "owner"])
def test_batches_are_drawn_by_what_is_free(kind):
    """The base keeps its share, given shares stay, an owner keeps its pictures; bins by their chances; every row's weight is p / q of it.
    32000 rows: 5 sigma of each count (fewer where rows are evenly spread)."""
    table = learnt(3)
    shares = (0.5, 0.3, 0.2) if kind == "shares" else None
    owner = torch.arange(12) % 3 if kind == "owner" else None
    chances = table.chances(shares)
    drawn = batches(chances, 500, 64, 0.25, shares, owner)
    teacher, t = together(drawn, "teacher"), together(drawn, "t")
    assert all((batch.teacher.diff() >= 0).all() for batch in drawn) and t.min() == 0 and t.max() == STEPS - 1
    cell = torch.bincount(teacher * BINS + t // WIDTH, minlength=4 * BINS).view(4, BINS).double()
    alone = table.floor / BINS + (1 - table.floor) * table.loss / table.loss.sum(1, keepdim=True)
    cells = torch.tensor(expected(table), dtype=torch.float64)
    if kind != "free":
        cells = torch.tensor(shares or (1 / 3,) * 3, dtype=torch.float64)[:, None] * alone[:3]
    q = torch.cat([0.75 * cells, 0.25 * alone[3:]])
    assert ((cell - 32000 * q).abs() < 5 * (32000 * q).sqrt()).all()
    p = torch.cat([0.75 * torch.tensor(shares or (1 / 3,) * 3), torch.tensor([0.25])])[:, None].expand(4, BINS) / BINS
    index = (teacher, t // WIDTH)
    torch.testing.assert_close(together(drawn, "importance"), (p / q)[index].float(), rtol=1e-5, atol=0)
    given_t = q.sum(1, keepdim=True) / BINS / q
    torch.testing.assert_close(together(drawn, "t_importance"), given_t[index].float(), rtol=1e-5, atol=0)
    if owner is not None:
        pictures = CaptionedLatents(small_data(12).buckets[0], [f"picture {i}" for i in range(12)], owner)
        for batch in batches(chances, 30, base_share=0.2, data=pictures):
            for who, row in zip(batch.teacher.tolist(), batch.caption.tolist()):
                assert who == 3 or row == 0 or int(pictures.prompts[row].split()[1]) % 3 == who


def test_a_batch_goes_to_its_share_with_its_weights():
    batch = batches(learnt().chances(), 1)[0]
    part = batch.share(slice(5, 9))
    for name in ("x_t", "t", "teacher", "caption", "importance", "t_importance"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[5:9])


def test_corrected_means_are_those_of_even_draws():
    """A fixed loss per teacher and timestep; 3000 seeds give independent means of a batch of 12: the grand mean is within 4 standard errors
    of the expectation, and without the weights it is far away. Likewise per teacher with the weights of the timestep alone."""
    g = torch.Generator().manual_seed(2)
    loss = torch.rand(4, STEPS, generator=g, dtype=torch.float64) * torch.linspace(0.1, 3, STEPS).double()
    table = Difficulty(3, STEPS, 1.0, 0.25)
    every = torch.arange(STEPS)
    for i in range(4):
        table.see(torch.full_like(every, i), every, loss[i] * (1 + i))
    chances, data = table.chances(), small_data(4)
    corrected, plain, by_teacher = [], [], []
    for seed in range(3000):
        batch = data.batch(seed % 7, Draw(seed, 12, 3, 0.2, 0.0, SCHEDULE, chances=chances))
        value = loss[batch.teacher, batch.t]
        corrected.append((batch.importance * value).mean())
        plain.append(value.mean())
        mine = batch.teacher == 1
        by_teacher.append(torch.stack([(batch.t_importance * value)[mine].sum(), mine.sum().double()]))

    def off(values, want):
        values = torch.stack(values)
        return (values.mean() - want).abs().item() / (values.std() / math.sqrt(len(values))).item()

    want = 0.8 * loss[:3].mean() + 0.2 * loss[3].mean()
    assert off(corrected, want) < 4 and off(plain, want) > 40
    by_teacher = torch.stack(by_teacher)
    # Has mean 0 if every row's expectation is the even mean.
    residual = by_teacher[:, 0] - by_teacher[:, 1] * loss[1].mean()
    assert residual.mean().abs() < 4 * residual.std() / math.sqrt(3000)


# --- the run ----------------------------------------------------------------------------------------------------------


def test_without_it_batches_are_what_they_were():
    """Timesteps, teachers and captions of 40 batches: the hash is that of the code before there was a choice (f959f08)."""
    data, digest = small_data(50), hashlib.sha256()
    for number in range(40):
        batch = data.batch(number, Draw(7, 16, 3, 0.1, 0.1, SCHEDULE))
        assert batch.importance is None and batch.t_importance is None
        for x in (batch.t, batch.teacher, batch.caption):
            digest.update(x.numpy().tobytes())
    assert digest.hexdigest() == "b8292af359d33b705b81e4d14a31ca12546cb5a16ad14e3bcfad1eb66c666eac"


def adaptive(**settings):
    """A run whose table says something from the first step on."""
    run = small_run(sampling="adaptive", base_share=0.2, **settings)
    run.draws.load_difficulty(learnt(run.num_styles).state_dict())
    return run


@pytest.mark.parametrize("correct", [True, False])
def test_the_objective_by_hand(correct):
    """p / q times (weighted score + feature + adversarial), or without p / q; the discriminator's gradient too: tolerance 1e-5."""
    run = adaptive(lambda_adv=0.1, lambda_feat=0.01, loss_weight="v", adaptive_correct=correct)
    batch = run.draws(0)
    losses = run.losses(batch, 0)
    p, total = batch.importance if correct else torch.ones(8), 0.0
    v = (1 + SCHEDULE.sigmas.double() ** 2).clamp(max=5)
    for i in range(8):
        score = losses.score[i] * (v / v.mean())[batch.t[i]] + 0.01 * losses.feature[i]
        total += p[i] * (score + 0.1 * losses.adversarial[i]) / 8
    assert p.std() > 0.1 or not correct
    assert math.isclose(run.objective.total(losses, batch, run.step).item(), total.item(), rel_tol=1e-5)
    head = list(run.discriminator.head.parameters())
    p = p[batch.teacher < 3]
    want = torch.autograd.grad((p * losses.discriminator[losses.judged]).sum() / len(p), head)
    seen = []
    run.discriminator_optimizer.register_step_pre_hook(lambda *_: seen.extend(q.grad.clone() for q in head))
    metrics = run.train_step()
    for ours, theirs in zip(seen, want):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert math.isclose(metrics.loss, total.item(), rel_tol=1e-5)


def test_what_is_reported_and_noted():
    """Metrics estimate even means; the table sees the loss as the objective weighs it, at the rows' cells: tolerance 1e-5."""
    run = adaptive(loss_weight="x0", accumulate=2)
    twin = adaptive(loss_weight="x0", accumulate=2)
    # The second forward is drawn by the same chances: the table changes with the step.
    parts = [(twin.draws(n), twin.losses(twin.draws(n))) for n in (0, 1)]
    metrics = run.train_step()
    teacher = torch.cat([batch.teacher for batch, _ in parts])
    t = torch.cat([batch.t for batch, _ in parts])
    score = torch.cat([losses.score.detach() for _, losses in parts])
    t_importance = torch.cat([batch.t_importance for batch, _ in parts])
    for i, name in enumerate(["teacher 1", "teacher 2", "teacher 3", "(no style)"]):
        mine = teacher == i
        assert metrics.count[name] == mine.sum()
        assert math.isclose(metrics.score[name], (t_importance * score)[mine].mean().item(), rel_tol=1e-5)
    weight = torch.cat([batch.importance for batch, _ in parts])
    feature = torch.cat([losses.feature.detach() for _, losses in parts])
    assert math.isclose(metrics.feature, (weight * feature).mean().item(), rel_tol=1e-5)
    sigma = SCHEDULE.sigmas.double()
    x0 = sigma.square().clamp(max=5)
    for batch, losses in parts:
        twin.difficulty.see(batch.teacher, batch.t, losses.score.detach() * (x0 / x0.mean())[batch.t])
    torch.testing.assert_close(run.difficulty.loss, twin.difficulty.loss, rtol=1e-5, atol=0)
    assert run.difficulty.rows.sum() == 4 * BINS * 5 + len(t)
    chances = twin.difficulty.chances()
    twin.step = 1
    twin.draws._ahead = None
    assert torch.equal(run.draws(2).t, twin.draws(2).t) and torch.equal(
        run.draws(2).importance, twin.draws(2).importance
    )
    assert not torch.equal(chances.cells, learnt(3).chances().cells)


class Stop(BaseException):
    pass


FINAL = {"accumulate": 2, "steps": 6, "final_steps": 4, "final_images": 8, "final_sampling_steps": 3, "lambda_adv": 0.1}


@pytest.mark.parametrize(
    "settings, stop_at",
    [(FINAL, 6), (FINAL, 8), ({"adaptive_correct": False, "loss_weight": "min_snr", "steps": 10, "accumulate": 2}, 5)],
)
def test_it_resumes_bitwise(tmp_path, settings, stop_at):
    """Stopped at and after the beginning of the final stage, and without one; there the table guides the draws by then, and a run that
    goes on without it ends otherwise."""

    def run():
        return small_run(teachers=2, sampling="adaptive", batch_size=12, base_share=0.1, **settings)

    straight = run()
    train(straight, None)

    def stop(run, metrics):
        if metrics.step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        train(run(), tmp_path, Watch(stop))
    second, without = run(), run()
    if stop_at == 5:
        resume(without, tmp_path, identity(without))
        assert without.difficulty.chances().cells.std() > 0
        without.draws.load_difficulty(Difficulty(2, STEPS, 1.0, 0.25).state_dict())
        train(without, None)
        assert not torch.equal(without.student.unet.out[2].bias, straight.student.unet.out[2].bias)
    train(second, tmp_path)
    a, b = straight.student_weights(False), second.student_weights(False)
    assert second.step == 10 and all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(second.difficulty.loss, straight.difficulty.loss)
    assert torch.equal(second.difficulty.rows, straight.difficulty.rows)


def test_what_was_drawn_ahead_is_drawn_anew_for_another_table():
    run, other = adaptive(), adaptive()
    run.train_step()
    other.step = 1
    for one in (run, other):
        one.draws.load_difficulty(learnt(3, seed=9).state_dict())
    assert torch.equal(run.draws(1).t, other.draws(1).t)


def test_a_step_that_fails_leaves_the_table(tmp_path):
    run = adaptive()
    before = {k: v.clone() for k, v in run.difficulty.state_dict().items()}
    run.student.unet.out[2].weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(ValueError, match="gradients are not finite"):
        run.train_step()
    assert all(torch.equal(v, before[k]) for k, v in run.difficulty.state_dict().items())


def test_runs_that_knew_nothing_of_it_go_on(tmp_path):
    """The identity of a run without it names none of its settings, so that states from before fit, and details that mean nothing may
    change; what does mean something is refused by name."""
    later = {f.name for f in dataclasses.fields(TrainConfig) if f.name.startswith(("adaptive_", "loss_", "sampling"))}
    assert len(later) == 6 and not {f"setting {name}" for name in later} & identity(small_run()).keys()
    train(small_run(steps=3), tmp_path)
    run = small_run(adaptive_floor=0.5, loss_clamp=2.0)
    assert resume(run, tmp_path, identity(run)) and run.step == 3
    run = small_run(sampling="adaptive")
    with pytest.raises(ValueError, match=r'setting sampling \(not set -> "adaptive"\)'):
        resume(run, tmp_path, identity(run))
    run = small_run(loss_weight="v")
    with pytest.raises(ValueError, match="setting loss_weight"):
        resume(run, tmp_path, identity(run))


def test_growing_and_forgetting_keep_their_shares():
    """Of the rows with a style: as without it, to the 8 of 2000 that evenly spread rows may differ by; timesteps follow the table."""
    settings = {"guard": 0.4, "sampling": "adaptive", "base_share": 0.0, "steps": 300}
    for run in (growing(2, **settings), forgetting(**settings)):
        run.draws.load_difficulty(learnt(run.num_styles).state_dict())
        drawn = [run.draws(number) for number in range(250)]
        counts = torch.bincount(together(drawn, "teacher"), minlength=run.num_styles)
        assert (counts - 2000 * torch.tensor(run.draws.shares)).abs().max() < 8
        assert together(drawn, "t_importance").std() > 0.1
        assert torch.equal(together(drawn, "importance"), together(drawn, "t_importance"))
        assert math.isfinite(run.train_step().loss) and run.difficulty.rows.sum() == 5 * run.difficulty.rows.numel() + 8


def test_refusals():
    for settings, message in [
        ({"sampling": "hard"}, "sampling is 'hard': choose one of uniform, adaptive"),
        ({"adaptive_floor": 0}, "adaptive_floor is 0: expected a share"),
        ({"adaptive_power": 0.0}, "adaptive_power is 0.0"),
        ({"adaptive_correct": "no"}, "adaptive_correct is 'no': expected true or false"),
        ({"loss_weight": "snr"}, "loss_weight is 'snr': choose one of plain, eps, v, x0, min_snr"),
        ({"loss_clamp": 0}, "loss_clamp is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainConfig(**settings).check()


def test_rollouts_bring_their_own_timesteps(caplog):
    """Presets say adaptive and are for all data: it is said, and nothing is chosen."""
    data = small_data()
    data.has_targets = True
    with caplog.at_level("INFO"):
        assert small_run(data=data, sampling="adaptive").difficulty is None
    assert "rollouts bring their teachers and timesteps" in caplog.text


# --- what a loss counts at a timestep ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [5.0, 1.0, 20.0])
def test_min_snr_is_the_published_weight(gamma):
    """Diffusers' SNR and, as its training examples say it, min(SNR, gamma) / SNR for eps and / (SNR + 1) for v: tolerance 1e-3, as its
    SNR is float32's."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    for prediction, divided_by in (("eps", snr), ("v", snr + 1)):
        want = snr.clamp(max=gamma) / divided_by
        ours = timestep_weights("min_snr", SCHEDULE, prediction, gamma)
        torch.testing.assert_close(ours.double(), want / want.mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_weights_turn_one_squared_error_into_another(prediction, zero_snr):
    """Two predictions by a student of either kind, said as eps, v and x0: the ratio of their squared errors is the weight, up to the
    clamp and a constant. Tolerance 1e-3 (at the first steps x0 is the difference of nearly equal numbers)."""
    schedule = NoiseSchedule(zero_snr)
    g = torch.Generator().manual_seed(0)
    t = torch.arange(10, 1000, 11)
    x_t, one, two = (torch.randn(len(t), 4, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    say = {"eps": schedule.to_eps, "v": schedule.to_v, "x0": schedule.to_x0}

    def squared(kind):
        a, b = (say[kind](x, x_t, t, prediction) for x in (one, two))
        return (a - b).square().mean((1, 2, 3))

    for kind in say:
        limit = torch.minimum(squared(kind) / squared("eps"), torch.tensor(5.0)) if kind != "eps" else 1
        want = limit * squared("eps") / squared(prediction)
        weights = timestep_weights(kind, schedule, prediction, 5.0)
        assert weights.shape == (1000,) and abs(weights.double().mean() - 1) < 1e-5
        ratio = weights[t].double() / want
        torch.testing.assert_close(ratio, ratio[50].expand_as(ratio), rtol=1e-3, atol=0)


def test_plain_weights_change_nothing():
    assert timestep_weights("plain", SCHEDULE, "v", 5.0) is None
    assert torch.equal(timestep_weights("eps", SCHEDULE, "eps", 5.0), torch.ones(1000))
    with pytest.raises(ValueError, match="loss_weight is 'snr'"):
        timestep_weights("snr", SCHEDULE, "eps", 5.0)
