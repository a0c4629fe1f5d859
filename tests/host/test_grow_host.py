"""Add Teacher to DMM and Forget Style in a real ComfyUI."""

import dataclasses

import pytest
import torch
from comfyui_dmm.dmm_core.bank import folded_bank
from comfyui_dmm.dmm_core.bank_fit import fit_bank, neutral_style
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo

from .families import DEMO, NAMES, checkpoint_of, random_unet
from .test_distill_host import graph, queue, saved

DMM = dataclasses.replace(DEMO, num_styles=3)
PLAIN = dataclasses.replace(DEMO, num_styles=0)


@pytest.fixture(scope="module")
def files(server):
    folder = server.base / "models" / "dmm"
    save_checkpoint(folder / "old-dmm.safetensors", checkpoint_of(random_unet(DMM, 0), whole=True))
    save_checkpoint(folder / "a.safetensors", checkpoint_of(random_unet(PLAIN, 1)))
    save_checkpoint(folder / "b.safetensors", checkpoint_of(random_unet(PLAIN, 2)))
    save_checkpoint(folder / "whole.safetensors", checkpoint_of(random_unet(PLAIN, 0), whole=True))
    return server


def grown(kind: str, name: str, file="old-dmm", **settings) -> dict:
    """The graph of Distill Teachers with another trainer in its place."""
    g = graph(name=name, names=("new",), models=("a",))
    g["old"] = {"class_type": "DMMLoadModel", "inputs": {"ckpt_name": f"{file}.safetensors"}}
    inputs = g["distil"]["inputs"]
    for key in ("base", "start_from"):
        del inputs[key]
    inputs |= {"model": ["old", 0], "clip": ["old", 1], "vae": ["old", 2], "guard": 0.5, **settings}
    if kind == "DMMForgetStyle":
        del inputs["teachers.teacher0"], g["teacher 0"], g["load 0"]
        inputs |= {"attack_codes": 2, "attack_every": 2, "attack_steps": 2, "check_steps": 2, **settings}
    else:
        inputs |= {"warm_start": 2, **settings}
    g["distil"]["class_type"] = kind
    return g


def text_of(messages) -> str:
    """What the training node says at the end."""
    executed = {d["node"]: d["output"] for kind, d in messages if kind == "executed"}
    return executed["distil"]["text"][0]


@pytest.fixture(scope="module")
def grown_once(files):
    """A model with the style "new" beside its own: its file, and the messages of the run."""
    end, messages = queue(files, grown("DMMAddTeacher", "grown"))
    assert end == "execution_success", messages[-1]
    (path,) = saved(files, "grown")
    return path, messages


def test_a_model_grows_keeps_its_styles_and_is_painted_with_at_once(files, grown_once):
    path, messages = grown_once
    old, new = (load_checkpoint(p) for p in (files.base / "models" / "dmm" / "old-dmm.safetensors", path))
    assert [style.name for style in new.styles] == [*NAMES[:3], "new"]
    known = [dataclasses.replace(style, thumbnail="") for style in new.styles[:3]]
    assert known == old.styles, "what was known of the styles is kept word for word; they get pictures"
    assert all(style.thumbnail.startswith("data:image/jpeg;base64,") for style in new.styles)
    assert new.recipe["added"] == ["new"]
    assert [entry["styles"] for entry in new.recipe["history"]] == [NAMES[:3]]
    assert new.recipe["history"][0]["steps"] == 7, "the recipe that the old file had"
    codes = new.unet["model_embedding.weight"]
    assert codes.shape[0] == 4
    # Four steps at a rate of 0.001: the old codes have moved by that much at the most, the new one is another.
    assert (codes[:3].float() - old.unet["model_embedding.weight"]).abs().max() < 6e-3
    assert "new" in text_of(messages) and "model before" in text_of(messages)
    texts = [data.decode(errors="replace") for kind, data in messages if kind == 3]
    assert any("looking for the new styles' codes" in text for text in texts)


