"""Checkpoint files: exact round trips, what other readers see in them, and hostile or damaged input.

Oracles: the safetensors library and a by-hand parse of the header. All comparisons are exact.
"""

import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_dmm.dmm_core import checkpoint as module
from comfyui_dmm.dmm_core import weights_file
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, read_info, save_checkpoint
from comfyui_dmm.dmm_core.files import atomic_write, file_sha256
from comfyui_dmm.dmm_core.metadata import LONGEST, StyleInfo
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig, load_unet
from comfyui_dmm.dmm_core.vocabulary import IDS, NUM_TOKENS, TABLE, compact_vocabulary, expand_vocabulary
from comfyui_dmm.training.files.describe import describe
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

N, D = 3, 128
TINY = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    depth_input=(0, 1),
    depth_middle=1,
    depth_output=(1, 1, 0, 0),
    context_dim=64,
    num_styles=N,
)
STYLES = [
    StyleInfo("ink", "black outlines\non paper", teacher="ink.safetensors", sha256="ab" * 32, licence="CC0"),
    StyleInfo("../../etc/passwd", recommended={"cfg": 7.5, "sampler": "dpmpp_2m"}),
    StyleInfo("<b>水墨</b> {0} %s 🎨", thumbnail="data:image/webp;base64,UklGRg=="),
]


@cache
def built(config: UNetConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {k: v.half() for k, v in UNet(config).state_dict().items()}


def unet_weights(config: UNetConfig = TINY) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in built(config).items()}


def full_checkpoint() -> Checkpoint:
    """Every part filled, in four dtypes, with foreign keys and metadata beside them; the same at every call."""
    unet = unet_weights()
    torch.manual_seed(1)
    return Checkpoint(
        unet=unet,
        text={"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.randn(64, dtype=torch.bfloat16)},
        vae={"decoder.conv_in.bias": torch.randn(8), "fp8": torch.randn(8).to(torch.float8_e4m3fn)},
        styles=list(STYLES),
        recipe={"steps": 10, "losses": {"score": 1.0, "feat": 0.001}, "base": "基"},
        metadata={"modelspec.title": "My model", "modelspec.author": "me", "custom": "kept \u2603"},
        other={"alphas_cumprod": torch.rand(10), "position_ids": torch.arange(77)},
    )


def plain_file(path: Path, metadata: dict[str, str] | None = None, config: UNetConfig = TINY, **tensors) -> Path:
    """A file written by safetensors alone, as another tool would."""
    weights = {f"model.diffusion_model.{k}": v for k, v in unet_weights(config).items()}
    save_file({**weights, **tensors}, path, metadata=metadata)
    return path


def header(path: Path) -> dict:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length])


def bits(tensors: dict[str, torch.Tensor]) -> dict:
    def raw(tensor):
        return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return {k: (v.dtype, tuple(v.shape), raw(v)) for k, v in tensors.items()}


# Round trips


