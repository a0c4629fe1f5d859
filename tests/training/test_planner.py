"""Estimates of memory against what real steps take, and the plans that are made of them."""

import dataclasses

import pytest
import torch
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.loop.new_student import student_bank
from comfyui_dmm.training.loop.optimizers import make_optimizer
from comfyui_dmm.training.memory import footprint, planner
from comfyui_dmm.training.memory.footprint import Allocations, Step, optimizer_bytes, sizes, step_peak
from comfyui_dmm.training.memory.planner import GB, Want, choices, plan
from comfyui_dmm.training.parallel.devices import available_bytes
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .families import SMALL, small_run

MIDDLE = UNetConfig(
    model_channels=64, channel_mult=(1, 2), num_res_blocks=(1, 1), depth_input=(1, 1), depth_output=(1, 1, 1, 1), context_dim=64,
)  # fmt: skip
SDXL = UNetConfig(
    channel_mult=(1, 2, 4), num_res_blocks=(2, 2, 2), depth_input=(0, 0, 2, 2, 10, 10), depth_middle=10,
    depth_output=(10, 10, 10, 2, 2, 2, 0, 0, 0), context_dim=2048, linear_proj=True, adm_channels=2816,
)  # fmt: skip
CPU = Step(MIDDLE, (32, 32), 3, precision="fp32", teacher_dtype="fp32", device="cpu")


