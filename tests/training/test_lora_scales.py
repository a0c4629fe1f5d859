"""LoRA files that keep alpha elsewhere than in a tensor: applied at the scale of their trainer, written out here by hand."""

import json
import logging
import math

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import Checkpoint
from comfyui_dmm.dmm_core.diffusers_layout import diffusers_names
from comfyui_dmm.training.config import LoraSpec
from comfyui_dmm.training.teachers.lora_files import apply_loras
from comfyui_dmm.training.text import init_text
from safetensors.torch import save_file

from .test_lora_files import ATTENTION, CONV, unet

RANK = 4
TEXT = "text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def base():
    return Checkpoint(unet=unet(), text=init_text(16, 2))


def theirs(base, module):
    return diffusers_names(base.unet)[f"{module}.weight"].removesuffix(".weight")


def pair(weight, seed=0):
    """(up, down) of rank 4 for a weight."""
    g = torch.Generator().manual_seed(seed)
    ones, kernel = [1] * (weight.ndim - 2), weight.shape[1:]
    return torch.randn(weight.shape[0], RANK, *ones, generator=g), torch.randn(RANK, *kernel, generator=g) * 0.01


def scale_of(base, path, key, up, down, part="unet"):
    """The number s by which a weight changed: s * up @ down, for every value of it."""
    before = getattr(base, part)[key].float()
    after = getattr(apply_loras(base, [LoraSpec(str(path))], torch.float32), part)[key]
    product = (up.flatten(1) @ down.flatten(1)).reshape(before.shape)
    scale = ((after - before).flatten() @ product.flatten() / product.flatten().square().sum()).item()
    torch.testing.assert_close(after, before + scale * product, rtol=0, atol=1e-5)
    return scale


def write(path, names, metadata=None, ends=("lora_B.weight", "lora_A.weight"), **more):
    tensors = {f"{name}.{end}": value for name, values in names.items() for end, value in zip(ends, values)}
    save_file(
        {**tensors, **more}, path, {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    )
    return path


UNET = {"unet.r": RANK, "unet.lora_alpha": 16, "unet.use_rslora": False}
FLAT = {"r": RANK, "lora_alpha": 16}


@pytest.mark.parametrize(
    "said, scale",
    [
        ({"lora_adapter_metadata": UNET}, 16 / RANK),
        ({"lora_adapter_metadata": UNET | {"unet.use_rslora": True}}, 16 / math.sqrt(RANK)),
        ({"lora_adapter_metadata": UNET | {"unet.alpha_pattern": {"to_q": 2}}}, 2 / RANK),
        ({"lora_adapter_metadata": UNET | {"unet.alpha_pattern": {"^to_q": 2, "to_v": 3}}}, 16 / RANK),
        ({"lora_adapter_metadata": UNET | {"unet.alpha_pattern": {"q": 2}}}, 16 / RANK),
        (
            {
                "lora_adapter_metadata": UNET
                | {"unet.alpha_pattern": {"attn1.to_q": 6}, "unet.rank_pattern": {"to_q": RANK}, "unet.r": 8}
            },
            6 / RANK,
        ),
        ({"lora_adapter_metadata": UNET | {"text_encoder.lora_alpha": 1}}, 16 / RANK),
        ({"lora_adapter_metadata": {"unet": FLAT}}, 16 / RANK),
        ({"lora_adapter_metadata": FLAT}, 16 / RANK),
        ({"adapter_config": FLAT}, 16 / RANK),
        ({"lora_alpha": "16", "r": "4"}, 16 / RANK),
        ({"lora_alpha": "16", "use_rslora": "True"}, 16 / math.sqrt(RANK)),
        ({"lora_adapter_metadata": {"unet.lora_alpha": 0}}, 0.0),
        ({"ss_network_alpha": "16.0", "ss_network_dim": "4"}, 16 / RANK),
        ({"ss_network_alpha": "16", "ss_network_args": {"conv_dim": "4", "conv_alpha": "1"}}, 16 / RANK),
        ({"ss_network_alpha": "None"}, 1.0),
        ({}, 1.0),
    ],
)
def test_the_scale_is_that_of_training(base, tmp_path, said, scale):
    key = f"{ATTENTION}.weight"
    up, down = pair(base.unet[key])
    path = write(tmp_path / "a.safetensors", {f"unet.{theirs(base, ATTENTION)}": (up, down)}, said)
    assert scale_of(base, path, key, up, down) == pytest.approx(scale, abs=1e-4)


def test_a_tensor_counts_before_all_else(base, tmp_path):
    key, name = f"{ATTENTION}.weight", f"unet.{theirs(base, ATTENTION)}"
    up, down = pair(base.unet[key])
    said = {"lora_adapter_metadata": UNET, "ss_network_alpha": "1"}
    path = write(tmp_path / "a.safetensors", {name: (up, down)}, said, **{f"{name}.alpha": torch.tensor(2.0)})
    assert scale_of(base, path, key, up, down) == pytest.approx(2 / RANK, abs=1e-4)


@pytest.mark.parametrize("module, scale", [(ATTENTION, 8 / RANK), (CONV, 2 / RANK)])
def test_kohyas_kernels_have_an_alpha_of_their_own(base, tmp_path, module, scale):
    key = f"{module}.weight"
    up, down = pair(base.unet[key])
    said = {"ss_network_alpha": "8", "ss_network_args": {"conv_dim": "4", "conv_alpha": "2"}}
    names = {"lora_unet_" + theirs(base, module).replace(".", "_"): (up, down)}
    path = write(tmp_path / "a.safetensors", names, said, ends=("lora_up.weight", "lora_down.weight"))
    assert scale_of(base, path, key, up, down) == pytest.approx(scale, abs=1e-4)


def test_text_encoder_and_unet_have_scales_of_their_own(base, tmp_path):
    key, text = f"{ATTENTION}.weight", f"cond_stage_model.transformer.{TEXT}.weight"
    of_unet, of_text = pair(base.unet[key]), pair(base.text[text], 1)
    said = {"lora_adapter_metadata": UNET | {"text_encoder.r": RANK, "text_encoder.lora_alpha": 6}}
    names = {f"unet.{theirs(base, ATTENTION)}": of_unet, f"text_encoder.{TEXT}": of_text}
    path = write(tmp_path / "a.safetensors", names, said)
    assert scale_of(base, path, key, *of_unet) == pytest.approx(16 / RANK, abs=1e-4)
    assert scale_of(base, path, text, *of_text, part="text") == pytest.approx(6 / RANK, abs=1e-4)


def test_pefts_own_folder(base, tmp_path):
    key, name = f"{ATTENTION}.weight", f"base_model.model.{theirs(base, ATTENTION)}"
    up, down = pair(base.unet[key])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 10}))
    path = write(tmp_path / "adapter_model.safetensors", {name: (up, down)})
    assert scale_of(base, path, key, up, down) == pytest.approx(10 / RANK, abs=1e-4)
    other = write(tmp_path / "other.safetensors", {name: (up, down)})  # beside it lies another LoRA's configuration
    assert scale_of(base, other, key, up, down) == pytest.approx(1, abs=1e-4)


