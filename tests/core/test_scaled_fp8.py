"""Files with scaled float8 weights, in both sets of marks: the numbers are value times scale, recomputed by hand; the rest is refused."""

import json

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, read_info, save_checkpoint
from comfyui_dmm.dmm_core.scaled_fp8 import dequantised
from safetensors.torch import save_file

from .test_checkpoint import bits, header, unet_weights

PREFIX = "model.diffusion_model."
KINDS = ("old", "old without its mark", "new", "new in the header", "new, e5m2", "one scale for each row")


def values(dtype: torch.dtype) -> torch.Tensor:
    """What each of the 256 bytes means, from the layout of the bits (1 sign, e exponent, m mantissa), NaN and infinity as NaN."""
    m, bias = (3, 7) if dtype == torch.float8_e4m3fn else (2, 15)
    out = []
    for byte in range(256):
        exponent, mantissa = byte >> m & (2 ** (7 - m) - 1), byte & (2**m - 1)
        value = (
            mantissa / 2**m * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa / 2**m) * 2.0 ** (exponent - bias)
        )
        out.append(-value if byte >> 7 else value)
    return torch.tensor(out)


def quantised(kind: str) -> tuple[dict, dict, dict]:
    """(tensors, metadata, right values) of a plain UNet whose attention is scaled float8."""
    dtype = torch.float8_e5m2 if "e5m2" in kind else torch.float8_e4m3fn
    unet = {k: v for k, v in unet_weights().items() if not k.startswith(("model_embedding", "add_embedding"))}
    tensors, layers, right = {}, {}, {}
    for key, weight in unet.items():
        if "transformer_blocks" not in key or not key.endswith("attn1.to_q.weight"):
            tensors[PREFIX + key] = right[key] = weight
            continue
        layer = PREFIX + key.removesuffix(".weight")
        scale = weight.float().abs().amax(1, keepdim=True) if "row" in kind else weight.float().abs().max()
        scale = scale / torch.finfo(dtype).max
        eight = (weight.float() / scale).to(dtype)
        tensors[PREFIX + key] = eight
        right[key] = values(dtype)[eight.view(torch.uint8).long()] * scale
        tensors[layer + (".scale_weight" if "old" in kind else ".weight_scale")] = scale
        tensors[layer + (".scale_input" if "old" in kind else ".input_scale")] = torch.tensor(0.5)
        layers[layer] = {"format": str(dtype).removeprefix("torch.")}
        if kind.startswith("new") and "header" not in kind:
            tensors[layer + ".comfy_quant"] = torch.tensor(list(json.dumps(layers[layer]).encode()), dtype=torch.uint8)
    if kind == "old":
        tensors[f"{PREFIX}scaled_fp8"] = torch.empty(0, dtype=dtype)
    return tensors, {"_quantization_metadata": json.dumps({"layers": layers})} if "header" in kind else {}, right


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_its_value_times_its_scale(tmp_path, kind):
    tensors, metadata, right = quantised(kind)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata)
    read = load_checkpoint(path)
    assert (
        read.unet.keys() == right.keys()
        and not read.other
        and read.scaled_fp8 == sum("scale_" in k or "_scale" in k for k in tensors) // 2
    )
    assert read.scaled_fp8 >= 4
    for key, weight in read.unet.items():
        assert weight.dtype == torch.float16
        torch.testing.assert_close(weight.float(), right[key].float(), rtol=2**-11, atol=2**-25)  # rounding to float16
    info = read_info(path)
    assert info.shapes == read.shapes and info.scaled_fp8 == read.scaled_fp8
    again = tmp_path / "b.safetensors"
    save_checkpoint(again, read)  # no mark is left that would scale the weights a second time
    assert not [k for k in header(again) if "scale" in k or "quant" in k] and "_quant" not in str(
        header(again)["__metadata__"]
    )
    assert bits(load_checkpoint(again).unet) == bits(read.unet)


def test_what_has_no_marks_comes_back_as_it_is():
    tensors = {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "logit_scale": torch.ones(())}
    assert dequantised(tensors, {"a": "b"}) == (tensors, {"a": "b"}, 0)


@pytest.mark.parametrize("size, dtype", [(1e-6, torch.float32), (1e-2, torch.float16), (1e5, torch.float32)])
def test_what_half_precision_does_not_hold_stays_in_float32(size, dtype):
    tensors = {
        "a.weight": torch.tensor([[448.0, 1.0]]).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.tensor(size / 448),
    }
    weight = dequantised(tensors, {})[0]["a.weight"]
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.float(), torch.tensor([[size, size / 448]]), rtol=2e-3, atol=0)


EIGHT = torch.ones(4, 4).to(torch.float8_e4m3fn)


def mark(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            {"a.weight": EIGHT, "a.comfy_quant": mark('{"format": "nvfp4"}'), "a.weight_scale": torch.ones(())},
            "'nvfp4'",
        ),
        ({"a.weight": EIGHT, "a.comfy_quant": mark('{"format": "float8_e4m3fn"}')}, "scale is missing"),
        ({"a.weight": EIGHT, "a.comfy_quant": mark("{"), "a.weight_scale": torch.ones(())}, "not valid JSON"),
        ({"a.weight": EIGHT, "a.comfy_quant": mark("[" * 4000), "a.weight_scale": torch.ones(())}, "not valid JSON"),
        ({"a.weight": EIGHT, "a.comfy_quant": mark("[]"), "a.weight_scale": torch.ones(())}, "no JSON object"),
        ({"a.weight": EIGHT, "a.comfy_quant": torch.ones(3), "a.weight_scale": torch.ones(())}, "no mark"),
        (
            {"scaled_fp8": EIGHT[0], "a.scale_weight": torch.ones(())},
            "'a.scale_weight' is the scale of a weight that is not",
        ),
        ({"a.weight": EIGHT, "a.weight_scale": torch.ones(4)}, "one for each row"),
        ({"a.weight": EIGHT, "a.weight_scale": torch.ones(2, 2)}, "one for each row"),
        ({"a.weight": EIGHT, "a.weight_scale": torch.tensor(float("nan"))}, "NaN"),
        ({"a.weight": EIGHT, "a.weight_scale": torch.tensor(1)}, "expected floating point"),
        ({"a.weight": EIGHT.half(), "a.weight_scale": torch.ones(())}, "'a.weight' is float16"),
        ({"a.weight": EIGHT, "a.weight_scale_inv": torch.ones(1, 1)}, "'a.weight_scale_inv'"),
        ({"a.weight": EIGHT, "a.weight_scale": torch.ones(()), "a.scale_weight": torch.ones(())}, "two scales"),
    ],
)
def test_what_cannot_be_read_is_named(tensors, message):
    with pytest.raises(ValueError) as error:
        dequantised(tensors, {})
    assert message in str(error.value) and "get " in str(error.value)


@pytest.mark.parametrize(
    "said", ["{", "[]", "{}", '{"layers": 3}', '{"layers": {"a": 1}}', '{"layers": {"a": {"format": "mxfp8"}}}']
)
def test_bad_marks_in_the_header_are_named(said):
    with pytest.raises(ValueError, match="_quantization_metadata|a.weight"):
        dequantised({"a.weight": EIGHT}, {"_quantization_metadata": said})
