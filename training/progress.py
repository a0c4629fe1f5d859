"""The callback by which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[int, int, str], None]
"""(done, total, what), what in words for people. Called after every item, and within long ones with
the same count; an exception that it raises ends the work."""
