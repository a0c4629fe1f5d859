"""Every reader on changed copies of good files (``hostile.py``): a value, a ValueError or an OSError, in time and memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_dmm.training.data.batches import load_latents
from comfyui_dmm.training.files.clip_layout import to_open_clip
from comfyui_dmm.training.files.model_files import CONFIG, load_any, load_any_info
from comfyui_dmm.training.files.style_file import read_style_file
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limits of memory")
KINDS = 10
GROWTH = 900
"""MB that the largest reads may need: the longest list of a million values, and the headers with 400,000 tensors."""


def mutate(folder: Path, seed: int, count: int) -> dict:
    """``count`` changes of each kind of file; the report of ``hostile.py``."""
    program = [sys.executable, str(Path(__file__).with_name("hostile.py")), str(folder), str(seed), str(count)]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({key: value for key, value in report.items() if key != "failures"}, indent=1))
    return report


def check(report: dict, count: int) -> None:
    assert report["failures"] == []
    assert report["mutations"] == KINDS * count
    assert report["grown_mb"] < GROWTH, report
    for name, outcomes in report["reads"].items():  # neither all of them refused nor all accepted
        if name != "model_sha256":
            assert {"accepted", "ValueError"} <= outcomes.keys(), (name, outcomes)


def test_hundreds_of_changes(tmp_path):
    check(mutate(tmp_path, 0, 50), 50)


@pytest.mark.slow
def test_thousands_of_changes(tmp_path):
    check(mutate(tmp_path, 10_000, 600), 600)


# What they found, each on its own


def words() -> dict[str, torch.Tensor]:
    layer = "encoder.layers.0.self_attn."
    return {
        "embeddings.position_embedding.weight": torch.zeros(7, 8),
        "embeddings.token_embedding.weight": torch.zeros(9, 8),
        "final_layer_norm.weight": torch.zeros(8),
        "final_layer_norm.bias": torch.zeros(8),
        **{f"{layer}{part}_proj.weight": torch.zeros(8, 8) for part in "qkv"},
    }


@pytest.mark.parametrize(
    "change",
    [
        {"encoder.layers.0.self_attn.k_proj.weight": torch.zeros(8, 7)},
        {"encoder.layers.0.self_attn.v_proj.weight": torch.zeros(8)},
        {"encoder.layers.0.self_attn.v_proj.weight": torch.zeros(8, 8, dtype=torch.int8)},
        {f"encoder.layers.0.self_attn.{part}_proj.weight": torch.tensor(0.0) for part in "qkv"},
    ],
)
def test_query_key_and_value_that_cannot_be_joined(change):
    assert to_open_clip(words())["transformer.resblocks.0.attn.in_proj_weight"].shape == (24, 8)
    with pytest.raises(ValueError, match="do not fit together"):
        to_open_clip({**words(), **change})


def test_a_projection_of_another_shape_is_no_text_encoder():
    with pytest.raises(ValueError, match="key 'text_projection.weight'"):
        to_open_clip({**words(), "text_projection.weight": torch.zeros(2, 2, 2)})


@pytest.mark.parametrize("captions", ["[" * 100_000, "{", "[1]"])
def test_captions_that_are_none(tmp_path, captions):
    save_file({"latents": torch.zeros(1, 4, 2, 2)}, tmp_path / "a.safetensors", {"captions": captions})
    with pytest.raises(ValueError, match="a.safetensors"):
        load_latents(tmp_path / "a.safetensors")


def test_a_style_file_of_nothing(tmp_path):
    save_file({"model_embedding.weight": torch.zeros(10**9, 0)}, tmp_path / "a.safetensors")
    for header_only in (True, False):
        with pytest.raises(ValueError, match="a.safetensors: no codebook"):
            read_style_file(tmp_path / "a.safetensors", header_only)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_config_that_is_a_pipe_is_not_waited_for(tmp_path):
    for name in ("unet", "text_encoder"):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / name / "model.safetensors")
    os.mkfifo(tmp_path / "text_encoder" / CONFIG)
    for read in (load_any, load_any_info):
        with pytest.raises(ValueError, match="text_encoder/config.json does not exist"):
            read(tmp_path)
