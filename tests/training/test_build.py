"""`dmm demo build` with a budget that learns nothing: every stage runs, every shipped file comes out and can be read."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.tests.benches.family_files import family_files
from comfyui_dmm.tests.benches.merge_arms import train_arm
from comfyui_dmm.tests.benches.merge_judge import judged
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.commands.demo import folders
from comfyui_dmm.training.data.demo.family import FIRST, SECOND
from comfyui_dmm.training.demo.build import build_parts
from comfyui_dmm.training.demo.classifier import classes_of, load_classifier
from comfyui_dmm.training.demo.judge import audit
from comfyui_dmm.training.demo.ship import files_of, publish, shipped_vae
from comfyui_dmm.training.demo.stages import BUDGETS, TINY, stages_of
from safetensors.torch import load_file

KILLED = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from comfyui_dmm.training.demo.build import _die_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _die_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.slow
def test_the_whole_build_and_again(tmp_path):
    work, models = tmp_path / "work", tmp_path / "models"
    assert set(build_parts(work, TINY)) == set(stages_of())
    files = {path.relative_to(models).as_posix() for path in publish(work, models)}
    assert files == {f"{name}.safetensors" for name in files_of().values()}
    student = load_checkpoint(models / "dmm" / "demo-dmm.safetensors")
    assert [style.name for style in student.styles] == list(FIRST.teachers)
    assert load_unet(student.unet).config.num_styles == len(FIRST.teachers) and student.text and student.vae
    assert len(audit(models, count=2).splitlines()) == 2 + 1 + 2 * len(FIRST.teachers)

    (work / "ink.safetensors").unlink()  # interrupted builds go on: only what is missing is made
    before = load_file(work / "pen.safetensors")
    assert set(build_parts(work, TINY)) == {"ink"}
    assert all(torch.equal(before[k], v) for k, v in load_file(work / "pen.safetensors").items())


@pytest.mark.slow
def test_the_second_family_is_built_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    """The command, with a budget that learns nothing: its folder can be distilled from and compared on as it is, and is gone on with."""
    monkeypatch.setitem(BUDGETS, "second", TINY)
    command = ["demo", "build", "--family", "second", "--out", str(tmp_path), "--jobs", "1", "--count", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "teacher neon" in said and "DMM" not in said  # no student: that is for the recipes that are compared
    files = family_files("second", str(tmp_path))
    models = files.models
    found = {path.relative_to(models).as_posix() for path in models.rglob("*") if path.is_file()}
    assert found == {"demo.yaml", *(f"{name}.safetensors" for name in files_of(SECOND).values())}
    assert load_classifier(files.features).classes == classes_of(SECOND)
    assert load_file(tmp_path / "vae.safetensors").keys() == shipped_vae().keys()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    (tmp_path / "wash.safetensors").unlink()
    assert main(command) == 0
    assert [path.stem for path, made in before.items() if path.stat().st_mtime_ns != made] == ["wash"]

    result, weights = train_arm("standard", 5, 0, torch.device("cpu"), files=files)
    assert result["names"] == list(SECOND.teachers) and set(weights) == {int(at) for at in result["at"]}
    figures = judged(weights[5], tmp_path / "parts", 6, 4, device=torch.device("cpu"), files=files)
    assert len(figures["m"]) == len(SECOND.teachers) and figures["pair"] > 0


def test_families_have_folders_of_their_own(tmp_path):
    with pytest.raises(ValueError, match="dmm demo build --family second --out"):
        family_files("second", str(tmp_path))
    with pytest.raises(ValueError, match="lies in models/"):
        family_files("first", str(tmp_path))
    assert family_files().config.name == "demo.yaml" and family_files().features.is_file()
    assert folders(SECOND, None, None, "x") == (Path("x"), Path("x/models"))
    with pytest.raises(ValueError, match="--out is for families that are not shipped"):
        folders(FIRST, None, None, "x")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_workers_end_with_a_killed_build(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as build:
        worker = int(build.stdout.readline())
        os.kill(worker, 0)  # alive
        build.send_signal(signal.SIGKILL)
    for _ in range(600):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} lives on")
