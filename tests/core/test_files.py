"""What a killed write leaves behind goes away with the next write into that folder; writes that go on are left alone."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from comfyui_dmm.dmm_core import files
from comfyui_dmm.dmm_core.files import atomic_write
from safetensors.torch import save_file

SAVE = """
import sys, torch
from comfyui_dmm.dmm_core.files import atomic_write
from safetensors.torch import save_file
while True:
    with atomic_write(sys.argv[1]) as temporary:
        save_file({"a": torch.zeros(4_000_000)}, temporary)
        print("written", flush=True)
        if sys.argv[2] == "wait":
            sys.stdin.read()
"""


def saver(path, how):
    command = [sys.executable, "-c", SAVE, str(path), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("delay", [0, 0.003, 0.01, 0.02])
def test_a_killed_write_is_cleared_by_the_next(tmp_path, delay):
    """At whatever point it is killed, in safetensors' own writing too."""
    process = saver(tmp_path / "a.safetensors", "run" if delay else "wait")
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert delay or len(left(tmp_path)) == 1
    with atomic_write(tmp_path / "other.safetensors") as temporary:
        save_file({"b": torch.ones(2)}, temporary)
    assert left(tmp_path) == []


def test_a_write_that_goes_on_is_left_alone(tmp_path):
    with saver(tmp_path / "a.safetensors", "wait") as process:
        process.stdout.readline()
        with atomic_write(tmp_path / "b") as outer, atomic_write(tmp_path / "c") as inner:
            outer.write_text("b")
            inner.write_text("c")
            assert len(left(tmp_path)) == 3
        process.kill()
    assert (tmp_path / "b").read_text() == "b" and (tmp_path / "c").read_text() == "c"


def test_another_machines_write_is_cleared_after_a_day(tmp_path):
    for name, age in (("1" * 16, 2 * files.ABANDONED), ("2" * 16, 0)):
        folder = tmp_path / f".dmm-00000000-1-{name}.tmp"
        folder.mkdir()
        (folder / "content.tmp").touch()
        for path in (folder / "content.tmp", folder):
            os.utime(path, (time.time() - age,) * 2)
    for name in (".dmm-notes.tmp", ".someone.tmp"):
        (tmp_path / name).write_text("not ours")
    with atomic_write(tmp_path / "a"):
        pass
    assert left(tmp_path) == [".dmm-00000000-1-" + "2" * 16 + ".tmp", ".dmm-notes.tmp", ".someone.tmp"]
