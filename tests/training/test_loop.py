"""The distillation loop: losses by hand, who sees what, gradients, averages, and that training does what it is for."""

import dataclasses
import itertools
import math

import pytest
import torch
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.sdxl import sdxl_vector
from comfyui_dmm.dmm_core.unet import UNet, load_unet
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.data.batches import CaptionedLatents, Draw, epoch_batch
from comfyui_dmm.training.files.hashing import PART
from comfyui_dmm.training.loop.ema import PowerEMA, power_beta
from comfyui_dmm.training.loop.eps_table import eps_errors, format_table
from comfyui_dmm.training.loop.losses import feature_loss, score_loss
from comfyui_dmm.training.loop.optimizers import learning_rate
from comfyui_dmm.training.loop.trainer import Trainer
from comfyui_dmm.training.teachers.teacher import soup

from .families import SMALL_XL, small_data, small_run, small_teacher


def test_score_loss_by_hand():
    student = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]])
    teacher = torch.tensor([[[[0.0, 4.0]]], [[[3.0, 0.0]]]])
    assert score_loss(student, teacher).tolist() == [(1 + 4) / 2, 9 / 2]


def test_feature_loss_by_hand():
    student = [torch.ones(1, 2, 1, 1), torch.zeros(1, 1, 2, 2)]
    teacher = [torch.zeros(1, 2, 1, 1), torch.full((1, 1, 2, 2), 2.0)]
    assert feature_loss(student, teacher).tolist() == [1 + 4]
    with pytest.raises(ValueError, match="2 blocks, the teacher 1"):
        feature_loss(student, teacher[:1])


@pytest.mark.parametrize("config, prediction", [(None, "eps"), (None, "v"), (SMALL_XL, "eps")])
def test_losses_equal_a_recomputation_row_by_row(config, prediction):
    """Every row on its own, straight from the definitions: tolerance 1e-5."""
    run = small_run(teachers=3, base_share=0.3, prediction=prediction, **({"config": config} if config else {}))
    batch = run.data.batch(0, Draw(run.config.seed, 16, 3, 0.3, 0.4, run.schedule))
    assert 3 in batch.teacher and (batch.caption == 0).any() and not (batch.caption == 0).all()
    losses = run.losses(batch)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    everyone = [*run.teachers, run.base]
    for i in range(16):
        a, b = abar[batch.t[i]].sqrt().float(), (1 - abar[batch.t[i]]).sqrt().float()
        x_t, row = batch.x_t[i : i + 1], int(batch.caption[i])
        who = int(batch.teacher[i])
        style = torch.zeros(1, 4)
        if who < 3:
            style[0, [who, 3]] = 1.0

        def y(text):
            return None if text.pooled is None else sdxl_vector(text.pooled[row : row + 1], 64, 64)

        teacher = everyone[who]
        target, target_features = teacher.unet(
            x_t, batch.t[i : i + 1], teacher.contexts[row : row + 1], y=y(teacher), features=True
        )
        if teacher.prediction == "v":
            target = a * target + b * x_t
        out, features = run.student.unet(
            x_t, batch.t[i : i + 1], run.base.contexts[row : row + 1], y=y(run.base), style=style, features=True
        )
        assert math.isclose(losses.score[i].item(), (out - target).square().mean().item(), rel_tol=1e-4, abs_tol=1e-6)
        by_hand = sum((f - g).square().mean().item() for f, g in zip(features, target_features))
        assert math.isclose(losses.feature[i].item(), by_hand, rel_tol=1e-4, abs_tol=1e-6)


def test_a_batch_noises_pictures_and_drops_captions_as_it_says():
    """x_t is one of the pictures with standard normal noise at its t, and its row that picture's caption: 200 batches."""
    data, schedule = small_data(3), NoiseSchedule()
    noises, seen = [], set()
    for number in range(200):
        batch = data.batch(number, Draw(5, 2, 2, 0.2, 0.25, schedule))
        for x_t, t, row in zip(batch.x_t, batch.t, batch.caption):
            a, b = schedule.alphas_cumprod[t].sqrt(), (1 - schedule.alphas_cumprod[t]).sqrt()
            guesses = [(x_t - a * x0) / b for x0 in data.buckets[0]]
            which = min(range(3), key=lambda i: abs(guesses[i].square().mean().item() - 1)) if b > 0.5 else None
            if which is not None and a > 0.3:  # the picture can be told
                noises.append(guesses[which])
                assert row == 0 or data.prompts[row] in data.captions
            seen.add(int(row))
    noise = torch.stack(noises)
    assert seen == {0, 1, 2, 3} and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_teachers_never_move_and_everything_of_the_student_does():
    run = small_run()
    before = [{k: v.clone() for k, v in t.unet.state_dict().items()} for t in (run.base, *run.teachers)]
    start = {k: v.clone() for k, v in run.student.unet.state_dict().items()}
    list(run.run())
    for teacher, weights in zip((run.base, *run.teachers), before):
        assert all(torch.equal(weights[k], v) for k, v in teacher.unet.state_dict().items())
    assert [k for k, v in run.student.unet.state_dict().items() if torch.equal(v, start[k])] == []


