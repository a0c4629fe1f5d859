"""The ``dmm`` command from files to files: distil, go on, sample, info, and what it says when something does not fit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.files import file_sha256
from comfyui_dmm.dmm_core.unet import UNet
from comfyui_dmm.dmm_core.vae import AutoencoderKL, VAEConfig
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.files.folder_lock import LOCK, locked
from comfyui_dmm.training.text import init_text
from PIL import Image
from safetensors.torch import save_file

from .families import SMALL

SHORT = {
    "steps": 4, "batch_size": 4, "lr": 1e-3, "ema_gamma": 6.94, "device": "cpu", "lambda_adv": 0.0, "validation": 4,
}  # fmt: skip
DISTILL = [sys.executable, "-m", "comfyui_dmm.training.cli", "--threads", "1", "distill", "--config"]
"""The command in a process of its own; a config comes behind it."""
WIDER = dataclasses.replace(SMALL, context_dim=64)


def unet(seed, config=SMALL):
    torch.manual_seed(seed)
    return dict(UNet(config).state_dict())


@pytest.fixture
def folder(tmp_path):
    """A base with text encoder and VAE, two teachers, 10 captioned latents and a config."""
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)).state_dict()
    text = init_text(16, 1)
    save_checkpoint(tmp_path / "base.safetensors", Checkpoint(unet=unet(0), text=text, vae=dict(vae)))
    save_checkpoint(tmp_path / "one.safetensors", Checkpoint(unet=unet(1)))
    save_checkpoint(tmp_path / "two.safetensors", Checkpoint(unet=unet(2)))
    captions = json.dumps([f"a picture of {i % 3}" for i in range(10)])
    save_file({"latents": torch.randn(10, 4, 8, 8)}, tmp_path / "data.safetensors", {"captions": captions})
    write_config(tmp_path)
    return tmp_path


def write_config(folder, **changes):
    config = {
        "base": "base.safetensors",
        "teachers": [
            {"name": "one", "file": "one.safetensors", "description": "the first"},
            {"name": "two", "file": "two.safetensors"},
        ],
        "output": "out/dmm.safetensors",
        "run_dir": "out/run",
        "data": {"kind": "latents", "file": "data.safetensors"},
        "train": SHORT,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, **changes}))


def dmm(*arguments) -> int:
    return main([str(a) for a in arguments])


def test_distil_sample_info(folder, capsys):
    assert dmm("distill", "--config", folder / "run.yaml") == 0
    path = folder / "out" / "dmm.safetensors"
    learnt = load_checkpoint(path)
    assert [s.name for s in learnt.styles] == ["one", "two"] and learnt.styles[0].description == "the first"
    assert learnt.styles[1].sha256 == file_sha256(folder / "two.safetensors")
    assert learnt.recipe["train"]["lr"] == 1e-3 and learnt.recipe["samples_seen"] == 16
    assert learnt.recipe["base"]["sha256"] == file_sha256(folder / "base.safetensors")
    resolved = json.loads((folder / "out" / "run" / "config.json").read_text())
    assert resolved["train"]["lambda_feat"] == 0.001  # a default: the resolved config has every setting
    raw = load_checkpoint(folder / "out" / "dmm-raw.safetensors")
    assert raw.unet.keys() == learnt.unet.keys() and not torch.equal(raw.unet["out.2.bias"], learnt.unet["out.2.bias"])
    log = [json.loads(line) for line in (folder / "out" / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4] and set(log[0]["score"]) <= {"one", "two", "(no style)"}
    assert (folder / "out" / "run" / "best.safetensors").exists()
    assert (folder / "out" / "run" / "pictures" / "step-00000000.png").exists()
    shown = capsys.readouterr().out
    assert '"lambda_feat": 0.001' in shown

    assert dmm("info", path) == 0
    assert "one" in capsys.readouterr().out
    picture = folder / "all.png"
    size = ("--size", 64, "--steps", 2)
    assert dmm("sample", path, "--prompt", "a", "--prompt", "b", "--style", "all", *size, "--output", picture) == 0
    assert Image.open(picture).size[0] > 128
    assert dmm("sample", path, "--prompt", "a", "--style", "tow", *size, "--output", picture) == 1
    assert "unknown style 'tow'. The styles of this model: one, two" in capsys.readouterr().err


def test_the_same_command_goes_on(folder, capsys):
    write_config(folder, train={**SHORT, "steps": 2})
    assert dmm("distill", "--config", folder / "run.yaml") == 0
    write_config(folder)
    assert dmm("distill", "--config", folder / "run.yaml") == 0
    part = load_checkpoint(folder / "out" / "dmm.safetensors")
    write_config(folder, run_dir="out/other", output="out/straight.safetensors")
    assert dmm("distill", "--config", folder / "run.yaml") == 0
    whole = load_checkpoint(folder / "out" / "straight.safetensors")
    assert part.recipe["steps_done"] == 4
    assert all(torch.equal(part.unet[k], whole.unet[k]) for k in whole.unet)


def test_dry_run_writes_nothing(folder, capsys):
    assert dmm("distill", "--config", folder / "run.yaml", "--dry-run") == 0
    assert '"steps": 4' in capsys.readouterr().out and not (folder / "out").exists()


def test_dry_run_prints_the_memory_plan_and_refuses_what_does_not_fit(folder, capsys):
    assert dmm("distill", "--config", folder / "run.yaml", "--dry-run", "--memory", "1") == 0
    assert "activations" in capsys.readouterr().out
    assert dmm("distill", "--config", folder / "run.yaml", "--dry-run", "--memory", "0.001") == 1
    assert "GB of memory at the least" in capsys.readouterr().err and not (folder / "out").exists()


def test_a_fork_begins_with_old_weights_in_a_folder_of_its_own(folder, capsys):
    assert dmm("distill", "--config", folder / "run.yaml") == 0
    old = load_checkpoint(folder / "out" / "dmm.safetensors")
    changed = {**SHORT, "lr": 1e-12, "weight_decay": 0.0, "steps": 1}
    write_config(folder, train=changed)
    assert dmm("distill", "--config", folder / "run.yaml") == 1
    assert "setting lr" in capsys.readouterr().err
    write_config(folder, train=changed, run_dir="out/second", output="out/second.safetensors")
    assert dmm("distill", "--config", folder / "run.yaml", "--fork", folder / "out" / "run") == 0
    new = load_checkpoint(folder / "out" / "second.safetensors")
    assert all(
        torch.equal(old.unet[k], new.unet[k]) for k in old.unet
    )  # the rate is too small for half precision to see
    assert (
        dmm("distill", "--config", folder / "run.yaml", "--fork", folder / "nothing") == 0
    )  # it has states of its own


def test_a_cache_of_pictures_and_rollouts_are_data(folder, capsys):
    """dmm cache, then dmm distill on it: both kinds, and a cache of another base is refused."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"red number {i}")
    base = folder / "base.safetensors"
    cache = ("cache", "images", "--images", pictures, "--base", base, "--output", folder / "cache", "--resolution", 64)
    assert dmm(*cache) == 0
    (folder / "captions.txt").write_text("red\ngreen\nblue\n")
    teachers = [x for name in ("one", "two") for x in ("--teacher", f"{name}={folder / name}.safetensors")]
    rollouts = (
        "--output",
        folder / "rolled",
        "--paths",
        4,
        "--states",
        2,
        "--steps",
        4,
        "--size",
        "64x64",
        "--base-share",
        0.2,
    )
    assert dmm("cache", "rollouts", "--captions", folder / "captions.txt", "--base", base, *teachers, *rollouts) == 0
    for kind in ("cache", "rolled"):
        write_config(
            folder, data={"kind": "cache", "file": kind}, run_dir=f"out/{kind}", output=f"out/{kind}.safetensors"
        )
        assert dmm("distill", "--config", folder / "run.yaml") == 0
    save_checkpoint(folder / "one.safetensors", Checkpoint(unet=unet(5)))
    assert dmm("distill", "--config", folder / "run.yaml") == 1
    assert "were not painted by teacher 'one'" in capsys.readouterr().err


