"""Evaluate DMM and Identify Style in a real ComfyUI."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.evaluation.baselines import make_baselines
from comfyui_dmm.training.evaluation.model_ref import ModelRef
from comfyui_dmm.training.teachers.teacher import Teacher

from .families import DEMO, NAMES, SMALL_SDXL, checkpoint_of, random_unet
from .server import NodeError
from .test_distill_host import queue

DMM = dataclasses.replace(DEMO, num_styles=3)
PLAIN = dataclasses.replace(DEMO, num_styles=0)
DEMO_MODELS = Path(__file__).parents[2] / "models" / "dmm"
PROMPTS = ["a red star", "an orange cat"]


@pytest.fixture(scope="module")
def files(server):
    folder = server.base / "models" / "dmm"
    save_checkpoint(folder / "eval-dmm.safetensors", checkpoint_of(random_unet(DMM, 0), whole=True))
    for i, name in enumerate(("x", "y"), start=1):
        save_checkpoint(folder / f"eval-{name}.safetensors", checkpoint_of(random_unet(PLAIN, i)))
    return server


def load(name: str) -> dict:
    return {"class_type": "DMMLoadModel", "inputs": {"ckpt_name": f"{name}.safetensors"}}


def graph(names=NAMES[:2], models=("eval-x", "eval-y"), student="eval-dmm", **settings) -> dict:
    """Two teachers under two of the model's three names -> Evaluate DMM -> a picture."""
    g = {"dmm": load(student)}
    inputs = {
        "model": ["dmm", 0], "clip": ["dmm", 1], "vae": ["dmm", 2], "prompts": "\n".join(PROMPTS), "count": 6, "width": 64,
        "height": 64, "steps": 2, "cfg": 2.0, "seed": 0, "distances": "KID", "features": "auto", "project": 0, "resamples": 3,
        "bins": 2, "own_pictures": 2, "own_draws": 3, "precision": "auto", **settings,
    }  # fmt: skip
    for i, (name, model) in enumerate(zip(names, models)):
        g[f"load {i}"] = load(model)
        g[f"teacher {i}"] = {"class_type": "DMMTeacher", "inputs": {"model": [f"load {i}", 0], "name": name}}
        inputs[f"teachers.teacher{i}"] = [f"teacher {i}", 0]
    g["evaluate"] = {"class_type": "DMMEvaluate", "inputs": inputs}
    g["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["evaluate", 0]}}
    return g


def report_of(outputs) -> str:
    return outputs["evaluate"]["text"][0]


def saved(server) -> list[Path]:
    return sorted((server.base / "output" / "dmm_evaluations").glob("*/evaluation.json"))


def newest(server) -> dict:
    return json.loads(max(saved(server), key=lambda p: p.stat().st_mtime_ns).read_text(encoding="utf-8"))


def parts(server) -> dict[str, int]:
    return {
        p.name: p.stat().st_mtime_ns
        for p in (server.base / "output" / "dmm_evaluations" / "parts").glob("*.safetensors")
    }


LONG = {"count": 40, "steps": 16}
"""Work of several seconds, so that a cancel comes in the middle of it on a busy machine too."""


def test_cancel_keeps_what_is_painted_and_the_same_graph_goes_on(files):
    """Cancelled in the middle, queued again: the parts that were there are not painted again; the headless command says the same."""
    asked, earlier, others = [], parts(files), saved(files)  # other tests of this server evaluate, too
    work = {**LONG, "seed": 1}  # not theirs, or its parts might be there

    def cancel(message):
        kind, data = message
        if kind == "progress" and data["node"] == "evaluate" and not asked and parts(files).keys() - earlier:
            asked.append(data["value"])
            files.interrupt()

    end, _ = queue(files, graph(**work), cancel)
    assert end == "execution_interrupted" and asked and saved(files) == others
    before = parts(files)
    assert before.keys() > earlier.keys()
    end, messages = queue(files, graph(**work))
    assert end == "execution_success", messages[-1]
    after = parts(files)
    assert len(after) > len(before) and all(after[name] == when for name, when in before.items())
    values = [(d["value"], d["max"]) for kind, d in messages if kind == "progress" and d["node"] == "evaluate"]
    assert values[-1][0] == values[-1][1]
    outputs = {d["node"]: d["output"] for kind, d in messages if kind == "executed"}
    assert "EXCESS" in report_of(outputs) and "PAIR" in report_of(outputs) and NAMES[1] in report_of(outputs)
    assert min(files.image(outputs["show"]["images"][0]).size) > 300
    (path,) = set(saved(files)) - set(others)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["names"] == NAMES[:2] and found["kid"]["count"] == 40

    folder, out = files.base / "models" / "dmm", files.base / "headless"
    teachers = [f"--teacher={name}={folder / f'eval-{x}.safetensors'}" for name, x in zip(NAMES, ("x", "y"))]
    (files.base / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    settings = (
        "--count 40 --size 64x64 --steps 16 --cfg 2 --metrics kid pair eps own --resamples 3 --bins 2 --own-pictures 2 --own-draws 3"
    ).split()
    command = [
        "evaluate",
        str(folder / "eval-dmm.safetensors"),
        *teachers,
        "--prompts",
        str(files.base / "prompts.txt"),
        *settings,
        "--seed=1",
    ]
    assert main([*command, "--device", "cpu", "--output", str(out)]) == 0
    ours = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    # The host holds text encoders in half precision: the same pictures to three digits, and so the same figures to two.
    np.testing.assert_allclose(found["pair"]["table"], ours["pair"]["table"], rtol=0.03)
    np.testing.assert_allclose(found["eps"]["errors"], ours["eps"]["errors"], rtol=0.03)
    scale = np.abs(ours["kid"]["m"]).max()
    np.testing.assert_allclose(found["kid"]["m"], ours["kid"]["m"], atol=0.05 * scale)


def test_another_evaluation_finds_the_teachers_pictures(files):
    files.run(graph(**LONG))  # in random order this may be the first test
    before = parts(files)
    torch.manual_seed(0)
    other = checkpoint_of(random_unet(DMM, 9), whole=True)
    save_checkpoint(files.base / "models" / "dmm" / "eval-other.safetensors", other)
    outputs = files.run(graph(**LONG, student="eval-other"))
    after = parts(files)
    assert all(after[name] == when for name, when in before.items()) and "EXCESS" in report_of(outputs)
    latents = {n for n in after if n not in before}
    # 40 pictures in 3 parts: the student's latents and features (12), its eps (2), its judgements (2); none of the teachers'.
    assert len(latents) == 16


def test_it_follows_the_loras_of_a_teacher(files):
    """The weights that the MODEL paints with count: another strength is another teacher."""
    before = parts(files)
    g = graph(count=4, own_pictures=1)
    g["merged"] = {
        "class_type": "ModelMergeSimple",
        "inputs": {"model1": ["load 0", 0], "model2": ["load 1", 0], "ratio": 0.5},
    }
    g["teacher 0"]["inputs"]["model"] = ["merged", 0]
    files.run(g)
    merged = newest(files)
    files.run(graph(count=4, own_pictures=1))
    plain = newest(files)
    assert merged["members"]["student"] == plain["members"]["student"]
    assert merged["members"][f"teacher {NAMES[0]}"] != plain["members"][f"teacher {NAMES[0]}"]
    assert merged["pair"]["own"][0]["value"] != plain["pair"]["own"][0]["value"]
    assert merged["pair"]["own"][1]["value"] == plain["pair"]["own"][1]["value"]
    assert before.keys() < parts(files).keys()


def test_an_sdxl_model_without_a_feature_network(files):
    folder = files.base / "models" / "dmm"
    config = dataclasses.replace(SMALL_SDXL, num_styles=2)
    save_checkpoint(folder / "eval-xl.safetensors", checkpoint_of(random_unet(config, 0), whole=True))
    plain = dataclasses.replace(config, num_styles=0, style_mlp="add_embedding")
    save_checkpoint(folder / "eval-xl-a.safetensors", checkpoint_of(random_unet(plain, 1)))
    g = graph(NAMES[:1], ["eval-xl-a"], "eval-xl", features="none", count=2, own_pictures=1, bins=1)
    g["evaluate"]["inputs"]["base"] = ["load 0", 0]
    text = report_of(files.run(g))
    assert "KID and FID are left out" in text and "PAIR" in text and "of the base's" in text


def test_baselines_stand_in_the_same_table(files):
    """All of them with a base, in the headless command's figures; without one those that need none, and a word about the others."""
    few = {"count": 4, "own_pictures": 1, "distances": "none", "rank": 2}
    g = graph(**few, baselines=True)
    folder = files.base / "models" / "dmm"
    save_checkpoint(folder / "eval-base.safetensors", checkpoint_of(random_unet(PLAIN, 5)))
    g["load base"] = load("eval-base")
    g["evaluate"]["inputs"]["base"] = ["load base", 0]
    text = report_of(files.run(g))
    found = newest(files)
    names = [row["name"] for row in found["compared"]]
    teachers = [f"teacher {name}" for name in NAMES[:2]]
    assert names == ["base", "untrained", "soup", "chain", "task vectors", "low-rank bank", *teachers]
    assert "| low-rank bank |" in text and "lambda = " in text and "left out:" not in text

    (files.base / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    given = [f"--teacher={name}={folder / f'eval-{x}.safetensors'}" for name, x in zip(NAMES, ("x", "y"))]
    settings = (
        "--count 4 --size 64x64 --steps 2 --cfg 2 --metrics pair eps own --resamples 3 --bins 2 --own-pictures 1 --own-draws 3 --rank 2"
    ).split()
    out = files.base / "headless-baselines"
    more = ["--prompts", str(files.base / "prompts.txt"), "--base", str(folder / "eval-base.safetensors")]
    command = ["evaluate", str(folder / "eval-dmm.safetensors"), *given, *more, *settings]
    assert main([*command, "--baselines", "all", "--device", "cpu", "--output", str(out)]) == 0
    ours = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    headless = [row for row in ours["compared"] if row["name"] != "merge"]  # the node leaves it out
    for theirs, mine in zip(found["compared"], headless, strict=True):
        assert theirs["name"] == mine["name"]
        for metric in ("pair", "eps", "eps_share"):
            values = [[figure["value"] for figure in row[metric]["own"]] for row in (theirs, mine)]
            np.testing.assert_allclose(*values, rtol=0.03, atol=1e-6)

    text = report_of(files.run(graph(**few, baselines=True)))
    assert "Baselines that are left out" in text and "- task-vectors: needs the base model" in text
    assert [row["name"] for row in newest(files)["compared"]] == ["soup", "chain", "low-rank bank", *teachers]
    report_of(files.run(graph(**few)))
    assert newest(files)["compared"] == []


def test_merges_are_the_hosts(host):
    """ModelMergeSimple in a row; the mean by its ratios 1/2, 2/3; base + lambda * differences by ModelSubtract and ModelAdd: 1e-5."""
    import comfy_extras.nodes_model_merging as merging
    from comfyui_dmm.nodes import host_model
    from comfyui_dmm.nodes.evaluate import model_ref
    from comfyui_dmm.nodes.teacher import TeacherInput
    from comfyui_dmm.nodes.weights import unet_weights

    with torch.inference_mode():
        models = [host_model.build_model(checkpoint_of(random_unet(PLAIN, seed))) for seed in range(4)]
        simple, add, subtract = merging.ModelMergeSimple(), merging.ModelAdd(), merging.ModelSubtract()
        base, *teachers = models
        chain, mean, tasks = teachers[0], teachers[0], base
        for k, other in enumerate(teachers[1:], start=1):
            (chain,) = simple.merge(chain, other, ratio=0.5)
            (mean,) = simple.merge(mean, other, ratio=k / (k + 1))
        for other in teachers:
            (vector,) = subtract.merge(other, base, multiplier=0.5)
            (tasks,) = add.merge(tasks, vector)
    states = torch.zeros(3, 7, PLAIN.context_dim)
    with torch.inference_mode(False), torch.no_grad():
        student = Teacher("student", random_unet(DMM, 9), states)
        named = [TeacherInput(name, one) for name, one in zip(("base", *NAMES), models)]
        first, *others = [model_ref(one, student, None, PROMPTS) for one in named]
        found = make_baselines(("soup", "chain", "task-vectors"), ModelRef.of(student, 3), NAMES, others, base=first)
        made = {one.name: one for one in found}
        made["task vectors"] = made["task vectors"].tuning.merged(0.5)
        for name, theirs in (("chain", chain), ("soup", mean), ("task vectors", tasks)):
            got, want = made[name].painters[0][0].open().unet.state_dict(), unet_weights(theirs)
            assert got.keys() == want.keys()
            for key, value in want.items():
                torch.testing.assert_close(got[key], value.float(), atol=1e-5, rtol=0, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["oil"], "models": ["eval-x"]}, "no style of the student is called 'oil'"),
        ({"baselines": True, "rank": 0}, "rank"),
        ({"distances": "FID and KID"}, "at least 225 pictures a style, 6 are asked for"),
        ({"models": ("eval-x", "eval-dmm")}, "itself a DMM model"),
        ({"prompts": " \n"}, "no prompts"),
        ({"width": 72}, "multiple of 16"),
        ({"student": "eval-x"}, "has no styles|carries no"),
    ],
)
def test_what_does_not_fit_is_explained_on_the_node(files, changes, message):
    with pytest.raises(NodeError, match=message) as error:
        files.run(graph(**changes))
    assert error.value.node == "evaluate"


