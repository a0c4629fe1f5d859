"""The host's Train LoRA node on a DMM MODEL: what it makes of a plain one, with the styles beside it.

The style side is no part of the LoRA. Without a style, losses and weights are those of the plain model. With one they do not depend on
gradient checkpointing, which computes the layers once more in the backward pass, where the style must be there too.
"""

import dataclasses
import inspect

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.style_value import Mix
from comfyui_dmm.training.files.style_file import save_style

from .families import FAMILIES, checkpoint_of, random_unet, with_bank
from .sampling import SIZE, conditioning, sample

CONFIG = FAMILIES["demo"]
STEPS = 6
INK = Mix((("ink", 1.0),))


@pytest.fixture(scope="module")
def files(models):
    """The same network plain, with styles, and with a style bank; and the bank's styles alone."""
    unet = random_unet(CONFIG)
    banked = with_bank(unet)
    checkpoint = checkpoint_of(unet, torch.float32)
    with_styles = checkpoint_of(banked, torch.float32)
    plain = {k: v for k, v in checkpoint.unet.items() if not k.startswith(("model_embedding", "add_embedding"))}
    found = {name: models / "dmm" / f"lora-{name}.safetensors" for name in ("plain", "styles", "bank")}
    save_checkpoint(found["plain"], dataclasses.replace(checkpoint, unet=plain, styles=[]))
    save_checkpoint(found["styles"], checkpoint)
    save_checkpoint(found["bank"], with_styles)
    found["alone"] = models / "lora-alone.safetensors"
    save_style(found["alone"], load_checkpoint(found["bank"]))
    return found


def train(model, **changes):
    """(LoRA, losses) of the host's node."""
    from comfy_extras.nodes_train import TrainLoraNode

    one = {
        "model": model, "batch_size": 1, "steps": STEPS, "grad_accumulation_steps": 1, "learning_rate": 3e-4, "rank": 4,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "none", "lora_dtype": "fp32",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": True, **changes,
    }  # fmt: skip
    known = inspect.signature(TrainLoraNode.execute).parameters
    inputs = {name: [value] for name, value in one.items() if name in known}
    latents = torch.randn(2, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)  # the node draws the LoRA's start from the global generator
    with torch.inference_mode():
        made = TrainLoraNode.execute(
            **inputs,
            latents=[{"samples": latents[:1]}, {"samples": latents[1:]}],
            positive=[conditioning(CONFIG, 1), conditioning(CONFIG, 2)],
        )
    lora, losses, steps = made.result
    assert steps == STEPS
    return lora, losses["loss"]


def loaded(file):
    from comfyui_dmm.nodes import host_model

    return host_model.load(str(file))[0]


def same(one, other, tolerance):
    (lora, losses), (lora_2, losses_2) = one, other
    assert lora.keys() == lora_2.keys()
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(losses_2), rtol=tolerance, atol=0)
    for key in lora:
        torch.testing.assert_close(lora[key], lora_2[key], rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("bypass", [True, False])
def test_without_a_style_it_is_the_plain_models_lora(files, bypass):
    same(train(loaded(files["styles"]), bypass_mode=bypass), train(loaded(files["plain"]), bypass_mode=bypass), 1e-6)


@pytest.mark.parametrize("checkpointing", [0, 1, 2])
@pytest.mark.parametrize("bypass", [True, False])
@pytest.mark.parametrize("kind", ["styles", "bank", "added"])
def test_with_a_style(files, kind, bypass, checkpointing):
    """The same with every kind of gradient checkpointing, and from what is really trained: the loss falls, and the LoRA paints."""
    import comfy.sd
    from comfyui_dmm.nodes import host_model

    if kind == "added":
        model, _ = host_model.with_added_styles(loaded(files["plain"]), str(files["alone"]))
    else:
        model = loaded(files[kind])
    styled = host_model.styled(model, INK)
    how = {"bypass_mode": bypass, "gradient_checkpointing": checkpointing > 0, "checkpoint_depth": checkpointing or 1}
    lora, losses = train(styled, **how)
    if checkpointing:
        same((lora, losses), train(styled, bypass_mode=bypass, gradient_checkpointing=False), 2e-4)
        return
    plain, without = train(loaded(files["plain"]), **how)
    assert lora.keys() == plain.keys() and not [key for key in lora if "embedding" in key or "style" in key]
    assert losses[:2] != pytest.approx(without[:2], rel=1e-3)  # the style was there
    assert sum(losses[-3:]) < sum(losses[:3])
    before = sample(styled, conditioning(CONFIG, 1), conditioning(CONFIG, 2))
    painted, _ = comfy.sd.load_lora_for_models(styled, None, {k: v.clone() for k, v in lora.items()}, 1.0, 0)
    assert (sample(painted, conditioning(CONFIG, 1), conditioning(CONFIG, 2)) - before).abs().max() > 1e-4
    again = sample(styled, conditioning(CONFIG, 1), conditioning(CONFIG, 2))
    assert torch.equal(again, before)  # the MODEL itself is as it was