FIELDS = ("x_t", "t", "teacher", "caption")


def test_a_batch_follows_from_seed_and_number():
    data, schedule = small_data(50), NoiseSchedule()
    one, two = (data.batch(11, Draw(7, 16, 4, 0.1, 0.1, schedule)) for _ in range(2))
    assert all(torch.equal(getattr(one, k), getattr(two, k)) for k in FIELDS)
    other = data.batch(11, Draw(8, 16, 4, 0.1, 0.1, schedule))
    assert not torch.equal(one.x_t, other.x_t) and not torch.equal(one.t, other.t)


@pytest.mark.parametrize("sizes, batch", [([60], 12), ([7], 12), ([30, 5, 1], 4)])
def test_every_picture_once_an_epoch_and_one_bucket_a_batch(sizes, batch):
    count = sum(math.ceil(size / batch) for size in sizes)
    for epoch in (0, 3):
        drawn = [epoch_batch(1, epoch * count + i, sizes, batch) for i in range(count)]
        for bucket, size in enumerate(sizes):
            indices = torch.cat([index for b, index in drawn if b == bucket])
            assert len(indices) == math.ceil(size / batch) * batch
            assert indices.unique().tolist() == list(range(size))
            assert torch.bincount(indices).max() <= math.ceil(len(indices) / size)
    first, second = ([epoch_batch(1, e * count + i, sizes, batch) for i in range(count)] for e in (0, 1))
    if count > 1:
        assert any(a[0] != b[0] or not torch.equal(a[1], b[1]) for a, b in zip(first, second))


def test_pictures_of_several_sizes():
    g = torch.Generator().manual_seed(0)
    buckets = [torch.randn(5, 4, 8, 8, generator=g), torch.randn(9, 4, 8, 16, generator=g)]
    data = CaptionedLatents(buckets, [f"caption {i}" for i in range(14)])
    assert len(data) == 14 and data.shape == (4, 8, 16) and data.shapes == {(4, 8, 8): 5, (4, 8, 16): 9}
    again = CaptionedLatents([*buckets, buckets[0]], ["x"] * 19)
    assert again.shape == (4, 8, 8) and again.shapes == {(4, 8, 8): 10, (4, 8, 16): 9}, "of one size in two parts"
    run = small_run(data=data, steps=8)
    sizes = {tuple(run.draws(n).x_t.shape[2:]) for n in range(8)}
    assert sizes == {(8, 8), (8, 16)}
    assert all(math.isfinite(m.loss) for m in run.run())


def test_teachers_share_equally():
    data, schedule = small_data(60), NoiseSchedule()
    batches = [data.batch(number, Draw(0, 12, 5, 0.0, 0.1, schedule)) for number in range(5)]
    counts = torch.bincount(torch.cat([b.teacher for b in batches]), minlength=5)
    assert counts.tolist() == [12] * 5
    assert all((b.teacher.diff() >= 0).all() for b in batches)


def test_pictures_with_an_owner_teach_no_other_teacher():
    data = small_data(12)
    owned = CaptionedLatents(data.buckets[0], [f"picture {i}" for i in range(12)], torch.arange(12) % 3)
    for number in range(30):
        batch = owned.batch(number, Draw(0, 8, 3, 0.2, 0.0, NoiseSchedule()))
        for teacher, row in zip(batch.teacher.tolist(), batch.caption.tolist()):
            assert teacher in (3, int(owned.prompts[row].split()[1]) % 3)


def test_shares_of_base_rows_and_dropped_captions():
    data, schedule = small_data(64), NoiseSchedule()
    batches = [data.batch(number, Draw(0, 64, 3, 0.25, 0.1, schedule)) for number in range(60)]
    base = torch.cat([b.teacher == 3 for b in batches]).float().mean().item()
    dropped = torch.cat([b.caption == 0 for b in batches]).float().mean().item()
    assert abs(base - 0.25) < 0.03 and abs(dropped - 0.1) < 0.02  # 3840 draws: 4 sigma is 0.028 and 0.019