def test_what_nothing_tells_is_said(base, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    key, name = f"{ATTENTION}.weight", f"unet.{theirs(base, ATTENTION)}"
    up, down = pair(base.unet[key])
    scale_of(base, write(tmp_path / "a.safetensors", {name: (up, down)}), key, up, down)
    assert "does not say alpha for 1 weights" in caplog.text and name in caplog.text
    caplog.clear()
    said = {"lora_adapter_metadata": UNET | {"unet.r": 64}}
    scale_of(base, write(tmp_path / "b.safetensors", {name: (up, down)}, said), key, up, down)
    assert "rank 64" in caplog.text and "does not say" not in caplog.text


@pytest.mark.parametrize(
    "said, message",
    [
        ({"lora_adapter_metadata": "{"}, "not valid JSON"),
        ({"lora_adapter_metadata": "[" * 100_000}, "not valid JSON"),
        ({"lora_adapter_metadata": []}, "no JSON object"),
        ({"lora_adapter_metadata": UNET | {"unet.lora_alpha": "x"}}, "'x', expected a number"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'}, "'nan', expected a number"),
        ({"lora_adapter_metadata": UNET | {"unet.lora_alpha": True}}, "'True', expected a number"),
        ({"lora_adapter_metadata": UNET | {"unet.alpha_pattern": {"(a+)+$": 1}}}, "regular expression"),
        ({"lora_adapter_metadata": UNET | {"unet.alpha_pattern": 3}}, "no JSON object"),
        ({"ss_network_alpha": "much"}, "'much', expected a number"),
        ({"ss_network_alpha": "1e999"}, "expected a number"),
    ],
)
def test_what_cannot_be_a_scale_is_refused(base, tmp_path, said, message):
    key = f"{ATTENTION}.weight"
    path = write(tmp_path / "a.safetensors", {f"unet.{theirs(base, ATTENTION)}": pair(base.unet[key])}, said)
    with pytest.raises(ValueError) as error:
        apply_loras(base, [LoraSpec(str(path))])
    assert message in str(error.value) and str(path) in str(error.value)