def test_an_interrupt_keeps_what_was_learnt(folder, monkeypatch, capsys):
    import comfyui_dmm.training.commands.watched as watched

    class Impatient(watched.Bar):
        def __call__(self, run, metrics):
            if metrics.step == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(watched, "Bar", Impatient)
    assert dmm("distill", "--config", folder / "run.yaml") == 130
    assert "interrupted" in capsys.readouterr().err
    assert load_checkpoint(folder / "out" / "dmm.safetensors").recipe["steps_done"] == 2
    assert (folder / "out" / "run" / "state-00000002.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_between_steps(folder, number):
    """A real process, a real signal: exit 130, a state and a checkpoint of the same step, and the run goes on from it."""
    write_config(folder, train={**SHORT, "steps": 100_000})
    command = [*DISTILL, folder / "run.yaml"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seen = ""
    while "0%" not in seen or "/100000" not in seen:  # the bar is drawn from the first step on
        seen += child.stderr.read(1)
    child.send_signal(number)
    assert child.wait(60) == 130
    (state,) = (folder / "out" / "run").glob("state-*.safetensors")
    step = load_checkpoint(folder / "out" / "dmm.safetensors").recipe["steps_done"]
    assert step >= 1 and state.name == f"state-{step:08d}.safetensors"


def test_a_log_holds_few_lines_in_order(folder):
    """Both streams in one file: config, progress, result, as in ``dmm ... 2>&1 | tee log``."""
    write_config(folder, train={**SHORT, "steps": 30})
    command = [sys.executable, "-W", "ignore", *DISTILL[1:], folder / "run.yaml"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    config, after = done.stdout.split("\n}\n")
    assert json.loads(config + "}")["train"]["steps"] == 30
    lines = after.splitlines()
    assert lines[0].startswith("0% 0/30") and lines[-2].startswith("100% 30/30") and len(lines) <= 6, after
    assert lines[-1] == f"wrote {folder / 'out' / 'dmm.safetensors'}"


def nan_teacher(folder):
    weights = unet(1)
    weights["out.2.bias"] = torch.full((4,), float("nan"))
    save_file({f"model.diffusion_model.{k}": v for k, v in weights.items()}, folder / "one.safetensors")


BREAKAGES = {
    "not safetensors": (lambda f: (f / "one.safetensors").write_text("hello"), "one.safetensors"),
    "pickle": (lambda f: torch.save({"a": 1}, f / "one.safetensors"), "pickle"),
    "truncated": (lambda f: (f / "two.safetensors").write_bytes((f / "two.safetensors").read_bytes()[:5000]), "two.safetensors"),
    "other sizes": (
        lambda f: save_checkpoint(f / "two.safetensors", Checkpoint(unet=unet(2, WIDER))), "'two' has context_dim 64 instead of 16",
    ),
    "NaN weights": (nan_teacher, "teacher 'one' has NaN"),
    "a DMM model": (
        lambda f: save_checkpoint(f / "one.safetensors", Checkpoint(unet=unet(1, dataclasses.replace(SMALL, num_styles=2)))),
        "itself a DMM model with 2 styles",
    ),
    "empty captions": (
        lambda f: save_file({"latents": torch.randn(2, 4, 8, 8)}, f / "data.safetensors", {"captions": '["a", ""]'}),
        "1 of 2 captions are empty",
    ),
    "no captions": (lambda f: save_file({"latents": torch.randn(2, 4, 8, 8)}, f / "data.safetensors"), "captions"),
    "no text encoder": (lambda f: save_checkpoint(f / "base.safetensors", Checkpoint(unet=unet(0))), "no text encoder"),
    "no such config": (lambda f: (f / "run.yaml").unlink(), "cannot read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_does_not_fit_is_explained_before_anything_is_written(folder, name, capsys):
    breakage, message = BREAKAGES[name]
    breakage(folder)
    assert dmm("distill", "--config", folder / "run.yaml") == 1
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_run_folder_in_use_is_refused_before_anything_is_written(folder, capsys):
    with locked(folder / "out" / "run", "the run folder"):
        assert dmm("distill", "--config", folder / "run.yaml") == 1
        assert [p.name for p in (folder / "out").rglob("*")] == ["run", LOCK]
    said = capsys.readouterr().err
    assert f"the run folder '{folder / 'out' / 'run'}' is in use by process {os.getpid()} on " in said
    assert not (folder / "out").exists()
    assert dmm("distill", "--config", folder / "run.yaml") == 0
    assert not list((folder / "out").rglob(LOCK))


def test_a_full_disk_leaves_the_old_checkpoint(folder, monkeypatch, capsys):
    assert dmm("distill", "--config", folder / "run.yaml") == 0
    old = (folder / "out" / "dmm.safetensors").read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    write_config(folder, train={**SHORT, "steps": 6})
    assert dmm("distill", "--config", folder / "run.yaml") == 1
    assert "No space left" in capsys.readouterr().err
    assert (folder / "out" / "dmm.safetensors").read_bytes() == old
    assert not list((folder / "out").rglob("*.tmp"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("ink=a.safetensors", ("ink", "a.safetensors")),
        (" ink =a.safetensors,prediction=v", ("ink", "a.safetensors,prediction=v")),
        ("ink=v2=a.safetensors", ("ink=v2", "a.safetensors")),
        ("ink=b=c/a.safetensors", ("ink", "b=c/a.safetensors")),
        (
            "x=y=b=c/a.safetensors+a.safetensors:0.5,clip_skip=2",
            ("x=y", "b=c/a.safetensors+a.safetensors:0.5,clip_skip=2"),
        ),
        ("ink=gone=a.ckpt", ("ink", "gone=a.ckpt")),  # no file anywhere
    ],
)
def test_names_and_paths_may_hold_an_equals_sign(tmp_path, monkeypatch, text, expected):
    from comfyui_dmm.training.commands.arguments import named_file

    (tmp_path / "b=c").mkdir()
    for path in ("a.safetensors", "b=c/a.safetensors"):
        (tmp_path / path).touch()
    monkeypatch.chdir(tmp_path)
    assert named_file(text) == expected


@pytest.mark.parametrize("text", ["ink", "=a.safetensors", "ink=", ""])
def test_what_is_no_name_and_file(text):
    import argparse

    from comfyui_dmm.training.commands.arguments import named_file

    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=FILE"):
        named_file(text)


def test_a_name_that_is_too_long_for_the_disk(folder, monkeypatch, capsys):
    long = "a" * 300
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    teachers = (
        "--teacher",
        "one=one.safetensors",
        "--teacher",
        "two=two.safetensors",
        "--parts-from",
        "base.safetensors",
    )
    for command in (
        ("info", long),
        ("sample", "base.safetensors", "--prompt", "a", "--output", f"{long}/x.png"),
        ("merge", *teachers, "--output", f"{long}.safetensors"),
        ("merge", *teachers, "--output", f"{long}/x.safetensors"),
        ("cache", "images", "--images", ".", "--base", "base.safetensors", "--output", long),
        ("demo", "looks", "--output", f"{long}.png"),
        ("demo", "judge", "--sheet", f"{long}.png"),
    ):
        assert dmm(*command) == 1
        said = capsys.readouterr().err
        assert "too long" in said or "at most 25" in said, said
        assert "Errno" not in said and len(said) < 400, said
    assert sorted(folder.rglob("*")) == before
