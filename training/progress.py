"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Tick = Callable[[int, int, str], None]
"""(done, total, what): called after every part; what it raises ends the work."""
