"""Configs: what is read, and that every mistake is named before anything is loaded."""

import pytest
import torch
import yaml
from comfyui_dmm.training.config import TrainConfig, check_names, load_config
from comfyui_dmm.training.parallel.sharding import check_parallel
from comfyui_dmm.training.presets import PRESETS
from torch.torch_version import TorchVersion


@pytest.fixture
def good(tmp_path):
    for name in ("base", "a", "b"):
        (tmp_path / f"{name}.safetensors").touch()
    return {
        "base": "base.safetensors",
        "teachers": [{"name": "A", "file": "a.safetensors"}, {"name": "B", "file": "b.safetensors"}],
        "output": "out/x.safetensors",
        "run_dir": "out/run",
        "train": {"steps": 5, "lr": "1e-5"},
    }


def write(tmp_path, config) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return str(path)


def test_paths_are_relative_to_the_file(tmp_path, good):
    config = load_config(write(tmp_path, good))
    assert config.base == str(tmp_path / "base.safetensors") and config.teachers[1].file == str(
        tmp_path / "b.safetensors"
    )
    assert config.output == str(tmp_path / "out/x.safetensors")
    assert config.train.lr == 1e-5 and isinstance(config.train.lr, float)
    assert not (tmp_path / "out").exists()


def test_a_preset_is_what_the_file_does_not_say(tmp_path, good):
    train = {"preset": "paper", "steps": 5, "memory": 12}
    config = load_config(write(tmp_path, {**good, "train": train})).train
    assert {k: getattr(config, k) for k in PRESETS["paper"]} == {**PRESETS["paper"], "steps": 5}
    assert config.memory == 12.0 and config.all_steps == 10_005


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trian": {}}, "unknown setting 'trian'; did you mean 'train'"),
        ({"train": {"stpes": 1}}, "train has an unknown setting 'stpes'; did you mean 'steps'"),
        ({"train": {"steps": 0}}, "steps is 0"),
        ({"train": {"steps": "many"}}, "steps is 'many'"),
        ({"train": {"lr": "fast"}}, "lr is 'fast'"),
        ({"train": {"lr": float("nan")}}, "lr is nan"),
        ({"train": {"caption_dropout": 1.5}}, "caption_dropout is 1.5"),
        ({"train": {"init": "zero"}}, "init is 'zero': choose one of base, soup"),
        ({"train": {"precision": "int4"}}, "precision is 'int4'"),
        ({"data": {"kind": "web"}}, "data.kind is 'web'"),
        ({"data": {"kind": "cache"}}, "data.file is missing"),
        ({"picture_every": -1}, "picture_every is -1"),
        ({"train": {"preset": "best"}}, "preset is 'best': choose one of draft, standard, paper"),
        ({"train": {"memory": "lots"}}, "memory is 'lots': expected GB, auto or off"),
        ({"train": {"memory": 0}}, "memory is 0"),
        ({"output": "x.ckpt"}, "must end in .safetensors"),
        ({"base": "missing.safetensors"}, "base: there is no file"),
        ({"teachers": []}, "no teachers"),
        (
            {"teachers": [{"name": "A", "file": "a.safetensors"}, {"name": " a ", "file": "b.safetensors"}]},
            "same style name",
        ),
        ({"teachers": [{"name": "None", "file": "a.safetensors"}]}, "cannot be called 'none'"),
        ({"teachers": [{"name": "", "file": "a.safetensors"}]}, "is empty"),
        ({"teachers": [{"name": "A", "file": "nope.safetensors"}]}, "teacher 'A': there is no file"),
        ({"teachers": [{"name": "A"}]}, "teacher 'A' has neither a file nor loras"),
    ],
)
def test_mistakes_are_named(tmp_path, good, change, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, {**good, **change}))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "{", "\x00"])
def test_not_a_config(tmp_path, text):
    with pytest.raises(ValueError, match="run.yaml"):
        load_config(write(tmp_path, text))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="cannot read the config"):
        load_config(tmp_path / "no.yaml")


def test_the_shipped_demo_config_is_complete():
    from pathlib import Path

    import comfyui_dmm.training as training

    config = load_config(Path(training.__file__).parent / "configs" / "demo.yaml")
    assert len(config.teachers) == 7


def test_names():
    check_names(["x", "y"])
    TrainConfig().check()


def test_several_processes_need_a_newer_torch_than_one(monkeypatch):
    def with_torch(version, processes):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        check_parallel(TrainConfig(), processes)

    with_torch("2.4.0", 1), with_torch("2.8.0+cu128", 2), with_torch("2.11.0", 2)
    with pytest.raises(ValueError, match="torch is 2.7.1.cu126.*use torch 2.8 or newer, or one process"):
        with_torch("2.7.1+cu126", 2)
