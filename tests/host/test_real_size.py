"""The whole way at Stable Diffusion 1.5's real size with random weights: cache, distil, paint, load in ComfyUI.

Minutes, some 9 GB of memory and of disk."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.dmm_core.vae import AutoencoderKL, VAEConfig
from comfyui_dmm.tests.benches.start import make_files
from PIL import Image

from .sampling import conditioning, watch

PIXELS = 256


def dmm(*arguments) -> str:
    """A command of its own process, so that its memory is free again afterwards."""
    command = [sys.executable, "-m", "comfyui_dmm.training.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    make_files(folder, 2, PIXELS // 8)
    torch.manual_seed(0)
    vae = {key: weight.half() for key, weight in AutoencoderKL(VAEConfig()).state_dict().items()}
    base = load_checkpoint(folder / "0.safetensors")
    save_checkpoint(folder / "parts.safetensors", Checkpoint(unet=base.unet, text=base.text, vae=vae))
    (folder / "pictures").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", [{"init": "soup", "trainable": "lora"}, {"init": "bank", "bank": "4%", "trainable": "bank"}]
)
def test_cache_distil_paint_and_load(models, folder, start):
    import comfy.sample
    from comfyui_dmm.dmm_core.style_value import parse_style
    from comfyui_dmm.nodes import host_model

    parts = folder / "parts.safetensors"
    images = ("--images", folder / "pictures", "--base", folder / "0.safetensors", "--parts-from", parts)
    dmm("cache", "images", *images, "--resolution", PIXELS, "--output", folder / "cache")
    config = {
        "base": "0.safetensors",
        "parts_from": "parts.safetensors",
        "teachers": [{"name": f"look {i}", "file": f"{i}.safetensors"} for i in (1, 2)],
        "data": {"kind": "cache", "file": "cache"},
        "output": "student.safetensors",
        "run_dir": f"run-{start['init']}",
        "picture_every": 0,
        "train": {"steps": 2, "batch_size": 2, "validation": 0, "lambda_adv": 0, "memory": "off", **start},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    dmm("distill", "--config", folder / "run.yaml")
    student = folder / "student.safetensors"
    learnt = load_checkpoint(student)
    assert [style.name for style in learnt.styles] == ["look 1", "look 2"] and learnt.recipe["steps_done"] == 2
    assert all(weight.isfinite().all() for weight in learnt.unet.values())
    picture = folder / "picture.png"
    dmm(
        "sample",
        student,
        "--prompt",
        "a picture",
        "--style",
        "all",
        "--size",
        PIXELS,
        "--steps",
        2,
        "--output",
        picture,
    )
    assert min(Image.open(picture).size) >= PIXELS

    with torch.inference_mode():
        model, *_ = host_model.load(str(student))
        model = host_model.styled(model, parse_style("look 2"))
        unet = load_unet(learnt.unet).float()
        latent = torch.zeros(1, 4, PIXELS // 8, PIXELS // 8)
        noise = comfy.sample.prepare_noise(latent, 0)
        prompts = conditioning(unet.config, 1), conditioning(unet.config, 2)
        with watch(model) as calls:
            comfy.sample.sample(model, noise, 1, 4.0, "euler", "normal", *prompts, latent, disable_pbar=True, seed=0)
        assert calls
        for call in calls:
            rows = style_row(2, 1).expand(len(call.x), -1)
            ours = unet(call.x.float(), call.t.float(), call.context.float(), style=rows)
            torch.testing.assert_close(call.out.float(), ours, rtol=0, atol=1e-3 * float(ours.std()))
