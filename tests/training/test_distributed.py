"""Several processes train as one does: real ones, connected by gloo, and under torchrun, where some of them are killed.

"As one does" is to rounding: sums over the rows are added up in another order. Losses agree to a relative 1e-5, gradients to 1e-5 of
the largest. Adam divides by the gradient's size, so that where it is nothing but rounding (a bias in front of a norm) a weight may
differ by a share of the learning rate: weights agree to 3e-5 at a rate of 5e-5 (``WEIGHT``).
"""

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.tests.training import pieces
from comfyui_dmm.tests.training.farm import Farm
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.config import FewStepConfig, TrainConfig
from comfyui_dmm.training.data.batches import Batch
from comfyui_dmm.training.memory.fitting import fitted
from comfyui_dmm.training.memory.planner import GB, Want, plan
from comfyui_dmm.training.parallel.devices import local_device
from comfyui_dmm.training.parallel.ranks import Ranks, launched
from comfyui_dmm.training.parallel.sharding import SEVERAL
from comfyui_dmm.training.run.state import begun_with, identity, read_state, save_state, states
from safetensors.torch import save_file

from .families import SMALL, small_run
from .test_cli import SHORT, folder, unet, write_config  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(torch.__version__ < SEVERAL, reason="several processes need torch 2.9")

SLOW = {"lr": 5e-5, "steps": 4, "batch_size": 8}
LOSS, WEIGHT = 1e-5, 3e-5
"""WEIGHT is absolute. AdamW divides a gradient by its own size: where it is near 0 the order of a sum decides how the weight moves, by at
most ``lr`` a step. The largest seen, on another processor than before, is 1.1e-5 (bank, 3 processes), of 2e-4."""
SMALLEST = 1e-4
"""A loss below is nothing: the student begins as the base, and a batch may be all the base's."""


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes of the farm have: what is compared bit for bit adds up in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def farm():
    made = Farm()
    yield made
    made.close()


# --- shares of things -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, world", [(8, 3), (3, 3), (100, 7), (0, 2)])
def test_shares_are_neighbours_and_differ_by_one_at_most(count, world):
    shares = [list(range(count))[Ranks(rank, world).share(count)] for rank in range(world)]
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("teachers, world", [(20, 4), (5, 3), (2, 3), (1, 4)])
def test_a_process_meets_few_teachers(teachers, world):
    """With equal shares and no base: its share of them, and one more at either end, whichever is more."""
    teacher = torch.arange(60 * teachers) % teachers
    x = torch.arange(len(teacher))
    batch = Batch(x, x, teacher.sort().values, x)
    for rank in range(world):
        part = batch.share(Ranks(rank, world).share(len(batch)))
        assert len(part.teacher.unique()) <= math.ceil(teachers / world) + 1
        assert torch.equal(part.x_t, x[part.start : part.start + len(part)]) and part.full is batch


def test_processes_tell_each_other(farm):
    for answer in farm(3, pieces.talk):
        assert answer["sum"] == [3.0, 3.0] and answer["any"] == [True, False]
        assert [one["rank"] for one in answer["gather"]] == [0, 1, 2] and len(answer["gather"][2]["text"]) == 12
        assert answer["from_main"] == "of 0"


def test_what_is_wrong_in_one_ends_all(farm):
    assert farm(3, pieces.fail_in_one, who=2) == ["the file of process 2 is damaged"] * 3


# --- the same training ------------------------------------------------------------------------------------------------

