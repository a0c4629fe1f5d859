"""A training asked for things while it runs in a real ComfyUI, and what is left of it in memory afterwards."""

import gc
import time
import weakref
from types import SimpleNamespace

import pytest
import requests
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.training.run.state import states
from comfyui_dmm.training.run.watch.journal import read_log
from PIL import Image

from .families import checkpoint_of, random_unet
from .test_distill_host import PICTURE, PLAIN, TEXT, files, graph, queue, saved  # noqa: F401, a fixture

FOREVER = 2000  # the host reports progress every half per cent
SECONDS = 30


def ask(server, action, node="distil"):
    return requests.post(f"http://{server.address}/dmm/training/{node}/{action}", timeout=SECONDS)


def training(server) -> list[dict]:
    return server.get("dmm/training").json()["training"]


def run_folder(server, name):
    (folder,) = (server.base / "output" / "dmm_runs").glob(f"{name}-????????")
    return folder


def until(happened, what: str):
    end = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.05)


class AtStep:
    """Called with every message of a run; calls ``act`` once, when the run has done so many steps."""

    def __init__(self, step, act):
        self.step, self.act, self.done = step, act, False

    def __call__(self, message):
        kind, data = message
        if kind == "progress" and data["node"] == "distil" and data["value"] >= self.step and not self.done:
            self.done = True
            self.act()


def test_nothing_runs(files):  # noqa: F811
    assert training(files) == []
    answer = ask(files, "stop")
    assert answer.status_code == 404 and answer.json() == {"error": "node 'distil' is not training"}
    assert requests.get(f"http://{files.address}/dmm/training/distil/stop", timeout=SECONDS).status_code in (404, 405)


def test_stop_ends_the_node_well_and_the_graph_goes_on(files):  # noqa: F811
    """The student so far is saved, loaded and painted with; the answers of the routes on the way."""
    seen = {}

    def act():
        (seen["entry"],) = training(files)
        seen["dance"], seen["other"] = ask(files, "dance"), ask(files, "stop", node="9")
        seen["stop"] = ask(files, "stop")

    end, messages = queue(files, graph(steps=FOREVER, name="stopped", preview_every=2), AtStep(3, act))
    assert end == "execution_success"
    entry = seen["entry"]
    assert entry["node_id"] == "distil" and entry["step"] >= 3 and entry["steps"] == FOREVER
    assert entry["seconds_left"] > 0 and not entry["paused"] and not entry["stopping"]
    assert seen["dance"].status_code == 400 and "action is 'dance': choose one of" in seen["dance"].json()["error"]
    assert seen["other"].status_code == 404 and "node '9' is not training" in seen["other"].json()["error"]
    assert seen["stop"].status_code == 200 and seen["stop"].json()["stopping"]
    assert training(files) == []

    (path,) = saved(files, "stopped")
    steps = load_checkpoint(path).recipe["steps_done"]
    assert 3 <= steps < FOREVER
    outputs = {d["node"]: d["output"] for kind, d in messages if kind == "executed"}
    assert files.image(outputs["show"]["images"][0]).size == (128, 128)
    report = outputs["distil"]["text"][0]
    assert f"stopped after {steps} of {FOREVER} steps" in report and "eps error" in report
    assert [int(state.name[6:14]) for state in states(run_folder(files, "stopped"))][-1] == steps
    log = list(read_log(run_folder(files, "stopped") / "log.jsonl"))
    assert [line["step"] for line in log] == list(range(1, steps + 1))


def test_pictures_of_student_beside_teacher(files):  # noqa: F811
    """Before the first step and every two, on disk and on the node; the words name every teacher."""
    end, messages = queue(files, graph(steps=4, name="watched", preview_every=2))
    assert end == "execution_success"
    folder = run_folder(files, "watched") / "pictures"
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{step:08d}.png" for step in (0, 2, 4)]
    sheet = Image.open(folder / "step-00000004.png")
    assert sheet.width > 2 * 128 and sheet.height > 2 * 128  # 2 styles, teacher and student
    assert len([data for kind, data in messages if kind == PICTURE and b"\xff\xd8\xff" in data[:64]]) >= 3
    first = next(d["value"] for kind, d in messages if kind == "progress" and d["node"] == "distil")
    assert first == 0  # its picture
    last = [data.decode(errors="replace") for kind, data in messages if kind == TEXT][-1]
    assert "step 4 of 4, 0 s left\nink" in last and "<b>neon</b>" in last


