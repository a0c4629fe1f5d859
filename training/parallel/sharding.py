"""The student on several processes: a copy in each (DDP), or a share of it in each (FSDP2, arXiv:2304.11277).

With shares, parameters, gradients, the optimiser's moments and the average are cut along their first dimension; a block is whole
only while it computes. Such a parameter is a DTensor, and ``whole`` and ``put_whole`` are the ways out of it and into it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ...dmm_core.unet import UNet
from ..config import TrainConfig
from .ranks import Ranks

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SEVERAL = (2, 8)
"""The torch that several processes need: before it, gloo's group is destroyed holding Python's lock, which its own thread may wait for
(pytorch/pytorch#154976; seen in 2.6 and 2.7, at every second end of a run)."""


def check_parallel(config: TrainConfig, world: int) -> None:
    """Raises ValueError for what cannot be done by this many processes."""
    c = config
    if world == 1:
        return
    if torch.__version__ < SEVERAL:
        raise ValueError(
            f"torch is {torch.__version__}, with which {world} processes may wait forever when they part: use torch 2.8 or newer, or "
            "one process"
        )
    if c.batch_size < world:
        raise ValueError(
            f"batch_size is {c.batch_size}, for {world} processes: it is shared out among them, so use {world} or more"
        )
    if c.parallel == "fsdp" and c.optimizer != "adamw":
        raise ValueError(
            f"optimizer is '{c.optimizer}', which does not work on shares of a weight (parallel: fsdp): use adamw, whose moments are "
            "shared out too, or parallel: ddp"
        )
    if c.parallel == "fsdp" and c.warm_start:
        raise ValueError(
            "warm_start looks for codes with the whole student, which parallel: fsdp cuts: set it to 0, or use ddp"
        )
    if c.parallel == "fsdp" and c.compile:
        raise ValueError("compile is on, which was never seen working with parallel: fsdp: switch one of them off")


def share(student: UNet, precision: str, device: torch.device, world: int) -> None:
    """Cut a student on the CPU into shares, in place, block by block: the whole of it is never on the device.

    With half-precision arithmetic its weights are gathered in that, as autocast would keep casted copies of all blocks; gradients
    are added up in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world,))
    half = HALVES.get(precision)
    policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
    for block in (*student.input_blocks, student.middle_block, *student.output_blocks, student):
        # The student itself too: a forward without a backward would leave its own weights whole, and later changes unseen.
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def replicate(student: UNet, device: torch.device) -> nn.Module:
    """The student as DDP calls it; all processes begin with the first one's weights."""
    from torch.nn.parallel import DistributedDataParallel

    # No buffers, and every trained parameter gets a gradient from every row, if only zero: nothing to look for.
    places = [device] if device.type == "cuda" else None
    return DistributedDataParallel(student, places, broadcast_buffers=False, gradient_as_bucket_view=True)


def without_sync(forward: Callable, last: bool):
    """A context for all forwards of a step but the ``last``, after which DDP adds up the gradients.

    With shares they are added up each time: to wait would keep the gradients of the whole student in each process.
    """
    no_sync = getattr(forward, "no_sync", None)
    return contextlib.nullcontext() if last or no_sync is None else no_sync()


def whole(tensor: Tensor) -> Tensor:
    """A shared-out tensor, whole; for all processes together. Any other tensor is returned as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def to_file(tensor: Tensor, is_main: bool) -> Tensor:
    """A shared-out tensor, whole and on the CPU where it ``is_main``, and nothing elsewhere; for all processes together, so that one
    tensor at a time is whole on a device. Any other tensor is returned as it is."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if is_main else torch.empty(0)


def own(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, in the same memory; the tensor itself where it is not shared out."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def cut_as(part: Tensor, parameter: Tensor) -> Tensor:
    """What each process has a ``part`` of, as the parameter is cut (an average, say), as one shared-out tensor; ``part`` itself where
    the parameter is not shared out."""
    if not hasattr(parameter, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    part = part.to(own(parameter).device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def share_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """``tensor``, which every process has whole, cut as ``parameter`` is; as it is where that is not shared out."""
    if not hasattr(parameter, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(own(parameter).device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def add_up(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Average the gradients over the processes; one without a gradient counts as zeros."""
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    with ranks.watching():
        torch.distributed.all_reduce(flat)
    flat /= ranks.world
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))
