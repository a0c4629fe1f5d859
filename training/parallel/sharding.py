"""The student on several processes: a copy in each (DDP), or a shard of every parameter in each (FSDP2,
arXiv:2304.11277).

With FSDP2, parameters, gradients, the optimiser's moments and the average are cut along their first dimension, and a
block has its full weights only while it computes. Such a parameter is a DTensor. ``full_tensor``, ``gather_to_main``
and ``local_tensor`` lead from it to plain tensors, ``distribute_like`` and ``sharded_from_local`` from plain tensors to
it; all of them pass plain tensors through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from ...dmm_core.unet import UNet
from ..config import TrainConfig
from .ranks import Ranks

if TYPE_CHECKING:  # its import takes a while, and only runs on several processes need it
    from torch.distributed.tensor import DTensor

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SEVERAL = (2, 9)
"""The torch that several processes need: before 2.8, gloo's group is destroyed holding Python's lock, which its own thread may wait for
(pytorch/pytorch#154976; seen in 2.6 and 2.7, at every second end of a run). And 2.8 on the CPU gives parallel: fsdp the sum of the
processes' gradients in place of their mean (seen in tests/training/test_distributed.py; 2.9 gives the mean)."""


def check_parallel(config: TrainConfig, world: int) -> None:
    """Raises ValueError for settings that do not work with ``world`` processes."""
    c = config
    if world == 1:
        return
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < SEVERAL:
        raise ValueError(
            f"torch is {torch.__version__}, with which {world} processes may wait forever when they part, or train with wrong "
            "gradients: use torch 2.9 or newer, or one process"
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


def shard(student: UNet, precision: str, device: torch.device, world: int) -> None:
    """Cut a student that is on the CPU into one shard per process, block by block (in place): the device never holds
    all of it.

    precision: "fp32", "bf16" or "fp16", in which weights are gathered to compute with (autocast would keep cast copies
    of all blocks); gradients are added up in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world,))
    half = HALVES.get(precision)
    policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
    # A style bank belongs to the student itself, not to the blocks whose layers call it: it is whole from the first block's forward to the
    # last's backward, a tenth of a model at the usual size.
    for block in (*student.input_blocks, student.middle_block, *student.output_blocks, student):
        # The student itself too: a forward without a backward would leave its own weights gathered, and later changes unseen.
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def replicate(student: UNet, device: torch.device) -> nn.Module:
    """The student as DDP calls it; all processes begin with the first one's weights."""
    from torch.nn.parallel import DistributedDataParallel

    # No buffers, and every trained parameter gets a gradient from every row, if only zero: nothing to look for.
    places = [device] if device.type == "cuda" else None
    return DistributedDataParallel(student, places, broadcast_buffers=False, gradient_as_bucket_view=True)


def without_sync(forward: object, last: bool) -> AbstractContextManager[None]:
    """A context for every forward of a step: DDP adds up the gradients after the ``last`` one only.

    FSDP2 adds them up each time: to wait would keep the gradients of all parameters in each process.
    """
    no_sync = getattr(forward, "no_sync", None)
    return contextlib.nullcontext() if last or no_sync is None else no_sync()


# --- sharded tensors --------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, of which each process holds a shard."""
    return hasattr(tensor, "to_local")


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor in full, in every process; for all processes together. A plain tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gather_to_main(tensor: Tensor, is_main: bool) -> Tensor:
    """A sharded tensor in full on the CPU in the main process, an empty tensor in the others; for all processes
    together.

    The device holds one full tensor at a time. A plain tensor is returned as it is.
    """
    if not is_sharded(tensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if is_main else torch.empty(0)


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, without gradient and in the same memory; of a plain tensor, all of it."""
    detached = tensor.detach()
    return detached.to_local() if is_sharded(detached) else detached


def sharded_from_local(local: Tensor, parameter: Tensor) -> Tensor:
    """A sharded tensor out of each process's ``local`` shard, cut as ``parameter`` is; ``local`` itself for a plain
    parameter."""
    if not is_sharded(parameter):
        return local
    from torch.distributed.tensor import DTensor

    local = local.to(local_tensor(parameter).device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def distribute_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full ``tensor``, which every process has, cut as ``parameter`` is; ``tensor`` itself for a plain parameter."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(local_tensor(parameter).device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Replace each gradient by its mean over the processes (in place); a parameter without a gradient counts as
    zeros."""
    gradients = []
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        gradients.append(p.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with ranks.watching():
        torch.distributed.all_reduce(flat)
    flat /= ranks.world
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))
