"""A run folder belongs to one process at a time, and a killed one leaves no lock."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_dmm.training.files.folder_lock import LOCK, locked
from comfyui_dmm.training.parallel.ranks import Ranks
from comfyui_dmm.training.run.train import run_folder

HOLDER = """
import pathlib, subprocess, sys
from comfyui_dmm.training.files.folder_lock import locked
with locked(pathlib.Path(sys.argv[1]), "the run folder"):
    child = subprocess.Popen(["sleep", "60"])  # a program that the process started does not keep the lock
    print(child.pid, flush=True)
    sys.stdin.read()
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    child = int(process.stdout.readline())
    yield process, tmp_path / "run"
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_the_second_process_is_refused_and_the_first_named(holder):
    process, folder = holder
    said = f"the run folder '{folder}' is in use by process {process.pid} on .* since "
    with pytest.raises(ValueError, match=said), run_folder(folder, Ranks()):
        pytest.fail("two processes in one folder")
    assert (folder / LOCK).exists(), "the refused one has taken away the file of the other's lock"


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_the_lock_goes_with_its_process(holder, how):
    process, folder = holder
    if how == "killed":
        process.send_signal(signal.SIGKILL)
    else:
        process.stdin.close()
    process.wait()
    with locked(folder, "the run folder"):
        (folder / "state").touch()
    assert [p.name for p in folder.iterdir()] == ["state"]


def test_two_threads_or_runs_of_one_process_are_two(tmp_path):
    with (
        locked(tmp_path, "the run folder"),
        pytest.raises(ValueError, match=f"process {os.getpid()} "),
        locked(tmp_path, "the run folder"),
    ):
        pytest.fail("held twice")
    with locked(tmp_path, "the run folder"):
        pass


def test_a_holder_that_could_not_say_who_it_is(tmp_path):
    with locked(tmp_path, "the run folder"):
        (tmp_path / LOCK).write_text("{")
        with pytest.raises(ValueError, match="in use by another process"), locked(tmp_path, "the run folder"):
            pytest.fail("held twice")


def test_nothing_is_left_where_nothing_was_written(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "runs" / "one", "the run folder"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
