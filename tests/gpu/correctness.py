"""Checks of the trainer on this device with small random models. Each raises AssertionError with both numbers where it fails.

On a CPU, where a step in fp16 takes seconds, only the scaler's check computes in it.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ...dmm_core.unet import UNetConfig
from ...training.config import TrainConfig
from ...training.loop.optimizers import make_optimizer, parameter_groups
from ...training.loop.trainer import Trainer
from ...training.run.train import tf32
from ..training.families import SMALL, SMALL_RUN, resumes_bitwise, small_data, small_teacher
from .setup import NotPossible, Setup

WIDER = UNetConfig(
    model_channels=128, channel_mult=(1, 2), num_res_blocks=(1, 1), depth_input=(0, 1), depth_output=(1, 1, 0, 0), context_dim=64,
)  # fmt: skip
"""Larger than the tests' models, so that a GPU takes its usual kernels; a CPU would take minutes."""


def small_run_on(device: torch.device, config: UNetConfig = SMALL, **settings) -> Trainer:
    data = small_data()
    base, *teachers = (small_teacher(f"model {i}", i, data, config) for i in range(4))
    return Trainer(base, teachers, data, TrainConfig(**{**SMALL_RUN, "lambda_feat": 0.001, **settings}), device=device)


def apart(one: Tensor, other: Tensor) -> float:
    """Length of the difference over the length of the second, in float64."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm())


def all_apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return apart(*(torch.cat([state[key].flatten().cpu() for key in one]) for state in (one, other)))


def check(holds: bool, words: str) -> None:
    if not holds:
        raise AssertionError(words)


def losses_of(run: Trainer) -> tuple[list[float], dict[str, Tensor]]:
    losses = [metrics.loss for metrics in run.run()]
    weights = {key: value.detach().cpu().clone() for key, value in run.student_weights(averaged=False).items()}
    run.targets.pool.close()
    return losses, weights


def gradients(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the student's output on a fixed batch, all arithmetic in ``dtype``."""
    from ...dmm_core.unet import UNet

    torch.manual_seed(1)
    unet = UNet(WIDER).to(device, dtype)
    g = torch.Generator().manual_seed(2)
    x, context = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 7, WIDER.context_dim, generator=g)
    t = torch.tensor([3, 250, 700, 999], device=device)
    unet(x.to(device, dtype), t, context.to(device, dtype)).square().mean().backward()
    return {name: p.grad for name, p in unet.named_parameters()}


def loop(setup: Setup) -> None:
    """fp32 without tf32 against float64 on the CPU, a forward and backward; then runs in each precision against the CPU's fp32 run."""
    reference = gradients(torch.device("cpu"), torch.float64)
    with tf32(False):
        error = all_apart(gradients(setup.device, torch.float32), reference)
        setup.note(**{"gradients from float64": error})
        check(error < 1e-3, f"gradients in fp32 are {error:.2e} from those in float64, 1e-3 allowed")
        straight, _ = losses_of(small_run_on(torch.device("cpu")))
        for precision, allowed in (("fp32", 1e-3), ("bf16", 5e-2), *((("fp16", 5e-2),) if setup.cuda else ())):
            losses, _ = losses_of(small_run_on(setup.device, precision=precision))
            worst = max(abs(a - b) / b for a, b in zip(losses, straight))
            setup.note(**{f"losses in {precision} from the CPU's": worst})
            check(worst < allowed, f"losses in {precision} are {worst:.2e} from the CPU's in fp32, {allowed} allowed")


def offload(setup: Setup) -> None:
    config = WIDER if setup.cuda else SMALL
    placed, weights = losses_of(small_run_on(setup.device, config, residency="device"))
    for slots in (1, 2):
        run = small_run_on(setup.device, config, residency="offload", teacher_slots=slots)
        pinned = all(flat.is_pinned() for flat in run.targets.pool._flat.values())
        check(pinned or not setup.cuda, "the teachers in RAM are not in pinned memory")
        moved, theirs = losses_of(run)
        same = moved == placed and all(torch.equal(weights[key], theirs[key]) for key in weights)
        setup.note(**{f"{slots} slots, bitwise": same, "pinned": pinned})
        check(
            same,
            f"{slots} slots: losses {moved} with teachers in RAM, {placed} on the device (is the device repeatable?)",
        )


