"""Hashes that are remembered: used only where nothing can have changed, and never needed."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core.files import file_sha256
from comfyui_dmm.training.files import remembered as module
from comfyui_dmm.training.files.hashing import PART, tensor_sha256
from comfyui_dmm.training.files.model_files import model_sha256
from comfyui_dmm.training.files.remembered import remembered, side_by_side, stamps

PACK = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "hashes.json"
    monkeypatch.setenv("DMM_HASHES", str(path))
    monkeypatch.setattr(module, "LARGE", 4)
    monkeypatch.setattr(module, "FRESH", -1)
    return path


class Counted:
    def __init__(self, file):
        self.file, self.calls = file, 0

    def __call__(self):
        self.calls += 1
        return file_sha256(self.file)


def test_computed_once(store, tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"12345")
    compute = Counted(file)
    assert [remembered("sha256", stamps([file]), compute) for _ in range(3)] == [file_sha256(file)] * 3
    assert compute.calls == 1
    (tmp_path / "link.bin").symlink_to(file)
    assert remembered("sha256", stamps([tmp_path / "link.bin"]), compute) == file_sha256(file) and compute.calls == 1
    assert remembered("another kind", stamps([file]), lambda: "0" * 64) == "0" * 64
    assert json.loads(store.read_text()) and not list(store.parent.glob("*.tmp"))


def test_every_change_is_seen(store, tmp_path):
    """Written in place with its old size and time, replaced by a file of the same size and time, grown: computed anew."""
    file = tmp_path / "a.bin"
    file.write_bytes(b"12345")
    compute = Counted(file)
    remembered("sha256", stamps([file]), compute)
    times = os.stat(file).st_atime_ns, os.stat(file).st_mtime_ns

    def in_place():
        with file.open("r+b") as out:
            out.write(b"54321")
        os.utime(file, ns=times)

    def replaced():
        other = tmp_path / "b.bin"
        other.write_bytes(b"67890")
        os.utime(other, ns=times)
        os.replace(other, file)

    def grown():
        with file.open("ab") as out:
            out.write(b"!")

    for count, change in enumerate((in_place, replaced, grown), 2):
        time.sleep(0.02)  # the clock of the file system ticks
        change()
        assert remembered("sha256", stamps([file]), compute) == file_sha256(file)
        assert compute.calls == count


def test_what_is_mapped_is_not_taken_for_the_file_that_took_its_name(store, tmp_path):
    """A file is opened, and replaced before it is hashed: neither is the old hash kept for the new file, nor the new one's used."""
    old, new = b"12345", b"67890"
    for known in (False, True):  # the new file's hash is in the store already
        file = tmp_path / f"{known}.bin"
        file.write_bytes(old)
        before = stamps([file])
        with file.open("rb") as opened:
            other = tmp_path / "other.bin"
            other.write_bytes(new)
            os.replace(other, file)
            if known:
                remembered("sha256", stamps([file]), Counted(file))
            mapped = hashlib.sha256(old).hexdigest()
            assert remembered("sha256", before, lambda: hashlib.sha256(opened.read()).hexdigest()) == mapped
        assert remembered("sha256", stamps([file]), Counted(file)) == hashlib.sha256(new).hexdigest()