def test_round_trip_is_exact_and_changes_nothing(tmp_path):
    saved, before = full_checkpoint(), full_checkpoint()
    save_checkpoint(tmp_path / "a.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    for part in ("unet", "text", "vae", "other"):
        assert bits(getattr(saved, part)) == bits(getattr(before, part)) == bits(getattr(loaded, part))
    assert saved.metadata == before.metadata and saved.styles == STYLES
    assert loaded.styles == STYLES and loaded.recipe == saved.recipe and loaded.num_styles == N
    assert loaded.metadata.items() >= saved.metadata.items()
    assert (loaded.prediction, loaded.zero_snr) == ("eps", False)
    load_unet(loaded.unet)  # strict

    save_checkpoint(tmp_path / "b.safetensors", loaded)  # a second generation is the same, but for the metadata's order
    assert header(tmp_path / "b.safetensors") == header(tmp_path / "a.safetensors")
    assert bits(load_file(tmp_path / "b.safetensors")) == bits(load_file(tmp_path / "a.safetensors"))


def test_other_readers_see_the_common_layout(tmp_path):
    saved = full_checkpoint()
    save_checkpoint(tmp_path / "a.safetensors", saved, extra={"workflow": "{}"})
    raw = load_file(tmp_path / "a.safetensors")
    assert torch.equal(raw["model.diffusion_model.model_embedding.weight"], saved.unet["model_embedding.weight"])
    assert torch.equal(raw["first_stage_model.decoder.conv_in.bias"], saved.vae["decoder.conv_in.bias"])
    assert len(raw) == len(saved.tensors)
    metadata = header(tmp_path / "a.safetensors")["__metadata__"]
    assert metadata["dmm.format"] == "1" and metadata["workflow"] == "{}"
    assert [s["name"] for s in json.loads(metadata["dmm.styles"])] == [s.name for s in STYLES]
    assert json.loads(metadata["dmm.recipe"]) == saved.recipe
    assert metadata["modelspec.sai_model_spec"] == "1.0.0" and metadata["modelspec.title"] == "My model"
    assert metadata["modelspec.prediction_type"] == "epsilon" and metadata["modelspec.merged_from"] == "ink.safetensors"
    assert all(f"modelspec.{key}" in metadata for key in ("architecture", "implementation", "date"))


@pytest.mark.parametrize(
    "config, prediction, architecture, resolution",
    [
        (UNetConfig(), "eps", "stable-diffusion-v1", "512x512"),
        (UNetConfig(in_channels=9), "eps", "stable-diffusion-v1-inpainting", "512x512"),
        (UNetConfig(context_dim=1024, linear_proj=True), "eps", "stable-diffusion-v2-512", "512x512"),
        (UNetConfig(context_dim=1024, linear_proj=True), "v", "stable-diffusion-v2-768-v", "768x768"),
        (UNetConfig(context_dim=2048, adm_channels=2816), "eps", "stable-diffusion-xl-v1-base", "1024x1024"),
        (TINY, "eps", "stable-diffusion-custom", None),
    ],
)
def test_modelspec_names_the_architecture(config, prediction, architecture, resolution):
    from comfyui_dmm.dmm_core.metadata import write_metadata

    metadata = write_metadata([], {}, prediction, rest={"modelspec.hash_sha256": "0xold"}, config=config, title="title")
    assert metadata["modelspec.architecture"] == architecture
    assert metadata.get("modelspec.resolution") == resolution
    assert "modelspec.hash_sha256" not in metadata  # the digest of other weights


def test_authors_file_gets_numbered_styles_and_plain_files_none(tmp_path):
    assert [s.name for s in load_checkpoint(plain_file(tmp_path / "dmm.safetensors")).styles] == [
        "style 0",
        "style 1",
        "style 2",
    ]
    plain = load_checkpoint(plain_file(tmp_path / "plain.safetensors", config=replace(TINY, num_styles=0)))
    assert plain.num_styles == 0 and plain.styles == []


def test_unet_only_file_without_prefix(tmp_path):
    save_file({**unet_weights(), "v_pred": torch.empty(0)}, tmp_path / "unet.safetensors")
    loaded = load_checkpoint(tmp_path / "unet.safetensors")
    assert bits(loaded.unet) == bits(unet_weights()) and loaded.other == {} and loaded.prediction == "v"


def test_sdxl_text_keys_and_style_mlp(tmp_path):
    config = replace(TINY, adm_channels=48, style_mlp="add_embedding2")
    text = {"conditioner.embedders.1.model.logit_scale": torch.ones(())}
    loaded = load_checkpoint(plain_file(tmp_path / "xl.safetensors", config=config, **text))
    assert loaded.text.keys() == text.keys() and loaded.num_styles == N
    assert "add_embedding2.linear_1.weight" in loaded.unet


def test_read_info_reads_no_weights(tmp_path, monkeypatch):
    """The weights' bytes are taken out of the file: the header must do."""
    touched = []

    @contextmanager
    def watched(path, framework):
        with safe_open(path, framework) as f:
            get = lambda key: touched.append(key) or f.get_tensor(key)  # noqa: E731
            yield SimpleNamespace(metadata=f.metadata, keys=f.keys, get_slice=f.get_slice, get_tensor=get)

    monkeypatch.setattr(weights_file, "safe_open", watched)
    save_checkpoint(tmp_path / "a.safetensors", full_checkpoint())
    whole = load_checkpoint(tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    with open(tmp_path / "hollow.safetensors", "wb") as file:
        file.write(raw[: 8 + length])
        file.truncate(len(raw))  # zeros, as a sparse hole
    touched.clear()
    info = read_info(tmp_path / "hollow.safetensors")
    assert touched == []
    assert info.styles == whole.styles and info.recipe == whole.recipe and info.num_styles == N
    assert info.shapes == {k: tuple(v.shape) for k, v in load_file(tmp_path / "a.safetensors").items()}
    assert {k: v.dtype for k, v in info.tensors.items()} == {k: v.dtype for k, v in whole.tensors.items()}
    assert all(tensor.is_meta for tensor in info.tensors.values())


# Prediction


@pytest.mark.parametrize(
    "metadata, marks, expected",
    [
        ({}, (), ("eps", False)),
        ({}, ("v_pred",), ("v", False)),
        ({}, ("v_pred", "ztsnr"), ("v", True)),
        ({"modelspec.predict_key": "v"}, (), ("v", False)),
        ({"modelspec.prediction_type": "v"}, (), ("v", False)),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), ("v", False)),
        ({"modelspec.predict_key": "epsilon"}, ("v_pred",), ("v", False)),  # as the host decides it
        ({"dmm.prediction": "eps"}, ("v_pred",), ("eps", False)),
    ],
)
def test_prediction_is_found(tmp_path, metadata, marks, expected):
    path = plain_file(tmp_path / "a.safetensors", metadata, **{mark: torch.empty(0) for mark in marks})
    loaded = load_checkpoint(path)
    assert (loaded.prediction, loaded.zero_snr) == expected
    assert not loaded.other.keys() & {"v_pred", "ztsnr"}
    save_checkpoint(tmp_path / "b.safetensors", loaded)
    again = load_checkpoint(tmp_path / "b.safetensors")
    assert (again.prediction, again.zero_snr) == expected
    assert ("v_pred" in load_file(tmp_path / "b.safetensors")) == (expected[0] == "v")


