"""Files that are small on disk and ask for much, or declare what cannot be: each was a crash, a hang or a blow-up of memory once."""

import json
import os
import struct
import time
from dataclasses import replace

import pytest
import torch
from comfyui_dmm.dmm_core import weights_file
from comfyui_dmm.dmm_core.checkpoint import (
    MAX_STYLES,
    Checkpoint,
    load_checkpoint,
    read_checkpoint,
    read_info,
    save_checkpoint,
)
from comfyui_dmm.dmm_core.metadata import StyleInfo, check_styles, default_styles
from comfyui_dmm.dmm_core.unet import MAX_LAYERS, unet_config_from_state_dict
from comfyui_dmm.dmm_core.vocabulary import IDS, MAX_WIDTH, NUM_TOKENS, TABLE, expand_vocabulary
from comfyui_dmm.dmm_core.weights_file import read_keys, read_weights, write_weights
from safetensors.torch import load_file, save_file

from .test_checkpoint import N, full_checkpoint, plain_file, unet_weights

PREFIX = "model.diffusion_model."
READERS = (load_checkpoint, read_info)


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def declared(path, changes: dict[str, tuple[str, list[int]]]):
    """A DMM file of which some tensors are declared otherwise, with offsets and (zero) data that fit."""
    header, end = {}, 0
    sizes = {PREFIX + k: ("F16", list(v.shape)) for k, v in unet_weights().items()}
    for key, (dtype, shape) in {**sizes, **{PREFIX + k: v for k, v in changes.items()}}.items():
        size = torch.Size(shape).numel() * (
            4 if dtype in ("F32", "I32") else 1 if dtype in ("I8", "BOOL", "F8_E4M3") else 2
        )
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return raw_file(path, header, bytes(end))


@pytest.mark.parametrize(
    "changes, message",
    [
        # No data at all, and a thousand million styles.
        ({"model_embedding.weight": ("F16", [10**9, 0])}, "without a codebook"),
        ({"model_embedding.weight": ("F16", [10**9, 0]), "time_embed.2.weight": ("F16", [0, 0])}, "without a codebook"),
        ({"model_embedding.weight": ("F16", [MAX_STYLES + 1, 128])}, f"declares {MAX_STYLES + 1} styles"),
        ({"input_blocks.0.0.weight": ("F16", [0, 4, 3, 3])}, r"'input_blocks.0.0.weight' has shape \(0, 4, 3, 3\)"),
        ({"input_blocks.0.0.weight": ("F16", [32])}, r"has shape \(32,\)"),
        ({"input_blocks.0.0.weight": ("F16", [64, 4, 3, 3])}, r"time_embed.0.weight' has shape .*expected \(256, 64\)"),
        ({"out.2.weight": ("F16", [])}, r"'out.2.weight' has shape \(\)"),
        ({"input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight": ("F16", [64])}, r"to_k.weight' has shape \(64,\)"),
        ({"input_blocks.3.1.proj_in.weight": ("F16", [8])}, r"proj_in.weight' has shape \(8,\)"),
        ({"label_emb.0.0.weight": ("F16", [8])}, r"label_emb.0.0.weight' has shape \(8,\)"),
        ({"input_blocks.1.0.out_layers.3.weight": ("F16", [8])}, r"out_layers.3.weight' has shape \(8,\)"),
        ({"out.0.bias": ("I32", [32])}, "'out.0.bias' of the UNet is int32: get the model in half precision"),
        ({"out.0.bias": ("BOOL", [32])}, "'out.0.bias' of the UNet is bool"),
        ({"model_embedding.weight": ("I8", [3, 128])}, "model_embedding.weight' of the UNet is int8"),
    ],
)
def test_declared_sizes_and_dtypes(tmp_path, changes, message):
    path = declared(tmp_path / "bad.safetensors", changes)
    for read in READERS:
        with pytest.raises(ValueError, match=f"bad.safetensors:? .*({message})"):
            read(path)


def test_float8_weights_are_read(tmp_path):
    path = declared(tmp_path / "a.safetensors", {"out.0.bias": ("F8_E4M3", [32])})
    assert all(read(path).unet["out.0.bias"].dtype == torch.float8_e4m3fn for read in READERS)