def scaler(setup: Setup) -> None:
    run = small_run_on(setup.device, precision="fp16", steps=8)
    run.train_step()
    before, scale = run.student_weights(averaged=False), run.scaler.get_scale()
    before = {key: value.detach().clone() for key, value in before.items()}
    run.scaler._scale.fill_(2.0**127)  # larger than any gradient in half precision bears
    run.train_step()
    skipped = all(torch.equal(value, before[key]) for key, value in run.student_weights(averaged=False).items())
    halved = run.scaler.get_scale() == 2.0**126
    setup.note(**{"scale": scale, "overflowing step skipped": skipped, "scale halved": halved})
    check(skipped and halved, "a step whose gradients overflow was not skipped, or the scale was not halved")
    run.scaler._scale.fill_(scale)
    metrics = run.train_step()
    moved = any(not torch.equal(value, before[key]) for key, value in run.student_weights(averaged=False).items())
    check(moved, f"the step after it changed nothing (norm {metrics.grad_norm})")
    run.targets.pool.close()


def fused(setup: Setup) -> None:
    """Three steps of the run's own optimiser and of AdamW without fused kernels, from the same weights and gradients."""
    run = small_run_on(setup.device)
    ours, theirs = run.student.unet, copy.deepcopy(run.student.unet)
    optimizers = [make_optimizer(parameter_groups(ours, run.config), run.config, setup.device)]
    plain = [{"params": group["params"]} for group in parameter_groups(theirs, run.config)]
    c = run.config
    betas = (c.betas[0], c.betas[1])
    optimizers.append(torch.optim.AdamW(plain, lr=c.lr, betas=betas, weight_decay=c.weight_decay, foreach=False))
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for step in range(3):
        g = torch.Generator(setup.device).manual_seed(step)
        for one, other in zip(ours.parameters(), theirs.parameters()):
            one.grad = torch.randn(one.shape, generator=g, device=setup.device)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    changes = [{name: p.detach() - start[name] for name, p in unet.named_parameters()} for unet in (ours, theirs)]
    error = all_apart(*changes)
    setup.note(**{"is fused": bool(optimizers[0].defaults.get("fused")), "changes apart": error})
    check(error < 1e-4, f"the two optimisers' changes are {error:.2e} apart, 1e-4 allowed")
    run.targets.pool.close()


def tensor_float(setup: Setup) -> None:
    if not setup.cuda:
        raise NotPossible("tf32 is a way to multiply on CUDA only")
    a, b = (torch.randn(1024, 1024, device=setup.device) for _ in range(2))
    before, errors = torch.backends.cuda.matmul.allow_tf32, {}
    for allowed in (False, True):
        with tf32(allowed):
            errors[allowed] = apart(a @ b, a.double() @ b.double())
    setup.note(**{"error without": errors[False], "error with": errors[True]})
    check(torch.backends.cuda.matmul.allow_tf32 == before, "the host's setting was not put back")
    check(
        errors[False] < 1e-5 < errors[True] < 2e-3,
        f"errors of a product: {errors[False]:.1e} without tf32, {errors[True]:.1e} with",
    )


def resume(setup: Setup) -> None:
    for precision in ("fp32", "bf16", *(("fp16",) if setup.cuda else ())):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            made: list[Trainer] = []

            def make(precision=precision, made=made) -> Trainer:
                made.append(small_run_on(setup.device, precision=precision))
                return made[-1]

            stack.callback(lambda made=made: [run.targets.pool.close() for run in made])
            resumes_bitwise(make, Path(folder))
        setup.note(**{precision: "bitwise"})


CHECKS = {"loop": loop, "offload": offload, "scaler": scaler, "fused": fused, "tf32": tensor_float, "resume": resume}


def measure(setup: Setup, check: str) -> None:
    CHECKS[check](setup)
