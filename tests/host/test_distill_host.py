"""Distill Teachers in a real ComfyUI: it learns, it shows, it survives a cancel, and it explains what does not fit."""

import dataclasses
import json
import struct
import uuid

import pytest
import requests
import torch
import websocket
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.unet import UNetConfig
from comfyui_dmm.training.run.state import states

from .families import DEMO, checkpoint_of, random_unet
from .server import NodeError

PLAIN = dataclasses.replace(DEMO, num_styles=0)
OTHER = UNetConfig(
    model_channels=64,
    channel_mult=(1, 1),
    num_res_blocks=(1, 1),
    depth_input=(0, 1),
    depth_output=(1, 0, 0, 0),
    context_dim=64,
)
PICTURE, TEXT = 1, 3  # the host's binary message types
TEACHERS = ("ink", "<b>neon</b>")


@pytest.fixture(scope="module")
def files(server):
    """A whole base, two teachers of its kind and one of another, in the server's models folder."""
    folder = server.base / "models" / "dmm"
    save_checkpoint(folder / "whole.safetensors", checkpoint_of(random_unet(PLAIN, 0), whole=True))
    for i, name in enumerate(("a", "b"), start=1):
        save_checkpoint(folder / f"{name}.safetensors", checkpoint_of(random_unet(PLAIN, i)))
    save_checkpoint(folder / "odd.safetensors", checkpoint_of(random_unet(OTHER, 5)))
    damaged = dict(random_unet(PLAIN, 6).state_dict())
    save_checkpoint(folder / "damaged.safetensors", Checkpoint(unet=damaged))
    return server