# --- Identify Style ---------------------------------------------------------------------------------------------------


def identify_graph(**inputs) -> dict:
    return {
        "dmm": load("demo-dmm"),
        "identify": {
            "class_type": "DMMIdentifyStyle",
            "inputs": {
                "model": ["dmm", 0],
                "clip": ["dmm", 1],
                "caption": "",
                "draws": 24,
                "with_none": True,
                "seed": 0,
                **inputs,
            },
        },
    }


def painted_by(name: str, text="a big blue house, hills", batch=1) -> dict:
    """A demo teacher paints with the host's own nodes -> LATENT of node ``name``."""
    inputs = {"seed": 7, "steps": 12, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
    return {
        f"load {name}": load(f"demo-teacher-{name}"),
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["dmm", 1], "text": text}},
        "nothing": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["dmm", 1], "text": ""}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": batch}},
        name: {
            "class_type": "KSampler",
            "inputs": {
                "model": [f"load {name}", 0], "positive": ["text", 0], "negative": ["nothing", 0], "latent_image": ["empty", 0], **inputs,
            },
        },
    }  # fmt: skip


def named(outputs) -> str:
    return outputs["identify"]["text"][0].split(" (")[0]


def test_it_names_the_style_of_each_demo_teachers_picture(server):
    """At least 5 of 7; only the near-duplicates ink and pen may be taken for each other."""
    styles = [style.name for style in load_checkpoint(DEMO_MODELS / "demo-dmm.safetensors").styles]
    wrong = []
    for name in styles:
        said = named(server.run({**identify_graph(latent=[name, 0]), **painted_by(name)}))
        if said != name:
            wrong.append((name, said))
    assert len(wrong) <= 2 and all({*pair} <= {"ink", "pen"} for pair in wrong), wrong


