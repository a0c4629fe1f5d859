"""Run folders, caches and merges belong to one process at a time, and a killed one leaves no lock."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.data.open_cache import open_cache
from comfyui_dmm.training.files.folder_lock import LOCK, locked
from comfyui_dmm.training.parallel.ranks import Ranks
from comfyui_dmm.training.run.train import run_folder
from PIL import Image

from . import test_cli

models = test_cli.folder  # a fixture: a base and two teachers

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


# --- caches and merges ------------------------------------------------------------------------------------------------

WORK = """
import sys
from comfyui_dmm.training import cli
class Bar:
    def __call__(self, done, total, what):
        print("works", flush=True)
        sys.stdin.read()  # until it is killed or may go on
    def close(self): pass
from comfyui_dmm.training.commands import {command} as command
command.ProgressBar = Bar
sys.exit(cli.main(sys.argv[1:]))
"""


def commands(folder: Path) -> dict[str, tuple[list[str], Path]]:
    """Of each kind of work: the command, and the folder that belongs to one process."""
    base, pictures = str(folder / "base.safetensors"), folder / "images"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}")
    (folder / "captions.txt").write_text("red\ngreen\n")
    teachers = [word for name in ("one", "two") for word in ("--teacher", f"{name}={folder / name}.safetensors")]
    images = ["images", "--images", str(pictures), "--base", base, "--resolution", "64", "--batch-size", "1"]
    rolled = ["rollouts", "--captions", str(folder / "captions.txt"), "--base", base, *teachers, "--paths", "2"]
    rolled += ["--states", "2", "--steps", "3", "--size", "64x64"]
    cache, output = folder / "cache", folder / "merged.safetensors"
    return {
        "images": (["cache", *images, "--output", str(cache)], cache),
        "rollouts": (["cache", *rolled, "--output", str(cache)], cache),
        "merge": (["merge", *teachers, "--base", base, "--budget", "200%", "--output", str(output)], folder / ".merged-merge-parts"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["images", "rollouts", "merge"])
def test_two_commands_in_one_folder(models, kind, capsys):
    """Real processes: the second is refused and the first named; when the first was killed, the same command goes on."""
    command, place = commands(models)[kind]
    words = [sys.executable, "-c", WORK.format(command=command[0]), *command]
    first = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert first.stdout.readline() == "works\n"
    assert main(command) == 1
    said = capsys.readouterr().err
    assert re.search(
        f"(the cache|the merge folder) '{re.escape(str(place))}' is in use by process {first.pid} on ", said
    )
    assert "wait until it has ended or stop it, or " in said
    if kind != "merge":
        assert main(["cache", "text", "--cache", str(place), "--teacher", str(models / "base.safetensors")]) == 1
    first.kill()
    first.wait()
    assert (place / LOCK).exists(), "nothing is left of the killed one: this test tests nothing"
    assert main(command) == 0, capsys.readouterr().err
    if kind == "merge":
        assert not place.exists() and load_checkpoint(models / "merged.safetensors").num_styles == 2
    else:
        assert len(open_cache(place, verify=True)) and not (place / LOCK).exists()


def test_text_for_a_cache_that_is_being_made(models, capsys):
    command, place = commands(models)["images"]
    assert main(command) == 0
    text = ["cache", "text", "--cache", str(place), "--teacher", str(models / "base.safetensors")]
    with locked(place, "the cache"):
        assert main(text) == 1
        assert f"in use by process {os.getpid()} on " in capsys.readouterr().err
    assert main(text) == 0
    assert main([*text[:3], str(models / "nowhere"), *text[4:]]) == 1 and not (models / "nowhere").exists()