def test_it_can_be_repeated_from_the_file(files, grown_once):
    path, _ = grown_once
    (files.base / "models" / "dmm" / "grown-once.safetensors").write_bytes(path.read_bytes())
    g = grown("DMMAddTeacher", "twice", file="grown-once")
    g["teacher 0"]["inputs"]["name"] = g["style"]["inputs"]["style"] = "newer"
    g["load 0"]["inputs"]["ckpt_name"] = "b.safetensors"
    end, messages = queue(files, g)
    assert end == "execution_success", messages[-1]
    (path,) = saved(files, "twice")
    recipe = load_checkpoint(path).recipe
    assert [entry["styles"] for entry in recipe["history"]] == [NAMES[:3], [*NAMES[:3], "new"]]
    assert recipe["history"][1]["added"] == ["new"] and recipe["added"] == ["newer"]


def test_a_style_is_forgotten_by_name(files):
    g = grown("DMMForgetStyle", "less", styles=NAMES[1])
    g["style"]["inputs"]["style"] = NAMES[2]
    end, messages = queue(files, g)
    assert end == "execution_success", messages[-1]
    (path,) = saved(files, "less")
    new = load_checkpoint(path)
    assert [style.name for style in new.styles] == [NAMES[0], NAMES[2]]
    assert new.recipe["forgotten"] == [NAMES[1]]
    assert "found before" in text_of(messages) and NAMES[1] in text_of(messages)
    old = load_checkpoint(files.base / "models" / "dmm" / "old-dmm.safetensors").unet["model_embedding.weight"]
    assert (new.unet["model_embedding.weight"].float() - old[[0, 2]]).abs().max() < 6e-3


@pytest.fixture(scope="module")
def merged(files):
    """A merge of two models with a style bank, as a file."""
    paths = [files.base / "models" / "dmm" / f"{name}.safetensors" for name in ("a", "b", "whole")]
    a, b, base = (load_checkpoint(path) for path in paths)
    shapes = {key: tuple(weight.shape) for key, weight in base.unet.items()}
    fitted = fit_bank([a.unet, b.unet], base.unet, 4, shapes=shapes)
    unet = {key: value for one in fitted for key, value in one.weights.items()}
    unet |= neutral_style(2, DEMO.embed_dim, "add_embedding", torch.float16)
    styles = [StyleInfo("one"), StyleInfo("two")]
    save_checkpoint(
        files.base / "models" / "dmm" / "merged.safetensors", dataclasses.replace(base, unet=unet, styles=styles)
    )
    return unet


def without_pictures(g: dict) -> dict:
    """The graph with no latents and captions on its trainer."""
    for name in ("latents", "captions"):
        del g["distil"]["inputs"][name]
    return g


def test_a_bank_grows_at_once_and_forgets_at_once(files, merged):
    """Added, painted with, deleted again: the old styles' weights keep every bit, and at the end the old file's weights are back."""
    g = without_pictures(grown("DMMAddTeacher", "at-once", file="merged", instant=True, growth="30%"))
    g["load 0"]["inputs"]["ckpt_name"] = "whole.safetensors"
    end, messages = queue(files, g)
    assert end == "execution_success", messages[-1]
    (path,) = saved(files, "at-once")
    after = load_checkpoint(path)
    assert [style.name for style in after.styles] == ["one", "two", "new"] and after.recipe["added"] == ["new"]
    assert "grew by rank" in text_of(messages) and "| new |" in text_of(messages)
    for style, grown_style in ((0, 0), (1, 1), (2, 3)):  # the last is "no style"
        before, now = folded_bank(merged, torch.eye(3)[style]), folded_bank(after.unet, torch.eye(4)[grown_style])
        assert all(torch.equal(value, now[key]) for key, value in before.items() if key != "model_embedding.weight")

    (files.base / "models" / "dmm" / "grown-bank.safetensors").write_bytes(path.read_bytes())
    g = without_pictures(grown("DMMForgetStyle", "deleted", file="grown-bank", styles="new", only_delete=True))
    g["style"]["inputs"]["style"] = "two"
    end, messages = queue(files, g)
    assert end == "execution_success", messages[-1]
    (path,) = saved(files, "deleted")
    less = load_checkpoint(path)
    assert [style.name for style in less.styles] == ["one", "two"] and "bit for bit" in text_of(messages)
    assert less.unet.keys() == merged.keys() and all(torch.equal(less.unet[key], merged[key]) for key in merged)