FULL = {
    "teachers": 5, "lambda_adv": 0.1, "adv_lr": 1e-4, "base_share": 0.2, "accumulate": 2, "sampling": "adaptive",
    "loss_weight": "v", **SLOW,
}  # fmt: skip
CASES = {
    "everything": FULL,
    "2 teachers": {"teachers": 2, **SLOW},
    "low rank": {"teachers": 5, "trainable": "lora", "lora_rank": 4, **SLOW},
    "bf16": {"teachers": 5, "precision": "bf16", **SLOW},
    "style only": {"teachers": 5, "trainable": "style", **SLOW},
    "blocks recomputed": {"teachers": 5, "gradient_checkpointing": True, "accumulate": 2, **SLOW},
    "low rank, bf16": {"teachers": 5, "trainable": "lora", "lora_rank": 4, "precision": "bf16", **SLOW},
    "fp16": {"teachers": 5, "precision": "fp16", "lambda_adv": 0.1, **SLOW},
    "adafactor": {"teachers": 5, "optimizer": "adafactor", **SLOW},
    "soup": {"teachers": 5, "init": "soup", **SLOW},
    "bank": {"teachers": 5, "init": "bank", "bank": "60%", "lambda_adv": 0.1, "adv_lr": 1e-4, **SLOW},
    "bank only": {"teachers": 5, "init": "bank", "bank": "60%", "trainable": "bank", "accumulate": 2, **SLOW},
    "bank, blocks recomputed": {"teachers": 5, "init": "bank", "bank": "60%", "gradient_checkpointing": True, **SLOW},
    "bank, bf16": {"teachers": 5, "init": "bank", "bank": "60%", "precision": "bf16", **SLOW},
    "bank only, bf16": {"teachers": 5, "init": "bank", "bank": "60%", "trainable": "bank", "precision": "bf16", **SLOW},
    "low rank beside a bank": {
        "teachers": 5,
        "init": "bank",
        "bank": "60%",
        "trainable": "lora",
        "lora_rank": 4,
        **SLOW,
    },
    "few teachers": {**FULL, "teachers_per_step": 2},
    "mostly base": {"teachers": 5, "lambda_adv": 0.1, "adv_lr": 1e-4, "base_share": 0.8, **SLOW},
}
QUICK = [
    ("everything", 3, "ddp"),
    ("everything", 3, "fsdp"),
    ("2 teachers", 3, "ddp"),
    ("few teachers", 3, "ddp"),
    ("bf16", 3, "ddp"),
    ("bank", 3, "ddp"),
    ("bank", 3, "fsdp"),
]
THOROUGH = [
    (name, world, parallel)
    for name in CASES
    for world in (2, 3)
    for parallel in ("ddp", "fsdp")
    if (name, world, parallel) not in QUICK and (name, parallel) != ("adafactor", "fsdp")
]
_alone: dict = {}


def alone(name: str) -> dict:
    if name not in _alone:
        _alone[name] = pieces.train_all(Ranks(), **CASES[name])
    return _alone[name]


def differences(one: dict, other: dict) -> dict[str, float]:
    """The largest: of losses and per-teacher losses relative to the size of the step's loss, of weights absolute."""
    found = {"loss": 0.0, "teacher": 0.0, "norm": 0.0}
    for a, b in zip(one["metrics"], other["metrics"], strict=True):
        assert a.count == b.count and a.step == b.step and a.lr == b.lr
        for name in ("loss", "feature", "adversarial", "discriminator"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None)
            if x is not None:
                found["loss"] = max(found["loss"], abs(x - y) / max(x, SMALLEST))
        off = [abs(a.score[n] - b.score[n]) / max(a.loss, SMALLEST) for n in a.score]
        found["teacher"] = max(found["teacher"], *off)
        found["norm"] = max(found["norm"], abs(a.grad_norm - b.grad_norm) / max(a.grad_norm, SMALLEST))
    for kind in ("raw", "average"):
        assert one[kind].keys() == other[kind].keys()
        found[kind] = max((one[kind][k] - other[kind][k]).abs().max().item() for k in one[kind])
    return found


