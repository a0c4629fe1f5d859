"""Run states: an interrupted run ends bitwise like one that never stopped, and a state of another run is refused."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from comfyui_dmm.training.distill import train
from comfyui_dmm.training.state import identity, resume, save_state, states
from safetensors.torch import load_file

from .families import small_data, small_run, small_teacher


class Stop(BaseException):
    """Like the host's InterruptProcessingException, no Exception."""


@pytest.mark.parametrize("stop_at", [1, 2, 5])
@pytest.mark.parametrize("average", [6.94, None])
def test_resume_is_bitwise_exact(tmp_path, stop_at, average):
    straight = small_run(ema_gamma=average)
    train(straight, None)

    def stop(run, metrics):
        if metrics.step == stop_at:
            raise Stop

    first = small_run(ema_gamma=average, save_every=4)
    with pytest.raises(Stop):
        train(first, tmp_path, stop)
    second = small_run(ema_gamma=average, save_every=4)
    steps = []
    train(second, tmp_path, lambda run, metrics: steps.append(metrics.step))
    assert steps == list(range(stop_at + 1, 7))
    for averaged in (False, True):
        a, b = straight.student_weights(averaged), second.student_weights(averaged)
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_last_states_are_kept(tmp_path):
    train(small_run(save_every=1, keep=2), tmp_path)
    assert [p.name for p in states(tmp_path)] == ["state-00000005.safetensors", "state-00000006.safetensors"]


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path):
    train(small_run(save_every=1, keep=3), tmp_path)
    newest = states(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    run = small_run(save_every=1)
    assert resume(run, tmp_path, identity(run)) and run.step == 5


@pytest.mark.parametrize(
    "change, named",
    [
        ({"lr": 2e-3}, r"setting lr \(0.001 -> 0.002\)"),
        ({"seed": 4}, "setting seed"),
        ({"batch_size": 4}, "setting batch_size"),
        ({"teachers": 2}, "teacher 'teacher 3'"),
        ({"data": small_data(seed=1)}, "data"),
    ],
)
def test_another_run_is_refused_by_name(tmp_path, change, named):
    train(small_run(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=named):
        train(small_run(**change), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_changed_teacher_is_refused(tmp_path):
    train(small_run(), tmp_path)
    run = small_run()
    run.teachers[1].unet.load_state_dict(small_teacher("x", 99, run.data).unet.state_dict())
    with pytest.raises(ValueError, match="something else: teacher 'teacher 2'"):
        train(run, tmp_path)


def test_a_run_can_be_made_longer(tmp_path):
    """With a constant rate, 3 steps and then 3 more are 6 steps."""
    train(small_run(steps=3), tmp_path)
    longer = small_run(steps=6)
    train(longer, tmp_path)
    straight = small_run(steps=6)
    train(straight, None)
    a, b = straight.student_weights(), longer.student_weights()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_state_holds_what_the_next_step_needs(tmp_path):
    run = small_run(steps=2)
    train(run, None)
    tensors = load_file(save_state(run, tmp_path, {}))
    names = [k for k, _ in run.student.named_parameters()]
    assert set(tensors) == {f"{part}.{n}" for part in ("student", "exp_avg", "exp_avg_sq", "ema") for n in names}


CHILD = """
import sys, pathlib, torch
torch.set_num_threads(1)
from comfyui_dmm.training.distill import train
from tests.training.families import small_run
train(small_run(steps=60, save_every=1), pathlib.Path(sys.argv[1]), lambda run, m: print(m.step, flush=True))
"""


@pytest.mark.slow
def test_kill_nine_at_random_moments(tmp_path):
    """SIGKILL at 20 random moments, saves included; every time the same command goes on; the end is bitwise the same."""
    straight = small_run(steps=60, save_every=1)
    train(straight, None)
    moments = torch.rand(20, generator=torch.Generator().manual_seed(0))
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    for moment in moments.tolist():
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root
        )
        if not child.stdout.readline():
            child.wait()
            break  # nothing left to do: the run was finished before this kill
        time.sleep(0.3 * moment)
        child.send_signal(signal.SIGKILL)
        child.wait()
    last = small_run(steps=60, save_every=1)
    train(last, tmp_path)
    a, b = straight.student_weights(False), last.student_weights(False)
    assert all(torch.equal(a[k], b[k]) for k in a)
