"""The bench that compares recipes: what its figures are made of, and the recipes themselves."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.tests.benches.merge import at_seconds, row, samples_to, table
from comfyui_dmm.tests.benches.merge_arms import ARMS, HeldOut, ReleasedObjective, ReleasedTargets, settings
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.loop.objective import Objective
from comfyui_dmm.training.loop.trainer import Trainer
from comfyui_dmm.training.teachers.teacher import Prediction

from .families import small_data, small_teacher

CURVE = [[10, 1.0, 0.8, 0.9], [20, 2.0, 0.4, 0.6], [30, 3.0, 0.2, 0.3]]
"""step, seconds, mean error, worst"""


def test_a_curve_is_read_between_its_points():
    assert at_seconds(CURVE, 2.0) == pytest.approx(0.4)
    assert at_seconds(CURVE, 2.25) == pytest.approx(0.35)
    assert at_seconds(CURVE, 0.5) == pytest.approx(0.8) and at_seconds(CURVE, 9.0) == pytest.approx(0.2)


def test_samples_to_an_error():
    assert samples_to(CURVE, 0.3, batch=4) == pytest.approx(4 * 25)
    assert samples_to(CURVE, 0.9, batch=4) == 4 * 10 and math.isinf(samples_to(CURVE, 0.1, batch=4))


def test_a_row_beside_plain():
    names = ["ink", "echo"]
    plain = {"steps": 30, "batch": 2, "curve": CURVE, "names": names, "at": {"30": {"seconds": 3.0}}}
    faster = [[10, 2.0, 0.4, 0.5], [30, 6.0, 0.1, 0.1]]
    errors = [[0.1, 0.5], [0.7, 0.3]]
    mine = {**plain, "curve": faster, "at": {"30": {"seconds": 6.0, "errors": errors, "contrast": 0.5}}}
    judged = {"pair": 1, "pair worst": 2, "excess": 3, "leak": 4, "m": [[0, 5], [7, 0]], "floor": [[0, 8], [1, 0]]}
    one = row(mine, plain, judged, "echo")
    assert one["eps error"] == pytest.approx(0.2) and one["worst"] == pytest.approx(0.3)
    assert one["at equal seconds"] == pytest.approx(0.325)  # a quarter of the way from 2 s to 6 s
    assert one["samples to plain's end"] == pytest.approx((10 + 20 * 2 / 3) / 30)
    assert one["outlier's leak"] == 3  # ink to echo: |5 - 8|
    text = table({"plain": [one, one]})
    assert "0.2000 ± 0.0000" in text and "never" in table({"x": [{"samples to plain's end": math.inf}]})


def test_every_arm_is_a_valid_recipe():
    for arm in ARMS:
        config = settings(arm, 7, 3, None)
        config.train.check()
        assert config.train.steps == 7 and config.train.seed == 3 and config.train.adv_lr == config.train.lr
    plain = settings("plain", 7, 0, 5e-4).train
    assert (plain.lr, plain.init, plain.ema_gamma, plain.lambda_adv) == (5e-4, "base", None, 0.01)


def test_two_styles_apart():
    one, zero, shape = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2), (3, 1, 2, 2)
    held = HeldOut(*(torch.zeros(0),) * 4, said=[one, zero])
    answers = [torch.full(shape, 0.7), torch.full(shape, 0.2)]
    assert held.contrast(answers, 0, 1) == pytest.approx(0.5) and held.contrast([one, one], 0, 1) == 0
    want = torch.tensor([[0.3**2, 0.7**2], [0.8**2, 0.2**2]])  # style i to teacher j
    assert torch.allclose(held.errors(answers), want)


def test_the_release_drops_captions_of_teachers_and_student_separately():
    data = small_data(24)
    teachers = [small_teacher(f"t{i}", i, data) for i in range(3)]
    config = TrainConfig(steps=2, batch_size=24, caption_dropout=0.5, lambda_adv=0, base_share=0.0)
    run = Trainer(teachers[0], teachers[1:], data, config)
    plain = run.targets
    run.targets = ReleasedTargets(run)
    batch = run.draws(0)
    before = batch.caption.clone()
    theirs, shared = (targets(batch, batch.x_t, batch.t).out for targets in (run.targets, plain))
    assert torch.equal(batch.caption, before)  # what the student sees
    differ = (theirs - shared).abs().flatten(1).amax(1) > 1e-6
    assert 4 <= int(differ.sum()) <= 20  # of 24 rows half are expected to be dropped for one of the two only
    with pytest.raises(RuntimeError, match="another one"):
        run.targets(dataclasses.replace(batch, x_t=batch.x_t + 1), batch.x_t, batch.t)


def test_a_low_rank_student_is_asked_in_float32_and_trains_on():
    """Against a UNet that is built from the weights of the run's file: 1e-6 of the largest output."""
    data = small_data(24)
    teachers = [small_teacher(f"t{i}", i, data) for i in range(3)]
    config = TrainConfig(
        steps=3, batch_size=8, trainable="lora", lora_rank=2, precision="bf16", ema_gamma=6.94, lr=1e-2, lambda_adv=0
    )
    run = Trainer(teachers[0], teachers[1:], data, config)
    run.train_step(), run.train_step()
    x_t, t, rows = data.buckets[0][torch.arange(4)], torch.tensor([10, 300, 600, 900]), torch.tensor([0, 1, 2, 1])
    answers = HeldOut(x_t, t, rows, teachers[0].contexts, []).answers(run)
    unet = load_unet(run.student_weights())
    with torch.no_grad():
        for i, answer in enumerate(answers):
            want = unet(x_t, t, teachers[0].contexts[rows], style=style_row(2, i).expand(4, -1))
            assert (answer - want).abs().max() <= 1e-6 * want.abs().max() and answer.dtype == torch.float32
    assert not torch.equal(*answers)
    before = {name: p.clone() for name, p in run.student.trained.items()}
    run.train_step()
    assert before and all(p.requires_grad for p in run.student.trained.values())
    assert any(not torch.equal(p, before[name]) for name, p in run.student.trained.items())


def test_the_releases_feature_loss_is_the_mean_over_the_levels_ends():
    blocks = [torch.full((2, 1, 2, 2), float(i)) for i in range(9)]
    student = Prediction(torch.zeros(2, 1, 2, 2), [torch.zeros(2, 1, 2, 2)] * 9)
    teacher = Prediction(torch.ones(2, 1, 2, 2), blocks)
    batch = dataclasses.make_dataclass("B", ["teacher"])(torch.zeros(2, dtype=torch.long))
    batch.__class__.__len__ = lambda self: 2
    config = TrainConfig(lambda_adv=0, lambda_feat=0.002)
    plain = Objective.of(config, 1, "eps", NoiseSchedule())
    theirs = ReleasedObjective(**vars(plain)).losses(batch, student, teacher)
    assert theirs.feature.tolist() == pytest.approx(
        [(4 + 9 + 16 + 36 + 64) / 5] * 2
    )  # blocks 2, 3, 4, 6 and 8, squared
    assert plain.losses(batch, student, teacher).feature.tolist() == pytest.approx([sum(i * i for i in range(9))] * 2)
    assert torch.equal(theirs.score, plain.losses(batch, student, teacher).score)
