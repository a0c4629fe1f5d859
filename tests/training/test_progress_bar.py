"""Progress on stderr: a bar in a terminal, a line now and then in a log."""

import os
import re
import struct
import subprocess
import sys

import pytest
from comfyui_dmm.training.commands import progress_bar
from comfyui_dmm.training.commands.progress_bar import ProgressBar, new_bar
from comfyui_dmm.training.commands.watched import Bar

from .test_journal import metrics

STEPS = 200
RUN = f"""
from comfyui_dmm.training.commands.progress_bar import new_bar
bar = new_bar({STEPS}, unit="step")
for step in range({STEPS}):
    bar.set_postfix_str(f"ink {{step / 1000:.4f}}", refresh=False)
    bar.update()
bar.close()
"""


@pytest.fixture
def clock(monkeypatch):
    """A tqdm whose seconds pass when the test says so."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr("tqdm.std.time", lambda: Clock.now)
    return Clock


def run_into(stderr) -> None:
    subprocess.run([sys.executable, "-c", RUN], stderr=stderr, check=True)


def test_a_log_gets_a_first_and_a_last_line(tmp_path):
    with open(tmp_path / "log", "wb") as log:
        run_into(log)
    first, last = (tmp_path / "log").read_bytes().decode().splitlines()  # also cuts at a bare return
    assert first.startswith(f"0% 0/{STEPS} [") and first.endswith("step/s]")
    assert last.startswith(f"100% {STEPS}/{STEPS} [") and last.endswith("step/s, ink 0.1990]")


def test_a_terminal_gets_a_bar():
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    run_into(theirs)  # little enough for the terminal to hold it
    os.set_blocking(ours, False)
    shown = os.read(ours, 65536).decode()
    os.close(ours), os.close(theirs)
    drawings = shown.strip().split("\r")
    assert len(drawings) >= 2 and "\n" not in "".join(drawings)
    assert re.search(rf"100%\|█+\| {STEPS}/{STEPS} ", drawings[-1])


def test_lines_in_between_keep_their_distance(clock, capsys):
    bar = new_bar(STEPS, "distilling")
    for _ in range(STEPS):
        clock.now += 1
        bar.update()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.match(r"distilling: +\d+% (\d+)/200 \[", line)[1]) for line in lines] == [
        0,
        30,
        60,
        90,
        120,
        150,
        180,
        200,
    ]
    assert "[01:30<01:50," in lines[3]


def test_slow_steps_get_a_line_each(clock, capsys):
    bar = new_bar(3)
    for _ in range(3):
        clock.now += 2 * progress_bar.EVERY
        bar.update()
    bar.close()
    assert [line.split("%")[0] for line in capsys.readouterr().err.splitlines()][:-1] == ["0", "33", "67", "100"]


def test_each_piece_of_work_begins_and_ends(clock, capsys):
    bar = ProgressBar()
    for what, total in (("checking", 50), ("encoding", 80)):
        for done in range(1, total + 1):
            clock.now += 0.1
            bar(done, total, what)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines] == [
        "checking:   0% 0/50", "checking: 100% 50/50", "encoding:   0% 0/80", "encoding: 100% 80/80"
    ]  # fmt: skip


def test_the_steps_of_a_run(clock, capsys):
    """The command line's own bar, of a run that goes on at step 41."""
    bar = Bar()
    for step in range(41, STEPS + 1):
        clock.now += 1
        bar(None, metrics(step, STEPS, {"ink": 0.5, "neon": 0.25}))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines] == [
        "20% 40/200", "36% 71/200", "50% 101/200", "66% 131/200", "80% 161/200", "96% 191/200", "100% 200/200"
    ]  # fmt: skip
    assert all(line.endswith(", ink 0.5000  neon 0.2500]") for line in lines[1:])
