"""Hostile files by the thousand: seeded changes to the headers, metadata and configs of good ones, and what every reader makes of them.

A program of its own, so that a reader that runs wild meets a limit of memory and a clock and not the test run:
``python hostile.py FOLDER SEED COUNT`` prints a JSON object, counts by reader. Each read must end in a value, a ValueError, or
an OSError; anything else is listed under "failures" with the seed that makes it again.
"""

import json
import logging
import math
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, read_info, save_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig, load_unet
from comfyui_dmm.dmm_core.vocabulary import NUM_TOKENS, TABLE
from comfyui_dmm.training.config import LoraSpec
from comfyui_dmm.training.data.batches import load_latents
from comfyui_dmm.training.data.shards import read_manifest
from comfyui_dmm.training.files.convert import convert
from comfyui_dmm.training.files.describe import describe
from comfyui_dmm.training.files.model_files import load_any, load_any_info, model_sha256
from comfyui_dmm.training.files.style_file import is_style_file, read_style_file, recombine
from comfyui_dmm.training.teachers.lora_files import apply_loras
from safetensors.torch import load, load_file, save, save_file

SECONDS = 20
"""A read may take no longer; the machine may be busy."""
MEMORY = 3 * 2**30
"""Bytes of address space beyond what the program has when it begins: the good files have less than 1 MB."""

TINY = UNetConfig(
    model_channels=32, channel_mult=(1, 1), num_res_blocks=(1, 1), depth_input=(0, 1), depth_middle=1,
    depth_output=(1, 1, 0, 0), context_dim=8, num_styles=3,
)  # fmt: skip
SIZES = [0, 1, 2, 3, 7, 32, 33, 64, 128, 1024, 10**5, 10**9, 2**31, 2**40, 2**62, 2**63, 2**64, -1, 1.5, "3", None, [3], True]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"]
STRANGE_DTYPES = ["F8_E8M0", "F4", "F6_E2M3", "C64", "U16", "U32", "U64", "F99", "", "f32", None, 3, ["F16"]]
NAMES = [
    "../../etc/passwd", "/etc/passwd", "C:\\x", "a\x00b", "\ud800", "\x1b[2J", "<img src=x onerror=alert(1)>", "{0.__class__}",
    "%s%n", "x" * 200, "none", " ", "", "\u202egnp", "a\nb", "' OR 1", "../" * 50, "CON", 5, None, ["a"], {"a": 1}, 1e999,
]  # fmt: skip


# --- good files -------------------------------------------------------------------------------------------------------


