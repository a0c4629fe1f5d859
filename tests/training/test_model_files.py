"""One reader for every layout: the same model, the same words about it, the same digests; headers alone tell them."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core import weights_file
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.config import DataSpec, DistillConfig, TeacherSpec, TrainConfig
from comfyui_dmm.training.config_file import load_config
from comfyui_dmm.training.files.convert import convert
from comfyui_dmm.training.files.describe import describe
from comfyui_dmm.training.files.model_files import (
    CONFIG,
    WEIGHTS,
    add_parts,
    change_stamp,
    layout_of,
    load_any,
    load_any_info,
    model_sha256,
    weight_files,
)
from comfyui_dmm.training.files.style_file import read_style_file, style_digest, unet_digest
from comfyui_dmm.training.run.load import load_run
from PIL import Image
from safetensors.torch import load_file, save_file

from .test_convert import SD1, SDXL, checkpoint, saved, shipped_without_bank

DEMO = Path(__file__).parents[2] / "models" / "dmm"


@pytest.fixture(scope="module", params=[SD1, SDXL], ids=["SD1", "SDXL"])
def layouts(request, tmp_path_factory):
    """The same UNet in every layout -> {name: path}; "style" holds its styles alone."""
    folder = tmp_path_factory.mktemp("layouts")
    history = [{"steps": 3, "train": {"lr": 0.5}}, {"steps": 4}]
    single = saved(
        folder / "single.safetensors", request.param, prediction="v", recipe={"steps": 9, "history": history}
    )
    (folder / "pipeline").mkdir()
    for to, target in (("diffusers", "unet"), ("diffusers", "pipeline/unet"), ("style", "style.safetensors")):
        convert(single, folder / target, to)
    return {
        "single": single,
        "file": folder / "unet" / WEIGHTS,
        "unet": folder / "unet",
        "pipeline": folder / "pipeline",
        "style": folder / "style.safetensors",
    }


def models(layouts) -> list[Path]:
    return [path for name, path in layouts.items() if name != "style"]


def rows(report: str) -> dict[str, str]:
    return {line[:14].strip(): line[14:] for line in report.split("\n\n")[0].split("\n")}


def test_the_header_tells_all_but_the_weights(layouts, monkeypatch):
    whole = [load_any(path) for path in models(layouts)]
    opened, real = [], weights_file.safe_open
    monkeypatch.setattr(
        weights_file, "safe_open", lambda path, framework: opened.append(framework) or real(path, framework)
    )
    for path, expected in zip(models(layouts), whole):
        info = load_any_info(path)
        assert all(tensor.is_meta for tensor in info.tensors.values())
        assert {k: (v.shape, v.dtype) for k, v in info.unet.items()} == {
            k: (v.shape, v.dtype) for k, v in expected.unet.items()
        }
        assert (info.styles, info.recipe, info.metadata) == (expected.styles, expected.recipe, expected.metadata)
        assert (info.prediction, info.zero_snr) == ("v", False)
        describe(path, digest=False)
    read_style_file(layouts["style"], header_only=True)
    assert set(opened) == {"np"}  # as torch it maps all of the file


def test_the_report_of_every_layout(layouts):
    reports = {name: describe(path) for name, path in layouts.items()}
    heads = {name: rows(report) for name, report in reports.items()}
    unet, style = load_checkpoint(layouts["single"]).unet, load_any(layouts["unet"]).unet
    for name, head in heads.items():
        assert head["of styles"] == style_digest(unet if name in ("single", "style") else style)
        assert head["made for UNet" if name == "style" else "of the UNet"] == unet_digest(unet)
        assert head["sha256"] == model_sha256(layouts[name]) and head["prediction"] == "v"
        styles = reports[name].split("\n\n")[1:]
        assert styles[0].startswith("styles\n   0  ink") and "../../etc/passwd" in styles[0]
        recipe = styles[1].split("\n")
        assert recipe == [
            *("recipe", "  steps: 9", "  history.0.steps: 3", "  history.0.train.lr: 0.5", "  history.1.steps: 4")
        ]
    assert [heads[name]["layout"] for name in layouts] == [
        *("single file", "UNet in diffusers' layout", "UNet in diffusers' layout", "pipeline folder of diffusers"),
        "styles alone",
    ]
    assert heads["style"]["kind"].startswith("3 styles of width 256")
    assert heads["unet"]["kind"] == heads["single"]["kind"] == "DMM checkpoint, 3 styles (stable-diffusion-custom)"


def test_long_lists_are_cut(tmp_path):
    path = saved(
        tmp_path / "a.safetensors", recipe={f"k{i}": i for i in range(1000)}, metadata={"x" * 1000: "y" * 1000}
    )
    report = describe(path, digest=False).split("\n")
    assert "  k299: 299" in report and "  ... and more" in report and "  k300: 300" not in report
    assert max(map(len, report)) < 700


def test_the_digest_of_a_folder_is_that_of_its_files(tmp_path):
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "unet", "diffusers")
    digest = hashlib.sha256((tmp_path / "unet" / WEIGHTS).read_bytes()).hexdigest()
    assert model_sha256(tmp_path / "unet" / WEIGHTS) == digest
    assert model_sha256(tmp_path / "unet") == hashlib.sha256(f"{digest}  {WEIGHTS}\n".encode()).hexdigest()
    assert model_sha256(tmp_path) == hashlib.sha256(f"{digest}  unet/{WEIGHTS}\n".encode()).hexdigest()
    (tmp_path / "unet" / CONFIG).unlink()  # no weights
    assert model_sha256(tmp_path / "unet") == hashlib.sha256(f"{digest}  {WEIGHTS}\n".encode()).hexdigest()


def test_a_change_of_any_file_is_seen(tmp_path):
    convert(saved(tmp_path / "a.safetensors"), tmp_path / "unet", "diffusers")
    for path, changed in ((tmp_path, tmp_path / "unet" / CONFIG), (tmp_path / "unet", tmp_path / "unet" / WEIGHTS)):
        before = change_stamp(path)
        assert change_stamp(path) == before
        changed.write_bytes(changed.read_bytes() + b" ")
        assert change_stamp(path) != before
    with pytest.raises(OSError):
        change_stamp(tmp_path / "gone")


def test_layouts_and_files(layouts, tmp_path):
    assert [layout_of(path) for path in models(layouts)] == [
        *("single file", "UNet in diffusers' layout", "UNet in diffusers' layout", "pipeline folder of diffusers")
    ]
    assert weight_files(layouts["pipeline"]) == [layouts["pipeline"] / "unet" / WEIGHTS]
    assert weight_files(layouts["single"]) == [layouts["single"]]
    with pytest.raises(ValueError, match="no .safetensors file"):
        weight_files(tmp_path)


def test_an_sd2_unet_tells_its_prediction_from_its_header(tmp_path):
    """By the spread of one bias, the only tensor that is read: 0.1, the border is at 0.09."""
    config = UNetConfig(
        model_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=(2,) * 4, depth_input=(1,) * 6 + (0,) * 2,
        depth_output=(0,) * 3 + (1,) * 9, context_dim=1024, linear_proj=True,
    )  # fmt: skip
    unet = UNet(config).state_dict()
    unet["output_blocks.11.1.transformer_blocks.0.norm1.bias"] = torch.tensor([-0.1, 0.1]).repeat(16)
    save_checkpoint(tmp_path / "a.safetensors", Checkpoint(unet))
    convert(tmp_path / "a.safetensors", tmp_path / "unet", "diffusers")
    for path in (tmp_path / "a.safetensors", tmp_path / "unet" / WEIGHTS):
        save_file(load_file(path), path)  # without metadata, as the published ones
    for path in (tmp_path / "a.safetensors", tmp_path / "unet"):
        assert load_any(path).prediction == load_any_info(path).prediction == "v"


def test_parts_are_taken_where_there_are_none():
    full = checkpoint()
    own = {"mine": torch.ones(1)}
    lent = add_parts(replace(full, text={}, other={}, vae=own), full)
    assert (lent.text, lent.other, lent.vae) == (full.text, full.other, own)


# Used by the commands


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Demo models as UNet folders."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("base", "teacher-ink"):
        convert(DEMO / f"demo-{name}.safetensors", folder / name, "diffusers")
    convert(shipped_without_bank(folder / "dmm.safetensors"), folder / "dmm", "diffusers")
    return folder


def test_dmm_sample_paints_the_same_from_a_folder(demo, tmp_path, capsys):
    whole = str(demo / "dmm.safetensors")
    rest = ["--prompt", "a red star", "--style", "ink", "--steps", "2", "--size", "32", "--output"]
    assert not main(["sample", whole, *rest, str(tmp_path / "a.png")])
    assert not main(["sample", str(demo / "dmm"), "--parts-from", whole, *rest, str(tmp_path / "b.png")])
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_dmm_info_of_a_folder(demo, capsys):
    assert not main(["info", str(demo / "dmm")])
    assert "DMM checkpoint, 7 styles" in capsys.readouterr().out


def test_a_run_is_loaded_from_folders(demo, tmp_path):
    train = TrainConfig(steps=1, batch_size=1)

    def run_of(base, teacher):
        spec = TeacherSpec("ink", str(teacher))
        config = DistillConfig(
            base=str(base),
            teachers=[spec],
            output="x.safetensors",
            run_dir=str(tmp_path / "run"),
            parts_from=str(DEMO / "demo-dmm.safetensors"),
            data=DataSpec(count=2),
            train=train,
        )
        config.check()
        return load_run(config, torch.device("cpu"))

    files = run_of(DEMO / "demo-base.safetensors", DEMO / "demo-teacher-ink.safetensors")
    folders = run_of(demo / "base", demo / "teacher-ink")
    for one, other in ((files.base, folders.base), (files.teachers[0], folders.teachers[0])):
        assert one.weights_sha256 == other.weights_sha256
        assert torch.equal(one.contexts[:], other.contexts[:])
    teacher = folders.teachers[0]
    assert (teacher.file, teacher.sha256) == ("teacher-ink", model_sha256(demo / "teacher-ink"))
    assert folders.parts.vae.keys() == files.parts.vae.keys()


def test_a_config_may_name_folders(demo, tmp_path):
    settings = {
        "base": str(demo / "base"),
        "teachers": [{"name": "ink", "file": str(demo / "teacher-ink")}],
        "parts_from": str(DEMO / "demo-dmm.safetensors"),
        "output": "x.safetensors",
        "run_dir": "run",
    }
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    assert load_config(tmp_path / "c.yaml").teachers[0].file == str(demo / "teacher-ink")
