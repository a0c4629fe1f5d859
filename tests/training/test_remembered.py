"""Hashes that are remembered: used only where nothing can have changed, and never needed."""

import json
import os
import time

import pytest
from comfyui_dmm.dmm_core.files import file_sha256
from comfyui_dmm.training.files import remembered as module
from comfyui_dmm.training.files.model_files import model_sha256
from comfyui_dmm.training.files.remembered import remembered, side_by_side


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
    assert [remembered("sha256", [file], compute) for _ in range(3)] == [file_sha256(file)] * 3
    assert compute.calls == 1
    (tmp_path / "link.bin").symlink_to(file)
    assert remembered("sha256", [tmp_path / "link.bin"], compute) == file_sha256(file) and compute.calls == 1
    assert remembered("another kind", [file], lambda: "0" * 64) == "0" * 64
    assert json.loads(store.read_text()) and not list(store.parent.glob("*.tmp"))


def test_every_change_is_seen(store, tmp_path):
    """Written in place with its old size and time, replaced by a file of the same size and time, grown: computed anew."""
    file = tmp_path / "a.bin"
    file.write_bytes(b"12345")
    compute = Counted(file)
    remembered("sha256", [file], compute)
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
        assert remembered("sha256", [file], compute) == file_sha256(file)
        assert compute.calls == count


def test_fresh_small_and_switched_off_are_not_remembered(store, tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    file.write_bytes(b"12345")
    compute = Counted(file)
    monkeypatch.setattr(module, "FRESH", 10**12)
    remembered("sha256", [file], compute)
    monkeypatch.setattr(module, "FRESH", -1)
    monkeypatch.setattr(module, "LARGE", 6)
    remembered("sha256", [file], compute)
    monkeypatch.setattr(module, "LARGE", 4)
    monkeypatch.setenv("DMM_HASHES", "")
    remembered("sha256", [file], compute)
    assert compute.calls == 3 and not store.exists()


def test_a_file_that_changes_meanwhile_is_not_remembered(store, tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"12345")

    def compute():
        sha = file_sha256(file)
        file.write_bytes(b"123456")
        return sha

    remembered("sha256", [file], compute)
    assert remembered("sha256", [file], Counted(file)) == file_sha256(file)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"a": 3}', b"\xff\xfe", b"[" * 5000, b'{"a": "' + b"0" * 63 + b'"}']
)
def test_a_damaged_store_is_no_store(store, tmp_path, content):
    store.parent.mkdir()
    store.write_bytes(content)
    file = tmp_path / "a.bin"
    file.write_bytes(b"12345")
    compute = Counted(file)
    assert [remembered("sha256", [file], compute) for _ in range(2)] == [file_sha256(file)] * 2
    assert compute.calls == 1


def test_a_store_that_cannot_be_written_harms_nothing(tmp_path, monkeypatch, store):
    (tmp_path / "cache").write_text("a file where the folder would be")
    file = tmp_path / "a.bin"
    file.write_bytes(b"12345")
    assert remembered("sha256", [file], Counted(file)) == file_sha256(file)


def test_the_oldest_go_first(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST", 3)
    files = [tmp_path / f"{i}.bin" for i in range(5)]
    for file in files:
        file.write_bytes(str(file).encode())
        remembered("sha256", [file], Counted(file))
    counts = [Counted(file) for file in files]
    for file, compute in list(zip(files, counts))[::-1]:
        remembered("sha256", [file], compute)
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
