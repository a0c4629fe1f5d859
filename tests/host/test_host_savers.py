"""What the host's own CheckpointSave and ModelSave keep of a DMM MODEL, and the names that Load DMM Model finds again."""

import json
import os

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from safetensors.torch import load_file, save_file

from .families import DEMO, NAMES, checkpoint_of, random_unet

LOST = ["style 0", "style 1", "style 2", "style 3"]


def prompt_of(name, node="DMMLoadModel"):
    return {"1": {"class_type": node, "inputs": {"ckpt_name": name}}, "2": {"class_type": "KSampler", "inputs": {}}}


@pytest.fixture
def original(models):
    path = models / "dmm" / "original.safetensors"
    save_checkpoint(path, checkpoint_of(random_unet(DEMO), torch.float16, whole=True))
    yield path
    path.unlink(missing_ok=True)


def saved(models, node, model, clip, vae, prompt, name):
    """The file that a node of the host writes, moved to where the loader finds it."""
    from comfy_extras import nodes_model_merging

    parts = {"clip": clip, "vae": vae} if node == "CheckpointSave" else {}
    saver = getattr(nodes_model_merging, node)()
    saver.save(model=model, filename_prefix=f"saved/{name}", prompt=prompt, extra_pnginfo={"workflow": {}}, **parts)
    (file,) = (
        os.path.join(root, f) for root, _, files in os.walk(saver.output_dir) for f in files if f.startswith(name)
    )
    os.replace(file, target := models / "checkpoints" / f"{name}.safetensors")
    return target


@torch.inference_mode()
@pytest.mark.parametrize("node", ["CheckpointSave", "ModelSave"])
def test_names_come_back_while_the_model_is_there(models, original, node):
    from comfyui_dmm.nodes import host_model

    model, clip, vae, _ = host_model.load(str(original))
    file = saved(models, node, model, clip, vae, prompt_of("original.safetensors"), f"by-{node}")
    ours, theirs = load_checkpoint(original), load_checkpoint(file)
    assert [style.name for style in theirs.styles] == LOST and not any(
        key.startswith("dmm.") for key in theirs.metadata
    )
    for key, weight in ours.unet.items():
        assert torch.equal(theirs.unet[key].half(), weight)  # the styles' weights are all there
    back, _, _, info = host_model.load(str(file))
    assert info.styles == tuple(ours.styles) and "they are those of 'original.safetensors'" in info.remark
    assert list(host_model.model_info(back).known) == NAMES
    again = models / "dmm" / "again.safetensors"
    save_checkpoint(again, host_model.to_checkpoint(back))
    assert host_model.load(str(again))[3].remark == ""
    original.unlink()
    info = host_model.load(str(file))[3]
    assert [style.name for style in info.styles] == LOST and "Edit Style names them" in info.remark


HOSTILE = [
    json.dumps(prompt_of("../../etc/passwd")),
    json.dumps(prompt_of("/etc/passwd")),
    json.dumps(prompt_of("../dmm/original.safetensors")),
    json.dumps(prompt_of(["original.safetensors"])),
    json.dumps(prompt_of("original.safetensors", "CheckpointLoaderSimple")),
    json.dumps({"1": {"class_type": "DMMLoadModel", "inputs": 3}, "2": 4}),
    json.dumps(["DMMLoadModel"]),
    "[" * 100_000,
    "no JSON",
]


@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_a_workflow_is_only_text(models, original, prompt):
    from comfyui_dmm.nodes import host_model

    file = models / "checkpoints" / "hostile.safetensors"
    save_file(load_file(original), file, {"prompt": prompt})
    assert [style.name for style in host_model.load(str(file))[3].styles] == LOST


def test_other_codes_are_other_styles(models, original):
    from comfyui_dmm.nodes import host_model

    file = models / "checkpoints" / "other.safetensors"
    tensors = load_file(original)
    tensors["model.diffusion_model.model_embedding.weight"][0, 0] += 1
    save_file(tensors, file, {"prompt": json.dumps(prompt_of("original.safetensors"))})
    info = host_model.load(str(file))[3]
    assert [
        style.name for style in info.styles
    ] == LOST and "no model that its workflow loads has the same codes" in info.remark


def test_lost_weights_are_said(models, original):
    """Through the host's own loader, which drops the styles."""
    from comfyui_dmm.nodes import host_model

    plain = {k: v for k, v in load_file(original).items() if "model_embedding" not in k and "add_embedding" not in k}
    file = models / "checkpoints" / "dropped.safetensors"
    nodes = prompt_of("x", "CheckpointLoaderSimple") | {"3": {"class_type": "DMMStyleSelector", "inputs": {}}}
    save_file(plain, file, {"prompt": json.dumps(nodes)})
    assert (
        "Load the original with Load DMM Model and save it with Save DMM Model" in host_model.load(str(file))[3].remark
    )
    save_file(plain, file, {"prompt": json.dumps(prompt_of("x", "CheckpointLoaderSimple"))})
    assert "workflow" not in host_model.load(str(file))[3].remark
