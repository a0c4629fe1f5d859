"""A full disk, no CUDA, a reader that has gone: each ends in a line of words (or silence), never in a traceback."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core.files import atomic_write
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.parallel.devices import missing_cuda, pick_device
from comfyui_dmm.training.parallel.ranks import in_words
from PIL import Image
from safetensors.torch import save_file

from .test_cli import folder, write_config  # noqa: F401, folder is a fixture

ROOT = Path(__file__).parents[2]

# --- a full disk ------------------------------------------------------------------------------------------------------

WRITERS = {
    "distill": (("distill", "--config", "run.yaml"), "dmm.safetensors could not be written"),
    "merge": (
        ("merge", "--teacher", "a=base.safetensors", "--teacher", "b=two.safetensors", "--output", "m.safetensors"), "could not be written",
    ),
    "convert": (("convert", "base.safetensors", "c.safetensors", "--to", "single"), "c.safetensors"),
    "cache images": (
        ("cache", "images", "--images", "pictures", "--base", "base.safetensors", "--resolution", "64", "--output", "cache"), "text-",
    ),
    "sample": (
        ("sample", "base.safetensors", "--prompt", "a", "--size", "128", "--steps", "1", "--output", "s.png"), "s.png",
    ),
}  # fmt: skip


@contextlib.contextmanager
def small_disk(size):
    """Inside, writes fail behind ``size`` bytes of a file, as on a disk that is full there (EFBIG instead of ENOSPC)."""
    resource = pytest.importorskip("resource", reason="limits of a process are posix")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_a_line_that_names_the_file(folder, name, capsys, monkeypatch):  # noqa: F811
    command, named = WRITERS[name]
    (folder / "pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "pictures" / "a.png")
    (folder / "pictures" / "a.txt").write_text("a picture")
    write_config(folder, picture_every=0)
    monkeypatch.chdir(folder)
    with small_disk(4000):
        assert main(list(command)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dmm: ")]
    assert len(lines) == 1 and named in lines[0] and "File too large" in lines[0] and "rrno" not in lines[0]
    assert not [p for p in folder.rglob("*") if p.suffix == ".tmp"]


def test_every_error_of_a_write_names_the_file(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(OSError, match="No space") as found, atomic_write(path):
        raise OSError(28, "No space left on device")
    assert in_words(found.value) == f"No space left on device: {path}"
    with pytest.raises(OSError, match="Is a directory") as found, atomic_write(path) as temporary:
        temporary.unlink()
        temporary.mkdir()
        try:
            save_file({"a": torch.zeros(4)}, temporary)
        finally:
            temporary.rmdir()
    assert in_words(found.value) == f"Is a directory: {path}"
    with pytest.raises(FileNotFoundError) as found, atomic_write(path):
        (tmp_path / "another").read_bytes()
    assert in_words(found.value) == f"No such file or directory: {tmp_path / 'another'}"
    with pytest.raises(OSError) as found, atomic_write(path):
        raise OSError("in words of its own")
    assert in_words(found.value) == "in words of its own" and not list(tmp_path.iterdir())


# --- no CUDA ----------------------------------------------------------------------------------------------------------


def test_no_cuda_is_said_before_anything_is_loaded(folder, capsys):  # noqa: F811
    if not missing_cuda():
        pytest.skip("there is a GPU here")
    for device in ("cuda", "cuda:0"):
        with pytest.raises(
            ValueError, match=f"device is '{device}', and there is no CUDA GPU that can be used .*use cpu or auto"
        ):
            pick_device(device)
    assert pick_device("auto") == torch.device("cpu")
    (folder / "base.safetensors").write_bytes(b"not read")
    command = ["cache", "images", "--images", "none", "--base", "base.safetensors", "--output", "c", "--device", "cuda"]
    assert main(command) == 1
    assert capsys.readouterr().err.startswith("dmm: device is 'cuda', and there is no CUDA GPU")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_is_not_there():
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match=f"device is 'cuda:99', and there are {torch.cuda.device_count()} CUDA GPUs"):
        pick_device("cuda:99")


@pytest.mark.parametrize("device", ["xpu", "mps", "vulkan", "gpu", "meta", "cuda:x"])
def test_devices_that_cannot_be_used(device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ValueError, match=f"device is '{device}'"):
        pick_device(device)


# --- a reader that has gone -------------------------------------------------------------------------------------------

TALKERS = {
    "help": ("--help",),
    "help of a command": ("distill", "--help"),
    "settings": ("distill", "--list-settings"),
    "info": ("info", "base.safetensors"),
    "an error": ("info", "no-such-file"),
}


PIPED = """
import json, os, sys
from comfyui_dmm.training.cli import main
reader, writer = os.pipe()
os.close(reader)
for name, command in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    if not os.fork():
        os.dup2(writer, 1)
        both = name.startswith("both: ")
        os.dup2(writer if both else os.open(f"{name}.err", os.O_WRONLY | os.O_CREAT), 2)
        sys.exit(main(command))
    print(name, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
"""Runs each command in a process of its own, whose standard output is a pipe that nobody reads. (A fork: torch is imported once.)"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are posix")
def test_a_reader_that_has_gone_is_no_error(folder):  # noqa: F811
    """As with | head, the pipe is closed before the first word; for two commands so is that of the errors."""
    commands = {**TALKERS, "both: run": ("distill", "--config", "run.yaml"), "both: an error": TALKERS["an error"]}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PIPED, json.dumps(commands)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    ends = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert ends.keys() == commands.keys(), done.stderr
    # No signal, and not the 120 of a Python that could not say goodbye.
    assert set(ends.values()) <= {"0", "1"}, ends
    for name in TALKERS:
        said = (folder / f"{name}.err").read_text()
        assert not any(word in said for word in ("Traceback", "Exception ignored", "Broken")), f"{name}: {said}"
        assert (name == "an error") == ("no-such-file" in said)
