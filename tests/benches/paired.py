"""The one way in which benches of speed measure: their sides in turns in one process, the ratio of each turn, its median and quartiles;
and no ratio of sides that do not agree in what they compute."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...training.markdown import table


def quartiles(values: Sequence[float]) -> list[float]:
    """[first quartile, median, third]; of a single value itself."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def process_seconds() -> float:
    """Of this process's computing, all its threads: other processes of the machine are not in it, though they slow it down."""
    return time.process_time()


def clock_of(device: torch.device | str) -> Callable[[], float]:
    """Seconds: of this process on a CPU; of the clock on a GPU, once it is done."""
    device = torch.device(device)
    if device.type != "cuda":
        return process_seconds

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


@dataclass(frozen=True)
class Side:
    """``work`` is timed and returns what it computed; ``prepare`` comes before each turn and is not; ``around`` holds while it works."""

    work: Callable[[], Any]
    prepare: Callable[[], object] = lambda: None
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def turn(self, clock: Callable[[], float]) -> tuple[float, Any]:
        """(seconds, what it computed)"""
        with self.around():
            self.prepare()
            started = clock()
            result = self.work()
            return clock() - started, result


def in_turns(
    sides: Mapping[str, Side], rounds: int, *, clock: Callable[[], float] = process_seconds, until: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each turn of each side: ``rounds`` turns or more, as long as the clock on the wall is before ``until`` (time.monotonic).
    Every other round begins with the last side."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    done = 0
    while done < rounds or time.monotonic() < until:
        for name in list(sides) if done % 2 == 0 else reversed(list(sides)):
            took[name].append(sides[name].turn(clock)[0])
        done += 1
    return took


# --- the same result? -------------------------------------------------------------------------------------------------


def apart(one: Any, other: Any) -> float:
    """How far two results are from each other: the largest difference of two elements over the largest element of ``one``; of mappings and
    sequences, that of the two that are furthest apart. Infinite for other keys, lengths or shapes, and for what is not finite."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return float("inf")
        return max((apart(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return max(map(apart, one, other), default=0.0) if len(one) == len(other) else float("inf")
    if not isinstance(one, (Tensor, int, float)) or not isinstance(other, (Tensor, int, float)):
        raise TypeError(f"cannot compare {type(one).__name__} with {type(other).__name__}: sides return numbers")
    a, b = (torch.as_tensor(each).detach().to("cpu", torch.float64) for each in (one, other))
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    if not a.numel() or torch.equal(a, b):
        return 0.0
    return ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()


@dataclass(frozen=True)
class Line:
    """Two sides measured. ratio: quartiles of other's amount over one's, turn by turn; None where they disagree, ``apart`` by more than
    ``tolerance``. amount: median of ``one``, in seconds, or in bytes of what ``PeakMemory`` or a count gives."""

    name: str
    ratio: list[float] | None
    amount: float
    apart: float
    tolerance: float
    aim: str = ""
    unit: str = "s"

    def named(self, name: str) -> Line:
        return replace(self, name=name)

    @property
    def cells(self) -> dict[str, str]:
        ratio = "the sides disagree" if self.ratio is None else f"{self.ratio[1]:.3f}"
        between = "" if self.ratio is None else f"{self.ratio[0]:.3f} to {self.ratio[2]:.3f}"
        return {
            "other / one": self.name,
            "median ratio": ratio,
            "quartiles": between,
            "one": "" if self.ratio is None else shown(self.amount, self.unit),
            "apart (at most)": f"{self.apart:.1e} ({self.tolerance:.0e})",
            "aim": self.aim,
        }


HEADER = ["other / one", "median ratio", "quartiles", "one", "apart (at most)", "aim"]


def shown(amount: float, unit: str) -> str:
    """Seconds or bytes for people."""
    if unit == "B":
        return f"{amount / 2**30:.3g} GB" if amount >= 2**30 else f"{amount / 2**20:.3g} MB"
    return f"{amount:.3g} s" if amount >= 1 else f"{1000 * amount:.3g} ms"


def paired(
    name: str,
    one: Side,
    other: Side,
    *,
    tolerance: float,
    rounds: int = 9,
    same: Callable[[], tuple[Any, Any]] | None = None,
    clock: Callable[[], float] = process_seconds,
    aim: str = "",
    unit: str = "s",
) -> Line:
    """Compare the results of both sides, and where they agree measure them, after one turn each to warm up.

    tolerance: at most so far ``apart``; clock, unit: what is measured, else seconds of this process; same: computes what is compared
    instead, where the sides that are timed compute two things by their nature (a batch of styles, and a batch without): the same code at
    work on what must come out equal.
    """
    first, second = one.turn(clock)[1], other.turn(clock)[1]
    wanted, found = (first, second) if same is None else same()
    distance = apart(wanted, found)
    if distance > tolerance:
        return Line(name, None, float("nan"), distance, tolerance, aim, unit)
    took = in_turns({"one": one, "other": other}, rounds, clock=clock)
    ratio = quartiles([b / a for a, b in zip(took["one"], took["other"])])
    return Line(name, ratio, statistics.median(took["one"]), distance, tolerance, aim, unit)


def printed(lines: Sequence[Line]) -> str:
    """The lines as one table in Markdown."""
    return table(HEADER, [[line.cells[column] for column in HEADER] for line in lines])


# --- memory -----------------------------------------------------------------------------------------------------------


class Memory:
    """The most anonymous memory of this process, in bytes, while it is open (RssAnon, Linux): what it alone has; pages of mapped files are
    not in it. before: what it had at the start, once glibc has given back what was freed: it would be taken again unseen."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = self.peak = self.now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        (anonymous,) = (int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        return 1024 * anonymous

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, self.now())


class PeakMemory:
    """As a clock of ``paired``, asked before and after a turn: the most anonymous memory in between, in bytes above what was there."""

    def __init__(self) -> None:
        self._memory: Memory | None = None

    def __call__(self) -> float:
        if self._memory is None:
            self._memory = Memory()
            self._memory.__enter__()
            return 0.0
        memory, self._memory = self._memory, None
        memory.__exit__()
        return memory.peak - memory.before


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, as the tests run: seconds of a process are then those of one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
