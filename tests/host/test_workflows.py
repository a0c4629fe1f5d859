"""Whole workflows through a running ComfyUI: HTTP in, pictures, files and node errors out."""

import shutil

import numpy as np
import pytest
import requests
import torch
from comfyui_dmm.dmm_core.checkpoint import STYLE_KEYS, load_checkpoint, save_checkpoint

from .families import DEMO, NAMES, SD15, checkpoint_of, random_unet
from .server import PACK, NodeError

FILE = "tiny.safetensors"


@pytest.fixture(scope="module")
def files(server):
    """The server's dmm folder with one whole DMM model in it."""
    folder = server.base / "models" / "dmm"
    save_checkpoint(folder / FILE, checkpoint_of(random_unet(DEMO), torch.float16, whole=True))
    return folder


def loader(name=FILE):
    return {"class_type": "DMMLoadModel", "inputs": {"ckpt_name": name}}


def selector(model, style, strength=1.0):
    return {"class_type": "DMMStyleSelector", "inputs": {"model": model, "style": style, "strength": strength}}


def painting(styles: dict[str, str], name=FILE) -> dict:
    """One loader and, per entry {key: style}, a selector "style KEY" and a picture that ends in the node "save KEY"."""
    text = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1]}}
    graph = {
        "load": loader(name),
        "positive": {**text, "inputs": {**text["inputs"], "text": "a red house"}},
        "negative": {**text, "inputs": {**text["inputs"], "text": "blurry"}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    }
    vae = ["load", 2]
    for key, style in styles.items():
        settings = {"seed": 5, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        links = {"model": [f"style {key}", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
        graph |= {
            f"style {key}": selector(["load", 0], style),
            f"sample {key}": {"class_type": "KSampler", "inputs": {**settings, **links, "latent_image": ["latent", 0]}},
            f"decode {key}": {"class_type": "VAEDecode", "inputs": {"samples": [f"sample {key}", 0], "vae": vae}},
            f"save {key}": {
                "class_type": "SaveImage",
                "inputs": {"images": [f"decode {key}", 0], "filename_prefix": "test"},
            },
        }
    return graph


def pictures(server, graph) -> dict[str, np.ndarray]:
    outputs = server.run(graph)
    return {n: np.asarray(server.image(o["images"][0])) for n, o in outputs.items() if n.startswith("save")}


def listed(server) -> list[str]:
    """The files that Load DMM Model offers."""
    info = server.get("object_info/DMMLoadModel").json()["DMMLoadModel"]
    return info["input"]["required"]["ckpt_name"][1]["options"]


def forget(server):
    """Empty the server's cache of node outputs, so that a graph really runs again."""
    body = {"unload_models": True, "free_memory": True}
    requests.post(f"http://{server.address}/free", json=body, timeout=60).raise_for_status()


def test_two_selectors_on_one_loader(server, files):
    """One run with two styles gives the pictures of two runs with one style each, bit for bit."""
    together = pictures(server, painting({"a": "ink", "b": "墨"}))
    alone = {}
    for key, style in {"a": "ink", "b": "墨"}.items():
        forget(server)
        alone |= pictures(server, painting({key: style}))
    assert together.keys() == alone.keys() == {"save a", "save b"}
    for key in together:
        assert together[key].shape == (64, 64, 3)
        assert np.array_equal(together[key], alone[key])
    assert np.abs(together["save a"].astype(int) - together["save b"]).max() >= 8


def test_the_loader_names_the_styles(server, files):
    outputs = server.run(painting({"a": "none"}))
    assert outputs["load"]["text"] == [f"4 styles: {', '.join(NAMES)}"]


def test_a_wrong_style_name_is_a_node_error_that_lists_the_styles(server, files):
    with pytest.raises(NodeError, match="unknown style 'inc'.*ink, Neon lines, paper: cut-out, 墨, none") as caught:
        server.run(painting({"a": "inc"}))
    assert caught.value.node == "style a"


def test_a_plain_checkpoint_loads_with_a_note_and_refuses_styles(server, files):
    plain = checkpoint_of(random_unet(DEMO), whole=True, styles=[], recipe={})
    plain.unet = {k: v for k, v in plain.unet.items() if not k.startswith(STYLE_KEYS)}
    save_checkpoint(server.base / "models" / "checkpoints" / "plain.safetensors", plain)
    outputs = server.run(painting({"a": "none"}, "plain.safetensors"))
    assert outputs["load"]["text"] == ["a plain model, no styles: fine as a teacher or a base"]
    with pytest.raises(NodeError, match="unknown style 'ink'.*plain checkpoint") as caught:
        server.run(painting({"a": "ink"}, "plain.safetensors"))
    assert caught.value.node == "style a"


def test_a_model_from_another_loader_is_a_node_error(server, files):
    shutil.copy(files / FILE, server.base / "models" / "checkpoints" / "copy.safetensors")
    sd15 = checkpoint_of(random_unet(SD15), torch.float16)
    save_checkpoint(server.base / "models" / "checkpoints" / "sd15.safetensors", sd15)
    graph = painting({"a": "ink"})
    graph["other"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}}
    graph["style a"]["inputs"]["model"] = ["other", 0]
    with pytest.raises(NodeError, match="Load DMM Model") as caught:
        server.run(graph)
    assert caught.value.node == "style a"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("text.safetensors", b"this is a text file, whatever its name says", "not a safetensors file"),
        ("pickle.safetensors", b"PK\x03\x04" + bytes(99), "pickle"),
        ("empty.safetensors", b"", "is empty"),
    ],
)
def test_a_broken_file_is_a_node_error(server, files, name, content, message):
    (files / name).write_bytes(content)
    with pytest.raises(NodeError, match=message) as caught:
        server.run(painting({"a": "none"}, name))
    assert caught.value.node == "load" and name in str(caught.value)


def test_a_file_that_is_no_model_is_a_node_error(server, files):
    from safetensors.torch import save_file

    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, files / "lora.safetensors")
    with pytest.raises(NodeError, match="looks like a LoRA") as caught:
        server.run(painting({"a": "none"}, "lora.safetensors"))
    assert caught.value.node == "load"


