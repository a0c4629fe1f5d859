"""Run states: an interrupted run ends bitwise like one that never stopped, and a state of another run is refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core.unet import UNetConfig
from comfyui_dmm.training.loop.trainer import Trainer
from comfyui_dmm.training.run.state import BEST, best_error, fork, identity, read_state, resume, save_state, states
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.validation import validation_error
from comfyui_dmm.training.run.watch.watch import Watch
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
        train(first, tmp_path, Watch(stop))
    second = small_run(ema_gamma=average, save_every=4)
    steps = []
    train(second, tmp_path, Watch(lambda run, metrics: steps.append(metrics.step)))
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
    other = small_teacher("teacher 2", 99, run.data)
    run = Trainer(run.base, [run.teachers[0], other, run.teachers[2]], run.data, run.config)
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


@pytest.mark.parametrize(
    "settings", [{}, {"lambda_adv": 0.1}, {"trainable": "lora", "lora_rank": 4}, {"optimizer": "adafactor"}]
)
def test_a_state_holds_what_the_next_step_needs(tmp_path, settings):
    """Of the weights only those that learn; of the optimisers everything."""
    run = small_run(steps=2, **settings)
    train(run, None)
    tensors = load_file(save_state(run, tmp_path, {}))
    kinds = {"optimizer": ("exp_avg", "exp_avg_sq", "step")}
    if "optimizer" in settings:
        kinds["optimizer"] = ()  # a matrix has other moments than a vector: only their presence is asked below
        assert any("exp_avg_sq_row" in k for k in tensors)
    want = {f"{part}.{n}" for part in ("student", "ema") for n in run.student.trained}
    want |= {f"optimizer.{n}|{kind}" for n in run.student.trained for kind in kinds["optimizer"]}
    if run.discriminator:
        head = dict(run.discriminator.head.named_parameters())
        want |= {f"head.{n}" for n in head} | {f"head_optimizer.{n}|{k}" for n in head for k in kinds["optimizer"]}
    if "optimizer" in settings:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("optimizer.")}
    assert set(tensors) == want


EVERYTHING = {"lambda_adv": 0.1, "accumulate": 2, "final_steps": 4, "final_images": 8, "final_sampling_steps": 3}


@pytest.mark.parametrize("stop_at", [3, 6, 8])
@pytest.mark.parametrize(
    "settings",
    [
        EVERYTHING,
        {"trainable": "lora", "lora_rank": 4},
        {"trainable": "style"},
        {"optimizer": "adafactor"},
        {"optimizer": "muon"},
        {"precision": "bf16"},
    ],
)
def test_every_kind_of_run_resumes_bitwise(tmp_path, settings, stop_at):
    """Stopped before, at and after the beginning of the final stage."""
    settings = {"steps": 6 if "final_steps" in settings else 10, **settings}
    straight = small_run(teachers=2, **settings)
    train(straight, None)

    def stop(run, metrics):
        if metrics.step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        train(small_run(teachers=2, **settings), tmp_path, Watch(stop))
    second = small_run(teachers=2, **settings)
    train(second, tmp_path)
    assert second.step == 10
    for averaged in (False, True):
        a, b = straight.student_weights(averaged), second.student_weights(averaged)
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_an_eight_bit_run_resumes_bitwise(tmp_path):
    """With the real bitsandbytes, whose state has tables that all parameters share."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    straight = small_run(optimizer="adamw8bit")
    assert all(math.isfinite(m.loss) for m in straight.run())

    def stop(run, metrics):
        if metrics.step == 3:
            raise Stop

    with pytest.raises(Stop):
        train(small_run(optimizer="adamw8bit"), tmp_path, Watch(stop))
    second = small_run(optimizer="adamw8bit")
    train(second, tmp_path)
    assert any(state["state1"].dtype == torch.uint8 for state in second.optimizer.state.values())
    a, b = straight.student_weights(False), second.student_weights(False)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_best_is_the_state_with_the_lowest_error(tmp_path):
    run = small_run(steps=5, save_every=1, keep=2, lr=5e-3)
    errors = {}

    def note(run, metrics):
        errors[metrics.step] = validation_error(run)

    train(run, tmp_path, Watch(note))
    tensors, metadata = read_state(tmp_path / BEST)
    best = min(errors, key=errors.get)
    assert int(metadata["step"]) == best and float(metadata["error"]) == errors[best]
    assert [p.name for p in states(tmp_path)] == ["state-00000004.safetensors", "state-00000005.safetensors"]


def test_a_worse_state_does_not_become_the_best(tmp_path):
    run = small_run()
    list(run.run())
    save_state(run, tmp_path, {}, 0.5)
    run.step = 7
    save_state(run, tmp_path, {}, 0.75)
    save_state(run, tmp_path, {}, float("nan"))
    assert read_state(tmp_path / BEST)[1]["step"] == "6" and best_error(tmp_path) == 0.5