def graph(steps=4, names=TEACHERS, models=("a", "b"), name="trial", count=8, **settings) -> dict:
    """Demo scenes -> VAE Encode -> Distill Teachers -> Style Selector -> KSampler -> picture, and the loss graph."""
    g = {
        "whole": {"class_type": "DMMLoadModel", "inputs": {"ckpt_name": "whole.safetensors"}},
        "scenes": {"class_type": "DMMDemoScenes", "inputs": {"count": count, "seed": 0}},
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["scenes", 0], "vae": ["whole", 2]}},
    }
    distil = {
        "base": ["whole", 0], "clip": ["whole", 1], "vae": ["whole", 2], "latents": ["encode", 0], "captions": ["scenes", 1],
        "name": name, "steps": steps, "batch_size": 4, "learning_rate": 1e-3, "seed": 0, "start_from": "base", "style_rate": 1.0,
        "feature_weight": 0.001, "caption_dropout": 0.1, "no_style_share": 0.05, "precision": "fp32",
        "gradient_checkpointing": False, "preview_every": 2, "save_every": 2, **settings,
    }  # fmt: skip
    for i, (style, model) in enumerate(zip(names, models)):
        g[f"load {i}"] = {"class_type": "DMMLoadModel", "inputs": {"ckpt_name": f"{model}.safetensors"}}
        g[f"teacher {i}"] = {
            "class_type": "DMMTeacher",
            "inputs": {"model": [f"load {i}", 0], "clip": ["whole", 1], "name": style},
        }
        distil[f"teachers.teacher{i}"] = [f"teacher {i}", 0]
    g["distil"] = {"class_type": "DMMDistillTeachers", "inputs": distil}
    g["style"] = {
        "class_type": "DMMStyleSelector",
        "inputs": {"model": ["distil", 0], "style": names[-1], "strength": 1.0},
    }
    g["text"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["whole", 1], "text": "a red star"}}
    g["empty"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
    g["sample"] = {
        "class_type": "KSampler",
        "inputs": {
            "model": ["style", 0], "seed": 1, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal",
            "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0], "denoise": 1.0,
        },
    }  # fmt: skip
    g["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["whole", 2]}}
    g["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
    g["loss"] = {"class_type": "LossGraphNode", "inputs": {"loss": ["distil", 1], "filename_prefix": "loss"}}
    return g


def queue(server, graph, on_message=None) -> tuple[str, list]:
    """Run a graph, interrupted or not -> (how it ended, every message: (type, data) and (number, bytes))."""
    client = uuid.uuid4().hex
    connection = websocket.create_connection(f"ws://{server.address}/ws?clientId={client}", timeout=300)
    messages = []
    try:
        body = {"prompt": graph, "client_id": client}
        prompt = requests.post(f"http://{server.address}/prompt", json=body, timeout=60).json()["prompt_id"]
        while True:
            frame = connection.recv()
            if isinstance(frame, bytes):
                message = (struct.unpack(">I", frame[:4])[0], frame[4:])
            else:
                loaded = json.loads(frame)
                message = (loaded["type"], loaded["data"])
            messages.append(message)
            if on_message:
                try:
                    on_message(message)
                except BaseException:
                    # Else an endless run would keep the server from all tests after this one.
                    server.interrupt()
                    raise
            ends = ("execution_success", "execution_error", "execution_interrupted")
            if message[0] in ends and message[1].get("prompt_id") == prompt:
                return message[0], messages
    finally:
        connection.close()


def saved(server, name: str) -> list:
    return sorted((server.base / "output" / "dmm").glob(f"{name}-*.safetensors"))


def test_it_learns_shows_and_can_be_painted_with_at_once(files):
    end, messages = queue(files, graph(name="whole-way"))
    assert end == "execution_success"
    steps = [d["value"] for kind, d in messages if kind == "progress" and d["node"] == "distil"]
    assert steps[-1] == 4 and steps == sorted(steps)
    pictures = [data for kind, data in messages if kind == PICTURE]
    assert any(b"\xff\xd8\xff" in data[:64] for data in pictures), "no JPEG preview arrived"
    texts = [data.decode(errors="replace") for kind, data in messages if kind == TEXT]
    assert any("step 4 of 4" in text and "ink" in text for text in texts)
    executed = {d["node"]: d["output"] for kind, d in messages if kind == "executed"}
    assert files.image(executed["show"]["images"][0]).size == (128, 128)
    assert files.image(executed["loss"]["images"][0]).size[0] > 100
    assert "eps error" in executed["distil"]["text"][0]
    (path,) = saved(files, "whole-way")
    learnt = load_checkpoint(path)
    assert [s.name for s in learnt.styles] == list(TEACHERS) and learnt.recipe["steps_done"] == 4
    assert learnt.text and learnt.vae and learnt.num_styles == 2
    base = load_checkpoint(files.base / "models" / "dmm" / "whole.safetensors")
    for key in base.text:  # the host holds text encoders in float16
        torch.testing.assert_close(learnt.text[key].float(), base.text[key], rtol=2**-11, atol=1e-7)
    assert all(torch.equal(learnt.vae[k].float(), base.vae[k].float()) for k in base.vae)


def test_cancel_keeps_what_was_learnt_and_the_same_graph_goes_on(files):
    """Interrupted like the user's cancel button does, then queued again: in the end the same weights as in one go."""
    asked = []

    def cancel(message):
        kind, data = message
        if kind == "progress" and data["node"] == "distil" and data["value"] >= 3 and not asked:
            asked.append(data["value"])
            files.interrupt()

    end, _ = queue(files, graph(steps=40, name="cancelled", preview_every=0, save_every=1000), cancel)
    assert end == "execution_interrupted" and asked
    (path,) = saved(files, "cancelled")
    part = load_checkpoint(path).recipe["steps_done"]
    assert 3 <= part < 40
    (run,) = (files.base / "output" / "dmm_runs").glob("cancelled-????????")
    assert [p.name for p in states(run)] == [f"state-{part:08d}.safetensors"]

    end, messages = queue(files, graph(steps=40, name="cancelled", preview_every=0, save_every=1000))
    assert end == "execution_success"
    first = next(d["value"] for kind, d in messages if kind == "progress" and d["node"] == "distil")
    assert first == part + 1
    assert saved(files, "cancelled") == [path]
    assert load_checkpoint(path).recipe["steps_done"] == 40

    end, _ = queue(files, graph(steps=40, name="straight", preview_every=0, save_every=1000))
    (other,) = saved(files, "straight")
    one, two = load_checkpoint(path).unet, load_checkpoint(other).unet
    assert all(torch.equal(one[k], two[k]) for k in one)


def merged_first(merge_of=(0, 1), **settings) -> dict:
    """The same graph, with Merge Checkpoints to DMM before it, whose MODEL is the base; ``merge_of``: its teachers."""
    g = graph(**settings)
    merge = {"base": ["whole", 0], "clip": ["whole", 1], "vae": ["whole", 2], "budget": "80%"}
    merge["name"] = "merged-" + "-".join(map(str, merge_of))  # other tests merge in another order
    merge |= {f"teachers.teacher{socket}": [f"teacher {i}", 0] for socket, i in enumerate(merge_of)}
    g["merge"] = {"class_type": "DMMMerge", "inputs": merge}
    g["distil"]["inputs"]["base"] = ["merge", 0]
    return g


def test_a_merged_model_goes_on(files):
    """Merge -> Distill Teachers -> picture: the student begins as the merged model, keeps the order of its styles and tells where it is
    from; the sockets of the second node have the teachers in another order."""
    end, messages = queue(
        files, merged_first((1, 0), steps=2, learning_rate=1e-6, name="after-merge", trainable="bank")
    )
    assert end == "execution_success", messages[-1]
    (path,), (merged,) = saved(files, "after-merge"), saved(files, "merged-1-0")
    before, after = load_checkpoint(merged), load_checkpoint(path)
    assert [style.name for style in after.styles] == [style.name for style in before.styles] == [*reversed(TEACHERS)]
    assert [style.sha256 for style in after.styles] == [style.sha256 for style in before.styles]
    assert after.unet.keys() == before.unet.keys() and after.recipe["train"]["trainable"] == "bank"
    assert [entry["styles"] for entry in after.recipe["history"]] == [[*reversed(TEACHERS)]]
    changed = set()
    for key, weight in after.unet.items():  # two steps of 1e-6, and a file in half precision
        assert (weight.float() - before.unet[key].float()).abs().max() < 2e-3 * before.unet[
            key
        ].float().abs().max() + 1e-5, key
        changed |= set() if torch.equal(weight, before.unet[key]) else {key.split(".")[0]}
    assert "style_bank" in changed and changed <= {"style_bank", "model_embedding", "add_embedding"}
    executed = {d["node"]: d["output"] for kind, d in messages if kind == "executed"}
    assert files.image(executed["show"]["images"][0]).size == (128, 128)
    table = executed["distil"]["text"][0].split("eps error against each teacher\n")[1].splitlines()
    columns = table[0].split()
    numbers = dict(zip(columns, table[-1].split(), strict=False))
    assert columns[1:3] == ["DMM", "merged"] and abs(float(numbers["merged"]) - float(numbers["DMM"])) < 0.01 * float(
        numbers["base"]
    )


def test_a_merged_model_without_a_teacher_is_named(files):
    g = merged_first(name="no-teacher")
    del g["distil"]["inputs"]["teachers.teacher1"]
    with pytest.raises(NodeError, match=f"no teacher for {TEACHERS[1]}. Its styles are {TEACHERS[0]}, {TEACHERS[1]}"):
        files.run(g)


def test_a_lora_on_a_teacher_is_part_of_it(files):
    """The trainer's copy of a patched MODEL is what the host itself would paint with."""
    import comfy.lora
    import comfy.model_management
    import comfy.sd
    from comfyui_dmm.nodes import host_model
    from comfyui_dmm.nodes.weights import unet_weights

    model, *_ = host_model.load(str(files.base / "models" / "dmm" / "a.safetensors"))
    key = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
    rank = torch.Generator().manual_seed(0)
    name = "lora_unet_" + key.replace(".", "_")
    lora = {
        f"{name}.lora_down.weight": torch.randn(2, 64, generator=rank),
        f"{name}.lora_up.weight": torch.randn(64, 2, generator=rank),
        f"{name}.alpha": torch.tensor(1.0),
    }
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    plain = dict(random_unet(PLAIN, 1).state_dict())
    want = plain[f"{key}.weight"] + 0.7 * 0.5 * lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]
    for load_it in (False, True):
        if load_it:
            comfy.model_management.load_models_gpu([patched])
        got = unet_weights(patched)
        torch.testing.assert_close(got[f"{key}.weight"], want, atol=1e-5, rtol=0)
        assert got.keys() == plain.keys()
        assert all(torch.equal(got[k], plain[k]) for k in plain if k != f"{key}.weight")
        assert all(torch.equal(unet_weights(model)[k], plain[k]) for k in plain)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())


@pytest.mark.parametrize(
    "change, node, message",
    [
        ({"names": ("ink", " INK ")}, "distil", "are the same style name"),
        ({"names": ("ink", "none")}, "teacher 1", "cannot be called 'none'"),
        ({"names": ("ink", "  ")}, "teacher 1", "is empty"),
        ({"models": ("a", "odd")}, "distil", "'<b>neon</b>' has model_channels 64 instead of 32"),
        ({"name": "../up"}, "distil", "plain file name"),
        ({"learning_rate": 5.0}, "distil", "learning_rate"),
    ],
)
def test_mistakes_show_on_the_node(files, change, node, message):
    with pytest.raises(NodeError, match=message.replace("(", r"\(")) as caught:
        files.run(graph(**{"name": "mistake", **change}))
    assert caught.value.node == node
    assert not saved(files, "mistake") and not list((files.base / "output").glob("dmm_runs/mistake-*"))


def test_fewer_captions_than_pictures(files):
    g = graph(name="mistake")
    g["one text"] = {"class_type": "PrimitiveString", "inputs": {"value": "a red star"}}
    g["distil"]["inputs"]["captions"] = ["one text", 0]
    with pytest.raises(NodeError, match="1 captions for 8 pictures"):
        files.run(g)
    g["one text"]["inputs"]["value"] = " "
    g["scenes"]["inputs"]["count"] = 8
    with pytest.raises(NodeError, match="captions"):
        files.run(g)