def test_a_picture_of_any_size_and_what_follows_from_it(server):
    """A batch of pictures, decoded and enlarged by the host: a name for each, and a style that paints each in its own."""
    g = {**identify_graph(image=["large", 0], vae=["dmm", 2]), **painted_by("candy"), **painted_by("echo")}
    g["both"] = {"class_type": "LatentBatch", "inputs": {"samples1": ["candy", 0], "samples2": ["echo", 0]}}
    g["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["both", 0], "vae": ["dmm", 2]}}
    scale = {"image": ["decode", 0], "upscale_method": "bilinear", "width": 300, "height": 260, "crop": "disabled"}
    g["large"] = {"class_type": "ImageScale", "inputs": scale}
    g["styled"] = {"class_type": "DMMApplyStyle", "inputs": {"model": ["dmm", 0], "style": ["identify", 1]}}
    g["again"] = {**g["candy"], "inputs": {**g["candy"]["inputs"], "model": ["styled", 0], "latent_image": ["both", 0]}}
    g["shown"] = {"class_type": "VAEDecode", "inputs": {"samples": ["again", 0], "vae": ["dmm", 2]}}
    g["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["shown", 0]}}
    g["name"] = {"class_type": "PreviewAny", "inputs": {"source": ["identify", 0]}}
    outputs = server.run(g)
    text = outputs["identify"]["text"][0]
    assert "picture 1: candy" in text and "picture 2: echo" in text
    assert "none" in text and "standard errors" in text
    assert outputs["name"]["text"] == ["candy", "echo"] or "candy" in str(outputs["name"])
    assert len(outputs["show"]["images"]) == 2


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "connect either image"),
        ({"image": ["picture", 0]}, "an image needs the vae"),
        ({"image": ["picture", 0], "vae": ["dmm", 2], "latent": ["empty", 0]}, "connect either image"),
        ({"latent": ["empty", 0], "model": ["plain", 0]}, "has no styles"),
    ],
)
def test_what_cannot_be_identified_is_explained(server, inputs, message):
    g = identify_graph(**inputs)
    g["plain"] = load("demo-base")
    g["empty"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
    g["picture"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
    with pytest.raises(NodeError, match=message):
        server.run(g)