def test_sd2_prediction_shows_in_one_bias():
    bias = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    unet = {
        "input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        bias.replace("norm1.bias", "attn2.to_k.weight"): torch.zeros(320, 1024),
    }
    wide = torch.tensor([-0.1, 0.1]).repeat(160)  # standard deviation 0.1, the border is at 0.09
    assert module._sd2_prediction({**unet, bias: wide}) == "v"
    assert module._sd2_prediction({**unet, bias: 0.8 * wide}) == "eps"
    assert module._sd2_prediction({**unet, "input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3), bias: wide}) == "eps"


# Compact vocabulary


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_vocabulary_round_trip(tmp_path, dtype):
    torch.manual_seed(1)
    table = torch.randn(1, 16).repeat(NUM_TOKENS, 1)
    table[:, 0] = 0.0
    ids = torch.randperm(NUM_TOKENS)[:50]
    table[ids] = torch.randn(50, 16)
    table[7, 0] = -0.0  # differs from the common row by one sign bit only
    table = table.to(dtype)
    saved = full_checkpoint()
    saved.text[TABLE] = table
    save_checkpoint(tmp_path / "a.safetensors", saved)
    raw = load_file(tmp_path / "a.safetensors")
    rows = sorted({7, *ids.tolist()})
    assert raw[IDS].dtype == torch.int32 and raw[IDS].tolist() == rows
    assert raw[TABLE].shape == (len(rows) + 1, 16)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert IDS not in loaded.text and bits({"": loaded.text[TABLE]}) == bits({"": table})
    assert read_info(tmp_path / "a.safetensors").text[TABLE].shape == table.shape


def test_ordinary_vocabularies_are_stored_as_they_are():
    for table in (torch.randn(NUM_TOKENS, 4), torch.zeros(100, 4)):
        assert compact_vocabulary({TABLE: table})[TABLE] is table


@settings(max_examples=10, deadline=None)
@given(st.dictionaries(st.integers(0, NUM_TOKENS - 1), st.floats(width=32, allow_nan=False), max_size=8))
def test_vocabulary_is_lossless_for_any_rows(rows):
    table = torch.full((NUM_TOKENS, 2), 0.5)
    for row, value in rows.items():
        table[row] = torch.tensor([0.5, value])
    compacted = compact_vocabulary({TABLE: table, "other": torch.ones(1)})
    assert compacted[IDS].tolist() == sorted(row for row, value in rows.items() if value != 0.5)
    assert torch.equal(expand_vocabulary(compacted)[TABLE].view(torch.int32), table.view(torch.int32))


@pytest.mark.parametrize(
    "ids, table, message",
    [
        (torch.tensor([0, 1]), torch.zeros(2, 4), "damaged"),
        (torch.tensor([0, NUM_TOKENS]), torch.zeros(3, 4), "different ids"),
        (torch.tensor([-1]), torch.zeros(2, 4), "different ids"),
        (torch.tensor([5, 5]), torch.zeros(3, 4), "different ids"),
        (torch.tensor([[1]]), torch.zeros(2, 4), "damaged"),
        (torch.tensor([1.5]), torch.zeros(2, 4), "damaged"),
        (torch.tensor([1]), torch.zeros(2), "damaged"),
        (torch.tensor([], dtype=torch.int32), torch.zeros(0, 4), "damaged"),
        (torch.tensor([], dtype=torch.int32), torch.zeros(1, 5_000_000), "at most"),
    ],
)
def test_damaged_vocabulary_is_refused(tmp_path, ids, table, message):
    path = plain_file(tmp_path / "bad.safetensors", **{IDS: ids, TABLE: table})
    for read in (load_checkpoint, read_info):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert "bad.safetensors" in str(error.value)


# What safetensors itself refuses


def test_shared_and_strided_tensors_are_saved(tmp_path):
    saved = full_checkpoint()
    base = torch.randn(64, 64)
    views = {"a": base, "b": base, "c": base.T, "d": base[1:], "e": base[:, ::2], "f": torch.nn.Parameter(base[3])}
    saved.vae.update(views)
    save_checkpoint(tmp_path / "a.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded.vae[k], v) for k, v in views.items())
    assert saved.vae["c"].data_ptr() == base.data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e5m2])
def test_non_finite_weights_are_not_saved(tmp_path, value, dtype):
    saved = full_checkpoint()
    saved.vae["decoder.conv_out.bias"] = torch.tensor([0.0, value]).to(dtype)
    with pytest.raises(ValueError, match="first_stage_model.decoder.conv_out.bias.*NaN or infinity"):
        save_checkpoint(tmp_path / "a.safetensors", saved)
    assert not any(tmp_path.iterdir())


# Hostile files


def bad_file(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "bad.safetensors"
    good = plain_file(tmp_path / "good.safetensors").read_bytes()
    if kind == "torch zip":
        torch.save({"a": torch.ones(2)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Tripwire(tmp_path / "fired")))
    elif kind == "folder":
        path.mkdir()
    elif kind == "nested header":
        path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    elif kind != "missing":
        path.write_bytes({
            "empty": b"",
            "five bytes": b"abcde",
            "text": b"just some text, not a model at all",
            "web page": b"\n<!DOCTYPE html><html>please log in</html>",
            "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "cut header": good[:1000],
            "cut data": good[:-1000],
            "long header": struct.pack("<Q", 2**63) + good[8:],
            "short header": struct.pack("<Q", 10) + good[8:],
            "extra bytes": good + b"xx",
            "unknown dtype": good.replace(b'"F16"', b'"F99"'),
        }[kind])  # fmt: skip
    return path


class Tripwire:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("torch zip", "is a pickle.*get the .safetensors version"),
        ("pickle", "is a pickle.*get the .safetensors version"),
        ("folder", "is a folder"),
        ("missing", "does not exist"),
        ("empty", "is empty: download"),
        ("five bytes", "not a safetensors file"),
        ("text", "not a safetensors file"),
        ("web page", "is a web page.*download it again"),
        ("git lfs", "Git LFS pointer"),
        ("cut header", r"cut off inside its header \(1000 bytes\)"),
        ("cut data", r"cut off: \d+ of \d+ bytes"),
        ("long header", "not a safetensors file"),
        ("short header", "damaged"),
        ("extra bytes", "damaged"),
        ("unknown dtype", "damaged"),
        ("nested header", "damaged"),
    ],
)
def test_files_that_are_not_checkpoints(tmp_path, kind, message):
    path = bad_file(tmp_path, kind)
    for read in (load_checkpoint, read_info, *([describe] if kind != "folder" else [])):  # it describes folders
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert "bad.safetensors" in str(error.value)
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize(
    "keys, message",
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "looks like a LoRA"),
        (["control_model.zero_convs.0.0.weight"], "looks like a ControlNet"),
        (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "model_embedding.weight"], "dmm convert"),
        (["first_stage_model.decoder.conv_in.weight"], "looks like a VAE"),
        (["double_blocks.0.img_attn.qkv.weight"], "another architecture"),
        (["something"], "choose a Stable Diffusion"),
    ],
)
def test_other_models_are_told_apart(tmp_path, keys, message):
    save_file({key: torch.ones(1) for key in keys}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=f"bad.safetensors: no Stable Diffusion UNet in it.*{message}"):
        load_checkpoint(tmp_path / "bad.safetensors")