def measured_peak(action) -> int:
    """Bytes that torch's own CPU allocator handed out at the worst moment of ``action``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def real_step(step: Step, batch: int) -> int:
    student, teacher = footprint._student(step), UNet(step.config).to(footprint.DTYPES[step.teacher_dtype])
    for p in student.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    return measured_peak(lambda: footprint._one_step(step, batch, student=student, teacher=teacher, head=None))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"precision": "bf16", "teacher_dtype": "bf16"},
        {"precision": "bf16", "teacher_dtype": "bf16", "gradient_checkpointing": True},
        {"trainable": "lora", "lora_rank": 4},
        {"features": False},
    ],
    ids=lambda changes: ", ".join(changes) or "plain",
)
def test_a_fake_step_takes_what_a_real_one_does(changes):
    step = dataclasses.replace(CPU, **changes)
    assert step_peak(step, 3) == pytest.approx(real_step(step, 3), rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"lambda_adv": 0.0}, {"accumulate": 2}])
def test_the_estimate_is_that_of_the_real_loop(settings):
    """A step of ``Trainer`` with a single teacher. Tolerance 15%: the loop also holds batches, noise and metrics."""
    run = small_run(1, MIDDLE, batch_size=6, base_share=0.0, ema_gamma=None, **settings)
    run.train_step()  # the optimisers make their state
    step = dataclasses.replace(
        CPU,
        latents_hw=tuple(run.data.shape[1:]),
        styles=1,
        gradient_checkpointing=run.config.gradient_checkpointing,
        adversarial=run.config.lambda_adv > 0,
        accumulating=run.config.accumulate > 1,
    )
    for optimizer in filter(None, (run.optimizer, run.discriminator and run.discriminator_optimizer)):
        optimizer.zero_grad()  # the profiler does not see the end of what began before it
    gradients = sizes(step).trained + sizes(step).head // 4
    assert step_peak(step, 6) + gradients == pytest.approx(measured_peak(run.train_step), rel=0.15)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"precision": "bf16", "accumulating": False}])
def test_the_peak_grows_with_the_samples_and_the_straight_line_is_never_too_low(changes):
    one, three, six = (step_peak(dataclasses.replace(CPU, **changes), n) for n in (1, 3, 6))
    line = one + (six - one) * 2 / 5
    assert three <= line * 1.001
    assert three == pytest.approx(line, rel=0.1)


def test_looking_ahead_changes_nothing_and_works_anywhere():
    state, step = torch.get_rng_state(), dataclasses.replace(CPU, config=SMALL, latents_hw=(8, 8))
    expected = step_peak.__wrapped__(step, 1)
    with torch.inference_mode():
        assert step_peak.__wrapped__(step, 1) == expected
    with torch.no_grad():
        assert step_peak.__wrapped__(step, 1) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_is_linear_in_the_pixels():
    """An L x L matrix of float32 and 64x64 latents would be 67 MB a head and layer."""
    step = dataclasses.replace(CPU, features=False)
    small, large = (step_peak(dataclasses.replace(step, latents_hw=(n, n)), 1) for n in (32, 64))
    assert large < 4.2 * small


def test_cuda_autocast_is_counted_with_its_wide_norms():
    narrow = dataclasses.replace(CPU, precision="bf16", teacher_dtype="bf16")
    assert step_peak(dataclasses.replace(narrow, device="cuda"), 2) > 1.1 * step_peak(narrow, 2)
    assert step_peak(dataclasses.replace(CPU, device="cuda"), 2) == step_peak(CPU, 2)


def test_allocations_are_counted_while_they_live():
    known = torch.zeros(1000)
    with Allocations([known]) as memory:
        a = known + 1
        known.add_(a)
        view = a[10:]
        assert memory.now == 4000
        b = a * 2
        del a
        assert memory.now == 8000
        del b, view
        assert memory.now == 0
    assert memory.peak == 8000


def test_the_sizes_are_those_of_the_published_models():
    styles = 8 * 1280 + 2 * (1280 * 1280 + 1280)
    for config, count in ((UNetConfig(), 859_520_964), (SDXL, 2_567_463_684)):
        found = sizes(Step(config))
        assert found.teacher == 2 * count
        assert found.student == found.trained == 4 * (count + styles)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_optimiser_state_is_what_the_optimiser_keeps(name):
    if name == "adafactor":
        pytest.importorskip("transformers")
    module = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(32, 24), nn.GroupNorm(4, 16))
    params = list(module.parameters())
    optimizer = make_optimizer([{"params": params}], TrainConfig(optimizer=name), torch.device("cpu"))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = [v for p in params for v in optimizer.state[p].values() if torch.is_tensor(v) and v.numel() > 1]
    assert optimizer_bytes([p.shape for p in params], name) == footprint.tensor_bytes(state)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """Plans for the tests' own model, for which CUDA's half gigabyte would be everything, with activations that are quick to tell."""

    def peak(step: Step, samples: int) -> int:
        return samples * (200_000 if step.gradient_checkpointing else 1_000_000) * (2 if step.features else 1)

    monkeypatch.setattr(planner, "CUDA_CONTEXT", 0)
    monkeypatch.setattr(planner, "step_peak", peak)
    return lambda budget, want=None, **more: plan(SMALL, (8, 8), 6, budget, want=want or Want(batch_size=4), **more)


def test_the_best_setting_that_fits_is_taken(tiny):
    want = Want(batch_size=4)
    order = list(choices(want))
    best = tiny(GB)
    assert vars(order[0]).items() <= vars(best).items()
    assert (best.trainable, best.optimizer, best.residency, best.gradient_checkpointing) == (
        "all",
        "adamw",
        "device",
        False,
    )
    ranks, budget = [], best.budget
    while True:
        try:
            made = tiny(budget, want)
        except ValueError as error:
            assert f"{budget / GB:.1f} GB are there" in str(error)
            break
        assert made.peak <= made.usable < budget
        ranks.append(
            order.index(planner.Choice(**{f.name: getattr(made, f.name) for f in dataclasses.fields(planner.Choice)}))
        )
        budget = int(made.peak / (1 - planner.MARGIN)) - 10
    assert ranks == sorted(ranks)
    assert len(set(ranks)) > 4
    assert (made.trainable, made.residency, made.slots) == ("lora", "offload", 1)


@pytest.mark.parametrize("larger", [True, False])
def test_adapters_come_after_a_bank_that_needs_more_than_they_do(tiny, larger):
    """Down to the last budget that will do: low-rank adapters beside a bank that is larger than they are, and else the bank. What learns
    is counted here from the layers' shapes."""
    rank = 8
    layers = [m for m in UNet(SMALL).modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    adapters = rank * sum(
        m.weight.shape[0] + m.weight[0].numel() for m in layers
    )  # of all layers: no less than of the blocks'
    bank = student_bank(SMALL, 6, TrainConfig(init="bank", bank="80%" if larger else "5%"))
    numbers = sum(p.numel() for p in UNet(dataclasses.replace(SMALL, num_styles=6, bank=bank)).bank_parameters())
    assert numbers > 2 * adapters if larger else 2 * numbers < adapters
    want = Want(batch_size=4, bank=bank, lora_rank=rank if larger else 8 * rank)
    made, seen = tiny(GB, want), []
    while True:
        seen.append(made.trainable)
        try:
            made = tiny(int(made.peak / (1 - planner.MARGIN)) - 10, want)
        except ValueError:
            break
    assert list(dict.fromkeys(seen)) == (["all", "bank", "lora"] if larger else ["all", "bank"])


def test_the_error_names_a_budget_that_would_do(tiny, monkeypatch):
    monkeypatch.setattr(planner, "GB", 1000)  # tiny models, told in kB
    with pytest.raises(ValueError, match="GB of memory at the least") as caught:
        tiny(10_000)
    need = float(str(caught.value).split(" need ")[1].split()[0])
    tiny(int(need * 1000 * 1.001))
    with pytest.raises(ValueError, match="at the least"):
        tiny(int(need * 1000 * 0.99))


def test_what_the_user_has_chosen_stays(tiny):
    fixed = {"optimizer": "adafactor", "gradient_checkpointing": True, "micro_batch": 2, "residency": "offload"}
    pytest.importorskip("transformers")
    made = tiny(GB, Want(batch_size=4, fixed=fixed))
    assert fixed.items() <= vars(made).items()
    assert made.accumulate == 2
    with pytest.raises(ValueError, match="does not choose colour"):
        tiny(GB, Want(fixed={"colour": "red"}))


def test_a_plan_is_a_training_config(tiny):
    for made in (tiny(GB), tiny(GB, Want(batch_size=6, fixed={"micro_batch": 3, "ema_device": "cpu"}))):
        config = TrainConfig(**made.settings())
        config.check()
        assert config.batch_size * config.accumulate == made.micro_batch * made.accumulate
    assert config.ema_device == "cpu"


def test_parts_add_up_and_are_told(tiny):
    made = tiny(GB)
    assert made.peak == sum(made.breakdown.values())
    assert made.breakdown["teachers"] == 7 * sizes(Step(SMALL)).teacher  # and the base
    text = made.describe()
    assert "all weights" in text
    for name in (*made.breakdown, "together"):
        assert name in text or not made.breakdown[name]


def test_each_wish_costs_what_it_needs(tiny):
    def with_(residency="offload", **wishes):
        return tiny(GB, Want(batch_size=4, fixed={"residency": residency}, **wishes)).breakdown

    plain, one = with_(), sizes(Step(SMALL)).teacher
    assert plain["teachers"] == 2 * one
    assert with_(adversarial=True)["teachers"] == 3 * one
    assert with_(adversarial=True)["discriminator"] > 0
    assert with_(ema=False)["average"] == 0 < plain["average"]
    assert with_(features=False)["activations"] < plain["activations"]
    assert with_(teacher_dtype="fp32")["teachers"] == 4 * one


def test_a_measured_peak_corrects_the_estimate(tiny):
    assert tiny(GB, measured_peak=1.5).breakdown["activations"] == int(1.5 * tiny(GB).breakdown["activations"])


def test_on_the_cpu_nothing_moves():
    every = list(choices(Want(device="cpu", precision="fp32")))
    assert {(c.residency, c.ema_device) for c in every} == {("device", "device")}


def test_free_memory_is_read(monkeypatch):
    assert 0 < available_bytes("cpu") < 2**50

    def no_file(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", no_file)
    assert 0 < available_bytes("cpu") < 2**50
    monkeypatch.setattr("os.sysconf", no_file)
    with pytest.raises(ValueError, match="give the budget"):
        available_bytes("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("teachers", "gb", "trainable"), [(8, 24, "all"), (4, 12, "lora"), (8, 8, "lora")])
def test_sd15_fits_where_it_should(teachers, gb, trainable):
    made = plan(UNetConfig(), (64, 64), teachers, gb * GB)
    assert made.trainable in {trainable, "all"}
    assert made.micro_batch * made.accumulate == 8
