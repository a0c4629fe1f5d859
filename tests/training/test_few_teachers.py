"""Few teachers a step: by closed forms and by counting, with adaptive sampling, several forwards, several processes, and resumed."""

import dataclasses
import math

import pytest
import torch
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.unet import UNetConfig
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.data.batches import Draw
from comfyui_dmm.training.data.few_teachers import ERA, draw_chances, drawn_models, rows_of_models
from comfyui_dmm.training.memory.bus import most_moved, teachers_in_time, wait_seconds, weight_bytes
from comfyui_dmm.training.memory.fitting import fitted, with_teachers_in_time
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.watch.watch import Watch

from .families import small_data, small_run
from .test_difficulty import learnt

SCHEDULE = NoiseSchedule()
SHARES = [
    [0.25] * 4,
    [0.95 / 7] * 7 + [0.05],
    [0.7, 0.1, 0.1, 0.05, 0.05],
    [0.6, 0.38, 0.01, 0.0, 0.01],
]


def shares_of(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "shares, count, expected",
    [
        ([0.25] * 4, 1, [0.25] * 4),
        ([0.25] * 4, 2, [0.5] * 4),
        ([0.5, 0.3, 0.2], 1, [0.5, 0.3, 0.2]),
        (
            [0.7, 0.1, 0.1, 0.1],
            2,
            [1, 1 / 3, 1 / 3, 1 / 3],
        ),  # 2 x 0.7 is more than 1: it always comes, the rest share one place
        ([0.5, 0.3, 0.1, 0.1], 3, [1, 1, 0.5, 0.5]),  # so do two of them
        ([0.5, 0.5, 0.0], 2, [1, 1, 0]),
        ([0.9, 0.1], 5, [1, 1]),
    ],
)
def test_the_chances_by_hand(shares, count, expected):
    """Tolerance 1e-12."""
    torch.testing.assert_close(draw_chances(shares_of(shares), count), shares_of(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_so_many_models_come_as_often_as_they_should(shares, count):
    """In any run: within 3 of their share of an era. Over 600 seeds, at any step: within 5 standard deviations of the probability."""
    shares = shares_of(shares)
    chances, steps = draw_chances(shares, count), ERA * len(shares)
    for seed in range(5):
        met = torch.zeros(len(shares))
        for step in range(steps):
            models = drawn_models(shares, count, seed, step)
            assert len(models) == count and torch.equal(models, models.sort().values)
            met[models] += 1
        assert (met - steps * chances).abs().max() < 3
    for step in (0, 5):
        met = torch.zeros(len(shares), dtype=torch.float64)
        for seed in range(600):
            met[drawn_models(shares, count, seed, step)] += 1 / 600
        assert ((met - chances).abs() <= 5 * (chances * (1 - chances) / 600).sqrt() + 1e-9).all()


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("count, rows", [(1, 8), (2, 5), (3, 16), (9, 16)])
def test_each_keeps_its_share_of_the_rows(shares, count, rows):
    """In a step a drawn model has s / pi of the rows, rounded up or down; over 800 steps its share of all rows is s (5 deviations of
    independent draws, which these are not: they are far closer)."""
    shares = shares_of(shares)
    chances, got = draw_chances(shares, count), torch.zeros(len(shares), dtype=torch.float64)
    for step in range(800):
        of_rows = rows_of_models(shares, count, rows, seed=1, step=step)
        each = torch.bincount(of_rows, minlength=len(shares))
        wanted = rows * shares / chances
        assert torch.equal(of_rows, of_rows.sort().values) and len(of_rows) == rows
        assert ((each == 0) | ((each - wanted).abs() < 1)).all()
        got += each / (800 * rows)
    assert ((got - shares).abs() <= 5 * (shares * (1 - shares) / 800).sqrt() + 1e-9).all()


def test_the_forwards_of_a_step_share_its_models():
    """Two forwards of 8 rows are the 16 rows of one forward; each model is in one of them or in neighbouring ones."""
    one, two = Draw(3, 16, 5, 0.1, 0.0, SCHEDULE, models=3), Draw(3, 4, 5, 0.1, 0.0, SCHEDULE, models=3, forwards=4)
    for step in range(50):
        parts = torch.cat([two.few(4 * step + k) for k in range(4)])
        assert torch.equal(one.few(step), parts) and len(parts.unique()) == 3


@pytest.mark.parametrize("models", [1, 2, 4, 9])
def test_rows_of_batches_go_to_the_models_of_the_step(models):
    data = small_data(50)
    for number in range(30):
        batch = data.batch(number, Draw(7, 16, 5, 0.1, 0.1, SCHEDULE, models=models))
        plain = data.batch(number, Draw(7, 16, 5, 0.1, 0.1, SCHEDULE))
        assert len(batch.teacher.unique()) == min(models, 6)
        assert torch.equal(batch.t, plain.t) and torch.equal(batch.teacher, batch.teacher.sort().values)


@pytest.mark.parametrize("shares", [None, (0.5, 0.25, 0.25)])
def test_with_adaptive_sampling_the_objective_stays(shares):
    """Of a loss that is a function of teacher and timestep, the corrected mean over 3000 batches of one teacher each is the even one, and
    so are the means by teacher: off by less than 5 of its standard errors."""
    chances = learnt(3).chances(shares)
    loss = torch.rand(4, 1000, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    loss *= torch.linspace(3, 0.3, 1000, dtype=torch.float64)
    even = shares_of(shares or [1 / 3] * 3)
    data, means, residuals = small_data(12), [], []
    for seed in range(3000):
        batch = data.batch(seed % 7, Draw(seed, 12, 3, 0.2, 0.0, SCHEDULE, shares, chances, models=1))
        assert len(batch.teacher.unique()) == 1
        value = loss[batch.teacher, batch.t]
        means.append((batch.importance * value).mean())
        mine = batch.teacher == 1
        residuals.append(((batch.t_importance * value - loss[1].mean())[mine]).sum())
    means, residuals = torch.stack(means), torch.stack(residuals)
    want = 0.8 * (even * loss[:3].mean(1)).sum() + 0.2 * loss[3].mean()
    assert (means.mean() - want).abs() < 5 * means.std() / math.sqrt(3000)
    assert residuals.mean().abs() < 5 * residuals.std() / math.sqrt(3000)


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("models, copies", [("all", None), (1, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("slots", [1, 2])
def test_only_the_drawn_ones_are_moved(models, copies, slots):
    """With teachers in RAM a step of two forwards copies each of its models once at the most, and what it computes is what it computes
    with all of them on the device, to the bit."""
    settings = {
        "teachers": 5,
        "batch_size": 8,
        "accumulate": 2,
        "steps": 12,
        "teachers_per_step": models,
        "base_share": 0.1,
    }
    run, near = (
        small_run(residency="offload", teacher_slots=slots, **settings),
        small_run(residency="device", **settings),
    )
    for _ in range(12):
        ours, theirs = run.train_step(), near.train_step()
        assert (ours.loss, ours.score, ours.grad_norm) == (theirs.loss, theirs.score, theirs.grad_norm)
        assert theirs.moved_bytes == 0
        assert copies is None or len(ours.count) == copies
    of_one = run.targets.pool.slots[0].flat.nbytes
    moved = run.targets.pool.copies
    assert run.targets.pool.moved_bytes == moved * of_one
    # The next step's first one has been sent for already.
    assert copies is None or moved <= 12 * copies + 1
    assert copies is not None or moved >= 12 * 5


class Stop(BaseException):
    pass


@pytest.mark.parametrize("sampling", ["uniform", "adaptive"])
@pytest.mark.parametrize("residency", ["device", "offload"])
def test_it_resumes_bitwise(tmp_path, sampling, residency):
    def run():
        return small_run(
            teachers=4, steps=10, accumulate=2, sampling=sampling, residency=residency, teachers_per_step=2, base_share=0.1
        )  # fmt: skip

    def stop(run, metrics):
        if metrics.step == 5:
            raise Stop

    straight, second = run(), run()
    train(straight, None)
    with pytest.raises(Stop):
        train(run(), tmp_path, Watch(stop))
    train(second, tmp_path)
    ours, theirs = (one.student.unet.state_dict() for one in (second, straight))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_another_number_of_teachers_is_another_run(tmp_path):
    def run(models):
        return small_run(steps=2, teachers_per_step=models)

    train(run("all"), tmp_path)
    with pytest.raises(ValueError, match="teachers_per_step.*not set -> 1"):
        train(run(1), tmp_path)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "some", None])
def test_what_is_no_number_of_teachers(value):
    with pytest.raises(ValueError, match="teachers_per_step is .*: expected a whole number from 1, all or auto"):
        dataclasses.replace(TrainConfig(), teachers_per_step=value).check()


def test_auto_is_for_a_planned_run():
    with pytest.raises(ValueError, match="teachers_per_step is 'auto'"):
        small_run(teachers_per_step="auto")


# --- the bus ----------------------------------------------------------------------------------------------------------


def test_what_a_step_waits_for_by_hand():
    """A step of 1 s, of which the teachers have a quarter. Tolerance 1e-12."""
    cases = [
        ((1, 0.5, 1.0, 2), 0.0),  # copied while the student trains, in 0.75 s
        ((1, 1.0, 1.0, 2), 0.25),
        ((2, 0.5, 1.0, 2), 0.25),  # two are copied in that time
        ((4, 0.2, 1.0, 2), 2 * (0.2 - 0.25 / 4)),  # and each of the others while one of four teachers computes
        ((4, 0.2, 1.0, 1), 3 * 0.2),
        ((9, 0.02, 1.0, 2), 0.0),
    ]
    for arguments, expected in cases:
        assert wait_seconds(*arguments) == pytest.approx(expected, abs=1e-12)


def test_what_is_moved_by_hand():
    assert most_moved(None, 9, 16, 1) == 9 and most_moved(None, 9, 4, 4) == 16  # a forward of 4 rows asks 4 teachers
    assert most_moved(2, 9, 4, 4) == 2 and most_moved(3, 9, 1, 2) == 2 and most_moved(12, 9, 16, 1) == 9


def test_as_many_as_there_is_time_for():
    """A UNet of SD 1.5 in half precision has 1.72 GB, and is copied at 20 GB/s in 0.086 s. With as many teachers as are chosen the rate is
    90% of that on the device or more, and with one more it is not."""
    each = weight_bytes(UNetConfig(), torch.bfloat16)
    assert each == pytest.approx(1.719e9, rel=1e-3)
    found = {}
    for step_seconds in (0.05, 0.2, 0.5, 1.0, 5.0):
        known = {"copy_seconds": each / 20e9, "step_seconds": step_seconds, "slots": 2}
        found[step_seconds] = models = teachers_in_time(9, 16, 1, **known)
        rates = [
            step_seconds / (step_seconds + wait_seconds(k, known["copy_seconds"], step_seconds, 2))
            for k in (models or 9, (models or 9) + 1)
        ]
        assert rates[0] >= 0.9 or models == 1
        assert models is None or rates[1] < 0.9
    assert found[0.05] == 1 and found[5.0] is None and list(found.values())[:4] == sorted(list(found.values())[:4])


def test_auto_takes_bus_and_step_time_from_the_settings():
    cuda, config = (
        torch.device("cuda"),
        TrainConfig(batch_size=16, lambda_adv=0.0, memory="off", precision="bf16", teachers_per_step="auto"),
    )
    with pytest.raises(ValueError, match="step_seconds is not set"):
        with_teachers_in_time(config, UNetConfig(), 8, device=cuda)
    each = weight_bytes(UNetConfig(), torch.bfloat16)
    for seconds, models in ((0.2, 2), (5.0, "all")):
        found, moved = with_teachers_in_time(
            dataclasses.replace(config, step_seconds=seconds), UNetConfig(), 8, device=cuda
        )
        assert found.teachers_per_step == models and moved == each * (9 if models == "all" else models)
    slow = dataclasses.replace(config, step_seconds=0.2, bus_speed=5)
    assert with_teachers_in_time(slow, UNetConfig(), 8, device=cuda)[0].teachers_per_step == 1
    for here in ({"device": torch.device("cpu")}, {"device": cuda}):
        near = dataclasses.replace(config, residency="device")
        assert with_teachers_in_time(near, UNetConfig(), 8, **here) == (
            dataclasses.replace(near, teachers_per_step="all"),
            0,
        )


def test_the_plan_says_what_is_moved():
    config = TrainConfig(
        batch_size=16, lambda_adv=0.0, precision="bf16", teachers_per_step=2, memory=24, residency="offload"
    )
    _, found = fitted(config, UNetConfig(), (32, 32), 8, device=torch.device("cuda"))
    assert "2 of the teachers and the base in a step, 3.4 GB over the bus at the most" in found.describe()
