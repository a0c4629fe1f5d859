"""Ctrl-C, SIGTERM and a stop that was asked for take effect between two pictures: real commands, real signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.training.run.state import states
from comfyui_dmm.training.run.synthesis import painted_by_teachers
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.watch.controls import Controls, StopAndSave
from comfyui_dmm.training.run.watch.pictures import Pictures
from comfyui_dmm.training.run.watch.watch import Watch

from .families import small_run
from .test_cli import DISTILL, SHORT, folder, write_config  # noqa: F401, a fixture

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

ROOT = Path(__file__).parents[2]
TEACHERS = [{"name": f"number {i}", "file": ("one.safetensors", "two.safetensors")[i % 2]} for i in range(12)]
TOLD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run behind an "&", it is ignored
from comfyui_dmm.training import cli
from comfyui_dmm.training.{module} import {owner} as owner
whole = owner.{method}
def told(self, *a, **k):
    print("painting", getattr(getattr(self, "run", None), "step", ""), flush=True)
    time.sleep(0.1)  # as if it were a larger model
    return whole(self, *a, **k)
owner.{method} = told
cli.leave(cli.main(sys.argv[1:]))
"""
SHEET = {"module": "run.watch.pictures", "owner": "Pictures", "method": "_latents"}
SAMPLE = {"module": "paint.painter", "owner": "Painter", "method": "latents"}


