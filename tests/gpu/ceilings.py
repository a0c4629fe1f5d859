"""What the device can do at best: a large bf16 matrix product, and a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from .setup import Setup

SIDE = {"cuda": 8192, "cpu": 512}
COPIED = {"cuda": 2**32, "cpu": 2**24}
"""Bytes, many times what a cache holds."""


def median_seconds(work: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Of one call, after three to warm up; on a GPU by events around it."""
    for _ in range(3):
        work()
    taken = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            taken.append(begin.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def matrix_peak(device: torch.device) -> float:
    """TFLOP/s of a square bf16 product of random numbers (zeros run faster)."""
    n = SIDE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / median_seconds(lambda: torch.mm(a, b, out=out), device) / 1e12


def copy_rate(device: torch.device) -> float:
    """TB/s of a copy on the device, bytes read and written."""
    source = torch.randint(0, 255, (COPIED[device.type],), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), device) / 1e12


def bus_rate(device: torch.device) -> float:
    """GB/s from pinned RAM to the device."""
    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return source.numel() / median_seconds(lambda: target.copy_(source, non_blocking=True), device) / 1e9


def measure(setup: Setup) -> None:
    setup.note(**{"bf16 product TFLOP/s": matrix_peak(setup.device)})
    setup.note(**{"copy TB/s": copy_rate(setup.device)})
    if setup.cuda:
        setup.note(**{"pinned RAM to device GB/s": bus_rate(setup.device)})
