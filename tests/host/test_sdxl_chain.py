"""SDXL through a real ComfyUI: teachers -> student -> file -> paintings, with pooled text and sizes kept."""

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import STYLE_KEYS, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.dmm_core.unet import timestep_embedding
from comfyui_dmm.training.text import ClipText

from . import chain
from .families import NAMES, SMALL_SDXL, checkpoint_of, random_unet
from .mixture import check_regions
from .sampling import SIZE, sample, watch
from .test_sampling_equals_core import assert_equal

SCALE = 0.13025
"""Of SDXL's latents (Podell et al.'s release)."""


@pytest.fixture(scope="module")
def distilled(server):
    """The chain's graph, run once -> (server, the student's file)."""
    chain.write_models(server.base / "models" / "dmm", "sdxl", SMALL_SDXL)
    server.run(chain.distil_graph("sdxl"))
    (path,) = (server.base / "output" / "dmm").glob("sdxl-*.safetensors")
    return server, path


def halved(weights):
    return {k: v.half() for k, v in weights.items()}


def test_the_file_has_everything(distilled):
    server, path = distilled
    base = load_checkpoint(server.base / "models" / "dmm" / "sdxl base.safetensors")
    learnt = load_checkpoint(path)
    assert [style.name for style in learnt.styles] == list(chain.STYLES) and learnt.prediction == "eps"
    styles = {k for k in learnt.unet if k.startswith(("model_embedding", "add_embedding"))}
    parts = {f"add_embedding2.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert styles == {"model_embedding.weight", *parts}
    assert learnt.unet.keys() - styles == base.unet.keys()
    moved = [k for k in base.unet if not torch.equal(learnt.unet[k], base.unet[k])]
    assert any(k.startswith("label_emb") for k in moved) and len(moved) > 0.9 * len(base.unet)
    chain.assert_same_weights(chain.read_text(learnt), chain.read_text(base))
    chain.assert_same_weights(halved(learnt.vae), base.vae)  # the host decodes in float32
    saved = load_checkpoint(next((server.base / "output" / "dmm").glob("sdxl saved_*.safetensors")))
    chain.assert_same_weights(saved.unet, learnt.unet)
    chain.assert_same_weights(chain.read_text(saved), chain.read_text(learnt))
    chain.assert_same_weights(saved.vae, base.vae)
    assert (saved.styles, saved.recipe, saved.prediction) == (learnt.styles, learnt.recipe, "eps")


def test_the_painting_is_our_own_and_that_of_the_reloaded_files(distilled):
    """Distilled in the graph, by dmm_core alone from the file (its text encoders included), and loaded again, bit for bit."""
    server, path = distilled
    host = chain.saved_latents(server, "sdxl")
    ours, plain = (chain.our_latents(path, style) for style in (chain.STYLES[1], None))
    chain.assert_same_painting(SCALE * host, ours)
    assert (ours - plain).abs().max() > 0.01 * ours.abs().max(), "the style does not show in this test"
    for name in (path.name, "sdxl saved_00001_.safetensors"):
        g = {"model": chain.load_node(name), **chain.painting_nodes(["model", 0], ["model", 1], "sdxl again")}
        server.run(g)
        assert torch.equal(chain.saved_latents(server, "sdxl again"), host)


def test_regions_and_sizes_in_one_graph(distilled):
    """Two regions over a background, SDXL's own text node and a negative in another style, to a decoded picture."""
    server, path = distilled
    picture = server.image(server.run(regions_graph(path.name))["show"]["images"][0])
    assert picture.size == (192, 128) and len(picture.getcolors(2**24)) > 1000


def regions_graph(file: str) -> dict:
    g = {"model": chain.load_node(file), **chain.painting_nodes(["model", 0], ["model", 1], "sdxl regions", (192, 128))}
    sizes = {"width": 640, "height": 512, "crop_w": 16, "crop_h": 32, "target_width": 192, "target_height": 128}
    for name, text in (("left", "a red star"), ("right", "a blue tree"), ("positive", "a lake")):
        inputs = {"clip": ["model", 1], "text_g": text, "text_l": text, **sizes}
        g[name] = {"class_type": "CLIPTextEncodeSDXL", "inputs": inputs}
    box = {
        "y": 0.0,
        "height": 1.0,
        "width": 0.4,
        "fall_off": "feather",
        "feather": 16,
        "weight": 1.0,
        "paint_on": "own crop",
    }
    for name, x, style in (("left", 0.0, "ink"), ("right", 0.6, "oil")):
        region = {"style": style, "positive": [name, 0], "x": x, **box}
        g[f"region {name}"] = {"class_type": "DMMRegion", "inputs": region}
    styled = {"conditioning": ["negative", 0], "model": ["model", 0], "style": "ink"}
    g["styled negative"] = {"class_type": "DMMStyleForPrompt", "inputs": styled}
    mix = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["styled negative", 0], "background": "none"}
    regions = {"regions.region0": ["region left", 0], "regions.region1": ["region right", 0]}
    g["mix"] = {"class_type": "DMMStyleMix", "inputs": {**mix, "mode": "own prompts", **regions}}
    g["sample"]["inputs"] |= {"positive": ["mix", 0], "negative": ["mix", 1]}
    g["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["model", 2]}}
    g["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
    return g


# --- inside this process: every call of the UNet watched --------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(models):
    """(our UNet, its checkpoint in half precision, MODEL, CLIP) of a small SDXL model with styles."""
    unet = random_unet(SMALL_SDXL)
    checkpoint = checkpoint_of(unet, whole=True)
    path = models / "dmm" / "small-sdxl.safetensors"
    save_checkpoint(path, checkpoint)
    return unet, checkpoint, *chain.load(path)


def encode_sized(clip, text: str, *sizes: int) -> list:
    """By the host's node for SDXL; sizes: width, height, crop_w, crop_h, target_width, target_height."""
    from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL

    with torch.inference_mode():
        return CLIPTextEncodeSDXL.execute(clip, *sizes, text, text)[0]


def test_regions_are_mixture_of_diffusers(loaded):
    unet, _, model, clip = loaded
    prompts = [chain.encode(clip, text) for text in ("a lake", "", "a red star", "grey")]
    check_regions(model, unet, prompts, SCALE, "eps")


def test_prompts_of_the_file(loaded):
    """Contexts and pooled texts of a loaded file: the host's CLIP, which holds weights in half precision, and ours on the same."""
    _, checkpoint, _, clip = loaded
    ours = ClipText(halved(checkpoint.text))
    for prompt in ("", "a red star", "a tall tree by the sea, " * 20):
        context, entries = chain.encode(clip, prompt)[0]
        expected, pooled = ours.encode_pooled([prompt])
        torch.testing.assert_close(context, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(entries["pooled_output"], pooled, rtol=0, atol=1e-4)


def numbers(pooled: torch.Tensor, *sizes: int) -> torch.Tensor:
    """y of six numbers: height, width, crop_h, crop_w, target height, target width (arXiv:2307.01952, Sec. 2.2)."""
    return torch.cat([pooled, timestep_embedding(torch.tensor(sizes), 256).flatten()[None]], dim=1)


def test_y_is_what_the_host_makes_of_the_prompts(loaded):
    """Plain and sized prompts, with styles of their own, in both of one forward's halves: y as without this pack, bit for bit."""
    from comfyui_dmm.nodes.style_apply import StyleForPrompt

    unet, _, model, clip = loaded
    plain, sized = chain.encode(clip, "a red star"), encode_sized(clip, "a red star", 832, 1216, 16, 24, 1024, 1536)
    negative = chain.encode(clip, "")
    bare = bare_model(unet)
    pooled = plain[0][1]["pooled_output"]
    expected = {
        "plain": numbers(pooled, 8 * SIZE, 8 * SIZE, 0, 0, 8 * SIZE, 8 * SIZE),  # of the canvas
        "sized": numbers(pooled, 1216, 832, 24, 16, 1536, 1024),
    }
    for name, prompt in (("plain", plain), ("sized", sized)):
        with watch(bare) as theirs:
            sample(bare, prompt, negative)
        styled = [StyleForPrompt.execute(c, model, style)[0] for c, style in ((prompt, NAMES[0]), (negative, NAMES[1]))]
        with watch(model) as calls:
            sample(model, *styled)
        assert len(calls) == len(theirs) == 2
        for call, their in zip(calls, theirs):
            assert call.chunks == their.chunks and torch.equal(call.y, their.y)
            assert_equal(call, unet, torch.cat([style_row(3, chunk) for chunk in call.chunks]))
            torch.testing.assert_close(call.y[[call.chunks.index(0)]], expected[name], rtol=0, atol=1e-4)


def bare_model(unet):
    """The host's own SDXL without anything of this pack."""
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.model_detection import detect_unet_config

    sd = {k: v.clone() for k, v in unet.state_dict().items() if not k.startswith(STYLE_KEYS)}
    config = comfy.supported_models.SDXL(detect_unet_config(sd, ""))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(sd).load_model_weights(sd)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def test_headless(models, tmp_path):
    chain.check_headless(tmp_path, chain.write_models(tmp_path, "sdxl", SMALL_SDXL))


def test_what_the_trainer_sees_is_what_the_host_paints_with(models, tmp_path):
    files = chain.write_models(tmp_path, "sdxl", SMALL_SDXL)
    everyone = chain.check_teachers(files, SCALE)
    assert len({float(teacher.pooled[1].sum()) for teacher in everyone}) == 3  # by the text encoder of each