def test_pictures_are_not_tied_to_teachers():
    """With as many pictures as a multiple of the teachers, a fixed pairing would starve each teacher of most pictures."""
    data = CaptionedLatents(small_data(24).buckets[0], [f"picture {i}" for i in range(24)])
    met = set()
    for number in range(120):
        b = data.batch(number, Draw(0, 12, 4, 0.0, 0.0, NoiseSchedule()))
        met |= set(zip(b.teacher.tolist(), b.caption.tolist()))
    assert len(met) == 4 * 24


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_one_large_batch(accumulate):
    """Gradients of 4 forwards of 4 = the mean of their gradients, one by one: tolerance 1e-6."""
    run, single = (small_run(accumulate=a, batch_size=4, grad_clip=0.0) for a in (accumulate, 1))
    want = None
    for number in range(accumulate):
        single.student.unet.zero_grad()
        batch = single.draws(number)
        single.objective.total(single.losses(batch), batch, 0).backward()
        grads = [p.grad.clone() for p in single.student.trained.values()]
        want = grads if want is None else [a + b for a, b in zip(want, grads)]
    metrics = run.train_step()
    for p, g in zip(run.student.trained.values(), want):
        torch.testing.assert_close(p.grad, g / accumulate, atol=1e-6, rtol=1e-4)
    assert (
        sum(metrics.count.values()) == 4 * accumulate
        and run.draws(accumulate).t.tolist() == single.draws(accumulate).t.tolist()
    )


def test_power_average_is_the_weighted_sum():
    """beta_t = (1 - 1/t)^(g+1) unrolls to weights w_t = (1 - beta_t) prod_{s>t} beta_s: arXiv:2312.02696 eq. 127."""
    p = torch.nn.Parameter(torch.zeros(1))
    gamma, values = 6.94, [3.0, -1.0, 4.0, 1.0, 5.0]
    ema = PowerEMA([("p", p)], gamma)
    for value in values:
        p.data.fill_(value)
        ema.update([("p", p)])
    want = 0.0
    for i, value in enumerate(values, start=1):
        weight = 1 - power_beta(i, gamma)
        for later in range(i + 1, len(values) + 1):
            weight *= power_beta(later, gamma)
        want += weight * value
    assert math.isclose(ema.state_dict()["p"].item(), want, rel_tol=1e-5)


def test_an_average_updated_now_and_then_ends_where_the_decays_say():
    """every = 3: at steps 3, 6, 9 the share of the new value is 1 - (1 - 3/t)^(g+1)."""
    p = torch.nn.Parameter(torch.zeros(1))
    ema = PowerEMA([("p", p)], 6.94, every=3)
    want = None
    for step in range(1, 10):
        p.data.fill_(float(step))
        assert ema.ready == (step > 3)
        ema.update([("p", p)])
        if step % 3 == 0:
            beta = (1 - 3 / step) ** 7.94
            want = step if want is None else beta * want + (1 - beta) * step
    assert math.isclose(ema.state_dict()["p"].item(), want, rel_tol=1e-5)


def test_averaged_weights_are_put_back():
    run = small_run()
    list(run.run())
    raw = {k: v.clone() for k, v in run.student.unet.state_dict().items()}
    with run.student.averaged():
        inside = run.student.unet.state_dict()
        assert all(torch.equal(inside[k], run.student.ema.average[k]) for k in inside)
    assert all(torch.equal(v, raw[k]) for k, v in run.student.unet.state_dict().items())


