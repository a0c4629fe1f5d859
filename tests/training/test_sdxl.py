"""SDXL in the trainer: pooled texts and sizes reach student and teachers alike, and what is no SDXL is refused."""

import dataclasses

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import Checkpoint
from comfyui_dmm.dmm_core.unet import UNet, timestep_embedding
from comfyui_dmm.dmm_core.vae import AutoencoderKL, VAEConfig
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.data.batches import CaptionedLatents
from comfyui_dmm.training.data.demo.latents import demo_images, demo_latents
from comfyui_dmm.training.data.demo.looks import BASE_LOOK, TEACHER_LOOKS
from comfyui_dmm.training.loop.trainer import Trainer
from comfyui_dmm.training.paint.images import to_tensor
from comfyui_dmm.training.teachers.teacher import check_text

from .families import SIZES, SMALL, SMALL_XL, small_data, small_run, small_teacher


def seen_by(unet, calls: list):
    """Keep what a UNet is given: (context, y, style), in the order of its calls."""

    def keep(module, args, kwargs):
        calls.append((args[2].clone(), kwargs["y"].clone(), kwargs.get("style")))

    unet.register_forward_pre_hook(keep, with_kwargs=True)


def test_dropped_captions_lose_their_pooled_text_with_them():
    """Of student and teacher in the same rows: after one step with half of the captions dropped."""
    run = small_run(2, SMALL_XL, steps=1, batch_size=32, caption_dropout=0.5, base_share=0.2)
    student, taught = [], [[], [], []]
    seen_by(run.student.unet, student)
    everyone = [*run.teachers, run.base]
    for teacher, calls in zip(everyone, taught):
        seen_by(teacher.unet, calls)
    batch = run.draws(0)
    run.train_step()
    dropped = batch.caption == 0
    assert 5 < dropped.sum() < 27
    ((context, y, _),) = student
    sizes = timestep_embedding(torch.tensor([64, 64, 0, 0, 64, 64]), 256).flatten().expand(32, -1)
    assert torch.equal(context, run.base.contexts[batch.caption])
    torch.testing.assert_close(y, torch.cat([run.base.pooled[batch.caption], sizes], dim=1))
    for i, (teacher, calls) in enumerate(zip(everyone, taught)):
        mine = batch.teacher == i
        ((context, y, _),) = calls
        assert torch.equal(context, teacher.contexts[batch.caption[mine]])
        torch.testing.assert_close(y, torch.cat([teacher.pooled[batch.caption[mine]], sizes[mine]], dim=1))
        empty = teacher.contexts[0], teacher.pooled[0]
        assert all(
            torch.equal(part, e)
            for part, e in ((context[dropped[mine]][0], empty[0]), (y[dropped[mine]][0, :24], empty[1]))
        )


def test_every_bucket_brings_its_own_size():
    """y says the size in pixels of the latents at hand, as original and target size, without a crop."""
    buckets = [torch.randn(8, 4, 8, 12), torch.randn(8, 4, 12, 8)]
    data = CaptionedLatents(buckets, [f"caption {i}" for i in range(16)])
    run = small_run(2, SMALL_XL, data, steps=4, batch_size=8)
    calls = []
    seen_by(run.student.unet, calls)
    said = set()
    for metrics in run.run():
        height, width = run.draws(metrics.step - 1).x_t.shape[2:]
        expected = timestep_embedding(torch.tensor([8 * height, 8 * width, 0, 0, 8 * height, 8 * width]), 256).flatten()
        _, y, _ = calls[-1]
        torch.testing.assert_close(y[:, -SIZES:], expected.expand(len(y), -1))
        said.add((height, width))
    assert said == {(8, 12), (12, 8)}


