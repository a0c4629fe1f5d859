"""Several processes, one run: who there is (torchrun says so), what they tell each other, and what to do when one is lost.

Every process draws the same batches and works on its own rows of them. What they tell each other here are small things on the CPU,
by gloo; gradients are the business of ``sharding``.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TIMEOUT = datetime.timedelta(hours=4)
"""For one process that waits for the others. A dead one is noticed at once, as its connections close; this is for slow disks and
long paintings, which are no reason to end a run."""
GRACE = 10.0
"""Seconds in which those that are left tell each other so."""


class LostProcess(RuntimeError):
    """Another process of the run has ended. ``speak``: whether this one is to tell the user."""

    speak = True


class AgreedError(ValueError):
    """A mistake that one process found and all of them know of."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: this one is ``rank`` of ``world``, and the ``local``-th on its machine. By default there is one.

    All methods but ``part`` are for all processes together, and do nothing where there is one. Each raises LostProcess when another
    process is gone.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        """The process that writes and speaks."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's share of ``count`` things in a row; the shares' sizes differ by one at the most."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the CPU, the same bits everywhere (in place)."""
        if self.world > 1:
            with self.watching():
                torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether it is set in some process."""
        return [count > 0 for count in self.sum(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def align(self, tensor: Tensor) -> None:
        """Give a tensor the first process's values, wherever it is (in place)."""
        if self.world > 1:
            with self.watching():
                torch.distributed.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self.watching():
            # As bytes in tensors on the CPU: torch's own gathering of objects would choose its device itself.
            data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
            sizes = self.sum(torch.eye(self.world, dtype=torch.int64)[self.rank] * len(data)).tolist()
            for rank, size in enumerate(sizes):
                buffer = data if rank == self.rank else torch.empty(size, dtype=torch.uint8)
                torch.distributed.broadcast(buffer, rank)
                values[rank] = pickle.loads(buffer.numpy().tobytes())
        return values

    def from_main(self, value: Any) -> Any:
        """The first process's value."""
        return self.gather(value if self.is_main else None)[0]

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes leave together: what is wrong in one (a ValueError or OSError) ends it in all, as AgreedError."""
        problem = None
        try:
            yield
        except (ValueError, OSError) as error:
            if self.world == 1:
                raise
            problem = error
        problems = [text for text in self.gather(None if problem is None else _text(problem)) if text]
        if problems:
            raise AgreedError(problems[0]) from problem

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the errors by which torch reports a closed connection become LostProcess."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not is_connection_error(error):
                raise
            raise LostProcess("another process of this run has ended") from error

    def left(self) -> tuple[list[int], bool]:
        """After a LostProcess: (ranks that give no sign of life, whether this process is the first of the others)."""
        try:
            # The launcher's, which outlives its processes and, where it starts them again, serves them again.
            store = torch.distributed.distributed_c10d._get_default_store()
            key = f"dmm left {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            store.set(f"{key} {self.rank}", "")
            end = time.monotonic() + GRACE
            while True:
                here = [r for r in range(self.world) if r == self.rank or store.check([f"{key} {r}"])]
                if here[0] < self.rank:
                    return [], False
                if len(here) == self.world - 1 or time.monotonic() > end:
                    first = store.add(f"{key} spoken", 1) == 1  # one that came late has been spoken for
                    return sorted(set(range(self.world)) - set(here)), first
                time.sleep(0.05)
        except Exception:  # noqa: BLE001, it was in the process that is gone: then all of them speak
            return [], True


def is_connection_error(error: RuntimeError) -> bool:
    network = getattr(torch.distributed, "DistError", ())
    return isinstance(error, (LostProcess, network)) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))


def _text(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or 'while writing'}"
    return str(error)


def launched() -> Ranks:
    """What the launcher says in the environment; one process without a launcher."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    rank, world, local = (int(os.environ.get(name, os.environ["RANK"])) for name in names)
    return Ranks(rank, world, local) if world > 1 else Ranks()


@contextlib.contextmanager
def joined(ranks: Ranks, device: torch.device, init_method: str = "env://", goodbye: type = ()) -> Iterator[Ranks]:
    """Inside, the processes are connected. device: this one's.

    At the end they wait for each other, so that the launcher, which stops all when the first ends, lets them finish. After
    exceptions they do not, but for those of the types ``goodbye``, which all of them get together.
    """
    if ranks.world == 1:
        yield ranks
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=init_method, rank=ranks.rank, world_size=ranks.world, timeout=TIMEOUT
    )
    try:
        yield ranks
    except (AgreedError, *_types(goodbye)):
        _leave(ranks)
        raise
    except BaseException:
        raise  # the group is left as it is: to take it down can hang while the others still work in it
    else:
        _leave(ranks)


def _types(types: type | tuple) -> tuple:
    return types if isinstance(types, tuple) else (types,)


def _leave(ranks: Ranks) -> None:
    ranks.barrier()
    torch.distributed.destroy_process_group()
