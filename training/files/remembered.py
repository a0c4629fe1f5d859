"""Hashes of large files, remembered between runs: eight SD1.5 teachers are 14 GB, half a minute of a core for each kind of hash.

A file is known again by its real path, size, inode and the times of its last change of content (mtime) and of its entry (ctime, which
copying tools cannot set back), as these were before it was opened: what is mapped stays what it was when another file takes its name. So
a wrong answer takes a file that changed under the same inode with its clocks turned back, or damage on the disk itself below the file
system. A run's state names its teachers by such hashes; digests of what states and caches hold are always computed. The hashes stand
in ``comfyui-dmm/hashes.json`` in the user's cache folder; the environment variable DMM_HASHES names another file, or turns it off
when empty. Without a file that can be read or written all is computed, as before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ...dmm_core.files import atomic_write
from .hashing import repr_sha256

LARGE = 64 * 2**20
"""Bytes from which remembering is worth a file."""
MOST = 2000
"""Hashes that are kept; the oldest go first."""
FRESH = 2 * 10**9
"""Nanoseconds: a file that changed this little ago may change again within one tick of its clock, so it is not remembered."""
_HASH = re.compile(r"[0-9a-f]{64}")

Given = TypeVar("Given")
Made = TypeVar("Made")


Stamps = tuple[tuple[str, int, int, int, int], ...]
"""(real path, size, inode, mtime, ctime) of files."""


def stamps(files: Iterable[str | os.PathLike]) -> Stamps | None:
    """How files are known again; None where they are small together, or gone. To be taken before they are opened."""
    try:
        stats = [(path, os.stat(path)) for path in map(os.path.realpath, files)]
    except OSError:
        return None
    if not stats or sum(stat.st_size for _, stat in stats) < LARGE:
        return None
    return tuple((path, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats)


def remembered(kind: str, before: Stamps | None, compute: Callable[[], str]) -> str:
    """What ``compute`` gave for these files before, or gives now: 64 hexadecimal digits.

    kind: of the hash, in words that change with its meaning; before: ``stamps`` from before that was read which ``compute`` hashes. Where
    the files are others by now, nothing is looked up or kept. Raises what ``compute`` raises.
    """
    store = _store()
    if store is None or before is None or _changed(before):
        return compute()
    key = repr_sha256(kind, before)
    known = _read(store).get(key)
    if known is not None:
        return known
    result = compute()
    newest = max(max(mtime, ctime) for *_, mtime, ctime in before)
    if not _changed(before) and time.time_ns() - newest > FRESH and _HASH.fullmatch(result):
        _write(store, key, result)
    return result


def side_by_side(function: Callable[[Given], Made], values: Iterable[Given]) -> list[Made]:
    """``function`` of each value, in order; hashing leaves Python to other threads meanwhile. One after the other on a single core."""
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as threads:
        return list(threads.map(function, values))


def _store() -> Path | None:
    """Where the hashes are; None when they are not to be remembered."""
    named = os.environ.get("DMM_HASHES")
    if named is not None:
        return Path(named) if named else None
    folder = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return Path(folder or Path.home() / ".cache") / "comfyui-dmm" / "hashes.json"
    except RuntimeError:  # no home
        return None


def _changed(before: Stamps) -> bool:
    return stamps(path for path, *_ in before) != before


def _read(store: Path) -> dict[str, str]:
    """By key; nothing from a file that is gone or is no list of hashes."""
    try:
        entries = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: value for key, value in entries.items() if isinstance(value, str) and _HASH.fullmatch(value)}


def _write(store: Path, key: str, value: str) -> None:
    """With what other processes have written meanwhile; of two at the same moment one may be lost."""
    entries = _read(store)
    entries.pop(key, None)
    entries[key] = value
    kept = dict(list(entries.items())[-MOST:])
    with contextlib.suppress(OSError, ValueError):
        store.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(store) as temporary:
            temporary.write_text(json.dumps(kept, indent=0) + "\n", encoding="utf-8")