def compare(farm, name: str, world: int, parallel: str) -> None:
    others = farm(world, pieces.train_all, parallel=parallel, **CASES[name])
    found = differences(alone(name), others[0])
    print(f"\n{name}, {world} processes, {parallel}: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()))
    # Half-precision rounding is per operation, and with shares the weights of norms are rounded too.
    half = CASES[name].get("precision", "fp32") != "fp32"
    assert max(found["loss"], found["teacher"], found["norm"]) < (2e-2 if half else LOSS)
    assert max(found["raw"], found["average"]) < (1e-3 if half else WEIGHT)
    for other in others[1:]:
        assert [m.loss for m in other["metrics"]] == [m.loss for m in others[0]["metrics"]]
        if parallel == "ddp":  # every process has the very same student
            assert all(torch.equal(other["raw"][k], v) for k, v in others[0]["raw"].items())
    if alone(name)["difficulty"] is not None:
        want = alone(name)["difficulty"]
        assert all(torch.equal(other["difficulty"], others[0]["difficulty"]) for other in others)
        torch.testing.assert_close(others[0]["difficulty"], want, rtol=LOSS, atol=0)


@pytest.mark.parametrize("name, world, parallel", QUICK)
def test_several_processes_train_as_one(farm, name, world, parallel):
    compare(farm, name, world, parallel)


@pytest.mark.slow
@pytest.mark.parametrize("name, world, parallel", THOROUGH)
def test_every_kind_of_run_trains_as_one(farm, name, world, parallel):
    compare(farm, name, world, parallel)


@pytest.mark.parametrize("objective", ["regression", pytest.param("both", marks=pytest.mark.slow)])
def test_few_steps_are_learnt_as_one(farm, tmp_path, objective):
    """Three processes share out the paintings and the rows. Of the paintings, in float16: the last place."""
    given = {"settings": FewStepConfig(paths=5, path_steps=2, objective=objective), "validation": 8, **SLOW}
    want = pieces.learn_few_steps(Ranks(), str(tmp_path / "one"), **given)
    got = farm(3, pieces.learn_few_steps, folder=str(tmp_path / "three"), **given)
    torch.testing.assert_close(got[0]["paths"].float(), want["paths"].float(), rtol=2e-3, atol=2e-3)
    for other in got[1:]:
        assert torch.equal(other["paths"], got[0]["paths"])
        assert all(torch.equal(other["raw"][k], v) for k, v in got[0]["raw"].items())
        assert [m.loss for m in other["metrics"]] == [m.loss for m in got[0]["metrics"]]
    # From the paintings of the one: what follows is then to rounding.
    shutil.rmtree(tmp_path / "three")
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    found = differences(want, again := farm(3, pieces.learn_few_steps, folder=str(tmp_path / "three"), **given)[0])
    assert max(found["loss"], found["teacher"], found["norm"]) < LOSS and max(found["raw"], found["average"]) < WEIGHT
    assert math.isclose(again["check"], want["check"], rel_tol=1e-4)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_bank_is_the_first_processes(farm, parallel):
    """Singular vectors have no sign of their own, and another machine may choose another one: shares of two banks would be none."""
    got = farm(2, pieces.train_with_other_signs, parallel=parallel, **CASES["bank only"])[0]
    found = differences(alone("bank only"), got)
    assert max(found["loss"], found["teacher"]) < LOSS and found["raw"] < WEIGHT


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(farm, parallel):
    """Before any optimiser: student and discriminator, uneven shares (8 rows for 3), tolerance 1e-5 of each tensor's largest."""
    want = pieces.first_gradients(Ranks(), **FULL)
    got = farm(3, pieces.first_gradients, parallel=parallel, **FULL)[1]
    assert want.keys() == got.keys() and any(name.startswith("0.") for name in want)
    scale = max(g.abs().max().item() for g in want.values())
    for name, g in want.items():
        assert (g - got[name]).abs().max().item() <= 1e-5 * max(g.abs().max().item(), 1e-3 * scale), name


def test_the_fixed_check_is_shared_out(farm):
    want = pieces.check(Ranks(), teachers=5, validation=20)
    for parallel in ("ddp", "fsdp"):
        for error in farm(3, pieces.check, teachers=5, validation=20, parallel=parallel):
            assert math.isclose(error, want, rel_tol=1e-4)


def test_what_cannot_be_shared_is_refused(farm):
    with pytest.raises(ValueError, match="batch_size is 2, for 3 processes"):
        farm(3, pieces.make, batch_size=2)
    with pytest.raises(ValueError, match="optimizer is 'adafactor'.*parallel: ddp"):
        farm(2, pieces.make, optimizer="adafactor", parallel="fsdp")
    with pytest.raises(ValueError, match="compile is on"):
        farm(2, pieces.make, compile=True, parallel="fsdp")


def test_not_finite_in_one_process_stops_all(farm):
    """Each meets other teachers, and all of them name the one."""
    said = farm(3, pieces.meet_nan, teacher=4, teachers=5, base_share=0.0)
    assert len(set(said)) == 1 and "not finite at step 1 (teacher: teacher 5)" in said[0]


# --- teachers of which each process meets some ------------------------------------------------------------------------


def test_a_process_reads_the_teachers_that_it_meets(farm, folder):  # noqa: F811
    """From the files, some in half precision: the same run, the same identity, and few teachers in RAM."""
    teachers = [{"name": f"{i}", "file": f"{i}.safetensors"} for i in range(6)]
    for i in range(6):
        weights = {k: v.half() if i % 2 else v for k, v in unet(10 + i).items()}
        save_checkpoint(folder / f"{i}.safetensors", Checkpoint(unet=weights))
    write_config(folder, teachers=teachers, train={**SHORT, "batch_size": 12, "base_share": 0.0, "lr": 1e-4})
    want = pieces.load_and_train(Ranks(), str(folder / "run.yaml"))
    got = farm(3, pieces.load_and_train, config=str(folder / "run.yaml"))
    assert want["settled"] == list(range(7))
    assert [one["settled"] for one in got] == [[0, 1], [2, 3], [4, 5]]
    for one in got:
        assert one["identity"] == want["identity"]
        assert all(math.isclose(a, b, rel_tol=LOSS) for a, b in zip(one["losses"], want["losses"], strict=True))


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_merged_model_goes_on_with_several(farm, folder, parallel):  # noqa: F811
    """Its teachers in another order than its styles: one process and three take the same steps."""
    names = ("one", "two")
    teachers = [word for name in names for word in ("--teacher", f"{name}={folder / name}.safetensors")]
    whole = ["--parts-from", str(folder / "base.safetensors"), "--budget", "60%"]
    assert main(["merge", *teachers, *whole, "--output", str(folder / "merged.safetensors")]) == 0
    given = [{"name": name, "file": f"{name}.safetensors"} for name in reversed(names)]
    train = {**SHORT, "batch_size": 12, "lr": 1e-4, "base_share": 0.2, "parallel": parallel}
    write_config(folder, base="merged.safetensors", teachers=given, train=train)
    want = pieces.load_and_train(Ranks(), str(folder / "run.yaml"))
    for one in farm(3, pieces.load_and_train, config=str(folder / "run.yaml")):
        assert one["identity"] == want["identity"]
        assert all(math.isclose(a, b, rel_tol=LOSS) for a, b in zip(one["losses"], want["losses"], strict=True))


def test_a_damaged_teacher_is_named_by_all(farm, folder):  # noqa: F811
    """The last of five is read by one process only."""
    bad = unet(5)
    bad["out.2.bias"] = bad["out.2.bias"].clone().fill_(float("nan"))
    save_file(bad, folder / "bad.safetensors")
    files = ["one", "two", "one", "two", "bad"]
    write_config(folder, teachers=[{"name": f"{i}", "file": f"{name}.safetensors"} for i, name in enumerate(files)])
    with pytest.raises(ValueError, match="teacher '4' has NaN or infinite weights in 'out.2.bias'"):
        farm(3, pieces.load_and_train, config=str(folder / "run.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("forget", [False, True])
def test_a_model_grows_and_forgets_with_several(farm, forget):
    """The codes that are looked for are everywhere the same; cut up, a student cannot be searched."""
    want, (got, other) = pieces.grow(Ranks(), forget), farm(2, pieces.grow, forget=forget)
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(want["losses"], got["losses"], strict=True))
    for key, weight in got["raw"].items():
        assert (want["raw"][key] - weight).abs().max().item() < 1e-4
        assert torch.equal(weight, other["raw"][key])
    with pytest.raises(ValueError, match="fsdp"):
        farm(2, pieces.grow, forget=forget, parallel="fsdp")


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_plan_counts_shares():
    """Of the student and all that belongs to it with fsdp; of the samples always. 12 rows for 3 processes are 4."""
    one, three, cut = (
        plan(SMALL, (8, 8), 5, 4 * GB, want=Want(batch_size=rows, device="cpu", processes=n, sharded=shared))
        for rows, n, shared in ((4, 1, False), (12, 3, False), (12, 3, True))
    )
    assert (one.micro_batch, three.micro_batch, cut.micro_batch) == (4, 12, 12)
    assert three.breakdown == one.breakdown and "shared by 3 processes" in three.describe()
    for name in ("student", "gradients", "optimiser", "average"):
        assert cut.breakdown[name] == -(-one.breakdown[name] // 3)
    assert (
        cut.breakdown["teachers"] == one.breakdown["teachers"]
        and cut.breakdown["activations"] > one.breakdown["activations"]
    )


def test_a_planned_run_keeps_its_batch(tmp_path):
    """What it was begun with by more processes."""
    config = TrainConfig(memory=4.0, batch_size=12, lambda_adv=0.0)
    assert fitted(config, SMALL, (8, 8), 5, device=torch.device("cpu"))[0].batch_size == 12
    kept, _ = fitted(config, SMALL, (8, 8), 5, device=torch.device("cpu"), begun=6)
    assert (kept.batch_size, kept.accumulate) == (6, 2)
    assert begun_with(tmp_path) is None
    run = small_run(batch_size=6)
    save_state(run, tmp_path, identity(run))
    assert begun_with(tmp_path) == 6
    (tmp_path / "state-00000001.safetensors").touch()  # damaged: the one before it knows
    assert begun_with(tmp_path) == 6


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_request_to_one_process_is_one_to_all(farm):
    answers = farm(3, pieces.ask, requests={1: ["save"], 2: ["sample", "stop"]})
    assert answers == [{"done": ["sample", "save"], "stopped": True}] * 3
    assert farm(3, pieces.ask, requests={0: ["pause", "resume"]}) == [{"done": [], "stopped": False}] * 3


# --- stopping, going on with others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first, last", [("ddp", "fsdp"), pytest.param("fsdp", "ddp", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(farm, tmp_path, first, last):
    """3 processes, of which one is asked to stop; then 1; then 2, cut up otherwise. All as one process without a stop."""
    settings = {**FULL, "steps": 6, "save_every": 5}
    straight = pieces.train_all(Ranks(), **settings)
    begun = farm(3, pieces.train_until, folder=str(tmp_path), stop_at=2, asked_of=2, parallel=first, **settings)
    assert [(one["steps"], one["stopped"]) for one in begun] == [([1, 2], True)] * 3
    assert [p.name for p in states(tmp_path)] == ["state-00000002.safetensors"]
    middle = pieces.train_until(Ranks(), str(tmp_path), stop_at=4, **settings)
    assert middle["steps"] == [3, 4] and middle["stopped"]
    ended = farm(2, pieces.train_until, folder=str(tmp_path), parallel=last, **settings)
    assert [one["steps"] for one in ended] == [[5, 6]] * 2
    # The check after step 5 puts the average into the student, of which step 6 must see nothing.
    for one, two in zip(straight["metrics"][4:], ended[0]["losses"], strict=True):
        assert math.isclose(one.loss, two, rel_tol=LOSS)
    for kind in ("raw", "average"):
        assert max((straight[kind][k] - v).abs().max().item() for k, v in ended[0][kind].items()) < WEIGHT
        saved = ended[0][kind] if kind == "raw" else {}
        tensors, metadata = read_state(states(tmp_path)[-1])
        assert metadata["step"] == "6" and all(torch.equal(tensors[f"student.{k}"], v) for k, v in saved.items())


def test_teachers_paint_together(farm, tmp_path):
    """The final stage: the pictures of one process, each painted once, by processes of which each has few teachers."""
    settings = {"teachers": 5, "final_steps": 2, "final_images": 6, "final_sampling_steps": 2, "batch_size": 4}
    want = pieces.paint_all(Ranks(), str(tmp_path / "one"), **settings)
    got = farm(3, pieces.paint_all, folder=str(tmp_path / "three"), **settings)
    names = [sorted(p.name for p in (tmp_path / where).iterdir()) for where in ("one", "three")]
    assert names[0] == names[1] and len(names[0]) == 10
    assert sum((one["own"] for one in got), []) == want["own"] and all(one["own"] for one in got)
    for one in got:
        assert torch.equal(one["latents"], want["latents"]) and torch.equal(one["owner"], want["owner"])
        assert one["captions"] == want["captions"]


# --- torchrun ---------------------------------------------------------------------------------------------------------

LONG = {**SHORT, "steps": 100_000, "save_every": 3, "batch_size": 6, "validation": 0, "lr_schedule": "constant"}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor_interval=0.2"]


def test_what_torchrun_says(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == Ranks(5, 8, 1) and not launched().is_main
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() == Ranks()
    monkeypatch.delenv("RANK")
    assert launched() == Ranks()


def test_each_process_gets_its_own_gpu():
    cpu = torch.device("cpu")
    assert local_device(cpu, Ranks(1, 2, 1)) == cpu and local_device(torch.device("cuda:1"), Ranks()) == torch.device(
        "cuda:1"
    )
    with pytest.raises(ValueError, match="device is 'cuda:1', for 2 processes"):
        local_device(torch.device("cuda:1"), Ranks(1, 2, 1))
    with pytest.raises(ValueError, match="process 1000 on this machine has no GPU"):
        local_device(torch.device("cuda"), Ranks(999, 1000, 999))


class Torchrun:
    """``torchrun -m comfyui_dmm.training.cli distill`` on this machine."""

    def __init__(self, where: Path, processes: int):
        self.run_dir, self.log = where / "out" / "run", where / "torchrun.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*LAUNCH, f"--nproc_per_node={processes}", "-m", "comfyui_dmm.training.cli"]
        command += ["distill", "--config", str(where / "run.yaml")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=where)

    def wait_for_a_state(self) -> None:
        end = time.monotonic() + 120
        while not (self.run_dir.is_dir() and states(self.run_dir)):
            assert self.process.poll() is None and time.monotonic() < end, self.text()
            time.sleep(0.1)

    def rank(self, rank: int) -> int:
        """The process id of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(
            int(p) for p in children if f"RANK={rank}".encode() in Path(f"/proc/{p}/environ").read_bytes().split(b"\0")
        )

    def text(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_run_which_goes_on_with_another_number(folder, killed):  # noqa: F811
    write_config(folder, train={**LONG, "lambda_adv": 0.1})
    launch = Torchrun(folder, 3)
    launch.wait_for_a_state()
    os.kill(launch.rank(killed), signal.SIGKILL)
    assert launch.process.wait(60) != 0
    said = [line for line in launch.text().splitlines() if "of this run ended" in line]
    # One of the two that are left may wait for the other inside of a sum, and then not notice in time that one is gone.
    if killed:
        named = "dmm: (process 1|processes 1, 2 gave no answer: at least one)"
    else:
        named = "dmm, process (1: (process 0|processes 0, 2 gave no answer: at least one)|2: processes 0, 1 gave no answer: at least one)"
    assert len(said) == 1 and re.match(f"{named} of the 3 of this run ended: stopped after step ", said[0]), said
    left = states(launch.run_dir)[-1]
    assert f"{left.name} is in" in said[0] and "any number of processes" in said[0]
    step = int(read_state(left)[1]["step"])
    if killed:  # the first process has saved what it had
        assert f"stopped after step {step};" in said[0]
    write_config(folder, train={**LONG, "lambda_adv": 0.1, "steps": step + 2})
    assert main(["distill", "--config", str(folder / "run.yaml")]) == 0
    assert int(read_state(states(launch.run_dir)[-1])[1]["step"]) == step + 2


def test_ctrl_c_of_torchrun_saves(folder):  # noqa: F811
    write_config(folder, train=LONG)
    launch = Torchrun(folder, 2)
    launch.wait_for_a_state()
    launch.process.send_signal(signal.SIGINT)
    assert launch.process.wait(60) != 0
    assert launch.text().count("dmm: interrupted; what is done is kept") == 1
    recipe = load_checkpoint(folder / "out" / "dmm.safetensors").recipe
    tensors, metadata = read_state(states(launch.run_dir)[-1])
    assert recipe["steps_done"] == int(metadata["step"]) > 0


@pytest.mark.slow
def test_a_mistake_is_said_once(folder):  # noqa: F811
    write_config(folder, train={**LONG, "batch_size": 1})
    launch = Torchrun(folder, 2)
    assert launch.process.wait(60) != 0
    assert "batch_size is 1, for 2 processes" in launch.text() and not launch.run_dir.exists()


@pytest.mark.slow
def test_two_nodes(folder):  # noqa: F811
    """Two launchers of one process each, who find each other by an address, end as one process does."""
    write_config(folder, train={**SHORT, "lr": 5e-5})
    config = folder / "run.yaml"
    assert main(["distill", "--config", str(config)]) == 0
    alone = read_state(states(folder / "out" / "run")[-1])[0]
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**settings, "run_dir": "out/two"}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *meeting]
    command += ["-m", "comfyui_dmm.training.cli", "distill", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [node.wait(120) for node in nodes] == [0, 0]
    tensors = read_state(states(folder / "out" / "two")[-1])[0]
    assert max((alone[k] - v).abs().max().item() for k, v in tensors.items() if k.startswith("student.")) < WEIGHT


@pytest.mark.slow
def test_a_student_in_shares_from_the_command_line(folder):  # noqa: F811
    """States, contact sheets, final stage and the model's file, with parallel: fsdp."""
    train = {**SHORT, "lr": 5e-5, "final_steps": 2, "final_images": 4, "final_sampling_steps": 2, "save_every": 2}
    write_config(folder, train={**train, "parallel": "fsdp"})
    launch = Torchrun(folder, 2)
    assert launch.process.wait(200) == 0, launch.text()
    pictures = sorted(p.name for p in (launch.run_dir / "pictures").iterdir())
    assert pictures == ["step-00000000.png", "step-00000006.png"]
    got = load_checkpoint(folder / "out" / "dmm.safetensors")
    write_config(folder, train=train, run_dir="out/alone", output="out/alone.safetensors")
    assert main(["distill", "--config", str(folder / "run.yaml")]) == 0
    want = load_checkpoint(folder / "out" / "alone.safetensors")
    assert got.recipe["steps_done"] == 6 and got.unet.keys() == want.unet.keys()
    for key, weight in want.unet.items():  # saved in half precision
        assert (
            weight.float() - got.unet[key].float()
        ).abs().max().item() <= 1e-3 * weight.float().abs().max().item() + 2e-5