def test_edm_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="EDM model"):
        load_checkpoint(plain_file(tmp_path / "a.safetensors", **{"edm_vpred.sigma_max": torch.tensor(120.0)}))


def names(*values) -> str:
    return json.dumps([{"name": value} for value in values])


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"dmm.styles": "not json"}, "'dmm.styles' is not valid JSON"),
        ({"dmm.styles": "[" * 100_000}, "'dmm.styles' is not valid JSON"),
        ({"dmm.styles": '{"name": "a"}'}, "JSON dict, expected a list"),
        ({"dmm.styles": "3"}, "JSON int, expected a list"),
        ({"dmm.styles": names("a", "b")}, "names 2 styles but the weights hold 3"),
        ({"dmm.styles": names("a", "b", "c", "d")}, "names 4 styles but the weights hold 3"),
        ({"dmm.styles": names("a", "b", "a")}, r"\['a'\] appear more than once"),
        ({"dmm.styles": names("a", "b", 5)}, "entry 2: a style's name is int, expected text"),
        ({"dmm.styles": names("a", "b", None)}, "entry 2: a style's name is NoneType"),
        ({"dmm.styles": names("a", " ", "c")}, "entry 1: a style has an empty name"),
        ({"dmm.styles": names("a", "b", "x" * 1_000_000)}, "1000000 characters, at most 100"),
        ({"dmm.styles": names("a", "b\x1b[2J", "c")}, r"control character '\\x1b'"),
        ({"dmm.styles": names("a", "b\ud800", "c")}, "control character"),
        ({"dmm.styles": '["a", "b", "c"]'}, "entry 0 is not a style"),
        ({"dmm.styles": '[{"name": "a", "thumbnail": "data:image/svg+xml;base64,AAAA"}]'}, "JPEG or WebP"),
        ({"dmm.styles": '[{"name": "a", "thumbnail": "https://example.org/a.jpg"}]'}, "JPEG or WebP"),
        ({"dmm.styles": '[{"name": "a", "sha256": "../x"}]'}, "hexadecimal"),
        ({"dmm.styles": '[{"name": "a", "recommended": [1]}]'}, "not a dictionary"),
        ({"dmm.recipe": "[]"}, "'dmm.recipe' is a JSON list, expected a dict"),
        ({"dmm.recipe": '{"a": ' + "[" * 100 + "]" * 100 + "}"}, "nested deeper"),
        ({"dmm.format": "4"}, "has DMM format 4, .* reads up to 3: update comfyui-dmm"),
        ({"dmm.format": "4", "dmm.styles": "a new syntax"}, "update comfyui-dmm"),
        ({"dmm.format": "-1"}, "not a version number"),
        ({"dmm.format": "9" * 5000}, "not a version number"),
        ({"dmm.prediction": "x0"}, "expected 'eps' or 'v'"),
    ],
)
def test_hostile_metadata(tmp_path, metadata, message):
    path = plain_file(tmp_path / "bad.safetensors", metadata)
    for read in (load_checkpoint, read_info):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert "bad.safetensors" in str(error.value) and len(str(error.value)) < 1000


