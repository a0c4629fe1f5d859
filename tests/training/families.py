"""Small random teachers and data for tests of the trainer."""

from collections.abc import Callable
from pathlib import Path

import torch
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.data.batches import CaptionedLatents
from comfyui_dmm.training.loop.trainer import Trainer
from comfyui_dmm.training.parallel.ranks import Ranks
from comfyui_dmm.training.run.state import identity, resume, save_state
from comfyui_dmm.training.teachers.teacher import Teacher

SIZES = 6 * 256
"""Width of SDXL's size conditioning, which follows the pooled text in y."""
# 64 channels: in GroupNorm's 32 groups a single channel's offset, and with it time and style, would be normalised away.
SMALL = UNetConfig(
    model_channels=64, channel_mult=(1, 1), num_res_blocks=(1, 1), depth_input=(0, 1), depth_output=(1, 0, 0, 0), context_dim=16,
)  # fmt: skip
SMALL_XL = UNetConfig(
    model_channels=64, channel_mult=(1, 1), num_res_blocks=(1, 1), depth_input=(0, 1), depth_output=(1, 0, 0, 0), context_dim=16,
    linear_proj=True, adm_channels=SIZES + 24,
)  # fmt: skip


def small_data(count=12, seed=0) -> CaptionedLatents:
    g = torch.Generator().manual_seed(seed)
    return CaptionedLatents(torch.randn(count, 4, 8, 8, generator=g), [f"caption {i % 5}" for i in range(count)])


def small_teacher(name: str, seed: int, data: CaptionedLatents, config=SMALL, prediction="eps") -> Teacher:
    """A random UNet with text states of its own."""
    torch.manual_seed(seed)
    prompts = len(data.prompts)
    pooled = torch.randn(prompts, config.adm_channels - SIZES) if config.adm_channels else None
    return Teacher(name, UNet(config), torch.randn(prompts, 7, config.context_dim), pooled, prediction)


SMALL_RUN = {
    "steps": 6, "batch_size": 8, "lr": 1e-3, "ema_gamma": 6.94, "seed": 3, "lambda_adv": 0.0, "validation": 8,
}  # fmt: skip
"""Settings of a run that takes a second."""


def small_run(
    teachers=3, config=SMALL, data=None, prediction="eps", ranks=None, base_prediction="eps", **settings
) -> Trainer:
    data = data or small_data()
    base = small_teacher("base", 0, data, config, base_prediction)
    named = [small_teacher(f"teacher {i}", i, data, config, prediction) for i in range(1, teachers + 1)]
    return Trainer(base, named, data, TrainConfig(**{**SMALL_RUN, **settings}), ranks=ranks or Ranks())


def resumes_bitwise(make: Callable[[], Trainer], folder: Path) -> None:
    """A run that stops after three steps and goes on from its state ends in the same weights, averaged and not."""
    straight = make()
    list(straight.run())
    first = make()
    for _ in range(3):
        first.train_step()
    save_state(first, folder, identity(first))
    second = make()
    assert resume(second, folder, identity(second)) and second.step == 3
    list(second.run())
    for averaged in (True, False):
        one, two = straight.student_weights(averaged), second.student_weights(averaged)
        assert all(torch.equal(one[k], two[k]) for k in one)