def test_another_clip_is_another_file(files, merged):
    """What the model inherits is in the name of its file: the one with the first CLIP stays."""
    g = without_pictures(grown("DMMForgetStyle", "which-clip", file="merged", styles="one", only_delete=True))
    g["style"]["inputs"]["style"] = "two"
    assert queue(files, g)[0] == "execution_success"
    (path,) = saved(files, "which-clip")
    before = path.read_bytes()
    g["skip"] = {"class_type": "CLIPSetLastLayer", "inputs": {"clip": ["old", 1], "stop_at_clip_layer": -2}}
    g["distil"]["inputs"]["clip"] = ["skip", 0]
    assert queue(files, g)[0] == "execution_success"
    (new,) = set(saved(files, "which-clip")) - {path}
    assert path.read_bytes() == before
    assert (load_checkpoint(path).clip_skip, load_checkpoint(new).clip_skip) == (None, 2)


def test_a_bank_learns_and_forgets_by_training(files, merged):
    end, messages = queue(files, grown("DMMAddTeacher", "trained-bank", file="merged", growth="20%"))
    assert end == "execution_success", messages[-1]
    (path,) = saved(files, "trained-bank")
    after = load_checkpoint(path)
    assert [style.name for style in after.styles] == ["one", "two", "new"]
    assert any(".cores." in key and len(value) == 4 for key, value in after.unet.items())
    g = grown("DMMForgetStyle", "forgot-bank", file="merged", styles="one")
    g["style"]["inputs"]["style"] = "two"
    end, messages = queue(files, g)
    assert end == "execution_success", messages[-1]
    (path,) = saved(files, "forgot-bank")
    assert [style.name for style in load_checkpoint(path).styles] == ["two"]
    assert "deleted: and cores" in text_of(messages) and "trained: and cores" in text_of(messages)
    assert "The cores that stay told 100% of 'one'" in text_of(messages)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("DMMAddTeacher", {"instant": True}, "no style bank"),
        ("DMMAddTeacher", {"latents": None}, "connect them, or switch 'instant' on"),
        ("DMMForgetStyle", {"styles": NAMES[0], "latents": None}, "switch 'only_delete' on"),
        ("DMMForgetStyle", {"styles": "blue", "only_delete": True}, "no style 'blue'"),
        ("DMMAddTeacher", {"teacher": NAMES[0]}, "are the same style name"),
        ("DMMAddTeacher", {"model": ["whole", 0]}, "carries no DMM styles|has no styles"),
        ("DMMForgetStyle", {"styles": "watercolour"}, "no style 'watercolour'.*ink"),
        ("DMMForgetStyle", {"styles": ""}, "name one style"),
        ("DMMForgetStyle", {"styles": ", ".join(f'"{name}"' for name in NAMES[:3])}, "all styles would be forgotten"),
    ],
)
def test_what_does_not_fit_is_explained_on_the_node(files, kind, changes, message):
    teacher = changes.pop("teacher", "new") if "teacher" in changes else "new"
    g = grown(kind, "refused", **changes)
    g["distil"]["inputs"] = {key: value for key, value in g["distil"]["inputs"].items() if value is not None}
    if kind == "DMMAddTeacher":
        g["teacher 0"]["inputs"]["name"] = teacher
    end, messages = queue(files, g)
    assert end == "execution_error"
    error = messages[-1][1]
    assert error["node_id"] == "distil"
    import re

    assert re.search(message, error["exception_message"]), error["exception_message"]
    assert not saved(files, "refused")


def test_blends_become_styles_of_the_grown_model(host, models):
    """In process: the frozen old model knows a named blend as a code of its own."""
    from comfyui_dmm.dmm_core.style_value import parse_style
    from comfyui_dmm.nodes import host_model, training_inputs

    path = models / "dmm" / "to-grow.safetensors"
    save_checkpoint(path, checkpoint_of(random_unet(DMM, 0), whole=True))
    model, clip, _, _ = host_model.load(str(path))
    blended = host_model.with_blend(model, parse_style("ink:0.5, Neon lines:0.5"), StyleInfo("half"))
    with torch.inference_mode(False):
        base, styles = training_inputs.frozen_styles(blended, clip, ["", "a star"])
    assert [style.name for style in styles] == [*NAMES[:3], "half"]
    codes = base.unet.model_embedding.weight
    assert torch.allclose(codes[3], (codes[0] + codes[1]) / 2, atol=1e-6)