def test_unknown_style_fields_of_a_later_minor_version_are_ignored(tmp_path):
    entries = [{"name": n, "added later": 1} for n in "abc"]
    path = plain_file(tmp_path / "a.safetensors", {"dmm.styles": json.dumps(entries)})
    assert [s.name for s in load_checkpoint(path).styles] == list("abc")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"add_embedding.linear_1.bias": None}, r"missing \['add_embedding.linear_1.bias'\]"),
        ({"model_embedding.weight": None}, "without a codebook"),
        ({"model_embedding.weight": torch.zeros(0, D)}, "without a codebook"),
        ({"model_embedding.weight": torch.zeros(D)}, "without a codebook"),
        ({"model_embedding.weight": torch.zeros(N, 64)}, r"'model_embedding.weight' has shape \(3, 64\), expected \(3"),
        ({"add_embedding.linear_2.weight": torch.zeros(D, 64)}, r"'add_embedding.linear_2.weight' has shape \(128"),
        ({"add_embedding2.linear_1.weight": torch.zeros(D, D)}, "two style MLPs"),
        ({"add_embedding.linear_3.weight": torch.zeros(D, D)}, r"unexpected \['add_embedding.linear_3.weight'\]"),
    ],
)
def test_inconsistent_style_weights(tmp_path, change, message):
    unet = {k: v for k, v in {**unet_weights(), **change}.items() if v is not None}
    save_file({f"model.diffusion_model.{k}": v for k, v in unet.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "a.safetensors", Checkpoint(unet=unet))


# Saving what must not be saved, and saving that fails


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.styles.pop(), "names 2 styles but the weights hold 3"),
        (lambda c: c.styles.__setitem__(0, STYLES[1]), "appear more than once"),
        (lambda c: c.recipe.update(loss=float("nan")), "dmm.recipe cannot be written as JSON"),
        (lambda c: c.recipe.update(path=Path("x")), "dmm.recipe cannot be written as JSON"),
        (lambda c: c.metadata.update(steps=5), "'steps' is int: safetensors stores strings only"),
        (lambda c: setattr(c, "prediction", "epsilon"), "'epsilon', expected 'eps' or 'v'"),
        (lambda c: c.unet.pop("input_blocks.0.0.weight"), "'input_blocks.0.0.weight' is missing"),
    ],
)
def test_inconsistent_checkpoints_are_not_saved(tmp_path, change, message):
    saved = full_checkpoint()
    change(saved)
    with pytest.raises(ValueError, match=f"a.safetensors was not saved: .*{message}"):
        save_checkpoint(tmp_path / "a.safetensors", saved)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["name", "description", "teacher", "licence"])
