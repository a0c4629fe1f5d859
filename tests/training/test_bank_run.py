"""Distilling from a style bank: where it starts, what learns, how it goes on."""

import pytest
import torch
from comfyui_dmm.dmm_core.bank import BANK, folded_bank
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.dmm_core.unet import UNetConfig, load_unet, unet_config_from_state_dict
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.loop.new_student import student_bank
from comfyui_dmm.training.memory.planner import GB, Want, plan
from comfyui_dmm.training.run.state import identity

from .families import resumes_bitwise, small_run


def bank_run(**settings):
    return small_run(**{"init": "bank", "bank": "60%", "lambda_adv": 0.0, **settings})


def test_it_starts_as_the_merge_does():
    """Before the first step, each style is the mean with its teacher's change: the layer weights against the fit's oracle, full rank."""
    run = bank_run(bank="900%")
    weights = run.student_weights(False)
    for i, teacher in enumerate(run.teachers):
        folded = folded_bank(weights, torch.eye(len(run.teachers) + 1)[i])
        own = teacher.unet.state_dict()
        for key in ("input_blocks.1.0.in_layers.2.weight", "out.2.bias", "time_embed.0.weight"):
            torch.testing.assert_close(folded[key], own[key].float(), atol=1e-4, rtol=1e-3)
    base = folded_bank(weights, torch.eye(len(run.teachers) + 1)[-1])
    torch.testing.assert_close(
        base["out.2.weight"], run.base.unet.state_dict()["out.2.weight"].float(), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_everything_learns_and_the_loss_falls(optimizer):
    run = bank_run(optimizer=optimizer, steps=25, lr=1e-3)
    before = {name: p.detach().clone() for name, p in run.student.unet.named_parameters()}
    losses = [metrics.loss for metrics in run.run()]
    still = [name for name, p in run.student.unet.named_parameters() if torch.equal(p, before[name])]
    assert not still
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_trainable_bank_leaves_the_network_alone():
    run = bank_run(trainable="bank", steps=3)
    before = {name: p.detach().clone() for name, p in run.student.unet.named_parameters()}
    list(run.run())
    changed = {name for name, p in run.student.unet.named_parameters() if not torch.equal(p, before[name])}
    sides = (f"{BANK}.", "model_embedding.", "add_embedding.")
    assert changed and all(name.startswith(sides) for name in changed)
    assert {name for name in before if name.startswith(sides)} == changed == set(run.student.trained)


@pytest.mark.parametrize("settings", [{}, {"trainable": "bank", "optimizer": "muon"}, {"gradient_checkpointing": True}])
def test_a_run_with_a_bank_resumes_bitwise(tmp_path, settings):
    settings = {"ema_gamma": 6.94, "steps": 6, **settings}
    resumes_bitwise(lambda: bank_run(**settings), tmp_path)


def test_recomputed_blocks_train_the_same():
    """Gradient checkpointing changes no loss of the first steps. Tolerance 1e-6."""
    losses = [[m.loss for m in bank_run(steps=3, gradient_checkpointing=on).run()] for on in (False, True)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-6, rtol=1e-6)


def test_the_size_counts_only_with_a_bank():
    """Runs that began before there were banks go on: the setting is no part of their identity."""
    assert "setting bank" not in identity(small_run())
    assert identity(small_run(bank="20%")) == identity(small_run())
    assert identity(bank_run())["setting bank"] == '"60%"'


def test_the_student_reads_back_and_paints_its_styles():
    run = bank_run(steps=2)
    list(run.run())
    weights = run.student_weights()
    unet = load_unet(weights).eval()
    assert unet_config_from_state_dict(weights).bank == run.student.unet.config.bank
    batch = run.draws(0)
    with torch.no_grad():
        context, y = run.base.conditioning(batch.caption, batch.x_t.shape[2:], run.device)
        outs = [
            unet(batch.x_t, batch.t, context, y, style=style_row(run.num_styles, i).expand(len(batch), -1))
            for i in range(2)
        ]
    assert (outs[0] - outs[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bank": "0.1%"}, "0.1% is too small"),
        ({"bank": "many"}, "the size of the style bank is 'many'"),
        ({"init": "base", "trainable": "bank"}, "the student has no style bank: set init to bank"),
        ({"init": "soup", "trainable": "bank"}, "init is 'soup', which makes none"),
    ],
)
def test_what_makes_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        run = bank_run(**settings)
        run.config.check()


@pytest.mark.parametrize(
    ("config", "roomy_gb", "tight_gb"),
    [
        (UNetConfig(model_channels=1280, channel_mult=(1,), num_res_blocks=(2,), depth_input=(1, 1), depth_output=(1, 1, 1)), 24, 6),
        pytest.param(UNetConfig(), 48, 9, marks=pytest.mark.slow),
    ],
    ids=["one wide level", "sd15"],
)  # fmt: skip
def test_the_planner_knows_the_bank(config, roomy_gb, tight_gb):
    """Where not all weights fit, the bank alone learns."""
    bank = student_bank(config, 8, TrainConfig(init="bank"))
    roomy = plan(config, (64, 64), 8, roomy_gb * GB, want=Want(bank=bank))
    tight = plan(config, (64, 64), 8, tight_gb * GB, want=Want(bank=bank))
    assert roomy.trainable == "all" and tight.trainable == "bank"
    assert tight.peak < tight_gb * GB