def test_a_fork_starts_from_old_weights_and_nothing_else(tmp_path):
    old = small_run()
    train(old, tmp_path / "old")
    new = small_run(lr=5e-4, seed=9)
    begun = []

    def first(run, metrics):
        begun.append(metrics.step)

    start = {k: v.clone() for k, v in old.student_weights().items()}
    fork(new, tmp_path / "old")
    assert new.step == 0 and not new.optimizer.state
    assert all(torch.equal(v, start[k]) for k, v in new.student_weights(False).items())
    train(small_run(lr=5e-4, seed=9), tmp_path / "new", Watch(first), fork_from=tmp_path / "old")
    assert begun == [1, 2, 3, 4, 5, 6] and states(tmp_path / "old")[-1].name == "state-00000006.safetensors"
    with pytest.raises(ValueError, match="trained another model"):
        fork(small_run(teachers=2), tmp_path / "old")
    with pytest.raises(ValueError, match="no run to start from"):
        fork(small_run(), tmp_path / "nothing")


KILLED = {
    "teachers": 2, "steps": 25, "save_every": 1, "lambda_adv": 0.1, "final_steps": 35, "final_images": 16, "final_sampling_steps": 3,
}  # fmt: skip
CHILD = """
import sys, pathlib, torch
torch.set_num_threads(1)
from comfyui_dmm.training.run.distill import train
from comfyui_dmm.training.run.watch.watch import Watch
from tests.training.families import small_run
from tests.training.test_state import KILLED
def told(*what):
    print("alive", flush=True)
train(small_run(**KILLED), pathlib.Path(sys.argv[1]), Watch(told, on_paint=told))
"""


@pytest.mark.slow
def test_kill_nine_at_random_moments(tmp_path):
    """SIGKILL at 20 random moments, in saves and while teachers paint too; every time the same command goes on; the end is bitwise the
    same, discriminator and final stage included."""
    straight = small_run(**KILLED)
    train(straight, None)
    moments = torch.rand(20, generator=torch.Generator().manual_seed(0))
    killed = 0
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    for moment in moments.tolist():
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root
        )
        child.stdout.readline()  # its first step is done, or the first pictures of a teacher
        time.sleep(0.1 * moment)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
    last = small_run(**KILLED)
    train(last, tmp_path)
    assert killed == 20 and last.step == 60
    a, b = straight.student_weights(False), last.student_weights(False)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_kill_nine_in_the_middle_of_saves(tmp_path):
    """SIGKILL as soon as the temporary file of a save is there, 20 times: no state is damaged, and the end is bitwise the same."""
    straight = small_run(**KILLED)
    train(straight, None)
    root, in_a_save = os.path.dirname(os.path.dirname(os.path.dirname(__file__))), 0
    for _ in range(20):
        for left in tmp_path.glob(".*.tmp"):
            shutil.rmtree(left)
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.DEVNULL, text=True, cwd=root
        )
        while child.poll() is None and not list(tmp_path.glob(".*.tmp")):
            time.sleep(0.0005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        in_a_save += bool(list(tmp_path.glob(".*.tmp")))
        for path in states(tmp_path):
            read_state(path)
    last = small_run(**KILLED)
    train(last, tmp_path)
    print(f"\n20 kills, {in_a_save} of them in the middle of a save; every state that was there was sound")
    assert in_a_save >= 5 and last.step == 60 and not list(tmp_path.glob("*.damaged"))
    a, b = straight.student_weights(False), last.student_weights(False)
    assert all(torch.equal(a[k], b[k]) for k in a)


OLD_STATE = Path(__file__).parent / "states" / "state-00000003.safetensors"
"""Written by the trainer of commit d19a4ba, before it was taken apart."""
TINY = UNetConfig(
    model_channels=32, channel_mult=(1,), num_res_blocks=(1,), depth_input=(1,), depth_output=(0, 0), context_dim=16
)


def test_a_state_from_before_the_trainer_was_taken_apart_goes_on(tmp_path):
    """Every tensor is taken over as it is in the file; what the run is known by has the same names and the same settings. (Hashes of random
    weights are left out: they depend on the processor.)"""
    shutil.copy(OLD_STATE, tmp_path)
    tensors, metadata = read_state(OLD_STATE)
    then = json.loads(metadata["identity"])
    run = small_run(
        teachers=2, config=TINY, trainable="style", lambda_adv=0.05, adv_lr=1e-3, sampling="adaptive", batch_size=6
    )
    now = identity(run)
    assert then.keys() == now.keys()
    assert {k: v for k, v in then.items() if k.startswith("setting")} == {
        k: v for k, v in now.items() if k.startswith("setting")
    }
    assert resume(run, tmp_path, then) and run.step == 3
    again = save_state(run, tmp_path / "again", then)
    saved, _ = read_state(again)
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[k], v) for k, v in tensors.items())
    assert [m.step for m in run.run()] == [4, 5, 6]
