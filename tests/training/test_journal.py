"""The log of a run: what a line says, that a resumed run's log reads like a straight one's, and disks that are full."""

import dataclasses
import json
import logging
import math
import sys
import types

import numpy as np
import pytest
from comfyui_dmm.training.loop.metrics import Metrics
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.watch import journal as module
from comfyui_dmm.training.run.watch.journal import Journal, read_log
from comfyui_dmm.training.run.watch.progress import Progress, duration
from comfyui_dmm.training.run.watch.watch import Watch
from PIL import Image

from .families import small_run


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    """Whether it is installed here or not; a test that wants one puts a false one in its place."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def logged(folder) -> list[dict]:
    return list(read_log(folder / "log.jsonl"))


def metrics(step, steps=10, score=None, **changes) -> Metrics:
    score = score or {"ink": 0.5}
    made = Metrics(
        step, steps, loss=0.25, feature=0.125, score=score, count={"ink": 4}, lr=1e-5, grad_norm=2.0, seconds=0.5
    )
    return dataclasses.replace(made, **changes)


def test_a_line_per_step(tmp_path):
    run = small_run(steps=3, batch_size=3, accumulate=2)
    train(run, tmp_path / "run")
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["samples"] for line in lines] == [6, 12, 18]
    fields = {field.name for field in dataclasses.fields(Metrics)}
    assert all(line.keys() == fields | {"samples"} for line in lines)  # no peak_bytes without CUDA
    names = {teacher.name for teacher in run.teachers}
    assert names <= set().union(*(line["score"] for line in lines))


def test_numbers_are_those_of_the_step_and_json_for_everyone(tmp_path):
    run, journal = small_run(teachers=1), Journal(tmp_path)
    journal.step(run, metrics(1, loss=1 / 3, grad_norm=math.inf, score={"墨": math.nan}))
    text = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line["loss"] == 0.333333 and line["lr"] == 1e-5
    assert line["grad_norm"] is None and line["score"] == {"墨": None} and "墨" in text


def test_lines_are_there_at_once(tmp_path):
    journal = Journal(tmp_path)
    journal.step(small_run(teachers=1), metrics(1))
    assert len(logged(tmp_path)) == 1  # while the journal is open


def test_every_so_many_steps_and_the_last(tmp_path):
    run, journal = small_run(teachers=1), Journal(tmp_path, every=4)
    for step in range(1, 11):
        journal.step(run, metrics(step))
    assert [line["step"] for line in logged(tmp_path)] == [4, 8, 10]


def killable():
    return small_run(teachers=2, steps=7, batch_size=2, save_every=3)


class Killed(BaseException):
    """The end of the process, as far as its files know."""


def test_after_a_kill_no_step_is_there_twice(tmp_path):
    """Killed 2 steps behind the last state, in the middle of a line: the log ends up as if nothing had happened."""

    def killed_at_5(run, metrics):
        if metrics.step == 5:
            run.updating = True  # or the state would be saved on the way out
            raise Killed

    def note(step, text):
        journal = Journal(tmp_path)
        journal.note(step, text)
        journal.close()

    note(0, "before the first step")
    with pytest.raises(Killed):
        train(killable(), tmp_path, Watch(killed_at_5))
    note(5, "behind the last state")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    train(killable(), tmp_path)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert lines[0] == {"step": 0, "note": "before the first step"}

    straight = tmp_path / "straight"
    train(killable(), straight)
    kept = [line for line in lines if "note" not in line]
    for one, two in zip(kept, logged(straight), strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_a_run_from_the_beginning_begins_its_log(tmp_path):
    for _ in range(2):
        journal = Journal(tmp_path)
        for step in (1, 2):
            journal.step(small_run(teachers=1), metrics(step))
        journal.close()
    assert [line["step"] for line in logged(tmp_path)] == [1, 2]


class FullDisk:
    """A file whose disk has room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        written = self.file.write(data[: max(0, self.room)])
        self.room -= written
        return written


