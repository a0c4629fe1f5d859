"""A MODEL whose layers the host keeps as scaled float8: training gets the numbers that the host computes with, LoRAs included, and that are
read from its file. The oracle is the host's own dequantising."""

import json
from dataclasses import replace

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint
from comfyui_dmm.dmm_core.unet import UNet
from safetensors.torch import save_file

from .families import SD15

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def quantised(host, tmp_path_factory):
    """(MODEL of the host with quantised layers, its file, the keys of these)."""
    unet = {k: v.half() for k, v in plain_unet().items()}
    sd = {PREFIX + k: v for k, v in unet.items()}
    chosen = [k for k, v in unet.items() if "transformer_blocks" in k and v.ndim == 2]
    for key in chosen:
        scale, layer = unet[key].float().abs().max() / 448, PREFIX + key.removesuffix(".weight")
        sd[PREFIX + key] = (unet[key].float() / scale).to(torch.float8_e4m3fn)
        sd[f"{layer}.weight_scale"] = scale
        sd[f"{layer}.comfy_quant"] = torch.tensor(
            list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8
        )
    path = tmp_path_factory.mktemp("fp8") / "fp8.safetensors"
    save_file(sd, path)
    return host.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0], path, chosen


def plain_unet() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(UNet(replace(SD15, num_styles=0)).state_dict())


def test_the_weights_are_the_hosts_and_the_files(host, quantised):
    from comfy.quant_ops import QuantizedTensor
    from comfyui_dmm.nodes.weights import HostWeights, unet_weights

    model, path, chosen = quantised
    held = model.model.diffusion_model
    weights, file = unet_weights(model), load_checkpoint(path).unet
    assert weights.keys() == file.keys() and HostWeights(model).shapes == {k: tuple(v.shape) for k, v in file.items()}
    assert all(isinstance(held.get_parameter(key), QuantizedTensor) for key in chosen)
    for key, weight in weights.items():
        if key in chosen:
            theirs = held.get_parameter(key).dequantize().float()  # in the host's working precision
            torch.testing.assert_close(weight.float(), theirs, rtol=1e-2, atol=1e-6)
            assert torch.equal(weight, file[key])
        else:
            torch.testing.assert_close(weight.float(), file[key].float(), rtol=1e-2, atol=1e-6)


def test_patches_go_onto_the_numbers(host, quantised):
    from comfyui_dmm.nodes.weights import unet_weights

    model, _, chosen = quantised
    plain, patched = unet_weights(model), model.clone()
    change = torch.randn(plain[chosen[0]].shape) * 0.1
    patched.add_patches({f"diffusion_model.{chosen[0]}": ("diff", (change,))}, 0.5)
    after = unet_weights(patched)
    torch.testing.assert_close(after[chosen[0]].float(), plain[chosen[0]].float() + 0.5 * change, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(after[key], plain[key]) for key in plain if key != chosen[0])


def test_it_gets_styles_and_is_saved_without_marks(host, quantised, tmp_path):
    """An add-on on such a MODEL, and the file that Save DMM Model writes of the two."""
    from comfyui_dmm.nodes import host_model
    from comfyui_dmm.training.files.style_file import save_style

    model, path, _ = quantised
    base = load_checkpoint(path)
    torch.manual_seed(1)
    styled = dict(UNet(replace(SD15, num_styles=2)).state_dict())
    style = tmp_path / "style.safetensors"
    side = {k: v for k, v in styled.items() if k.startswith(("model_embedding", "add_embedding"))}
    save_style(style, Checkpoint(unet={**base.unet, **side}))
    added, note = host_model.with_added_styles(model, str(style))
    assert note.startswith("on the base they were made for")
    saved = host_model.to_checkpoint(added)
    assert saved.unet.keys() == base.unet.keys() | side.keys()
    for key, weight in base.unet.items():
        torch.testing.assert_close(saved.unet[key].float(), weight.float(), rtol=1e-2, atol=1e-6)


def test_saving_says_what_it_narrowed():
    from comfyui_dmm.nodes.save import narrowed

    weights = {"a": torch.ones(2).to(torch.float8_e4m3fn), "b": torch.ones(2).half()}
    (said,) = narrowed(Checkpoint(weights), torch.float16)
    assert said.startswith("1 weights of the UNet were written as float8_e4m3fn") and "float16" in said
    assert narrowed(Checkpoint({"b": weights["b"]}), torch.float16) == []
