"""Learn Style from Images and Match Style in a real ComfyUI, on the demo model."""

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.dmm_core.style_value import parse_style
from comfyui_dmm.dmm_core.vae import SCALE_SD, load_vae
from comfyui_dmm.training.data.demo.latents import demo_images
from comfyui_dmm.training.paint.painter import Settings, painter
from PIL import Image

from .server import PACK, NodeError
from .test_distill_host import queue, saved

DEMO = PACK / "models" / "dmm" / "demo-dmm.safetensors"


@pytest.fixture(scope="module")
def pictures(server):
    """Four renders of a look that the demo model does not know, in the host's input folder, and what they show."""
    images, captions = demo_images(["frame"], 4, 12)
    for i, image in enumerate(images):
        Image.fromarray(image).save(server.base / "input" / f"frame-{i}.png")
    return captions


def graph(kind: str, captions: str, count=4, **settings) -> dict:
    """LoadImage nodes, batched, into one of the two nodes."""
    g = {"dmm": {"class_type": "DMMLoadModel", "inputs": {"ckpt_name": "demo-dmm.safetensors"}}}
    last = None
    for i in range(count):
        g[f"load {i}"] = {"class_type": "LoadImage", "inputs": {"image": f"frame-{i}.png"}}
        if last:
            g[f"batch {i}"] = {"class_type": "ImageBatch", "inputs": {"image1": last, "image2": [f"load {i}", 0]}}
        last = [f"batch {i}" if last else f"load {i}", 0]
    inputs = {"model": ["dmm", 0], "clip": ["dmm", 1], "vae": ["dmm", 2], "images": last, "captions": captions}
    if kind == "DMMLearnStyle":
        inputs |= {
            "style": "golden", "name": "golden-dmm", "learns": "core", "directions": 3, "steps": 20, "prior": 0.3, "seed": 0,
            "preview_every": 10,
        }  # fmt: skip
        g["learnt"] = {"class_type": "PreviewAny", "inputs": {"source": ["learn", 2]}}
    else:
        inputs |= {"draws": 6, "with_none": True, "seed": 0}
    g["learn"] = {"class_type": kind, "inputs": {**inputs, **settings}}
    return g


def test_a_style_is_learnt_saved_and_painted_with(server, pictures):
    g = graph("DMMLearnStyle", "\n".join(pictures))
    g["styled"] = {"class_type": "DMMApplyStyle", "inputs": {"model": ["learn", 0], "style": ["learn", 1]}}
    g["text"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["dmm", 1], "text": "a big blue house, hills"}}
    g["empty"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
    g["paint"] = {
        "class_type": "KSampler",
        "inputs": {
            "model": ["styled", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0], "seed": 7,
            "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        },
    }  # fmt: skip
    g["shown"] = {"class_type": "VAEDecode", "inputs": {"samples": ["paint", 0], "vae": ["dmm", 2]}}
    g["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["shown", 0]}}
    before = DEMO.read_bytes()
    end, messages = queue(server, g)
    assert end == "execution_success", messages[-1]
    assert DEMO.read_bytes() == before
    (path,) = saved(server, "golden-dmm")
    old, new = load_checkpoint(DEMO), load_checkpoint(path)
    assert [s.name for s in new.styles] == [*(s.name for s in old.styles), "golden"] and new.styles[:7] == old.styles
    assert new.styles[7].thumbnail and new.recipe["learned"]["pictures"] == 4 and new.vae and new.text
    for key, value in old.unet.items():
        now = new.unet[key]
        assert torch.equal(now[: len(value)], value) or key.endswith("cores.weight") and torch.equal(now[:7], value[:7])
    executed = {d["node"]: d["output"] for kind, d in messages if kind == "executed"}
    assert "'golden' was learnt from 4 pictures" in executed["learn"]["text"][0]
    assert executed["learn"]["saved"][0]["style"] == "golden" and executed["show"]["images"]
    texts = [data.decode(errors="replace") for kind, data in messages if kind == 3]
    assert any("learning 'golden'" in text for text in texts)
    assert any(kind in (1, 2, 4) for kind, _ in messages), "a preview was sent"


def test_a_cancel_saves_nothing(server, pictures):
    g = graph("DMMLearnStyle", "\n".join(pictures), name="not-learnt", steps=5000, preview_every=0)

    def cancel(message):
        if message[0] == 3 and b"learning" in message[1]:
            server.interrupt()

    end, _ = queue(server, g, cancel)
    assert end == "execution_interrupted" and not saved(server, "not-learnt")


def test_a_known_blend_is_named(server):
    """Pictures that the demo model painted in it."""
    model = load_checkpoint(DEMO)
    brush = painter(model)
    captions = ["a big blue house, hills", "a red tree, plain", "a small green boat, hills", "a yellow house, plain"]
    latents = brush.latents(captions, brush.style("pixel:0.6, echo:0.4"), 5, Settings(steps=8, width=128, height=128))
    with torch.no_grad():
        pixels = load_vae(model.vae).decode(latents / SCALE_SD)
    for i, image in enumerate(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(server.base / "input" / f"frame-{10 + i}.png")
    g = graph("DMMMatchStyle", "\n".join(captions), draws=16)
    for i in range(4):
        g[f"load {i}"]["inputs"]["image"] = f"frame-{10 + i}.png"
    g["name"] = {"class_type": "PreviewAny", "inputs": {"source": ["learn", 0]}}
    text = server.run(g)["learn"]["text"][0]
    shares = dict(parse_style(text.splitlines()[0]).shares)
    assert shares.get("pixel", 0) == pytest.approx(0.6, abs=0.25) and shares.get("echo", 0) == pytest.approx(
        0.4, abs=0.25
    ), text


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("DMMLearnStyle", {"style": "ink"}, "already has a style 'ink'"),
        ("DMMLearnStyle", {"captions": "a\nb\nc"}, "3 lines of captions for 2 pictures"),
        ("DMMLearnStyle", {"name": "a/b"}, "plain file name"),
        ("DMMLearnStyle", {"model": ["plain", 0]}, "has no styles"),
        ("DMMMatchStyle", {"model": ["plain", 0]}, "has no styles"),
    ],
)
def test_what_does_not_fit_is_explained(server, pictures, kind, changes, message):
    changes = dict(changes)
    g = graph(kind, changes.pop("captions", ""), count=2, **changes)
    g["plain"] = {"class_type": "DMMLoadModel", "inputs": {"ckpt_name": "demo-base.safetensors"}}
    if kind == "DMMMatchStyle":
        g["name"] = {"class_type": "PreviewAny", "inputs": {"source": ["learn", 0]}}
    with pytest.raises(NodeError, match=message):
        server.run(g)