def test_mixed_predictions_meet_in_the_students():
    """An eps and a v teacher of one denoiser teach the same: the target is the v that follows from eps, in closed form."""
    data = small_data()
    base, eps, v = (
        small_teacher(name, 0, data, SMALL_XL, kind) for name, kind in (("base", "v"), ("a", "eps"), ("b", "v"))
    )
    run = Trainer(base, [eps, v], data, TrainConfig(steps=1, batch_size=16, lambda_adv=0.0, ema_gamma=None))
    batch = run.draws(0)
    target = run.targets(batch, batch.x_t, batch.t).out
    alpha = run.schedule.alphas_cumprod[batch.t].sqrt()[:, None, None, None]
    sigma = (1 - alpha**2).sqrt()
    for i, teacher in enumerate((eps, v)):
        mine = batch.teacher == i
        context, y = teacher.conditioning(batch.caption[mine], (8, 8), torch.device("cpu"))
        with torch.no_grad():
            out = teacher.unet(batch.x_t[mine], batch.t[mine], context, y)
        if i == 0:  # v = alpha eps - sigma x0 (arXiv:2202.00512), x0 = (x_t - sigma eps) / alpha
            a, s = alpha[mine], sigma[mine]
            out = a * out - s * (batch.x_t[mine] - s * out) / a
        torch.testing.assert_close(target[mine], out, rtol=1e-4, atol=1e-4)


def test_eps_teachers_say_nothing_of_pure_noise():
    """v = (eps - sigma x_t) / alpha, and alpha is 2e-4 where the schedule ends in noise."""
    data = small_data()
    base, ink = (small_teacher(name, 0, data, SMALL_XL, kind) for name, kind in (("base", "v"), ("ink", "eps")))
    config = TrainConfig(steps=1, lambda_adv=0.0)
    Trainer(base, [ink], data, config)
    base.zero_snr = ink.zero_snr = True
    with pytest.raises(ValueError, match="eps-prediction teachers for a v-prediction base .*: ink"):
        Trainer(base, [ink], data, config)
    ink.prediction, base.prediction = "v", "eps"  # eps = alpha v + sigma x_t
    Trainer(base, [ink], data, config)


REFINER = dataclasses.replace(SMALL_XL, adm_channels=SMALL_XL.adm_channels - 256)
"""It is told five numbers, and no target size."""


@pytest.mark.parametrize(
    "config, text, message",
    [
        (REFINER, SMALL_XL, "pooled conditioning of 1560, its UNet takes 16 and 1304.*refiner"),
        (SMALL, SMALL_XL, "pooled conditioning of 1560, its UNet takes 16 and 0"),
        (SMALL_XL, SMALL, "pooled conditioning of 0, its UNet takes 16 and 1560"),
        (SMALL, dataclasses.replace(SMALL, context_dim=24), "contexts of width 24 .* its UNet takes 16 and 0"),
    ],
    ids=["refiner", "text of SDXL", "text of SD1.x", "another width"],
)
def test_a_text_encoder_of_another_kind_is_refused(config, text, message):
    data = small_data()
    others = SMALL_XL if config is REFINER else config
    base, ink = (small_teacher(name, 0, data, others) for name in ("base", "ink"))
    odd = dataclasses.replace(small_teacher("odd", 0, data, text), unet=UNet(config))
    with pytest.raises(ValueError, match=f"'odd'.*{message}"):
        check_text([base, ink, odd])
    if config is not REFINER:
        with pytest.raises(ValueError, match=f"'odd'.*{message}"):
            Trainer(base, [ink, odd], data, TrainConfig(steps=1, lambda_adv=0.0))


def test_demo_scenes_have_the_scale_of_their_model():
    """0.13025 for SDXL, 0.18215 otherwise."""
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)).eval()
    images, _ = demo_images((BASE_LOOK, *TEACHER_LOOKS), 2, 0)
    with torch.no_grad():
        mean = vae.encode(to_tensor(images))
    for config, scale in ((SMALL, 0.18215), (SMALL_XL, 0.13025)):
        checkpoint = Checkpoint(unet=dict(UNet(config).state_dict()), vae=dict(vae.state_dict()))
        torch.testing.assert_close(demo_latents(checkpoint, 2, 0).buckets[0], scale * mean)