def test_a_full_disk_is_reported_once_and_the_log_stays_whole(tmp_path, caplog):
    journal = Journal(tmp_path)
    run = small_run(teachers=1)
    journal.step(run, metrics(1))
    journal._file = FullDisk(journal._file, 100)
    for step in (2, 3, 4):
        journal.step(run, metrics(step))
    assert [line["step"] for line in logged(tmp_path)] == [1]
    journal._file.room = 10_000  # somebody made room
    journal.step(run, metrics(5))
    assert [line["step"] for line in logged(tmp_path)] == [1, 5]
    messages = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(messages) == 1 and "No space left" in messages[0]


def test_a_folder_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    journal = Journal(tmp_path / "file" / "run")
    for step in (1, 2):
        journal.step(small_run(teachers=1), metrics(step))
    journal.note(2, "a word")
    journal.picture(2, Image.new("RGB", (4, 4)))
    journal.close()
    assert len(caplog.records) == 1


# --- TensorBoard ------------------------------------------------------------------------------------------------------


class FalseWriter:
    """The calls that a SummaryWriter got."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.calls, self.full = folder, purge_step, [], False

    def __getattr__(self, name):
        def call(*arguments, **named):
            if self.full:
                raise OSError(28, "No space left on device")
            self.calls.append((name, arguments))

        return call


@pytest.fixture
def writers(monkeypatch) -> list[FalseWriter]:
    """Those that are made from here on."""
    made = []

    def make(*arguments, **named):
        made.append(FalseWriter(*arguments, **named))
        return made[-1]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=make))
    return made


def test_tensorboard_gets_every_number_and_picture(tmp_path, writers):
    journal = Journal(tmp_path)
    journal.step(small_run(teachers=1), metrics(4, score={"ink": 0.5, "neon": 0.75}))
    journal.picture(4, Image.new("L", (6, 3), 7))
    journal.close()
    (writer,) = writers
    assert writer.purge_step == 4  # of the steps 1 to 3 it keeps what it has
    got = {arguments[0]: arguments for name, arguments in writer.calls if name == "add_scalar"}
    assert got["score/neon"] == ("score/neon", 0.75, 4) and got["loss"] == ("loss", 0.25, 4)
    assert "step" not in got and "lr" in got and "grad_norm" in got
    assert all(isinstance(value, (int, float)) for _, value, _ in got.values())  # some metrics are None at times
    (image,) = [arguments for name, arguments in writer.calls if name == "add_image"]
    assert np.array_equal(image[1], np.full((3, 6, 3), 7)) and image[2] == 4
    assert writer.calls[-1][0] == "close"


def test_tensorboards_full_disk_does_no_harm_either(tmp_path, writers, caplog):
    journal = Journal(tmp_path)
    run = small_run(teachers=1)
    journal.step(run, metrics(1))
    writers[0].full = True
    for step in (2, 3):
        journal.step(run, metrics(step))
    journal.close()
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3]
    assert len(caplog.records) == 1 and "TensorBoard" in caplog.records[0].message


# --- in words ---------------------------------------------------------------------------------------------------------


def test_progress_smooths_and_counts_down():
    progress = Progress()
    assert progress.seconds_left is None
    progress.update(metrics(1, 100, {"ink": 1.0, "neon": 3.0}, seconds=2.0))
    progress.update(metrics(2, 100, {"ink": 2.0}, seconds=2.0))  # no rows of neon in this batch
    assert progress.losses == {"ink": pytest.approx(0.95 * 1 + 0.05 * 2), "neon": 3.0}
    assert progress.seconds_left == pytest.approx(98 * 2.0)
    assert progress.text() == "step 2 of 100, 3 min 16 s left\nink 1.0500  neon 3.0000"


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_end_of_a_log_without_lines(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b"")
    assert module.end_of_steps(tmp_path / "log.jsonl", 10) == 0