def test_too_long_texts_are_refused(key):
    StyleInfo(**{"name": "a", key: "x" * LONGEST[key]})
    with pytest.raises(ValueError, match=f"a style's {key} has {LONGEST[key] + 1} characters"):
        StyleInfo(**{"name": "a", key: "x" * (LONGEST[key] + 1)})


def test_save_needs_a_file_in_a_folder(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in [
        ("folder.safetensors", "is a folder"),
        ("no/a.safetensors", "does not exist"),
        ("a.ckpt", "must end in .safetensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_checkpoint(tmp_path / name, full_checkpoint())
    assert [p.name for p in tmp_path.iterdir()] == ["folder.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="file modes and links")
def test_file_mode_and_links(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "store" / "real.safetensors")
    (tmp_path / "ordinary").touch()
    save_checkpoint(tmp_path / "link.safetensors", full_checkpoint())
    assert (tmp_path / "link.safetensors").is_symlink()
    mode = (tmp_path / "store" / "real.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_saving_over_the_file_that_is_loaded(tmp_path):
    path = plain_file(tmp_path / "a.safetensors")
    loaded = load_checkpoint(path)
    loaded.styles, before = STYLES, path.read_bytes()
    with path.open("rb") as reader:  # such as another ComfyUI that has the file mapped into memory
        save_checkpoint(path, loaded)
        assert os.name != "posix" or reader.read() == before
    assert load_checkpoint(path).styles == STYLES and bits(load_checkpoint(path).unet) == bits(unet_weights())


def test_a_write_cut_short_by_the_system_keeps_the_old_file(tmp_path):
    resource = pytest.importorskip("resource", reason="needs POSIX resource limits")
    path = plain_file(tmp_path / "a.safetensors")
    before, checkpoint = path.read_bytes(), full_checkpoint()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match="a.safetensors could not be written .*File too large.*untouched"):
            save_checkpoint(path, checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    save_checkpoint(path, checkpoint)  # and without the limit the same save works
    assert load_checkpoint(path).recipe == checkpoint.recipe


def test_a_full_disk_keeps_the_old_file(tmp_path):
    """A real disk with room for one and a half files; needs the right to mount one."""
    disk, size = tmp_path / "disk", plain_file(tmp_path / "a.safetensors").stat().st_size
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(disk)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        path = Path(shutil.copy(tmp_path / "a.safetensors", disk))
        before = path.read_bytes()
        with pytest.raises(OSError, match="No space left.*untouched"):
            save_checkpoint(path, full_checkpoint())
        assert path.read_bytes() == before and list(disk.iterdir()) == [path]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_error_that_only_shows_when_syncing_keeps_the_old_file(tmp_path, monkeypatch):
    """Network disks report a full disk at fsync, after every write has succeeded."""
    path = plain_file(tmp_path / "a.safetensors")
    before, checkpoint = path.read_bytes(), full_checkpoint()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*untouched"):
        save_checkpoint(path, checkpoint)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# dmm info


def test_describe(tmp_path):
    saved = full_checkpoint()
    saved.metadata["note"] = "\x1b[31mred\x07 " + "x" * 5000
    save_checkpoint(tmp_path / "a.safetensors", saved)
    report = describe(tmp_path / "a.safetensors")
    lines = report.split("\n")
    for text in ("DMM checkpoint, 3 styles", "ink.safetensors", "../../etc/passwd", "cfg 7.5", "losses.feat: 0.001"):
        assert text in report
    assert f"{sum(v.numel() for v in saved.unet.values()) / 1e6:.2f} M parameters, float16" in report
    assert file_sha256(tmp_path / "a.safetensors") in report
    assert "      black outlines on paper" in lines
    assert "\x1b" not in report and "\x07" not in report and max(map(len, lines)) < 500
    assert "sha256  " not in describe(tmp_path / "a.safetensors", digest=False)


def test_describe_plain(tmp_path):
    path = plain_file(tmp_path / "a.safetensors", {"format": "pt"}, config=replace(TINY, num_styles=0))
    report = describe(path)
    assert "plain checkpoint, no styles" in report and "not in this file" in report and "\nstyles" not in report


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, example B.1
    assert file_sha256(tmp_path / "abc") == known
