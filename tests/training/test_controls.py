"""What may be asked of a run while it runs: by threads, by signals, in and out of a pause."""

import os
import signal
import threading
import time

import pytest
import torch
from comfyui_dmm.training.run.state import states
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.watch.controls import ACTIONS, Controls, StopAndSave, signals
from comfyui_dmm.training.run.watch.watch import Watch

from .families import small_run


class Interrupt(BaseException):
    """Like the host's: no Exception."""


class Answers:
    """Counts what a Controls does."""

    def __init__(self, controls):
        self.controls, self.done, self.checks = controls, [], 0

    def after_step(self):
        self.controls.after_step(self.save, self.sample, self.check)

    def save(self):
        self.done.append("save")

    def sample(self):
        self.done.append("sample")

    def check(self):
        self.checks += 1


@pytest.fixture
def answers():
    return Answers(Controls())


def test_nothing_asked_nothing_done(answers):
    answers.after_step()
    assert answers.done == [] and answers.checks == 1


def test_each_request_is_answered_once(answers):
    for action in ("save", "sample", "sample"):
        answers.controls.ask(action)
    answers.after_step()
    answers.after_step()
    assert answers.done == ["sample", "save"]


def test_an_unknown_action_is_refused(answers):
    with pytest.raises(ValueError, match="action is 'dance': choose one of sample, save, stop, pause, resume"):
        answers.controls.ask("dance")


def test_stop_answers_what_else_was_asked_and_raises(answers):
    answers.controls.ask("stop")
    answers.controls.ask("save")
    assert answers.controls.stopping
    with pytest.raises(StopAndSave):
        answers.after_step()
    assert answers.done == ["save"]


def paused_in_a_thread(answers) -> threading.Thread:
    answers.controls.ask("pause")
    thread = threading.Thread(target=answers.after_step, daemon=True)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive() and answers.controls.paused
    return thread


def test_a_pause_answers_and_ends_with_resume(answers):
    thread = paused_in_a_thread(answers)
    for action in ("sample", "save"):
        answers.controls.ask(action)
        time.sleep(0.1)
    assert answers.done == ["sample", "save"] and thread.is_alive()
    assert answers.checks > 1, "the host's interrupt is not looked at during a pause"
    answers.controls.ask("resume")
    thread.join(5)
    assert not thread.is_alive() and not answers.controls.paused


def test_a_pause_that_was_taken_back_before_the_step_ended(answers):
    for action in ("pause", "resume"):
        answers.controls.ask(action)
    answers.after_step()


@pytest.mark.parametrize("by", ["stop", "interrupt"])
def test_a_pause_can_be_ended_for_good(answers, by):
    answers.controls.ask("pause")
    timer = threading.Timer(0.3, answers.controls.ask, ["stop"])
    if by == "stop":
        timer.start()
        with pytest.raises(StopAndSave):
            answers.after_step()
        return

    def check():
        answers.checks += 1
        if answers.checks > 2:
            raise Interrupt

    answers.check = check
    with pytest.raises(Interrupt):
        answers.after_step()


def test_requests_of_many_threads_are_all_heard(answers):
    def ask():
        for _ in range(200):
            answers.controls.ask("save")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        answers.after_step()
    answers.after_step()
    done = list(answers.done)
    assert done and set(done) == {"save"}
    answers.after_step()
    assert answers.done == done  # nothing was left over


def test_a_stopped_run_has_saved_itself_and_goes_on_bitwise(tmp_path):
    controls = Controls()

    def on_step(run, metrics):
        if metrics.step == 2:
            controls.ask("stop")

    run = small_run(teachers=2, steps=4, batch_size=2)
    with pytest.raises(StopAndSave):
        train(run, tmp_path, Watch(on_step, controls=controls))
    assert run.step == 2 and [path.name for path in states(tmp_path)] == ["state-00000002.safetensors"]
    again, straight = small_run(teachers=2, steps=4, batch_size=2), small_run(teachers=2, steps=4, batch_size=2)
    train(again, tmp_path)
    train(straight, None)
    one, two = again.student_weights(), straight.student_weights()
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_signals_are_requests(answers):
    if not hasattr(signal, "SIGUSR1"):
        pytest.skip("this system has no SIGUSR1")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP)
    before = [signal.getsignal(number) for number in numbers]
    with signals(answers.controls):
        os.kill(os.getpid(), signal.SIGUSR1)
        answers.after_step()
        os.kill(os.getpid(), signal.SIGUSR2)
        answers.after_step()
        assert signal.getsignal(signal.SIGTSTP) == before[-1]
    assert answers.done == ["sample", "save"]
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_waits_for_the_step_and_a_second_does_not(number):
    controls, seen = Controls(), []
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), signals(controls):
        os.kill(os.getpid(), number)
        seen.append("the step ends")
        controls.after_step(save=lambda: None, sample=lambda: None)
        seen.append("not reached")
    assert seen == ["the step ends"]
    controls, seen = Controls(), []
    with pytest.raises(KeyboardInterrupt), signals(controls):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        seen.append("not reached")
    assert seen == [] and signal.getsignal(number) == before


def test_a_signal_ends_a_pause():
    controls = Controls()
    controls.ask("pause")
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt), signals(controls):
        controls.after_step(save=lambda: None, sample=lambda: None)


def test_without_the_signals_of_unix(monkeypatch, answers):
    for name in ("SIGUSR1", "SIGUSR2"):
        monkeypatch.delattr(signal, name, raising=False)
    with signals(answers.controls):
        answers.after_step()


def test_every_action_can_be_asked(answers):
    for action in ACTIONS:
        answers.controls.ask(action)
    with pytest.raises(StopAndSave):
        answers.after_step()
