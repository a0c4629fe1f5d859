"""`dmm demo build` with a budget that learns nothing: every stage runs, every shipped file comes out and can be read."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.training.data.demo.looks import TEACHER_LOOKS
from comfyui_dmm.training.demo.build import build_parts
from comfyui_dmm.training.demo.judge import audit
from comfyui_dmm.training.demo.ship import SHIPPED, publish
from comfyui_dmm.training.demo.stages import STAGES, TINY
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
    assert set(build_parts(work, TINY)) == set(STAGES)
    files = {path.relative_to(models).as_posix() for path in publish(work, models)}
    assert files == {f"{name}.safetensors" for name in SHIPPED.values()}
    student = load_checkpoint(models / "dmm" / "demo-dmm.safetensors")
    assert [style.name for style in student.styles] == list(TEACHER_LOOKS)
    assert load_unet(student.unet).config.num_styles == len(TEACHER_LOOKS) and student.text and student.vae
    assert len(audit(models, count=2).splitlines()) == 2 + 1 + 2 * len(TEACHER_LOOKS)

    (work / "ink.safetensors").unlink()  # interrupted builds go on: only what is missing is made
    before = load_file(work / "pen.safetensors")
    assert set(build_parts(work, TINY)) == {"ink"}
    assert all(torch.equal(before[k], v) for k, v in load_file(work / "pen.safetensors").items())


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
