"""A step waits for its device once, and computes on it what it computes on the CPU.

Not seen here: teachers that wait in RAM (test_residency.py), whose copies have a stream of their own on CUDA alone; fp16's GradScaler with
an optimiser that is not fused, which asks for one number more; an average in RAM, a copy of the student every eighth step.
"""

import pytest
import torch
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.loop.metrics import Metrics
from comfyui_dmm.training.loop.trainer import Trainer

from .families import SMALL, SMALL_RUN, SMALL_XL, small_data, small_run, small_teacher
from .far_device import FAR, FarDevice, FarTensor

SETTINGS = {
    "plain": {},
    "the standard preset's": {"sampling": "adaptive", "style_lr_scale": 10.0, "loss_weight": "v"},
    "adversarial": {"lambda_adv": 0.1, "sampling": "adaptive"},
    "two forwards, two teachers": {"accumulate": 2, "teachers_per_step": 2},
    "one teacher": {"teachers_per_step": 1},
    "low-rank": {"trainable": "lora", "lora_rank": 4},
    "muon": {"optimizer": "muon"},
    "not clipped": {"grad_clip": 0.0, "ema_gamma": None},
}


def far_run(config=SMALL, predictions=("eps", "eps"), **settings) -> Trainer:
    data = small_data()
    base = small_teacher("base", 0, data, config)
    named = [small_teacher(f"teacher {i}", i, data, config, p) for i, p in enumerate(predictions, start=1)]
    return Trainer(base, named, data, TrainConfig(**{**SMALL_RUN, "base_share": 0.2, **settings}), device=FAR)


def numbers(metrics: Metrics) -> dict[str, float]:
    names = ("loss", "feature", "grad_norm", "adversarial", "discriminator")
    return {name: value for name in names if (value := getattr(metrics, name)) is not None}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_waits_once(settings):
    """In the steps after the first, and with the numbers of a run on the CPU (tolerance 1e-5 in the first, 1e-2 later)."""
    near = small_run(teachers=2, base_share=0.2, **settings)
    with FarDevice() as device:
        run = far_run(**settings)
        for step in range(3):
            device.counting, device.waits = step > 0, []
            ours = run.train_step()
            assert device.waits == ["aten._to_copy.default"] * device.counting
            theirs = near.train_step()
            near_enough = 1e-2 if step else 1e-5  # rounding grows from step to step, with Muon most
            assert ours.count == theirs.count and ours.score == pytest.approx(theirs.score, rel=near_enough)
            assert numbers(ours) == pytest.approx(numbers(theirs), rel=near_enough, abs=1e-7)
        assert all(isinstance(p.detach(), FarTensor) for p in run.student.trained.values())


@pytest.mark.parametrize("config, predictions", [(SMALL_XL, ("eps", "eps")), (SMALL, ("eps", "v"))])
def test_so_it_does_with_sdxl_and_with_teachers_that_predict_v(config, predictions):
    with FarDevice() as device:
        run = far_run(config, predictions)
        run.train_step()
        device.counting = True
        run.train_step()
        assert device.waits == ["aten._to_copy.default"]


def test_the_device_sees_what_is_waited_for():
    with FarDevice() as device:
        x = torch.arange(4.0).to(FAR)
        device.counting = True
        assert x.sum().item() == 6
        assert bool((x == x).all())
        x[torch.tensor([True, False, True, False])]
        x[x > 1]
        x[torch.tensor([1])]
        x.nonzero()
        x.to("cpu")
        torch.ones(4).to(FAR)
        torch.empty(4).copy_(x)
        waits = len(device.waits)
        torch.ones(4).to(FAR, non_blocking=True)
        x[:2].mul_(2.0)
        assert x.here.tolist() == [0, 2, 2, 3] and len(device.waits) == waits
    assert waits >= 9
