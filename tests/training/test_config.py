"""Configs: what is read, and that every mistake is named before anything is loaded."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from comfyui_dmm.training.cli import main, parser
from comfyui_dmm.training.config import (
    SECTIONS,
    AttackConfig,
    DataSpec,
    DistillConfig,
    LoraSpec,
    TeacherSpec,
    TrainConfig,
    check_names,
)
from comfyui_dmm.training.config_file import load_config
from comfyui_dmm.training.data.rollout_paths import RolloutSettings
from comfyui_dmm.training.fields import describe
from comfyui_dmm.training.parallel.sharding import check_parallel
from comfyui_dmm.training.presets import PRESETS
from comfyui_dmm.training.yaml_file import read_yaml
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
        ({"train": {"learning_rate": 1e-4}}, "unknown setting 'learning_rate'; did you mean 'lr'"),
        ({"train": {"steps": "100"}}, "train.steps is '100': expected a whole number"),
        ({"train": None}, "train is empty: give settings under it, or leave it out"),
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
    with pytest.raises(ValueError, match="cannot read .*no.yaml"):
        load_config(tmp_path / "no.yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "base: a\ntrain:\n  lr: 1.0e-4\n  steps: 5\n  lr: 2.0e-4\n",
            r"run.yaml: 'lr' is given twice, in lines 3 and 5",
        ),
        ("base: a\nbase: b\n", r"run.yaml: 'base' is given twice, in lines 1 and 2"),
        ("teachers:\n  - {name: A, file: a, name: B}\n", r"run.yaml: 'name' is given twice, in lines 2 and 2"),
        ("base: a\n  steps: 3\n", r'in "run.yaml", line 2'),
    ],
)
def test_a_setting_that_is_given_twice_is_refused_and_places_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text))


def test_what_is_merged_in_may_be_given_once_more(tmp_path):
    """A YAML merge key brings defaults: that is not giving a setting twice."""
    text = "a: &shared {steps: 3, lr: 0.1}\nb:\n  <<: *shared\n  lr: 0.2\n"
    assert read_yaml(write(tmp_path, text))["b"] == {"steps": 3, "lr": 0.2}


def test_the_shipped_demo_config_is_complete():
    from pathlib import Path

    import comfyui_dmm.training as training

    config = load_config(Path(training.__file__).parent / "configs" / "demo.yaml")
    assert len(config.teachers) == 7


def test_a_preset_has_no_say_in_the_start_of_a_model_that_goes_on(tmp_path, good):
    path = write(tmp_path, {**good, "train": {"preset": "standard", "guard": 0.25}})
    assert load_config(path).train.init == "bank"
    grown = load_config(path, grown=True).train
    assert grown.init == "base" and grown.guard == 0.25 and grown.sampling == "adaptive"
    path = write(tmp_path, {**good, "train": {"preset": "standard", "init": "soup"}})
    assert load_config(path, grown=True).train.init == "soup"  # what is said is said, and refused later


def test_names():
    check_names(["x", "y"])
    TrainConfig().check()


# --- the fields -------------------------------------------------------------------------------------------------------

TRAIN_JSON = (
    '{"steps": 100000, "batch_size": 8, "accumulate": 1, "lr": 1e-05, "style_lr_scale": 1.0, "lr_schedule": "constant", "warmup": 0, '
    '"optimizer": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.01, "grad_clip": 1.0, "lambda_feat": 0.001, "lambda_adv": 0.01, '
    '"adv_lr": 1e-05, "adv_start": 0, "caption_dropout": 0.1, "base_share": 0.05, "loss_weight": "plain", "loss_clamp": 5.0, '
    '"sampling": "uniform", "adaptive_power": 1.0, "adaptive_floor": 0.25, "adaptive_correct": true, "guard": 0.5, "warm_start": 0, '
    '"growth": "2%", '
    '"final_steps": 0, "final_images": 1500, "final_lr": null, "final_cfg": 7.0, "final_sampling_steps": 25, "init": "base", '
    '"bank": "10%", '
    '"trainable": "all", "lora_rank": 32, "ema_gamma": null, "ema_device": "auto", "precision": "fp32", "teacher_dtype": "auto", '
    '"residency": "auto", "teacher_slots": 2, "teachers_per_step": "all", "bus_speed": 20.0, "step_seconds": null, "memory": "auto", '
    '"gradient_checkpointing": false, "compile": false, "parallel": "ddp", '
    '"tf32": true, "seed": 0, "device": "auto", "save_every": 500, "keep": 2, "validation": 64}'
)
"""What the defaults were in runs that were written before the fields had their documentation."""


def test_the_json_of_a_configuration_stays():
    assert json.dumps(dataclasses.asdict(TrainConfig())) == TRAIN_JSON
    assert json.dumps(dataclasses.asdict(AttackConfig())) == '{"every": 25, "steps": 10, "codes": 3, "check": 100}'
    assert json.dumps(dataclasses.asdict(DataSpec())) == '{"kind": "demo_scenes", "file": "", "count": 600, "seed": 0}'


@pytest.mark.parametrize(
    "cls", [RolloutSettings, DistillConfig, TeacherSpec, LoraSpec, DataSpec, TrainConfig, AttackConfig]
)
def test_every_field_says_what_it_is(cls):
    for row in describe(cls):
        assert row.doc.endswith(".") and row.values and "|" not in row.doc + row.values + row.unit


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainConfig)])
def test_every_setting_refuses_what_is_no_value_of_it(name):
    """Of every field: an object, and what is false in YAML ("no") where that is not meant."""
    for wrong in ({"a": 1}, [], float("nan"), *(() if isinstance(getattr(TrainConfig(), name), bool) else (False,))):
        with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(wrong))}: (expected|choose one of) "):
            TrainConfig(**{name: wrong}).check()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": True}, "steps is True: expected a whole number from 1"),
        ({"warmup": -1}, "warmup is -1: expected 0 or more"),
        ({"seed": 1.5}, "seed is 1.5: expected a whole number"),
        ({"lr": 0}, "lr is 0: expected a positive number"),
        ({"grad_clip": -1}, "grad_clip is -1: expected 0 or more"),
        ({"guard": 1}, "guard is 1: expected a share from 0 to below 1"),
        (
            {"adaptive_floor": 1.1},
            "adaptive_floor is 1.1: expected a share from above 0 to 1: with 0, cells that went well once would never be seen again",
        ),
        ({"betas": (0.9, 1)}, "betas is (0.9, 1): expected two numbers from 0 to below 1, as in [0.9, 0.99]"),
        ({"betas": (0.9,)}, "betas is (0.9,): expected two numbers from 0 to below 1, as in [0.9, 0.99]"),
        ({"betas": 0.9}, "betas is 0.9: expected two numbers from 0 to below 1, as in [0.9, 0.99]"),
        ({"teacher_slots": 3}, "teacher_slots is 3: expected 1 or 2"),
        ({"memory": "8"}, "memory is '8': expected GB, auto or off"),
        ({"ema_gamma": 0}, "ema_gamma is 0: expected > 0 or null"),
        ({"compile": 1}, "compile is 1: expected true or false"),
        ({"tf32": "yes"}, "tf32 is 'yes': expected true or false"),
        ({"optimizer": None}, "optimizer is None: choose one of adamw, adamw8bit, adafactor, muon"),
    ],
)
def test_the_words_of_an_error(settings, message):
    with pytest.raises(ValueError) as error:
        TrainConfig(**settings).check()
    assert str(error.value) == message


def test_what_is_within_the_bounds_passes():
    TrainConfig(adaptive_floor=1, guard=0, grad_clip=0, betas=(0, 0.5), memory=0.5, final_lr=1e-9, seed=-3).check()
    AttackConfig(1, 1, 0, 0).validate()
    with pytest.raises(ValueError, match="^attack.steps is 0: expected a whole number from 1$"):
        AttackConfig(steps=0).validate()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base": 5}, "base is 5, which YAML reads as a number: expected text, put it into quotes: '5'"),
        ({"title": 2024}, "title is 2024, which YAML reads as a number: expected text, put it into quotes: '2024'"),
        ({"teachers": None}, "teachers is None: expected a list, see teachers"),
        (
            {"teachers": [{"name": 5, "file": "a.safetensors"}]},
            r"teachers\[0\].name is 5, which YAML reads as a number: expected text, put it into quotes: '5'",
        ),
        ({"data": {"count": 0}}, "data.count is 0: expected a whole number from 1"),
        (
            {"data": {"kind": "cache", "file": 7}},
            "data.file is 7, which YAML reads as a number: expected text, put it into quotes: '7'",
        ),
        ({"attack": {"codes": -1}}, "attack.codes is -1: expected a whole number from 0"),
        ({"train": {"tf32": "maybe"}}, "train.tf32 is 'maybe': expected true or false"),
    ],
)
def test_values_of_a_wrong_kind_in_a_file(tmp_path, good, change, message):
    with pytest.raises(ValueError, match=f"^run.yaml: {message}$"):
        load_config(write(tmp_path, {**good, **change}))


def test_nothing_behind_a_key_is_the_empty_text(tmp_path, good):
    """As "parts_from:" in a file."""
    teachers = [{**good["teachers"][0], "description": None}]
    config = load_config(write(tmp_path, {**good, "teachers": teachers, "parts_from": None}))
    assert config.parts_from == "" and config.teachers[0].description == ""


def test_the_tables_of_the_docs_are_those_of_the_fields(capsys):
    """When this fails: paste what `dmm distill --list-settings` prints between the two marks in docs/training.md."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (inside,) = re.findall(r"<!-- dmm distill --list-settings -->\n(.*)\n<!-- end -->", page, re.DOTALL)
    with pytest.raises(SystemExit) as end:
        main(["distill", "--list-settings"])
    assert end.value.code in (None, 0) and capsys.readouterr().out.strip() == inside.strip()
    rows = {line.split("`")[1] for line in inside.splitlines() if line.startswith("| `")}
    assert rows == {f.name for cls in SECTIONS.values() for f in dataclasses.fields(cls)}