def test_a_file_that_does_not_exist_is_refused_before_running(server, files):
    for name in ("gone.safetensors", "../../secret.safetensors"):
        with pytest.raises(NodeError, match="not in list") as caught:
            server.run(painting({"a": "none"}, name))
        assert caught.value.node == "load"


def test_a_file_without_text_encoder_or_vae_says_so(server, files):
    save_checkpoint(files / "unet.safetensors", checkpoint_of(random_unet(DEMO), torch.float16))
    graph = painting({"a": "ink"}, "unet.safetensors")
    with pytest.raises(NodeError, match="clip input is invalid") as caught:
        server.run(graph)
    assert caught.value.node in ("positive", "negative")
    graph["whole"] = loader()
    for prompt in ("positive", "negative"):
        graph[prompt]["inputs"]["clip"] = ["whole", 1]
    with pytest.raises(NodeError, match="VAE is invalid") as caught:
        server.run(graph)
    assert caught.value.node == "decode a"
    graph["decode a"]["inputs"]["vae"] = ["whole", 2]
    note = server.run(graph)["load"]["text"][0]
    assert "no CLIP and no VAE in this file" in note


def test_save_and_load(server, files):
    """Bit for bit back to the file, names included; the saved file appears in the loader's list and paints the same."""
    graph = painting({"a": "ink"})
    before = pictures(server, graph)["save a"]
    links = {"model": ["style a", 0], "clip": ["load", 1], "vae": ["load", 2], "filename_prefix": "mine/saved"}
    graph["keep"] = {"class_type": "DMMSaveModel", "inputs": links}
    outputs = server.run(graph)
    assert outputs["keep"]["text"] == ["saved dmm/mine/saved_00001_.safetensors"]
    name = "mine/saved_00001_.safetensors"
    original, saved = load_checkpoint(files / FILE), load_checkpoint(server.base / "output" / "dmm" / name)
    assert original.tensors.keys() == saved.tensors.keys()
    for key, weight in original.tensors.items():
        assert saved.tensors[key].dtype == weight.dtype and torch.equal(saved.tensors[key], weight), key
    assert (saved.styles, saved.recipe) == (original.styles, original.recipe)
    assert '"keep"' in saved.metadata["prompt"]  # the workflow, as the host's savers keep it
    assert name in listed(server)
    assert np.array_equal(pictures(server, painting({"a": "ink"}, name))["save a"], before)


def test_saving_outside_of_the_output_folder_is_refused(server, files):
    graph = {"load": loader(), "keep": {"class_type": "DMMSaveModel", "inputs": {"model": ["load", 0]}}}
    graph["keep"]["inputs"]["filename_prefix"] = "../../escaped"
    with pytest.raises(NodeError, match="outside the output folder") as caught:
        server.run(graph)
    assert caught.value.node == "keep"
    assert not list(server.base.glob("**/escaped*"))


def test_a_replaced_file_is_read_again(server, files):
    """A training run overwrites its result under the same name."""
    path = files / "replaced.safetensors"
    save_checkpoint(path, checkpoint_of(random_unet(DEMO, seed=1), torch.float16, whole=True))
    graph = painting({"a": "ink"}, path.name)
    first = pictures(server, graph)["save a"]
    save_checkpoint(path, checkpoint_of(random_unet(DEMO, seed=2), torch.float16, whole=True))
    second = pictures(server, graph)["save a"]
    assert np.abs(first.astype(int) - second).max() >= 8


def test_the_packs_own_models_are_listed(server):
    own = {path.name for path in (PACK / "models" / "dmm").glob("*.safetensors")}
    assert own <= set(listed(server))


def test_the_nodes_present_themselves(server):
    names = {"DMMLoadModel": "Load DMM Model", "DMMStyleSelector": "Style Selector", "DMMSaveModel": "Save DMM Model"}
    for node, name in names.items():
        info = server.get(f"object_info/{node}").json()[node]
        assert (info["display_name"], info["category"]) == (name, "DMM") and info["description"]
