"""What may be asked of a training while it runs: a picture, a save, a pause, an end. Asked from any thread, answered after a step; a stop
between two pictures too."""

from __future__ import annotations

import contextlib
import queue
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from ...parallel.ranks import Ranks

ACTIONS = ("sample", "save", "stop", "pause", "resume")
WAIT = 0.2
"""Seconds between two looks at the host's interrupt while a run is paused."""


class StopAndSave(Exception):
    """Raised after a step, or between two pictures, when a stop was asked for: what trains saves what was learnt, as it does whatever
    ends it early."""


class Controls:
    """The requests to one run.

    ``paused`` and ``stopping`` say what was asked for, at once; the run follows when its step is done, and a sheet of pictures is given up
    for a stop. on_pause: called when it pauses.
    What is asked of one process of a run is asked of all: they look together after each step.
    """

    def __init__(self, on_pause: Callable[[], object] = lambda: None) -> None:
        self.on_pause = on_pause
        self.paused = self.stopping = False
        self._waiting = self._over = False  # the same, as of the last look: what the run follows
        # Unlike a lock's, its methods may be called by a signal handler that came in the middle of one of them.
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask(self, action: str) -> None:
        """From any thread and from signal handlers. Raises ValueError for an unknown action."""
        if action not in ACTIONS:
            raise ValueError(f"action is '{action}': choose one of {', '.join(ACTIONS)}")
        if action in ("pause", "resume"):
            self.paused = action == "pause"
        if action == "stop":
            self.stopping = True
        self._asked.put(action)

    def after_step(
        self,
        save: Callable[[], object],
        sample: Callable[[], object],
        check_interrupt: Callable[[], object] = lambda: None,
        ranks: Ranks | None = None,
    ) -> None:
        """Do what was asked for since the last step, each once; while paused, wait here for more.

        Everything stays where it is during a pause, on the device too. ``check_interrupt`` may raise the host's interrupt.
        Raises StopAndSave after a stop, even out of a pause.
        """
        ranks = ranks or Ranks()
        check_interrupt()
        while asked := self._look(ranks):  # a picture takes a while, and a stop may have come meanwhile
            self._answer(asked, save, sample)
        if self._waiting:
            self.on_pause()
        while self._waiting:
            check_interrupt()
            self._answer(self._look(ranks, WAIT), save, sample)

    def _look(self, ranks: Ranks, wait: float = 0.0) -> set[str]:
        """What was asked since the last look, of any process; up to ``wait`` seconds for a first request."""
        waiting = self._drain(wait)
        turns = [action for action in waiting if action in ("pause", "resume")]
        own = set(waiting) - set(turns[:-1])  # the last one counts
        flags = ranks.any([action in own for action in ACTIONS])
        asked = {action for action, flag in zip(ACTIONS, flags) if flag}
        if asked & {"pause", "resume"}:
            self._waiting = "resume" not in asked
        self._over = self._over or "stop" in asked
        if ranks.world > 1:
            self.paused, self.stopping = self._waiting, self._over
        return asked

    def _drain(self, wait: float) -> list[str]:
        asked = []
        with contextlib.suppress(queue.Empty):
            if wait:
                asked.append(self._asked.get(timeout=wait))
            while True:
                asked.append(self._asked.get_nowait())
        return asked

    def _answer(self, asked: set[str], save: Callable[[], object], sample: Callable[[], object]) -> None:
        if "sample" in asked:
            sample()
        if "save" in asked:
            save()
        if self._over:
            raise StopAndSave


@contextlib.contextmanager
def signals(controls: Controls) -> Iterator[None]:
    """Inside, signals to this process are requests: SIGINT (Ctrl-C) and SIGTERM stop, SIGUSR1 is sample, SIGUSR2 save.

    A second stop does not wait for the step's end. However it was stopped, the block ends in KeyboardInterrupt, after the run
    has saved itself. SIGTSTP (Ctrl-Z) is left to the shell, and Windows has no SIGUSR1 and SIGUSR2. Main thread only.
    """

    heard = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if heard:  # not controls.stopping, which another process of the run may have brought about
            raise KeyboardInterrupt
        heard = True
        controls.ask("stop")

    def asks(action: str) -> Callable[[int, FrameType | None], None]:
        return lambda number, frame: controls.ask(action)

    handlers: dict[int, Callable[[int, FrameType | None], None]] = {signal.SIGINT: stop, signal.SIGTERM: stop}
    for name, action in (("SIGUSR1", "sample"), ("SIGUSR2", "save")):
        if hasattr(signal, name):
            handlers[getattr(signal, name)] = asks(action)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except StopAndSave:
        raise KeyboardInterrupt from None
    finally:
        for number, old in before.items():
            signal.signal(number, old)
