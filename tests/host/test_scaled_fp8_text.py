"""A CLIP whose layers the host keeps as scaled float8: captions are read as by the same numbers in half precision, in the host's own
encoding (teachers' contexts), and in the copy of it that a student inherits."""

import json
from types import SimpleNamespace

import pytest
import torch
from comfyui_dmm.dmm_core.scaled_fp8 import dequantised
from comfyui_dmm.training.text import ClipText, init_text

PREFIX = "cond_stage_model.transformer."
PROMPTS = ["", "a red star on hills", "a tall tree by the sea"]


@pytest.fixture(scope="module")
def texts():
    """(weights with scaled float8 under the new marks, the same numbers in half precision) of SD1.x's text encoder, random."""
    plain = {key.removeprefix(PREFIX): weight.half() for key, weight in init_text(768, 12).items()}
    plain["text_projection.weight"] = torch.eye(768).half()
    small = dict(plain)
    for key in [key for key, weight in plain.items() if "encoder.layers" in key and weight.ndim == 2]:
        layer, scale = key.removesuffix(".weight"), plain[key].float().abs().max() / 448
        small[key] = (plain[key].float() / scale).to(torch.float8_e4m3fn)
        small[f"{layer}.weight_scale"] = scale
        mark = json.dumps({"format": "float8_e4m3fn"}).encode()
        small[f"{layer}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    return small, dequantised(dict(small), {})[0]


def loaded(host, weights):
    quantised = any(key.endswith(".comfy_quant") for key in weights)
    # v0.33 looks for the marks in newer text encoders; for SD's own it must be told, or it leaves the scales out.
    options = {"dtype": torch.float32, **({"quantization_metadata": {"mixed_ops": True}} if quantised else {})}
    return host.sd.load_text_encoder_state_dicts(
        [dict(weights)], clip_type=host.sd.CLIPType.STABLE_DIFFUSION, model_options=options
    )


def test_captions_are_read_by_the_numbers(host, texts):
    from comfy.quant_ops import QuantizedTensor
    from comfyui_dmm.nodes.host_model import text_weights
    from comfyui_dmm.nodes.training_inputs import text_states

    clip, straight = loaded(host, texts[0]), loaded(host, texts[1])
    held = clip.cond_stage_model.parameters()
    assert any(isinstance(weight.data, QuantizedTensor) for weight in held), "nothing is quantised: this tests nothing"
    model = SimpleNamespace(model=SimpleNamespace(adm_channels=0))
    ours, theirs = text_states(model, clip, PROMPTS)[0], text_states(model, straight, PROMPTS)[0]
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 0.02 * theirs.std()

    state = {
        PREFIX + key.split("transformer.", 1)[1]: weight
        for key, weight in clip.get_sd().items()
        if "transformer." in key
    }
    inherited = ClipText(text_weights(state, torch.float16)).encode(PROMPTS)
    assert inherited.shape == theirs.shape
    assert (inherited - theirs).abs().max() < 0.02 * theirs.std()