ENTRY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": {"dtype": "F16", "shape": [2**63, 0], "data_offsets": [0, 0]}}, "sizes over"),
        ({"a": {"dtype": "F16", "shape": [0, 2**41], "data_offsets": [0, 0]}}, "sizes over"),
        ({"a": {"dtype": "F16", "shape": [0] + [1] * 99, "data_offsets": [0, 0]}}, "100 dimensions"),
        # The second words are of a safetensors that does not know the type itself: before 0.7 and 0.6.
        ({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, "of dtype C64|is a damaged"),
        ({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, "of dtype F4|is a damaged"),
        (b"{" + b",".join(b'"%d":%s' % (i, ENTRY) for i in range(20_001)) + b"}", "declares 20001 tensors"),
        (b"{" + b",".join(b'"%d":%s' % (i, ENTRY) for i in range(300_001)) + b"}", "more than 300000 tensors"),
        (b'{"' + b"." * 501 + b'":' + ENTRY + b"}", "more than 500 characters"),
        ({"__metadata__": {"a": "x" * 2**25}}, r"its header has \d+ bytes"),
    ],
)
def test_absurd_headers(tmp_path, header, message):
    data = bytes(8) if not isinstance(header, bytes) and header.get("a", {}).get("data_offsets") == [0, 8] else b""
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    started = time.monotonic()
    for read in (load_checkpoint, read_info, read_weights):
        with pytest.raises(ValueError, match=f"bad.safetensors:? .*({message})") as error:
            read(path)
        assert len(str(error.value)) < 1000
    assert time.monotonic() - started < 10


def test_a_deep_unet_is_refused_before_it_is_built(tmp_path):
    block = "input_blocks.3.1.transformer_blocks.{}.norm1.weight"
    unet = {**unet_weights(), **{block.format(i): torch.empty(0) for i in range(MAX_LAYERS + 1)}}
    with pytest.raises(ValueError, match=f"more than {MAX_LAYERS} transformer layers"):
        unet_config_from_state_dict(unet)


def test_a_file_with_a_hole_of_a_hundred_gigabytes_is_described_and_not_read(tmp_path):
    """A sparse file: its size is real to the library, its blocks are not there."""
    path, size = plain_file(tmp_path / "a.safetensors"), 10**11
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    end = len(raw) - 8 - length
    # Its values would decide between eps and v, its shape says that it does not.
    bias = PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    header[bias] = {"dtype": "F16", "shape": [size // 2], "data_offsets": [end, end + size]}
    header[bias.replace("norm1.bias", "attn2.to_k.weight")] = {
        "dtype": "F16", "shape": [0, 1024], "data_offsets": [end + size, end + size],
    }  # fmt: skip
    raw_file(path, header, raw[8 + length :])
    try:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + size)
    except OSError:
        pytest.skip("no sparse files of this size here")
    info = read_info(path)
    assert (info.num_styles, info.prediction) == (N, "eps")
    assert info.unet[bias.removeprefix(PREFIX)].shape == (size // 2,)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    for read in (load_checkpoint, read_info, read_keys):
        with pytest.raises(ValueError, match="a.safetensors is not a file"):
            read(tmp_path / "a.safetensors")


# Metadata


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"dmm.styles": "[" + "[]," * 1_000_000 + "[]]"}, "more than 1000000 values"),
        ({"dmm.recipe": json.dumps({"a": [0] * 1_000_001})}, "more than 1000000 values"),
        (
            {"dmm.styles": json.dumps([{"name": str(i)} for i in range(100_000)])},
            "names 100000 styles but the weights hold 3",
        ),
    ],
)
def test_long_json(tmp_path, metadata, message):
    path = plain_file(tmp_path / "bad.safetensors", metadata)
    for read in READERS:
        with pytest.raises(ValueError, match=f"bad.safetensors:? .*({message})"):
            read(path)


def test_numbers_that_json_does_not_have_can_be_saved_again(tmp_path):
    recipe = '{"a": 1e999, "b": [NaN, -Infinity, 2.5], "c": -1e999}'
    loaded = load_checkpoint(plain_file(tmp_path / "a.safetensors", {"dmm.recipe": recipe}))
    assert loaded.recipe == {"a": None, "b": [None, None, 2.5], "c": None}
    save_checkpoint(tmp_path / "b.safetensors", loaded)
    assert load_checkpoint(tmp_path / "b.safetensors").recipe == loaded.recipe


