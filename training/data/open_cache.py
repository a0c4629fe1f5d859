"""Opens a folder that ``dmm cache`` made: pictures or rollouts."""

from __future__ import annotations

import os

from .cache import ImageCache, open_image_cache
from .rollout_data import Rollouts, open_rollouts
from .shards import read_manifest


def open_cache(folder: str | os.PathLike, verify: bool = False) -> ImageCache | Rollouts:
    """Open a finished cache, reading its manifest only. ``for_teachers`` then checks that it fits a run, and gives the
    run's data.

    Raises ValueError for one that is unfinished, damaged or of a newer version; ``verify`` reads and hashes every
    shard.
    """
    if read_manifest(folder)["kind"] == "rollouts":
        return open_rollouts(folder, verify)
    return open_image_cache(folder, verify)
