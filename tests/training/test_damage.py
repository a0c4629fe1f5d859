"""Damage in the files of a run and of a cache: it is found and named, the newest sound state is gone on from, and a wrong result without
a word never comes."""

import json
import logging
import random
import shutil
from collections import Counter

import pytest
import torch
from comfyui_dmm.training.data.batches import load_latents
from comfyui_dmm.training.data.shards import DIGEST, DIGESTS, MANIFEST, ShardReader, ShardWriter, read_manifest
from comfyui_dmm.training.files.checksums import read_checked, row_digests, write_checked
from comfyui_dmm.training.files.pieces import read_piece, write_piece
from comfyui_dmm.training.run.state import BEST, best_error, fork, identity, read_state, resume, save_state, states
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.watch.journal import read_log
from comfyui_dmm.training.run.watch.watch import Watch
from PIL import Image
from safetensors.torch import load_file, save_file

from .families import small_run
from .test_state import TINY

RUN = {
    "teachers": 2, "config": TINY, "steps": 4, "save_every": 1, "keep": 2, "batch_size": 4, "lambda_adv": 0.05, "sampling": "adaptive",
    "final_steps": 3, "final_images": 4, "final_sampling_steps": 2,
}  # fmt: skip
"""A run with everything that a state may hold, in tenths of a second."""


class Stop(BaseException):
    pass


def stopped_at(folder, step, **settings):
    def stop(run, metrics):
        if metrics.step == step:
            raise Stop

    def decode(latents):
        return [Image.new("RGB", (16, 16)) for _ in latents]

    with pytest.raises(Stop):
        train(small_run(**{**RUN, **settings}), folder, Watch(stop, decode=decode, picture_every=2))