def make_good(folder: Path) -> dict[str, Path]:
    """One small file or folder of every kind that is read."""
    torch.manual_seed(0)
    folder.mkdir()
    styles = [StyleInfo("ink", "lines", thumbnail="data:image/jpeg;base64,/9j/4AAQ"), StyleInfo("pen"), StyleInfo("墨")]
    table = torch.zeros(NUM_TOKENS, 8).half()
    table[:5] = torch.randn(5, 8)
    text = {TABLE: table, "cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.randn(8).half()}
    checkpoint = Checkpoint(
        unet={k: v.half() for k, v in UNet(TINY).state_dict().items()},
        text=text,
        vae={"encoder.conv_in.weight": torch.randn(8, 3, 3, 3).half()},
        styles=styles,
        recipe={"steps": 5, "history": [{"steps": 3, "train": {"lr": 1e-5}}]},
        other={"alphas_cumprod": torch.rand(10)},
    )
    good = {"single": folder / "single.safetensors", "style": folder / "style.safetensors", "unet": folder / "unet"}
    save_checkpoint(good["single"], checkpoint)
    convert(good["single"], good["style"], "style")
    convert(good["single"], good["unet"], "diffusers")
    good["pipeline"] = folder / "pipeline"
    shutil.copytree(good["unet"], good["pipeline"] / "unet")
    vae, layer = good["pipeline"] / "vae", "text_model.encoder.layers.0."
    vae.mkdir()
    sides = [
        "encoder.down_blocks.0.resnets.0.conv1.weight",
        "encoder.mid_block.attentions.0.to_q.weight",
        "quant_conv.bias",
    ]
    save_file({key: torch.randn(4, 4).half() for key in sides}, vae / "diffusion_pytorch_model.safetensors")
    words = {
        "text_model.embeddings.token_embedding.weight": torch.randn(10, 8),
        "text_model.embeddings.position_embedding.weight": torch.randn(7, 8),
        "text_model.final_layer_norm.weight": torch.randn(8),
        "text_model.final_layer_norm.bias": torch.randn(8),
        **{f"{layer}self_attn.{part}_proj.weight": torch.randn(8, 8) for part in "qkv"},
        **{f"{layer}self_attn.{part}_proj.bias": torch.randn(8) for part in "qkv"},
        f"{layer}mlp.fc1.weight": torch.randn(16, 8),
    }
    for name, act in (("text_encoder", "quick_gelu"), ("text_encoder_2", "gelu")):
        (good["pipeline"] / name).mkdir()
        save_file(words, good["pipeline"] / name / "model.safetensors")
        (good["pipeline"] / name / "config.json").write_text(json.dumps({"hidden_act": act}))
    (good["pipeline"] / "scheduler").mkdir()
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (good["pipeline"] / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    good["latents"] = folder / "latents.safetensors"
    save_file({"latents": torch.randn(2, 4, 4, 4)}, good["latents"], {"captions": '["a", "b"]'})
    good["lora"] = folder / "lora.safetensors"
    key = "lora_unet_input_blocks_1_0_emb_layers_1"
    save_file({f"{key}.lora_up.weight": torch.randn(32, 2), f"{key}.lora_down.weight": torch.randn(2, 128),
               f"{key}.alpha": torch.tensor(2.0)}, good["lora"])  # fmt: skip
    good["lora header"] = folder / "lora-header.safetensors"
    save_file({f"{key}.lora_up.weight": torch.randn(32, 2), f"{key}.lora_down.weight": torch.randn(2, 128)}, good["lora header"],
              {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})})  # fmt: skip
    for kind in ("fp8 old", "fp8 new"):
        good[kind] = folder / f"{kind.replace(' ', '-')}.safetensors"
        save_file(in_fp8(load_file(good["single"]), new=kind == "fp8 new"), good[kind])
    good["cache"] = folder / "cache"
    good["cache"].mkdir()
    shard = {"file": "latents-32x32-00000.safetensors", "count": 1, "bytes": 3, "sha256": "ab" * 32}
    manifest = {
        "format": 1,
        "kind": "images",
        "settings": {"vae": "x"},
        "prompts": [""],
        "buckets": [{"shards": [shard]}],
    }
    (good["cache"] / "manifest.json").write_text(json.dumps(manifest))
    return good