def test_sample_and_save_now(files):  # noqa: F811
    seen = {}

    def act():
        ask(files, "sample")
        ask(files, "save")
        folder = run_folder(files, "asked")
        until(lambda: saved(files, "asked"), "a checkpoint")
        until(lambda: list(folder.glob("pictures/*.png")), "a picture")
        seen["state"] = states(folder)
        (path,) = saved(files, "asked")
        seen["steps"] = load_checkpoint(path).recipe["steps_done"]
        seen["still"] = training(files)
        ask(files, "stop")

    settings = {"preview_every": 0, "save_every": 1_000_000}
    end, messages = queue(files, graph(steps=FOREVER, name="asked", **settings), AtStep(2, act))
    assert end == "execution_success"
    assert len(seen["state"]) == 1 and seen["state"][0].name == f"state-{seen['steps']:08d}.safetensors"
    assert seen["still"], "the run did not go on"
    assert any(kind == PICTURE for kind, _ in messages)


def test_pause_and_resume(files):  # noqa: F811
    seen = {}

    def act():
        (asked,) = training(files)
        assert ask(files, "pause").json()["paused"]
        ask(files, "sample")
        # Painted between two steps: by then the step in hand has ended, however slow the machine is.
        until(lambda: list(run_folder(files, "paused").glob("pictures/*.png")), "a picture during the pause")
        (before,) = training(files)
        time.sleep(1)
        (after,) = training(files)
        seen["steps"] = asked["step"], before["step"], after["step"]
        assert not ask(files, "resume").json()["paused"]
        until(lambda: training(files)[0]["step"] > after["step"] + 2, "steps after the pause")
        ask(files, "stop")

    end, messages = queue(files, graph(steps=FOREVER, name="paused", preview_every=0), AtStep(2, act))
    asked, before, after = seen["steps"]
    assert end == "execution_success" and before == after <= asked + 2, seen  # a step may end between the two questions
    assert any(b"paused at step" in data for kind, data in messages if kind == TEXT)


def test_cancel_ends_a_pause_and_keeps_what_was_learnt(files):  # noqa: F811
    def act():
        ask(files, "pause")
        time.sleep(0.5)
        files.interrupt()

    settings = {"preview_every": 0, "save_every": 1_000_000}
    end, _ = queue(files, graph(steps=FOREVER, name="paused-off", **settings), AtStep(2, act))
    assert end == "execution_interrupted" and training(files) == []
    (path,) = saved(files, "paused-off")
    (state,) = states(run_folder(files, "paused-off"))
    assert state.name == f"state-{load_checkpoint(path).recipe['steps_done']:08d}.safetensors"
    end, _ = queue(files, graph(steps=2, name="afterwards"))
    assert end == "execution_success"


# --- memory, in this process ------------------------------------------------------------------------------------------