@pytest.mark.parametrize("schedule, at_end", [("constant", 1.0), ("cosine", 0.0), ("linear", 0.0)])
def test_learning_rate_schedules(schedule, at_end):
    run = small_run(steps=100, warmup=10, lr=2.0, lr_schedule=schedule)
    rates = [learning_rate(run.config, s) for s in range(101)]
    assert (
        math.isclose(rates[0], 0.2)
        and math.isclose(rates[10], 2.0)
        and math.isclose(rates[100], 2.0 * at_end, abs_tol=1e-9)
    )
    if schedule == "cosine":
        assert math.isclose(rates[55], 1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    share = dataclasses.replace(run.config, warmup=0.1)  # the same steps, said as a share of them
    assert [learning_rate(share, s) for s in range(101)] == rates


def test_the_final_stage_has_a_rate_of_its_own():
    run = small_run(steps=10, final_steps=5, lr=2.0, lr_schedule="cosine", final_lr=0.5)
    assert learning_rate(run.config, 10) == learning_rate(run.config, 14) == 0.5 and learning_rate(run.config, 9) < 0.1


def test_style_side_gets_its_own_rate():
    run = small_run(style_lr_scale=5.0)
    run.train_step()
    plain, style = run.optimizer.param_groups
    assert math.isclose(style["lr"], 5 * plain["lr"]) and len(style["params"]) == 5


def test_soup_is_the_mean_and_the_start():
    run = small_run(init="soup", teachers=2)
    a, b = (t.unet.state_dict() for t in run.teachers)
    mean = soup([a, b])
    for key, value in mean.items():
        torch.testing.assert_close(value, (a[key] + b[key]) / 2)
        torch.testing.assert_close(run.student.unet.state_dict()[key], value)


def test_soup_of_large_tensors_in_several_precisions():
    """Summed part by part; against float64. The last part is shorter, and a tensor may be one that is not contiguous."""
    g = torch.Generator().manual_seed(0)
    whole = torch.randn(PART + 3, 2, generator=g)
    states = [
        {"w": (whole * k).to(dtype).T}
        for k, dtype in ((1.0, torch.float32), (-2.0, torch.float16), (0.5, torch.bfloat16))
    ]
    (mean,) = soup(states).values()
    assert mean.dtype == torch.float32 and mean.shape == (2, PART + 3)
    torch.testing.assert_close(mean.double(), sum(s["w"].double() for s in states) / 3, rtol=1e-6, atol=1e-6)
    assert torch.equal(states[0]["w"], whole.T), "no model is changed"


def test_distillation_learns_each_style():
    """Teachers that differ from the base by an offset of their own: each style must end far nearer to its teacher than
    the base, the soup and the other styles are."""
    run = small_run(teachers=3, steps=150, batch_size=16, lr=2e-3, base_share=0.1, data=small_data(32))
    offsets = torch.tensor([[0.5, 0.5, -0.5, 0.0], [-0.5, 0.0, 0.5, 0.5], [0.0, -0.5, 0.0, -0.5]])
    for teacher, offset in zip(run.teachers, offsets):
        teacher.unet.load_state_dict(run.base.unet.state_dict())
        teacher.unet.out[2].bias.data += offset
        teacher.contexts = run.base.contexts
    list(run.run())
    average = UNet(run.base.unet.config)
    average.load_state_dict(soup([t.unet.state_dict() for t in run.teachers]))
    table = eps_errors(run.teachers, run.base, average, load_unet(run.student_weights()), data=run.data, samples=32)
    for row in table:
        assert row.student < 0.25 * min(row.base, row.soup, row.wrong_best), format_table(table)


def test_a_loss_that_is_not_finite_stops_with_step_and_teacher():
    run = small_run(teachers=2)
    with torch.no_grad():
        run.teachers[1].unet.out[2].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"not finite at step 1 \(teacher: teacher 2\)"):
        run.train_step()


def test_gradients_that_are_not_finite_stop_before_anything_changes():
    run = small_run(teachers=2)
    run.train_step()
    before = {k: v.clone() for k, v in run.student.unet.state_dict().items()}
    run.student.unet.out[2].weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(ValueError, match="gradients are not finite at step 2"):
        run.train_step()
    assert run.step == 1 and all(torch.equal(v, before[k]) for k, v in run.student.unet.state_dict().items())


def test_gradient_clipping_bounds_the_update():
    run = small_run(grad_clip=1e-3)
    run.train_step()
    norm = torch.stack([p.grad.norm() for p in run.student.unet.parameters()]).norm().item()
    assert norm <= 1.001e-3


def test_refusals():
    data = small_data()
    with pytest.raises(ValueError, match=r"'odd' has .*adm_channels 1560 instead of 0"):
        Trainer(small_teacher("base", 0, data), [small_teacher("odd", 1, data, SMALL_XL)], data, TrainConfig(steps=1))
    with pytest.raises(ValueError, match="3 of 4 captions are empty"):
        CaptionedLatents(torch.zeros(4, 4, 8, 8), ["a", "", " ", ""])
    with pytest.raises(ValueError, match="2 captions for latents of 4 "):
        CaptionedLatents(torch.zeros(4, 4, 8, 8), ["a", "b"])
    with pytest.raises(ValueError, match="NaN"):
        CaptionedLatents(torch.full((1, 4, 8, 8), float("nan")), ["a"])


def test_schedule_matches_the_closed_form():
    t = torch.tensor([0, 500, 999])
    x0, eps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    x_t = NoiseSchedule().add_noise(x0, eps, t)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[t].reshape(
        3, 1, 1, 1
    )
    torch.testing.assert_close(x_t.double(), abar.sqrt() * x0 + (1 - abar).sqrt() * eps, atol=1e-6, rtol=0)
