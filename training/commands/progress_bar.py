"""Progress on stderr: a bar in a terminal; a plain line now and then where stderr is a file or a pipe, as in a CI log."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 30.0
"""Seconds between two lines of one piece of work, its first and last line apart."""
LINE = "{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
"""tqdm's own line without the drawing in the middle."""


def new_bar(total: int, what: str = "", **options: Any) -> tqdm:
    """A tqdm bar named ``what``; without a terminal it writes lines: at its start, at its end, and every EVERY seconds between.

    ``options`` are tqdm's, as ``initial`` and ``unit``.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, dynamic_ncols=True, **options)
    pace: dict[str, Any] = {"mininterval": EVERY, "maxinterval": EVERY, "miniters": 1}
    return tqdm(total=total, desc=what and f"{what}: ", file=Lines(sys.stderr), bar_format=LINE, **pace, **options)


class Lines:
    """A stream for tqdm that turns each drawing of a bar over the one before into a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        line = text.strip()  # of the return to the line's start, and of blanks over what stood there
        if line:
            self.stream.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


class ProgressBar:
    """Shows (done, total, what) as a bar; a new one when the count begins again."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.bar is None or total != self.bar.total or done < self.bar.n:
            self.close()
            self.bar = new_bar(total, what)
        self.bar.set_description(what, refresh=False)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
