"""A painter for one style, whose bank is in the weights."""

from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.training.paint.painter import Settings, painter

ROOT = Path(__file__).parents[2]
SETTINGS = Settings(steps=3, cfg=4.0, width=128, height=128)


@pytest.fixture(scope="module")
def brush():
    return painter(load_checkpoint(ROOT / "models" / "dmm" / "demo-dmm.safetensors"))


def test_one_style_in_the_weights_paints_what_the_bank_paints(brush):
    assert brush.unet.config.bank is not None
    for row in (brush.style_row("ink"), brush.style_row({"candy": 0.4, "echo": 0.6}, 0.7), brush.style_row(None)):
        alone = brush.in_weights(row)
        assert alone.unet.config.bank is None
        wanted, found = (who.latents(["a red star"], row, seed=1, settings=SETTINGS) for who in (brush, alone))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4 * wanted.abs().max().item())
    plain = brush.latents(["a red star"], brush.style_row(None), seed=1, settings=SETTINGS)
    ink = brush.latents(["a red star"], brush.style_row("ink"), seed=1, settings=SETTINGS)
    assert (ink - plain).abs().max() > 0.1


def test_the_painter_itself_stays_as_it_is(brush):
    before = {key: value.clone() for key, value in brush.unet.state_dict().items()}
    alone = brush.in_weights(brush.style_row("ink"))
    assert alone.in_weights(brush.style_row("ink")) is alone
    assert all(torch.equal(before[key], value) for key, value in brush.unet.state_dict().items())