def weights_of(run):
    return {**run.student_weights(False), **{f"average {k}": v for k, v in run.student_weights(True).items()}}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def flip(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.unlink()  # best.safetensors may be a second name of a state
    path.write_bytes(data)


def body(path):
    """Where the tensors of a safetensors file begin."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.fixture(scope="module")
def straight():
    run = small_run(**RUN)
    train(run, None)
    return weights_of(run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run that was stopped in its final stage, after step 6 of 7; the worst kept state is not the best one."""
    folder = tmp_path_factory.mktemp("run")
    stopped_at(folder, 6)
    return folder


# --- any damage of any file -------------------------------------------------------------------------------------------

KINDS = ("a flipped bit", "a zeroed tail", "a lost tail", "a zeroed page", "two flipped bits")


def damage(path, kind, rng):
    """Returns whether the file has changed."""
    before = path.read_bytes()
    data, place = bytearray(before), rng.randrange(len(before))
    if kind == "a zeroed tail":
        data[place:] = bytes(len(data) - place)
    elif kind == "a lost tail":
        del data[place:]
    elif kind == "a zeroed page":
        start = place // 4096 * 4096
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    else:
        for _ in range(1 + (kind == "two flipped bits")):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.unlink()  # best.safetensors may be a second name of a state
    path.write_bytes(data)
    return bytes(data) != before


@pytest.mark.parametrize("trials", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_no_damage_in_a_run_folder_gives_a_wrong_result_without_a_word(tmp_path, folder, straight, caplog, trials):
    """Each trial damages one file of a stopped run and goes on with it. A state that a run would go on from is named when it is
    damaged, and the end is bitwise that of a run that never stopped; so it is with damage in everything else."""
    rng = random.Random(trials)
    counts = Counter()
    places = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert {p.parts[0] for p in places} >= {"painted", "pictures", "log.jsonl", BEST, states(folder)[-1].name}
    for trial in range(trials):
        copy = tmp_path / str(trial)
        shutil.copytree(folder, copy)
        place, kind = rng.choice(places), rng.choice(KINDS)
        changed = damage(copy / place, kind, rng)
        newest = place.name == states(folder)[-1].name
        caplog.clear()
        run = small_run(**RUN)
        try:
            train(run, copy)
        except ValueError as error:
            assert str(place.name) in str(error)
            counts["refused in words"] += 1
            continue
        said = any(place.name in record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
        assert same(weights_of(run), straight), (
            f"{kind} in {place}: a wrong result, {'with' if said else 'without'} a word"
        )
        if newest and changed:
            assert said, f"{kind} in {place} went unseen"
        counts["right, and the damage named" if said else "right, the damaged file was not needed"] += 1
        shutil.rmtree(copy)
    print(f"\n{trials} trials: {dict(counts)}, and none wrong")
    assert sum(counts.values()) == trials


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["body", "header", "step", "length", "tail"])
def test_a_damaged_state_is_named_and_the_one_before_it_gone_on_from(tmp_path, straight, caplog, where):
    stopped_at(tmp_path, 4)
    older, newest = states(tmp_path)
    if where == "tail":
        size = newest.stat().st_size
        newest.write_bytes(newest.read_bytes()[: size - 5000] + bytes(5000))
    else:
        step = newest.read_bytes().index(b'"step":"4"') + len(b'"step":"')
        place = {"body": body(newest) + 77, "header": newest.read_bytes().index(b"exp_avg"), "step": step, "length": 0}[
            where
        ]
        flip(newest, place)
    run = small_run(**RUN)
    assert resume(run, tmp_path, identity(run)) and run.step == 3
    assert newest.name in caplog.text and f"going on from {older.name}, at its step 3" in caplog.text
    assert [p.name for p in tmp_path.glob("*.damaged")] == [f"{newest.name}.damaged"] and states(tmp_path) == [older]
    train(run := small_run(**RUN), tmp_path)
    assert same(weights_of(run), straight)


def test_a_sound_state_is_never_deleted_for_a_damaged_newer_one(tmp_path):
    """keep: 1, and a crash between a save and its tidying up has left two states, the newer one damaged."""
    stopped_at(tmp_path / "a", 3, keep=1)
    stopped_at(tmp_path / "b", 4, keep=1)
    (damaged,) = states(tmp_path / "b")
    flip(damaged, body(damaged) + 1)
    shutil.copy(damaged, tmp_path / "a")
    settings = {**RUN, "keep": 1, "save_every": 100}
    run = small_run(**settings)
    assert resume(run, tmp_path / "a", identity(run)) and run.step == 3
    save_state(run, tmp_path / "a", identity(run))
    assert [p.name for p in states(tmp_path / "a")] == ["state-00000003.safetensors"]
    # Nor for one of a later step that came there after the run had begun.
    shutil.copy(damaged, tmp_path / "a")
    save_state(run, tmp_path / "a", identity(run))
    assert [read_name(p) for p in states(tmp_path / "a")] == [3, 4]


def read_name(path):
    return int(path.stem.partition("-")[2])


def test_the_best_state_is_the_last_resort(tmp_path, caplog):
    stopped_at(tmp_path, 4, keep=1)
    (newest,) = states(tmp_path)
    best = tmp_path / BEST
    flip(newest, body(newest))
    run = small_run(**{**RUN, "keep": 1})
    step = int(read_state(best)[1]["step"])
    assert resume(run, tmp_path, identity(run)) and run.step == step
    assert f"going on from {BEST}" in caplog.text and not states(tmp_path)


def test_where_every_state_is_damaged_the_run_is_refused_and_nothing_lost(tmp_path):
    stopped_at(tmp_path, 4)
    for path in (*states(tmp_path), tmp_path / BEST):
        flip(path, body(path) + 3)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(
        ValueError, match="no state of the run in .*state-00000004.*state-00000003.*begin anew in another run folder"
    ):
        train(small_run(**RUN), tmp_path)
    with pytest.raises(ValueError, match="can be used"):
        fork(small_run(**RUN), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_fork_passes_over_damage_and_touches_nothing(tmp_path, caplog):
    stopped_at(tmp_path, 4)
    older, newest = states(tmp_path)
    flip(newest, body(newest) + 9)
    assert fork(small_run(**RUN), tmp_path) == 3 and newest.exists()
    with pytest.raises(ValueError, match="is damaged: 1 of its"):
        fork(small_run(**RUN), newest)


def test_a_best_state_with_a_damaged_error_is_replaced(tmp_path, caplog):
    """Else a digit that became smaller would keep every later state out."""
    run = small_run(**RUN)
    save_state(run, tmp_path, {}, 0.5)
    best = tmp_path / BEST
    assert best_error(tmp_path) == 0.5
    flip(best, best.read_bytes().index(b'"error":"0.5"') + len(b'"error":"0.'))
    assert best_error(tmp_path) == float("inf") and BEST in caplog.text
    run.step = 1
    save_state(run, tmp_path, {}, 0.75)
    assert best_error(tmp_path) == 0.75 and read_state(best)[1]["step"] == "1"


@pytest.mark.parametrize("lost", ["identity", "optimizer", "step"])
def test_an_old_state_that_lost_an_entry_is_passed_over(tmp_path, caplog, lost):
    """Of states without digests, this much can be seen."""
    run = small_run(**RUN)
    first = save_state(run, tmp_path, identity(run))
    tensors, metadata = read_state(first)
    del metadata[lost]
    save_file(tensors, tmp_path / "state-00000009.safetensors", metadata)
    again = small_run(**RUN)
    assert resume(again, tmp_path, identity(again)) and again.step == 0 and "state-00000009" in caplog.text


# --- what is only for looking at --------------------------------------------------------------------------------------


def test_a_damaged_log_never_stops_a_run(tmp_path, straight):
    stopped_at(tmp_path, 5)
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    junk = [b"\xff\xfe\x00\n", b"[1, 2]\n", b'{"step": "x"}\n', b"[" * 5000 + b"\n", b"\n", b'{"no": 1}\n', b"null\n"]
    log.write_bytes(b"".join([*junk, *lines[:3], *junk, *lines[3:], *junk, b'{"step": 5, "sco']))
    run = small_run(**RUN)
    train(run, tmp_path)
    assert same(weights_of(run), straight)
    assert [line["step"] for line in read_log(log) if "note" not in line] == [1, 2, 3, 4, 5, 6, 7]


def test_a_log_that_cannot_be_opened_never_stops_a_run(tmp_path, straight, caplog):
    for name in ("log.jsonl", "pictures", "tensorboard"):
        (tmp_path / name).mkdir() if name == "log.jsonl" else (tmp_path / name).write_text("a file")
    run = small_run(**RUN)
    train(run, tmp_path)
    assert same(weights_of(run), straight) and "the log cannot be written" in caplog.text


# --- caches, latents, pieces ------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    """(folder, manifest, reader) of a small cache of one shard."""
    writer = ShardWriter(tmp_path / "cache", "images", {"resolution": 64})
    made = {"latents": torch.randn(5, 4, 8, 8).half(), "windows": torch.arange(5)}
    entry = writer.shard("latents-64x64-00000.safetensors", "identity", 5, lambda: made)
    manifest = writer.finish({"buckets": [{"shards": [entry]}]})
    return tmp_path / "cache", manifest, ShardReader(tmp_path / "cache", [entry])


def test_a_flipped_bit_in_a_shard_is_found_when_its_row_is_read(cache):
    folder, manifest, reader = cache
    path = folder / manifest["buckets"][0]["shards"][0]["file"]
    whole = load_file(path)["latents"]
    size = whole[0].nbytes
    # Tensors lie in the file in the order of their dtypes' sizes: "windows" first.
    for row in range(5):
        start = path.stat().st_size - (5 - row) * size
        flip(path, start + 100, 6)
        fresh = ShardReader(folder, manifest["buckets"][0]["shards"])
        with pytest.raises(ValueError, match=f"damaged: 'latents' is not as it was written in rows {row} to {row}"):
            fresh.rows("latents", torch.arange(5))
        others = torch.tensor([i for i in range(5) if i != row])
        assert torch.equal(fresh.rows("latents", others), whole[others])
        flip(path, start + 100, 6)
    assert torch.equal(ShardReader(folder, manifest["buckets"][0]["shards"]).rows("latents", torch.arange(5)), whole)


def test_a_cache_from_before_there_were_digests_is_read_and_gets_them(cache):
    """Its shards stay bit for bit, so that runs that began with them go on."""
    folder, manifest, _ = cache
    path = folder / manifest["buckets"][0]["shards"][0]["file"]
    bytes_before = path.read_bytes()
    old = json.loads((folder / MANIFEST).read_text())
    del old[DIGEST], old["buckets"][0]["shards"][0][DIGESTS]
    (folder / MANIFEST).write_text(json.dumps(old))
    read = read_manifest(folder)
    assert ShardReader(folder, read["buckets"][0]["shards"]).rows("latents", torch.tensor([2])).shape == (1, 4, 8, 8)
    writer = ShardWriter(folder, "images", {"resolution": 64})
    entry = writer.shard(path.name, "identity", 5, lambda: pytest.fail("the shard is there"))
    assert writer.finish({"buckets": [{"shards": [entry]}]}) == manifest and path.read_bytes() == bytes_before
    assert DIGEST in json.loads((folder / MANIFEST).read_text())


def test_every_flipped_bit_in_a_manifest_is_found(cache):
    folder, manifest, _ = cache
    path = folder / MANIFEST
    good = path.read_bytes()
    unseen = []
    for place in range(len(good)):
        flip(path, place, place % 7)
        try:
            found = read_manifest(folder)
        except ValueError as error:
            assert MANIFEST in str(error) or "cache" in str(error)
        else:
            unseen += [place] if found != manifest and DIGEST not in str(found) else []
            assert found == manifest or any(key not in manifest for key in found), f"place {place}"
        path.write_bytes(good)
    assert not unseen


def test_a_row_of_another_dtype_is_another_row():
    row = torch.tensor([1.0, 2.0]).half()
    assert row_digests(row[None]) != row_digests(row.view(torch.int16)[None])
    assert row_digests(row[None]) != row_digests(row[None, None])


def test_damaged_latents_are_refused_and_others_files_read(tmp_path):
    latents, captions = torch.randn(3, 4, 8, 8), {"captions": json.dumps(["a", "b", "c"])}
    path = tmp_path / "ours.safetensors"
    write_checked(path, {"latents": latents}, captions)
    assert torch.equal(load_latents(path).buckets[0], latents)
    flip(path, body(path) + 2)
    with pytest.raises(
        ValueError, match="is damaged: 1 of its 1 tensors are not as they were written, such as 'latents'"
    ):
        load_latents(path)
    save_file({"latents": latents}, tmp_path / "theirs.safetensors", captions)
    assert len(load_latents(tmp_path / "theirs.safetensors")) == 3


def test_a_damaged_piece_is_made_anew(tmp_path, caplog):
    path = tmp_path / "piece.safetensors"
    write_piece(path, {"latents": torch.zeros(2, 3)})
    assert read_piece(path, 2) is not None
    flip(path, path.stat().st_size - 1)
    assert read_piece(path, 2) is None and "made anew" in caplog.text


def test_tensors_of_every_kind_have_digests(tmp_path):
    tensors = {
        "empty": torch.empty(0, 3), "number": torch.tensor(2.5), "whole": torch.arange(4), "bits": torch.tensor([True, False]),
        "bf16": torch.randn(3).bfloat16(), "fp8": torch.randn(4).to(torch.float8_e4m3fn), "strided": torch.randn(4, 4).T,
    }  # fmt: skip
    write_checked(tmp_path / "a.safetensors", tensors, {"note": "ü"})
    read, metadata = read_checked(tmp_path / "a.safetensors")
    assert metadata == {"note": "ü"} and read.keys() == tensors.keys()
    assert all(
        torch.equal(read[k].view(-1).view(torch.uint8), v.contiguous().view(-1).view(torch.uint8))
        for k, v in tensors.items()
    )
