"""Chooses the device that a process works on, and reads how much memory is free."""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

from .ranks import Ranks


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU; anything else is a torch device name. Raises ValueError for
    what is none, and for a device that is not there or has no driver."""
    if name == "auto":
        return torch.device("cpu" if missing_cuda() else "cuda")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: use auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        if why := missing_cuda():
            raise ValueError(f"device is {name!r}, and there is no CUDA GPU that can be used ({why}): use cpu or auto")
        if (count := torch.cuda.device_count()) <= (device.index or 0):
            raise ValueError(f"device is {name!r}, and there are {count} CUDA GPUs, counted from 0")
    elif device.type != "cpu":
        try:
            torch.empty(1, device=device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"device is {name!r}, which cannot be used here: use auto, cpu, cuda or cuda:0") from error
    return device


def missing_cuda() -> str:
    """Why no CUDA GPU can be used, in a few words; "" where one can. No GPU is touched by asking."""
    if not torch.backends.cuda.is_built():
        return "this torch was built without CUDA"
    with warnings.catch_warnings(record=True) as said:  # of an old driver, say
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    words = str(said[-1].message).removeprefix("CUDA initialization: ").partition(". ")[0] if said else ""
    return " ".join(words.split()) or "no driver or no card was found"


def local_device(device: torch.device, ranks: Ranks) -> torch.device:
    """This process's device: with several processes on "cuda" the ``local``-th GPU of its machine.

    Raises ValueError for more processes than GPUs on the machine, and for one GPU by number, which they would have to
    share.
    """
    if ranks.world == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(
            f"device is '{device}', for {ranks.world} processes: use auto or cuda, and each gets its own GPU"
        )
    count = torch.cuda.device_count()
    if ranks.local >= count:
        raise ValueError(
            f"process {ranks.local + 1} on this machine has no GPU: there are {count}; start {count} (--nproc_per_node={count})"
        )
    return torch.device("cuda", ranks.local)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, without waiting for it: to CUDA from pinned memory, beside the arithmetic. (A plain ``.to`` from the CPU
    waits until the device has done all that was asked of it before.)"""
    if device.type == "cpu" or values.device.type != "cpu":
        return values.to(device)
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def available_bytes(device: torch.device | str) -> int:
    """Free memory in bytes of a CUDA device, or of this machine for any other device.

    Raises ValueError where this machine does not say.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):  # "MemAvailable:   12345 kB"
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError) as error:  # Windows has no sysconf, macOS not this name
        raise ValueError("cannot read how much memory is free here: give the budget in GB") from error
