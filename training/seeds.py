"""Seeds for random generators that follow from a run's seed and a purpose, not from what was drawn before."""

from __future__ import annotations

import hashlib


def hash_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose of a run, unrelated to the seed of any other purpose.

    purpose: anything with a faithful repr (texts, numbers, tuples of them).
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