@pytest.fixture
def node(host, models, monkeypatch):
    """Distill Teachers called as the host calls it -> how it ended, the runs that it made (weakly), and what went wrong."""
    from comfyui_dmm.nodes import distill, host_model, training_inputs
    from comfyui_dmm.nodes.teacher import TeacherInput

    path = models / "dmm" / "in-process.safetensors"
    save_checkpoint(path, checkpoint_of(random_unet(PLAIN, 0), whole=True))
    monkeypatch.setattr(distill.DistillTeachers, "hidden", SimpleNamespace(unique_id="7"), raising=False)
    alive, gather = [], training_inputs.gather

    def gathered(*inputs, **named):
        run = gather(*inputs, **named)
        held = [
            run.student.unet,
            run.optimizer,
            run.student.ema,
            run.targets.pool,
            *(teacher.unet for teacher in run.teachers),
        ]
        alive.extend(weakref.ref(thing) for thing in held)
        return run

    monkeypatch.setattr(training_inputs, "gather", gathered)

    def execute(name, change_vae=lambda vae: None, **changes):
        """-> (NodeOutput or None, the error or None, weak references to what the run held)"""
        alive.clear()
        model, clip, vae, _ = host_model.load(str(path))
        change_vae(vae)
        g = torch.Generator().manual_seed(0)
        settings = {
            "base": model, "clip": clip, "vae": vae, "name": name, "steps": 3, "batch_size": 2, "learning_rate": 1e-4, "seed": 0,
            "start_from": "base", "style_rate": 1.0, "feature_weight": 0.001, "caption_dropout": 0.1, "no_style_share": 0.05,
            "precision": "fp32", "gradient_checkpointing": False, "preview_every": 1, "save_every": 100, **changes,
        }  # fmt: skip
        teachers = {f"teacher{i}": [TeacherInput(style, model)] for i, style in enumerate(("ink", "neon"))}
        latents = [{"samples": torch.randn(4, 4, 16, 16, generator=g)}]
        gc.disable()  # nothing may depend on when Python happens to collect
        try:
            with torch.inference_mode():
                lists = {key: [value] for key, value in settings.items()}
                output = distill.DistillTeachers.execute(teachers, latents, ["a", "b", "c", "d"], **lists)
            return output, None, list(alive)
        except BaseException as error:  # the host's interrupt too; it is held, as the host holds it
            return None, error, list(alive)
        finally:
            gc.enable()

    return execute


def at_step(monkeypatch, step, act):
    from comfyui_dmm.training.loop.trainer import Trainer

    whole = Trainer.train_step

    def train_step(run):
        metrics = whole(run)
        if metrics.step == step:
            act()
        return metrics

    monkeypatch.setattr(Trainer, "train_step", train_step)


def fail():
    raise RuntimeError("out of luck")


def cancel():
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()


def stop():
    from comfyui_dmm.nodes import training_routes

    training_routes._running["7"][0].ask("stop")


@pytest.mark.parametrize("how", ["success", "stop", "error", "cancel"])
def test_nothing_of_a_run_survives_it(node, monkeypatch, how):
    """Not on the device and not in the frames of the error, which the host holds for a while."""
    from comfyui_dmm.nodes import training_routes

    if how != "success":
        at_step(monkeypatch, 2, {"stop": stop, "error": fail, "cancel": cancel}[how])
    output, error, alive = node(f"memory-{how}")
    assert len(alive) == 6, error
    assert [ref() for ref in alive] == [None] * 6
    assert training_routes._running == {}
    kind = {
        "success": "NoneType",
        "stop": "NoneType",
        "error": "RuntimeError",
        "cancel": "InterruptProcessingException",
    }[how]
    assert type(error).__name__ == kind
    assert (output is not None) == (how in ("success", "stop"))
    if how == "error":  # cleared frames keep their places
        import traceback

        assert "in fail" in "".join(traceback.format_tb(error.__traceback__))


def test_a_vae_out_of_memory_costs_the_pictures_only(node, caplog):
    def break_it(vae):
        def decode(latent):
            raise torch.OutOfMemoryError("CUDA out of memory")

        vae.decode = decode

    output, error, alive = node("no-pictures", break_it)
    assert error is None and output is not None and [ref() for ref in alive] == [None] * 6
    assert caplog.text.count("no pictures at step 0, training goes on: OutOfMemoryError") == 1
    assert caplog.text.count("no pictures") == 1


def test_a_failed_comparison_costs_the_table_only(node, monkeypatch):
    from comfyui_dmm.nodes import training_run

    monkeypatch.setattr(training_run, "eps_errors", lambda *arguments, **named: fail())
    output, error, _ = node("no-table")
    assert error is None and "not compared with its teachers: out of luck" in str(output.ui)
