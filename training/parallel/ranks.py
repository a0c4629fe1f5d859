"""The processes of one run: how many torchrun started, small messages between them, and what happens when one of them
ends.

Every process draws the same batches and works on its local rows of them. The messages here are small and go over the
CPU (gloo); gradients are added up in ``sharding``.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TIMEOUT = datetime.timedelta(hours=4)
"""How long a process waits for the others. One that has ended is noticed at once, as its connections close; this is for
slow disks and long paintings, which are no reason to end a run."""
GRACE = 10.0
"""Seconds in which the processes that are left find each other."""


class LostProcess(RuntimeError):
    """Another process of the run has ended. ``speak``: whether this process is the one that tells the user."""

    speak = True


class AgreedError(ValueError):
    """A mistake that one process found, raised in all of them."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: this one is ``rank`` of ``world``, and the ``local``-th on its machine. By default there
    is one.

    All methods but ``share`` and ``left`` must be called by all processes together; with one process they communicate
    nothing. Each raises LostProcess when another process has ended.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and messages: rank 0."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's share of ``count`` consecutive things, as a slice; the sizes of the shares differ by one at
        most."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the CPU (in place); bitwise the same in every process."""
        if self.world > 1:
            with self.watching():
                torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set in at least one process."""
        return [count > 0 for count in self.sum(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def align(self, tensor: Tensor) -> None:
        """Overwrite a tensor, on any device, with the first process's values (in place)."""
        if self.world > 1:
            with self.watching():
                torch.distributed.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """The values (anything that pickles) of all processes, in order of rank."""
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
        """The first process's value, in every process."""
        return self.gather(value if self.is_main else None)[0]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sum(torch.zeros(1))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes leave together: a ValueError or OSError in one of them becomes an AgreedError in
        all."""
        problem: ValueError | OSError | None = None
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
        """After a LostProcess: (ranks of the processes that do not answer, whether this process is the first of those
        that do)."""
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
        except Exception:  # noqa: BLE001, the store was in the process that is gone: then every process reports it
            return [], True


def is_connection_error(error: RuntimeError) -> bool:
    """Whether an error is one by which torch reports a closed connection to another process."""
    network = getattr(torch.distributed, "DistError", ())
    return isinstance(error, (LostProcess, network)) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))


def _text(error: ValueError | OSError) -> str:
    return in_words(error) if isinstance(error, OSError) else str(error)


def in_words(error: OSError) -> str:
    """What a disk says, in a line: with the file's name where there is one, or in the words of whoever raised it."""
    if error.strerror is None:
        return str(error)
    if error.errno == errno.ENAMETOOLONG and error.filename:
        longest = max(Path(os.fsdecode(error.filename)).parts, key=len, default="")
        return f"a file name of {len(longest)} characters is too long: '{longest[:40]}...'"
    return f"{error.strerror}: {error.filename or 'while reading or writing'}"


def launched() -> Ranks:
    """The processes that torchrun declares in the environment; one process without torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    rank, world, local = (int(os.environ.get(name, os.environ["RANK"])) for name in names)
    return Ranks(rank, world, local) if world > 1 else Ranks()


@contextlib.contextmanager
def joined(
    ranks: Ranks,
    device: torch.device,
    init_method: str = "env://",
    raised_by_all: tuple[type[BaseException], ...] = (),
) -> Iterator[Ranks]:
    """A context in which the processes are connected. device: the one that this process works on.

    At the end they wait for each other, because the launcher stops all of them when the first one ends. After an
    exception they do not, except for AgreedError and the types ``raised_by_all``, which every process raises.
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
    except BaseException as error:
        if isinstance(error, (AgreedError, *raised_by_all)):
            _leave(ranks)
        raise  # else the group stays as it is: to take it down can hang while the others still work in it
    else:
        _leave(ranks)


def _leave(ranks: Ranks) -> None:
    ranks.barrier()
    torch.distributed.destroy_process_group()