def test_the_options_of_rollouts_are_their_settings():
    command = [
        "cache",
        "rollouts",
        "--captions",
        "c.txt",
        "--base",
        "b",
        "--output",
        "o",
        "--teacher",
        "a=a.safetensors",
    ]
    found = vars(parser().parse_args(command))
    plain = dataclasses.asdict(RolloutSettings())
    assert plain.pop("sizes") == () and found["size"] is None
    assert {name: found[name] for name in plain} == plain
    given = parser().parse_args([*command, "--base-share", "0.2", "--batch-size", "3", "--sampler", "ddim"])
    assert (given.base_share, given.batch_size, given.sampler) == (0.2, 3, "ddim")
    json_before = (
        '{"paths": 400, "base_share": 0.05, "states": 5, "sizes": [], "steps": 25, "cfg": 7.0, "sampler": "dpmpp_2m", '
        '"scheduler": "sgm_uniform", "seed": 0, "batch_size": 8, "precision": "fp32"}'
    )
    assert json.dumps(dataclasses.asdict(RolloutSettings())) == json_before, "caches name their settings"


def test_several_processes_need_a_newer_torch_than_one(monkeypatch):
    def with_torch(version, processes):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        check_parallel(TrainConfig(), processes)

    with_torch("2.4.0", 1), with_torch("2.9.0+cu128", 2), with_torch("2.11.0", 2)
    with pytest.raises(ValueError, match="torch is 2.8.0.cu128.*use torch 2.9 or newer, or one process"):
        with_torch("2.8.0+cu128", 2)