def in_fp8(tensors: dict[str, torch.Tensor], new: bool) -> dict[str, torch.Tensor]:
    """A single file's tensors with some of the UNet's weights as float8 and a scale, under the new marks or the old ones."""
    out = dict(tensors)
    for key in (key for key in tensors if key.endswith(SCALED)):
        layer, scale = key.removesuffix(".weight"), tensors[key].float().abs().max() / 400
        out[key] = (tensors[key].float() / scale).to(torch.float8_e4m3fn)
        out[f"{layer}.{'weight_scale' if new else 'scale_weight'}"] = scale
        if new:
            out[f"{layer}.comfy_quant"] = as_mark(b'{"format": "float8_e4m3fn"}')
    return out if new else {**out, f"{UNET}scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}


def as_mark(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


UNET = "model.diffusion_model."
SCALED = ("to_q.weight", "to_v.weight", "emb_layers.1.weight", "out_layers.3.weight")


# --- changes ----------------------------------------------------------------------------------------------------------


def changed_file(raw: bytes, dice: random.Random) -> bytes:
    """A safetensors file with one to three changes: to its bytes, its header, its metadata, or to the tensors it declares, with
    offsets that fit (so that they pass the library and reach the readers)."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    kind = dice.choice(["bytes", "header", "metadata", "metadata", "tensors", "tensors", "tensors", "raw header"])
    if kind == "bytes":
        return changed_bytes(raw, 8 + length, dice)
    if kind == "raw header":
        return with_header(strange_header(dice, header), data)
    for _ in range(dice.randint(1, 3)):
        if kind == "tensors":
            change_tensors(header, dice)
        elif kind == "metadata":
            before = header.get("__metadata__", {})
            header["__metadata__"] = changed_metadata(before if isinstance(before, dict) else {}, dice)
        else:
            change_entry(header, dice)
    if kind == "tensors":
        data = refit(header)
    return with_header(json.dumps(header, ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass"), data)


def with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def changed_bytes(raw: bytes, end: int, dice: random.Random) -> bytes:
    out = bytearray(raw)
    what = dice.randrange(5)
    if what == 0:
        return bytes(out[: dice.randrange(len(out))])
    if what == 1:
        out[:8] = struct.pack(
            "<Q", dice.choice([0, 1, end, 2**31, 2**63, 2**64 - 1, len(raw), dice.randrange(2 * end)])
        )
    elif what == 2:
        at = dice.randrange(end)
        out[at:at] = bytes(dice.randrange(256) for _ in range(dice.randrange(1, 20)))
    elif what == 3:
        return bytes(out) + bytes(dice.randrange(1, 100))
    else:
        for _ in range(dice.randrange(1, 30)):
            out[dice.randrange(end)] = dice.randrange(256)
    return bytes(out)


def strange_header(dice: random.Random, header: dict) -> bytes:
    entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    count = dice.choice([10, 25_000, 400_000])
    text = json.dumps(header).encode()
    return dice.choice([
        lambda: b"[" * 100_000,
        lambda: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        lambda: b"{" + b",".join(b'"%d":%s' % (i, entry) for i in range(count)) + b"}",
        lambda: text[:-1] + b"," + b",".join(b'"model.diffusion_model.x%d":%s' % (i, entry) for i in range(count)) + b"}",
        lambda: text[:-1] + b',"' + b"." * 200_000 + b'":' + entry + b"}",
        lambda: text[:-1] + b"," + text[1:],  # every key twice
        lambda: text.replace(b"[", b"[ " * 1000, 1),
        lambda: b'{"a":{"dtype":"F16","shape":[' + b"1," * 1_000_000 + b'0],"data_offsets":[0,0]}}',
        lambda: b'{"__metadata__":{' + b",".join(b'"%d":"x"' % i for i in range(300_000)) + b"}}",
        lambda: text + b" " * 1_000_000,
        lambda: b"null", lambda: b"", lambda: b"{}", lambda: b'{"__metadata__":null}', lambda: b"[]", lambda: b'"x"',
        lambda: text.replace(b"0", b"NaN", 1), lambda: text.replace(b":", b":-", 3), lambda: text.decode().encode("utf-16"),
    ])()  # fmt: skip


def change_entry(header: dict, dice: random.Random) -> None:
    """One thing about one tensor, without regard to the others."""
    key = dice.choice([k for k in header if k != "__metadata__"] or ["x"])
    entry = header.setdefault(key, {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]})
    what = dice.randrange(6)
    if not isinstance(entry, dict) or what == 0:
        header[key] = dice.choice([None, 3, [], {}, "x", {"dtype": "F16"}])
    elif what == 1:
        entry["dtype"] = dice.choice(DTYPES + STRANGE_DTYPES)
    elif what == 2:
        entry["shape"] = dice.choice([[dice.choice(SIZES) for _ in range(dice.randrange(5))], *SIZES])
    elif what == 3:
        entry["data_offsets"] = dice.choice([[dice.choice(SIZES) for _ in range(dice.randrange(4))], [8, 0], None, "x"])
    elif what == 4:
        header[dice.choice(NAMES[:17])] = entry
    else:
        other = header[dice.choice([k for k in header if k != "__metadata__"])]
        if isinstance(other, dict):
            entry["data_offsets"] = other.get("data_offsets")


def change_tensors(header: dict, dice: random.Random) -> None:
    """A tensor of another size or dtype, under another name, missing, or one more. Keys that decide are chosen more often."""
    keys = [k for k in header if k != "__metadata__"]
    telling = [k for k in keys if any(part in k for part in TELLING)]
    key = dice.choice(telling if telling and dice.random() < 0.6 else keys or ["x"])
    entry = header.get(key, {"dtype": "F16", "shape": [2]})
    what = dice.randrange(7)
    if what == 0:
        header.pop(key, None)
    elif what == 1:
        entry["dtype"] = dice.choice(DTYPES + STRANGE_DTYPES[:7])
    elif what == 2:
        header[
            dice.choice([*NAMES[:17], *keys, *(key.replace("1", str(dice.choice([0, 2, 7, 10**9]))) for _ in range(9))])
        ] = entry
        if dice.random() < 0.5:
            header.pop(key, None)
    elif what == 3:
        number = dice.randrange(1, 3000)
        header.update(
            {f"{key.rsplit('.', 2)[0]}.{i}.norm1.weight": {"dtype": "U8", "shape": [0]} for i in range(number)}
        )
    else:
        shape = list(entry["shape"]) or [1]
        at = dice.randrange(len(shape))
        if what == 4:
            shape[at] = dice.choice([0, 1, 2, 3, 31, 33, 64, 100])
        elif what == 5:  # nothing in it, and the rest as large as one likes
            shape = [dice.choice([10**9, 2**40, 2**62, 2**63, 2**64 - 1, 5]) for _ in range(dice.randrange(1, 4))]
            shape[dice.randrange(len(shape))] = 0
        else:
            shape = dice.choice([[], [1], shape[::-1], [*shape, 1], shape[:1], [1] * 40, [70_000, 4]])
        entry["shape"] = shape


TELLING = ("model_embedding", "add_embedding", "time_emb", "input_blocks.0.0", "conv_in", "out.2", "conv_out", "token_embedding",
           "token_ids", "to_k", "proj_in", "self_attn", "latents", "lora_", "scale", "comfy_quant")  # fmt: skip
BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
        "F4": 4, "F6_E2M3": 6}  # fmt: skip


def refit(header: dict) -> bytes:
    """Offsets end to end, and as much data (zeros)."""
    end = 0
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        count = 1
        for size in entry["shape"]:
            count *= size
        size = min(count * BITS.get(entry["dtype"], 8) // 8, 10**6)
        header[key] = {**entry, "data_offsets": [end, end + size]}
        end += size
    return bytes(end)


def changed_metadata(metadata: dict, dice: random.Random) -> object:
    metadata = dict(metadata)
    key = dice.choice(["dmm.styles", "dmm.styles", "dmm.styles", "dmm.recipe", "dmm.format", "dmm.prediction", "captions",
                       "dmm.zero_snr", "dmm.unet_sha256", "modelspec.predict_key", "new"])  # fmt: skip
    if dice.random() < 0.05:
        return dice.choice([None, [], "x", 5, {"a": 1}, {"a": None}, {"a": {}}])
    try:
        value = json.loads(metadata.get(key, "[]"))
    except (ValueError, TypeError, RecursionError):  # an earlier change's
        value = []
    if key == "dmm.styles" and dice.random() < 0.6:
        value = [{"name": name} for name in ("a", "b", "c")]
        field = dice.choice(
            ["name", "description", "thumbnail", "teacher", "sha256", "licence", "recommended", "other"]
        )
        value[dice.randrange(3)][field] = dice.choice([*NAMES, "x" * 300_000, {"cfg": "y" * 5000}])
    elif dice.random() < 0.7:
        value = changed_json(value, dice)
    text = dice.choice([json.dumps(value), json.dumps(value), json.dumps(value)[: dice.randrange(1, 50)], STRANGE_JSON[
        dice.randrange(len(STRANGE_JSON))]()])  # fmt: skip
    metadata[key] = text if dice.random() < 0.97 else value
    return metadata


def changed_fp8(raw: bytes, dice: random.Random) -> bytes:
    """A file of scaled float8 weights with something wrong, or merely unusual, about one weight, its scale or its mark."""
    tensors, metadata = load(raw), None
    layers = sorted(key.removesuffix(".weight") for key in tensors if key.endswith(SCALED))
    for layer in dice.sample(layers, dice.randint(1, 3)):
        key = next(f"{layer}.{end}" for end in ("weight_scale", "scale_weight") if f"{layer}.{end}" in tensors)
        other = f"{layer}.{'scale_weight' if key.endswith('weight_scale') else 'weight_scale'}"
        weight, scale = tensors[f"{layer}.weight"], tensors[key]
        rows, ones = weight.shape[0], [1] * (weight.ndim - 1)
        what = dice.randrange(10)
        if what == 0:
            tensors.pop(key)
        elif what == 1:
            shape = dice.choice([(1,), (1, 1), (rows, *ones), (rows,), (2,), (0,), (rows, rows), (*ones, rows), ()])
            tensors[key] = torch.rand(shape) * scale
        elif what == 2:
            tensors[key] = scale.to(
                dice.choice([torch.float16, torch.float64, torch.bfloat16, torch.int32, torch.bool])
            )
        elif what == 3:
            tensors[key] = torch.tensor(dice.choice([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30, 1e-30]))
        elif what == 4:
            tensors[f"{layer}.weight"] = weight.to(dice.choice([torch.float16, torch.float8_e5m2, torch.uint8]))
        elif what == 5:
            tensors[other] = scale
        elif what == 6:
            tensors[f"{layer}.comfy_quant"] = dice.choice(STRANGE_MARKS)
        elif what == 7:
            tensors.pop(dice.choice([f"{layer}.weight", f"{layer}.comfy_quant"]), None)
        elif what == 8:
            tensors[f"{layer}.{dice.choice(['input_scale', 'scale_input', 'weight_scale_2', 'weight_codebook'])}"] = (
                torch.ones(())
            )
        else:
            said = dice.choice(
                [{}, [], None, {"layers": 3}, {"layers": {layer.removeprefix(UNET): {"format": "float8_e4m3fn"}}}]
            )
            metadata = {"_quantization_metadata": dice.choice([json.dumps(said), "{", ""])}
    return save({key: tensor.clone() for key, tensor in tensors.items()}, metadata)


STRANGE_MARKS = [
    *map(
        as_mark,
        (
            b"{",
            b"",
            b"[]",
            b"null",
            b'{"format": "nvfp4"}',
            b'{"format": 5}',
            b'{"format": "float8_e5m2"}',
            b"[" * 3000,
        ),
    ),
    torch.zeros(5000, dtype=torch.uint8),
    torch.zeros(2, 2, dtype=torch.uint8),
    torch.zeros(3),
]

ALPHAS = [
    *((4, 4), ("4", 4), (" 3 ", 3), (0, 0), (-3, -3), (0.5, 0.5), ("1e2", 100), (1e30, 1e30), ("x", None), ("", None), (True, None)),
    *((None, None), ([4], None), ({"a": 4}, None), (math.nan, None), (math.inf, None), ("nan", None), (10**400, None), ("1e999", None)),
]  # fmt: skip
"""(lora_alpha as a header has it, the number that it is or None: it must be refused)."""
KOHYA_ALPHAS = [
    ("4", 4),
    ("16.0", 16),
    ("-3", -3),
    ("0", 2),
    ("None", 2),
    ("", 2),
    ("x", None),
    ("nan", None),
    ("1e999", None),
    ("[4]", None),
]
"""As ALPHAS, of ``ss_network_alpha``; the rank is 2, and what says nothing means scale 1."""
PATTERNS = [({}, ""), (None, ""), ({"emb_layers_1": 6}, 6), ({"^emb_layers_1": 6}, ""), ({"other": "x"}, ""),
            *((bad, None) for bad in (3, "x", [1], True, {"(a+)+$": 1}, {"emb_layers_1": "x"}, {"emb_layers_1": [6]}))]  # fmt: skip
"""(alpha_pattern, the alpha that it gives the weight, "" for none, None: refused)."""
RANKS = [2, "2", 0, -1, 64, None, "x", [2], True, math.nan, 10**400]
"""r: what is said of the rank only warns, as the tensors have it."""
RANK_PATTERNS = [
    ({}, True),
    ({"emb_layers_1": 2}, True),
    ({"emb_layers_1": "x"}, True),
    (3, False),
    ([2], False),
    ({"(a+)+$": 1}, False),
]
NO_JSON = ["{", "", "nul", "[" * 100_000, "{'unet.r': 2}", "\x00", "[]", "5", '"x"', "true"]


def changed_lora_header(raw: bytes, dice: random.Random) -> tuple[bytes, float | None]:
    """A LoRA with a header of another content -> (the file, the scale that it must be applied at, None: it must be refused)."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    place = dice.choice(["lora_adapter_metadata", "adapter_config", "peft_config", "header", "kohya", "no JSON"])
    (said, alpha), root = dice.choice(ALPHAS), dice.choice([False, False, True, "true"])
    if place == "kohya":
        said, alpha = dice.choice(KOHYA_ALPHAS)
        metadata, root = {"ss_network_alpha": said}, False
    elif place == "no JSON":
        metadata, alpha = {"lora_adapter_metadata": dice.choice(NO_JSON)}, None
    elif place == "header":
        said, alpha = dice.choice([(a, n) for a, n in ALPHAS if isinstance(a, str)])
        metadata = {"lora_alpha": said, "r": str(dice.choice(RANKS[:5])), "use_rslora": str(root)}
    else:
        (pattern, of_pattern), (ranks, fine) = dice.choice(PATTERNS), dice.choice(RANK_PATTERNS)
        if dice.random() < 0.6:
            pattern, of_pattern, ranks, fine = {}, "", {}, True
        config = {
            "r": dice.choice(RANKS),
            "lora_alpha": said,
            "alpha_pattern": pattern,
            "rank_pattern": ranks,
            "use_rslora": root,
        }
        alpha = (alpha if of_pattern == "" else of_pattern) if fine else None
        metadata = {place: json.dumps({f"unet.{k}": v for k, v in config.items()} if dice.random() < 0.5 else config)}
    header["__metadata__"] = metadata
    scale = None if alpha is None else alpha / 2 * (math.sqrt(2) if root else 1)
    return with_header(json.dumps(header).encode(), data), scale


STRANGE_JSON: list[Callable[[], str]] = [
    lambda: "[" * 100_000,
    lambda: "[" * 30 + "]" * 30,
    lambda: json.dumps([{"name": str(i)} for i in range(100_000)]),
    lambda: "[" + "[]," * 1_000_000 + "[]]",
    lambda: '{"a":' + "1" * 5000 + "}",
    lambda: '{"a": 1e999, "b": NaN, "c": -Infinity}',
    lambda: '[{"name":"\\ud800"},{"name":"b"},{"name":"c"}]',
    lambda: '{"history": [' + "{}," * 1000 + "{}]}",
    lambda: json.dumps({"a": list(range(300_000))}),
    lambda: json.dumps({str(i): i for i in range(2000)}),
    lambda: "9" * 5000,
    lambda: "",
    lambda: "null",
    lambda: "\u202e",
]


def changed_json(value: object, dice: random.Random) -> object:
    """A JSON value with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and dice.random() < 0.8:
        value, key = dict(value), dice.choice(list(value))
        if dice.random() < 0.2:
            value.pop(key)
        else:
            value[key] = changed_json(value[key], dice)
        return value
    if isinstance(value, list) and value and dice.random() < 0.8:
        value, at = list(value), dice.randrange(len(value))
        value[at] = changed_json(value[at], dice)
        return value if dice.random() < 0.8 else value * 3
    return dice.choice(
        [*SIZES[:-5], *NAMES, -1, 10**30, 1e308, [], {}, [[]], [None] * 1000, "x" * 10_000, {"a": {"b": []}}]
    )


def changed_config(text: bytes, dice: random.Random) -> bytes:
    what = dice.randrange(8)
    if what == 0:
        return bytes(text[: dice.randrange(len(text))])
    if what == 1:
        return dice.choice(
            [b"", b"null", b"[]", b"[" * 200_000, b'{"a":' * 100_000, b"{}", b"\xff\xfe", b" " * 1_100_000]
        )
    if what == 2:
        out = bytearray(text)
        for _ in range(dice.randrange(1, 9)):
            out[dice.randrange(len(out))] = dice.randrange(256)
        return bytes(out)
    return json.dumps(changed_json(json.loads(text), dice)).encode("utf-8", "surrogatepass")


# --- readers ----------------------------------------------------------------------------------------------------------


meant: dict[Path, float | None] = {}
"""The scale that a LoRA must be applied at (None: it must be refused), where the change says it."""


def readers(good: dict[str, Path], scratch: Path) -> dict[str, list[tuple[str, Callable[[Path], object]]]]:
    """What is tried on each kind of file, by name."""

    def used(path: Path) -> None:
        """What users do with a file that was read."""
        checkpoint = load_any(path)
        load_unet(checkpoint.unet)
        save_checkpoint(scratch / "again.safetensors", checkpoint)
        again = load_checkpoint(scratch / "again.safetensors")
        assert (again.styles, again.recipe) == (checkpoint.styles, checkpoint.recipe)

    def right_fp8(path: Path) -> None:
        """What is accepted is value times scale, computed here by hand."""
        read, raw = load_any(path).unet, load_file(path)
        for key, weight in raw.items():
            if (
                weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2)
                or not key.startswith(UNET)
                or not key.endswith(".weight")
            ):
                continue
            layer = key.removesuffix(".weight")
            scale = raw.get(f"{layer}.weight_scale", raw.get(f"{layer}.scale_weight"))
            assert scale is not None or f"{layer}.comfy_quant" not in raw, key
            if scale is not None and scale.numel() > 1:
                scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
            want = weight.float() * (1 if scale is None else scale.float())
            got = read[key.removeprefix(UNET)]
            least = 2**-24 if got.dtype == torch.float16 else 0  # half precision's smallest step
            torch.testing.assert_close(got.float(), want, rtol=2**-10, atol=least)

    def right_scale(path: Path) -> None:
        """The LoRA is applied at the scale that its header means, or refused."""
        lora = [LoraSpec(str(path), 1.0)]
        if path not in meant:
            apply_loras(base, lora)
            return
        name, key = "lora_unet_input_blocks_1_0_emb_layers_1", "input_blocks.1.0.emb_layers.1.weight"
        after, parts = apply_loras(base, lora, torch.float32).unet[key], load_file(path)
        change = parts[f"{name}.lora_up.weight"] @ parts[f"{name}.lora_down.weight"]
        assert meant[path] is not None, "it must be refused"
        torch.testing.assert_close(after, base.unet[key].float() + meant[path] * change, rtol=1e-4, atol=1e-4)

    base = load_checkpoint(good["single"])
    models = [
        ("load_any", load_any), ("load_any_info", load_any_info), ("describe", lambda path: describe(path, digest=False)),
        ("describe, digests", describe), ("use", used),
    ]  # fmt: skip
    file = [("is_style_file", is_style_file), *models]
    return {
        "single": [("load_checkpoint", load_checkpoint), ("read_info", read_info), *file],
        "style": [
            *file,
            ("read_style_file", read_style_file),
            ("recombine", lambda path: recombine(path, good["single"])),
        ],
        "unet": models,
        "pipeline": [*models, ("model_sha256", model_sha256)],
        "latents": [("load_latents", load_latents), *file],
        "lora": [("apply_loras", lambda path: apply_loras(base, [LoraSpec(str(path), 1.0)])), *file[:2]],
        "lora header": [("right scale", right_scale), ("is_style_file", is_style_file)],
        "fp8 old": [("right fp8", right_fp8), *file],
        "fp8 new": [("right fp8", right_fp8), *file],
        "cache": [("read_manifest", read_manifest)],
    }


def hostile(kind: str, good: Path, target: Path, dice: random.Random) -> None:
    """Put a changed copy of a good file or folder at ``target``."""
    if good.is_dir():
        shutil.copytree(good, target)
        files = sorted(p for p in target.rglob("*") if p.is_file())
        chosen = dice.choice(files)
        target = chosen
    else:
        shutil.copyfile(good, target)
    raw = target.read_bytes()
    meant.pop(target, None)
    if kind == "lora header" and dice.random() < 0.8:
        raw, meant[target] = changed_lora_header(raw, dice)
        target.write_bytes(raw)
        return
    if kind.startswith("fp8") and dice.random() < 0.7:
        target.write_bytes(changed_fp8(raw, dice))
        return
    target.write_bytes(changed_file(raw, dice) if target.suffix == ".safetensors" else changed_config(raw, dice))


class TooSlow(BaseException):
    """No reader catches it."""


def run(folder: Path, seed: int, count: int) -> dict:
    good = make_good(folder / "good")
    tried = readers(good, folder)
    report = {"mutations": 0, "reads": {}, "failures": [], "slowest": ["", 0.0]}
    outcomes = {name: Counter() for kind in tried.values() for name, _ in kind}
    for kind in tried:  # the good ones are read, so that a reader which refuses all does not count as safe
        for name, read in tried[kind]:
            if name not in REFUSES.get(kind, ()):
                read(good[kind])

    def ring(*_):
        raise TooSlow

    signal.signal(signal.SIGALRM, ring)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(seed, seed + count):
        for kind in tried:
            target = folder / ("x.safetensors" if good[kind].is_file() else "x")
            hostile(kind, good[kind], target, random.Random(f"{kind} {number}"))
            report["mutations"] += 1
            for name, read in tried[kind]:
                started = time.monotonic()
                signal.alarm(SECONDS)
                try:
                    read(target)
                    outcome = "accepted"
                except ValueError:
                    outcome = "ValueError"
                except OSError:
                    outcome = "OSError"
                except BaseException as error:
                    outcome = "failed"
                    where = traceback.format_exc().strip().splitlines()
                    report["failures"].append(
                        [f"{kind} {number}", name, type(error).__name__, str(error)[:200], where[-3:]]
                    )
                signal.alarm(0)
                outcomes[name][outcome] += 1
                if (seconds := time.monotonic() - started) > report["slowest"][1]:
                    report["slowest"] = [f"{kind} {number} {name}", round(seconds, 2)]
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    report["grown_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return {**report, "reads": {name: dict(counts) for name, counts in outcomes.items()}}


REFUSES = {
    "style": ["load_any", "load_any_info", "use"],
    "latents": ["load_any", "load_any_info", "describe", "describe, digests", "use"],
    "lora": ["load_any"],
    "pipeline": [],
}
"""Readers that are right to refuse even the good file of a kind."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