def start(told: dict, *command) -> subprocess.Popen:
    """The ``dmm`` command in a process of its own, which prints a line before each picture."""
    words = [sys.executable, "-c", TOLD.format(**told), "--threads", "1", *map(str, command)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def stopped(process: subprocess.Popen, line: str, number: int, after: int = 3) -> tuple[int, str]:
    """Send a signal ``after`` such lines -> (how many lines came after it, stderr); the command has said that it was interrupted."""
    seen = 0
    for text in process.stdout:
        seen += text.strip() == line
        if seen == after:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    return out.count("painting"), err


def left_over(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.suffix == ".tmp"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_contact_sheet_and_the_run_has_saved_itself(folder, number):  # noqa: F811
    write_config(folder, teachers=TEACHERS, train={**SHORT, "steps": 50, "save_every": 50}, picture_every=2)
    process = start(SHEET, "distill", "--config", folder / "run.yaml")
    more, err = stopped(process, "painting 2", number)
    assert more <= 1, f"{more} pictures were painted after the signal"
    assert "dmm: interrupted; what is done is kept, the same command goes on from there" in err
    run_dir = folder / "out" / "run"
    assert [path.name for path in states(run_dir)] == ["state-00000002.safetensors"]
    assert load_checkpoint(folder / "out" / "dmm.safetensors").recipe["steps_done"] == 2
    assert [path.name for path in (run_dir / "pictures").iterdir()] == ["step-00000000.png"]
    assert not left_over(folder)


def test_a_stop_in_the_first_sheet_comes_before_the_first_step(folder):  # noqa: F811
    write_config(folder, teachers=TEACHERS, picture_every=2)
    more, err = stopped(start(SHEET, "distill", "--config", folder / "run.yaml"), "painting 0", signal.SIGINT)
    assert more <= 1 and "interrupted" in err
    assert not list((folder / "out").rglob("*.safetensors")) and not list((folder / "out").rglob("*.png"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sample_stops_at_once_and_writes_nothing(folder, number):  # noqa: F811
    write_config(folder, train={**SHORT, "steps": 1}, picture_every=0)
    subprocess.run([*DISTILL, folder / "run.yaml"], check=True, capture_output=True, cwd=ROOT)
    picture = folder / "pictures" / "all.png"
    picture.parent.mkdir()
    command = ("sample", folder / "out" / "dmm.safetensors", "--prompt", "a", "--style", "all", "--steps", 1000)
    more, err = stopped(start(SAMPLE, *command, "--size", 64, "--output", picture), "painting", number, after=1)
    assert more == 0 and "dmm: interrupted; nothing was written" in err
    assert not list(picture.parent.iterdir())


def asked_after(calls: int, controls: Controls):
    """A decoder that asks for a stop when it was called so often."""
    from PIL import Image

    made = []

    def decode(latents):
        made.append(1)
        if len(made) == calls:
            controls.ask("stop")
        return [Image.new("RGB", (8, 8)) for _ in latents]

    return decode, made


@pytest.mark.parametrize("sheet", ["the first", "of a step", "asked for"])
def test_a_stop_asked_through_the_controls_ends_the_sheet(tmp_path, sheet):
    controls, asked = Controls(), []
    decode, made = asked_after(3, controls)

    def on_step(run, metrics):
        if sheet == "asked for" and metrics.step == 2:
            controls.ask("sample")
        asked.append(metrics.step)

    run = small_run(teachers=4, steps=6, batch_size=2)
    every = {"the first": 2, "of a step": 0, "asked for": 0}[sheet]
    watch = Watch(on_step, decode=decode, picture_every=every, controls=controls)
    if sheet == "of a step":
        watch.on_step = lambda run, metrics: (on_step(run, metrics), setattr(watch, "picture_every", 2))
    with pytest.raises(StopAndSave):
        train(run, tmp_path, watch)
    steps = 0 if sheet == "the first" else 2
    assert len(made) == 3 and run.step == steps and asked == list(range(1, steps + 1))
    assert [int(path.stem[-8:]) for path in states(tmp_path)] == ([2] if steps else [])
    assert not (tmp_path / "pictures").exists()


def test_a_sheet_that_was_given_up_leaves_the_raw_weights_and_is_no_failure(caplog):
    run, controls = small_run(teachers=4, batch_size=2), Controls()
    run.train_step()
    before = {key: value.clone() for key, value in run.student.unet.state_dict().items()}
    decode, made = asked_after(1, controls)
    pictures = Pictures(run, decode, stopping=lambda: controls.stopping)
    assert pictures.paint() is None and len(made) == 1 and not caplog.records
    assert all(torch.equal(value, before[key]) for key, value in run.student.unet.state_dict().items())
    controls.stopping = False
    assert pictures.paint() is not None


def test_a_stop_ends_the_painting_of_the_final_stage_between_two_steps(tmp_path):
    final = {"steps": 2, "batch_size": 2, "final_steps": 2, "final_images": 6, "final_sampling_steps": 4}
    run, controls, told = small_run(teachers=2, **final), Controls(), []

    def on_paint(done, total, what):
        told.append(done)
        if len(told) == 7:  # in the second step of the second part
            controls.ask("stop")

    with pytest.raises(StopAndSave):
        train(run, tmp_path, Watch(on_paint=on_paint, controls=controls))
    assert told == [0, 0, 0, 0, 1, 1, 1] and len(list((tmp_path / "painted").iterdir())) == 1
    assert [path.name for path in states(tmp_path)] == ["state-00000002.safetensors"]
    again, straight = small_run(teachers=2, **final), painted_by_teachers(small_run(teachers=2, **final))
    train(again, tmp_path)
    assert torch.equal(again.draws.final_data.buckets[0], straight.buckets[0])


@pytest.mark.slow
def test_two_processes_stop_together_after_a_sheet_that_was_given_up(folder, tmp_path):  # noqa: F811
    """torchrun passes the signal on to both: the first gives its sheet up, and both stop at the same step."""
    write_config(folder, teachers=TEACHERS, train={**SHORT, "steps": 50, "save_every": 50}, picture_every=2)
    script = tmp_path / "told.py"
    script.write_text(TOLD.format(**SHEET))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--monitor_interval=0.2",
        "--nproc_per_node=2",
    ]
    words = [*launch, script, "--threads", "1", "distill", "--config", folder / "run.yaml"]
    process = subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    seen = 0
    for text in process.stdout:
        seen += text.strip() == "painting 2"
        if seen == 3:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (
        process.returncode and out.count("painting") <= 1 and err.count("dmm: interrupted; what is done is kept") == 1
    ), err
    run_dir = folder / "out" / "run"
    assert [path.name for path in states(run_dir)] == ["state-00000002.safetensors"]
    assert [path.name for path in (run_dir / "pictures").iterdir()] == ["step-00000000.png"] and not left_over(folder)
