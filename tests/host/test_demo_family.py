"""The shipped demo family in a real ComfyUI with its usual nodes: styles, ControlNet, LoRA, and the same picture headless."""

from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.training.data.demo.looks import LORA_LOOK
from comfyui_dmm.training.data.demo.scenes import Scene, control_hint
from comfyui_dmm.training.demo.classifier import classify, load_classifier
from comfyui_dmm.training.paint.painter import Settings, painter
from PIL import Image

MODELS = Path(__file__).parents[2] / "models"
STEPS, CFG = 12, 4.0


def test_it_is_small_enough_to_ship():
    assert sum(p.stat().st_size for p in MODELS.rglob("*.safetensors")) <= 24_000_000


def graph(text="a red star", style="ink", batch=1, seed=1, model=("style", 0), positive=("text", 0)) -> dict:
    g = {
        "dmm": {"class_type": "DMMLoadModel", "inputs": {"ckpt_name": "demo-dmm.safetensors"}},
        "style": {"class_type": "DMMApplyStyle", "inputs": {"model": ["dmm", 0], "style": style}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["dmm", 1], "text": text}},
        "none": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["dmm", 1], "text": ""}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": batch}},
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": list(model), "seed": seed, "steps": STEPS, "cfg": CFG, "sampler_name": "dpmpp_2m", "scheduler": "karras",
                "positive": list(positive), "negative": ["none", 0], "latent_image": ["empty", 0], "denoise": 1.0,
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["dmm", 2]}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
    }  # fmt: skip
    return g


def pictures(server, g) -> list[Image.Image]:
    return [server.image(entry).convert("RGB") for entry in server.run(g)["show"]["images"]]


def answers(images, question) -> list[str]:
    classifier = load_classifier(MODELS / "demo-classifier.safetensors")
    pixels = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return [classifier.classes[question][i] for i in classify(classifier, pixels)[question].argmax(1).tolist()]


@pytest.mark.parametrize("style", ["ink", "none", "pen:0.6, candy:0.4", "0%: sticker; 30%-70%: echo"])
def test_headless_and_comfyui_paint_the_same_picture(server, style):
    """Same file, seed and settings: 8-bit pixels differ by 2 at most (float32 on both sides, other order of sums)."""
    (theirs,) = pictures(server, graph("a big blue house, hills", style))
    brush = painter(load_checkpoint(MODELS / "dmm" / "demo-dmm.safetensors"))
    settings = Settings(STEPS, CFG, "dpmpp_2m", "karras", 128, 128)
    (ours,) = brush.pictures(brush.latents(["a big blue house, hills"], brush.style(style), 1, settings))
    difference = np.abs(np.asarray(theirs, int) - np.asarray(ours, int))
    assert difference.max() <= 2, difference.max()


def test_styles_are_recognised(server):
    for style in ("candy", "pixel", "sticker"):
        named = answers(pictures(server, graph("a purple mushroom", style, batch=4)), "look")
        assert named.count(style) >= 3, (style, named)


def test_the_controlnet_gives_the_shape(server):
    """An empty prompt and an outline: the base it was trained on mostly paints the outline's object, and hardly without (8 objects)."""
    (server.base / "input").mkdir(exist_ok=True)
    said = len(server.log.read_bytes())
    right = 0
    shapes = ("cat", "star", "moon", "mushroom")
    for shape in shapes:
        Image.fromarray(control_hint(Scene(shape, "red", "plain"))).save(server.base / "input" / f"{shape}.png")
        g = graph("", "none", batch=4, model=("base", 0), positive=("control", 0)) | BASE
        g["net"] = {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "demo-outline.safetensors"}}
        g["hint"] = {"class_type": "LoadImage", "inputs": {"image": f"{shape}.png"}}
        g["control"] = {
            "class_type": "ControlNetApplyAdvanced",
            "inputs": {
                "positive": ["text", 0], "negative": ["none", 0], "control_net": ["net", 0], "image": ["hint", 0],
                "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0,
            },
        }  # fmt: skip
        g["sample"]["inputs"]["negative"] = ["control", 1]
        right += answers(pictures(server, g), "shape").count(shape)
    named = answers(pictures(server, graph("", "none", batch=4, model=("base", 0)) | BASE), "shape")
    by_chance = sum(named.count(shape) for shape in shapes)
    assert right >= 9 and by_chance <= 5, (
        f"{right} of 16 pictures show the outline's object, {by_chance} of 16 without it"
    )
    assert b"no match" not in server.log.read_bytes()[said:]  # what the host says of sizes that it does not know


BASE = {"base": {"class_type": "DMMLoadModel", "inputs": {"ckpt_name": "demo-base.safetensors"}}}


def with_lora(source, strength) -> dict:
    g = graph("an orange cat", "none", batch=4, model=("lora", 0))
    g |= BASE
    g["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": [source, 0], "lora_name": "demo-frame.safetensors", "strength_model": strength},
    }
    return g


def test_the_lora_paints_its_look(server):
    """On the base it was trained on, and, stronger, on the DMM student, whose weights have moved away from the base's."""
    assert answers(pictures(server, with_lora("base", 1.0)), "look").count(LORA_LOOK) >= 3
    assert answers(pictures(server, with_lora("base", 0.0)), "look").count(LORA_LOOK) == 0
    frames = [border(image) for strength in (0.0, 1.5) for image in pictures(server, with_lora("style", strength))]
    assert sum(after > before + 20 for before, after in zip(frames[:4], frames[4:])) >= 3, frames


def border(image: Image.Image) -> float:
    """How much darker the ring of the frame (6 to 12 pixels from the edge) is than the field inside it, in levels."""
    grey = np.asarray(image.convert("L"), float)
    edge = np.minimum(np.minimum(*np.indices(grey.shape)), 127 - np.maximum(*np.indices(grey.shape)))
    return grey[(edge >= 16) & (edge < 22)].mean() - grey[(edge >= 6) & (edge < 12)].mean()