def test_a_run_s_hashes_are_stamped_before_its_files_are_opened(store, tmp_path, monkeypatch):
    """A teacher's file that is replaced while the run loads: its hash is that of the weights that the run has, and is kept for no file."""
    from comfyui_dmm.training.config_file import load_config
    from comfyui_dmm.training.run import load as loading
    from comfyui_dmm.training.run.load import load_run

    demo = PACK / "models" / "dmm"
    for name in ("ink", "candy"):
        shutil.copy(demo / f"demo-teacher-{name}.safetensors", tmp_path / f"{name}.safetensors")
    config = {
        "base": str(demo / "demo-base.safetensors"),
        "parts_from": str(demo / "demo-dmm.safetensors"),
        "teachers": [{"name": "ink", "file": str(tmp_path / "ink.safetensors")}],
        "data": {"kind": "demo_scenes", "count": 4},
        "output": str(tmp_path / "out.safetensors"),
        "run_dir": str(tmp_path / "run"),
        "train": {"steps": 1, "batch_size": 1},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    check = loading.check_text  # called when all weights have been read, and before any is hashed

    def replaced(teachers):
        os.replace(tmp_path / "candy.safetensors", tmp_path / "ink.safetensors")
        check(teachers)

    monkeypatch.setattr(loading, "check_text", replaced)
    (ink,) = load_run(load_config(tmp_path / "config.yaml"), torch.device("cpu")).teachers
    hashed = ink.hashed()
    monkeypatch.setenv("DMM_HASHES", "")
    assert hashed == ink.hashed()
    monkeypatch.setenv("DMM_HASHES", str(store))
    shutil.copy(demo / "demo-teacher-candy.safetensors", tmp_path / "candy.safetensors")
    monkeypatch.setattr(loading, "check_text", check)
    (candy,) = load_run(load_config(tmp_path / "config.yaml"), torch.device("cpu")).teachers
    assert candy.hashed() != hashed


def test_fresh_small_and_switched_off_are_not_remembered(store, tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    file.write_bytes(b"12345")
    compute = Counted(file)
    monkeypatch.setattr(module, "FRESH", 10**12)
    remembered("sha256", stamps([file]), compute)
    monkeypatch.setattr(module, "FRESH", -1)
    monkeypatch.setattr(module, "LARGE", 6)
    remembered("sha256", stamps([file]), compute)
    monkeypatch.setattr(module, "LARGE", 4)
    monkeypatch.setenv("DMM_HASHES", "")
    remembered("sha256", stamps([file]), compute)
    assert compute.calls == 3 and not store.exists()


def test_a_file_that_changes_meanwhile_is_not_remembered(store, tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"12345")

    def compute():
        sha = file_sha256(file)
        file.write_bytes(b"123456")
        return sha

    remembered("sha256", stamps([file]), compute)
    assert remembered("sha256", stamps([file]), Counted(file)) == file_sha256(file)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"a": 3}', b"\xff\xfe", b"[" * 5000, b'{"a": "' + b"0" * 63 + b'"}']
)
def test_a_damaged_store_is_no_store(store, tmp_path, content):
    store.parent.mkdir()
    store.write_bytes(content)
    file = tmp_path / "a.bin"
    file.write_bytes(b"12345")
    compute = Counted(file)
    assert [remembered("sha256", stamps([file]), compute) for _ in range(2)] == [file_sha256(file)] * 2
    assert compute.calls == 1


def test_a_store_that_cannot_be_written_harms_nothing(tmp_path, monkeypatch, store):
    (tmp_path / "cache").write_text("a file where the folder would be")
    file = tmp_path / "a.bin"
    file.write_bytes(b"12345")
    assert remembered("sha256", stamps([file]), Counted(file)) == file_sha256(file)


def test_the_oldest_go_first(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST", 3)
    files = [tmp_path / f"{i}.bin" for i in range(5)]
    for file in files:
        file.write_bytes(str(file).encode())
        remembered("sha256", stamps([file]), Counted(file))
    counts = [Counted(file) for file in files]
    for file, compute in list(zip(files, counts))[::-1]:
        remembered("sha256", stamps([file]), compute)
    assert [compute.calls for compute in counts][2:] == [0, 0, 0]


def test_a_models_hash_is_that_of_its_file(store, tmp_path):
    from safetensors.torch import save_file
    from torch import ones

    file = tmp_path / "m.safetensors"
    save_file({"a": ones(3)}, file)
    assert model_sha256(file) == model_sha256(file) == file_sha256(file)


def test_side_by_side_keeps_the_order_and_raises():
    assert side_by_side(lambda x: x * x, range(20)) == [x * x for x in range(20)]
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda x: 1 / x, [1, 0])


def test_a_tensor_s_hash_is_that_of_its_bytes_in_the_precision_that_is_asked_for():
    """Converted part by part: a state's hashes from before that stay the same."""
    tensor = torch.randn(PART // 2 + 5, 3, generator=torch.Generator().manual_seed(0)).half().T
    plain = tensor.contiguous()
    assert tensor_sha256(tensor) == hashlib.sha256(plain.numpy().tobytes()).hexdigest()
    assert tensor_sha256(tensor, torch.float32) == hashlib.sha256(plain.float().numpy().tobytes()).hexdigest()
    assert tensor_sha256(torch.empty(0)) == hashlib.sha256().hexdigest()