def test_what_could_not_be_read_back_is_not_saved(tmp_path):
    picture = "data:image/jpeg;base64," + "A" * 199_000
    with pytest.raises(ValueError, match="a.safetensors was not saved: its metadata have .* bytes"):
        write_weights(tmp_path / "a.safetensors", {}, {str(i): picture for i in range(170)})
    saved = replace(full_checkpoint(), recipe={"a": [0] * 1_000_001})
    with pytest.raises(ValueError, match="a.safetensors was not saved: .*more than 1000000 values"):
        save_checkpoint(tmp_path / "a.safetensors", saved)
    assert not any(tmp_path.iterdir())


def test_a_header_just_below_the_limit_is_written_and_read(tmp_path):
    text = "é" * (weights_file.HEADER_LIMIT // 2 - 1000)  # two bytes each
    write_weights(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {"text": text})
    assert read_weights(tmp_path / "a.safetensors")[1] == {"text": text}


def test_thousands_of_styles_are_compared_in_time():
    styles, started = default_styles(MAX_STYLES), time.monotonic()
    check_styles(styles, MAX_STYLES)
    with pytest.raises(ValueError, match="appear more than once"):
        check_styles([*styles[:-1], StyleInfo("style 7")], MAX_STYLES)
    assert time.monotonic() - started < 1


# The compact token table


def test_a_token_table_is_not_made_to_tell_its_size(tmp_path):
    tensors = {IDS: torch.tensor([3], dtype=torch.int32), TABLE: torch.randn(2, MAX_WIDTH)}
    info = read_checkpoint(plain_file(tmp_path / "a.safetensors", **tensors), header_only=True)
    assert info.text[TABLE].is_meta and info.text[TABLE].shape == (NUM_TOKENS, MAX_WIDTH)


def test_more_tokens_than_clip_has():
    count = NUM_TOKENS + 1
    with pytest.raises(ValueError, match=f"{count} ids"):
        expand_vocabulary({IDS: torch.arange(count), TABLE: torch.zeros(count + 1, 2)})


# Writing


def test_written_as_it_was(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.ones(2, dtype=torch.bool)}
    write_weights(tmp_path / "a.safetensors", tensors, {"x": "y"})
    read, metadata = read_weights(tmp_path / "a.safetensors")
    assert metadata == {"x": "y"} and read.keys() == tensors.keys() == load_file(tmp_path / "a.safetensors").keys()
    assert all(torch.equal(read[k], v) for k, v in tensors.items())


def test_what_is_not_asked_for_stays_on_disk(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(3, dtype=torch.int8)}, tmp_path / "a.safetensors")
    read, _ = read_weights(tmp_path / "a.safetensors", lambda key, shape: shape == (2,))
    assert torch.equal(read["a"], torch.ones(2)) and read["b"].is_meta
    assert (read["b"].shape, read["b"].dtype) == ((3,), torch.int8)


def test_a_checkpoint_of_most_styles_is_read(tmp_path):
    unet = {**unet_weights(), "model_embedding.weight": torch.zeros(MAX_STYLES, 128).half()}
    save_checkpoint(tmp_path / "a.safetensors", Checkpoint(unet=unet))
    assert read_info(tmp_path / "a.safetensors").styles == default_styles(MAX_STYLES)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 33), (64, 65)])
def test_finite_is_what_isfinite_says(dtype, shape):
    """At every kind of place and for every value that is not finite, also several at once; the largest finite ones are finite."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(shape, generator=generator)
    assert weights_file.is_finite(numbers.to(dtype))
    most = torch.finfo(dtype).max
    assert weights_file.is_finite(torch.full(shape, most, dtype=torch.float64).to(dtype))
    values = (
        [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), -float("inf")]
    )  # it has no infinity
    for value in values:
        for place in {0, numbers.numel() // 2, numbers.numel() - 1}:
            for other in (None, *values):
                damaged = numbers.flatten().clone()
                damaged[place] = value
                if other is not None:
                    damaged[0] = other
                damaged = damaged.view(shape).to(dtype)
                assert not damaged.float().isfinite().all()
                assert not weights_file.is_finite(damaged), (value, place, other)


def test_integers_and_nothing_are_finite():
    assert weights_file.is_finite(torch.tensor([1, 2])) and weights_file.is_finite(torch.empty(0, 3))
