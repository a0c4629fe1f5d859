"""Caches on disk: a folder of safetensors shards with a manifest, which is built shard by shard and read lazily.

A shard is written completely or not at all, and carries the hash of everything that decides its content; building again
keeps the shards whose hash is right. The manifest is written last and removed before a shard of it changes: a folder
with a manifest is complete. Nothing in it depends on when or in how many attempts it was made.

The manifest says what each row of each shard was when it was written, and what it was itself: a row that has changed
on disk is found when it is read. Caches from before that are read as they are; the command that made one adds it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...dmm_core.files import atomic_write, file_sha256
from ..files.checksums import ROW_DIGITS, row_digests
from ..files.folder_lock import locked
from ..files.hashing import repr_sha256
from .batches import bad_rows

logger = logging.getLogger(__name__)

FORMAT = 1
KINDS = ("images", "rollouts")
"""What a manifest says under "kind"."""

MANIFEST = "manifest.json"
DIGEST = "digest"
"""In a manifest: of everything else in it."""
DIGESTS = "digests"
"""In a shard's entry: ``row_digests`` of each of its tensors, by name."""
IDENTITY = "dmm.shard"
"""A shard's only metadata: safetensors writes several entries in a random order, and equal shards must be equal
files."""

SHARD_NAME = re.compile(r"(latents|text|rollouts)-[0-9a-z-]+-\d{5}\.safetensors")
OPEN_SHARDS = 64
"""Files kept open at a time (memory-mapped) by one reader."""

SHOWN = 5
"""Entries of a long list that a message shows."""


def first_few(items: Sequence[object]) -> str:
    """The first ``SHOWN`` items of a list in words, for error messages."""
    rest = len(items) - SHOWN
    return "; ".join(str(item) for item in items[:SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


# --- writing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cache_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Inside, the folder of a cache is this process's alone. Raises ValueError for a file, and naming the process that has the folder."""
    if os.path.isfile(folder):
        raise ValueError(f"'{folder}' is a file: give a folder for the cache")
    with locked(Path(folder), "the cache"):
        yield


P = ParamSpec("P")
R = TypeVar("R")


def in_cache_folder(
    build: Callable[Concatenate[str | os.PathLike, P], R],
) -> Callable[Concatenate[str | os.PathLike, P], R]:
    """``build``, whose first argument is the folder of a cache, inside of ``cache_folder``."""

    @functools.wraps(build)
    def alone(folder: str | os.PathLike, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with cache_folder(folder):
            return build(folder, *args, **kwargs)

    return alone


class ShardWriter:
    """The folder of a cache that is being built or extended, which is inside of ``cache_folder``.

    settings: what every shard depends on, by name; a folder that was made with others is refused (ValueError), never
    mixed.
    """

    def __init__(self, folder: str | os.PathLike, kind: str, settings: Mapping[str, Any]):
        self.folder, self.kind, self.settings = Path(folder), kind, json.loads(json.dumps(settings))
        self.before: dict[str, Any] = {}
        if (self.folder / MANIFEST).exists():
            self.before = read_manifest(self.folder, kind)
            changed = [
                f"{name} ({self.before['settings'].get(name)!r} -> {self.settings.get(name)!r})"
                for name in sorted(self.before["settings"].keys() | self.settings.keys())
                if self.before["settings"].get(name) != self.settings.get(name)
            ]
            if changed:
                raise ValueError(
                    f"the cache in '{folder}' was made with something else: {'; '.join(changed)}. Choose another folder"
                )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"'{folder}' is a file: give a folder for the cache") from None
        self.known = {entry["file"]: entry for entry in shard_entries(self.before)}

    def shard(self, name: str, identity: str, count: int, build: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
        """The manifest's entry of a shard, after it was built, unless it is there already.

        Raises OSError saying what to do when the disk refuses; finished shards stay.
        """
        path = self.folder / name
        digest = file_sha256(path) if _carries(path, identity) else None
        if digest is None or name in self.known and self.known[name]["sha256"] != digest:
            tensors = build()
            if name in self.known:
                (self.folder / MANIFEST).unlink(missing_ok=True)
            try:
                with atomic_write(path) as temporary:
                    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {IDENTITY: identity})
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"{path} could not be written ({getattr(error, 'strerror', None) or error}). The shards before it are "
                    "finished and stay usable: free some space and run the same command again, it goes on from here"
                ) from error
            digest, rows = file_sha256(path), {k: row_digests(v) for k, v in sorted(tensors.items())}
        elif name in self.known and DIGESTS in self.known[name]:
            rows = self.known[name][DIGESTS]
        else:
            rows = {k: row_digests(v) for k, v in sorted(load_file(path).items())}
        return {"file": name, "count": count, "bytes": path.stat().st_size, "sha256": digest, DIGESTS: rows}

    def finish(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest and remove shards that no longer belong to the cache. Returns the manifest."""
        manifest = {"format": FORMAT, "kind": self.kind, "settings": self.settings, **content}
        text = json.dumps({**manifest, DIGEST: repr_sha256(json.dumps(manifest))}) + "\n"
        path = self.folder / MANIFEST
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        wanted = {entry["file"] for entry in shard_entries(manifest)}
        for old in self.folder.iterdir():
            if SHARD_NAME.fullmatch(old.name) and old.name not in wanted:
                logger.info("removing %s, which is no longer part of the cache", old.name)
                old.unlink()
        return manifest


def _carries(path: Path, identity: str) -> bool:
    """Whether there is a readable shard with this identity."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(IDENTITY) == identity
    except (OSError, SafetensorError):
        return False


# --- reading ----------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | os.PathLike, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a finished cache. Raises ValueError for a folder that is none, one of another kind, or of a newer
    version."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        started = Path(folder).is_dir() and any(SHARD_NAME.fullmatch(p.name) for p in Path(folder).iterdir())
        what = (
            "is not finished: run the same 'dmm cache' command again"
            if started
            else "is not a cache: make one with 'dmm cache'"
        )
        raise ValueError(f"'{folder}' {what} (it has no {MANIFEST})") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"'{path}' cannot be read ({error}): run the 'dmm cache' command again after removing it"
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"'{folder}' is a cache of format {found!r}, this version reads {FORMAT}: make it again")
    if DIGEST in manifest and manifest.pop(DIGEST) != repr_sha256(json.dumps(manifest)):
        raise ValueError(
            f"'{path}' is damaged: it is not as it was written. Remove it and run the 'dmm cache' command again"
        )
    if manifest.get("kind") not in ([kind] if kind else KINDS):
        raise ValueError(
            f"'{folder}' is a cache of {manifest.get('kind')}, expected one of {kind or ' or '.join(KINDS)}"
        )
    try:
        bad = [e["file"] for e in shard_entries(manifest) if not SHARD_NAME.fullmatch(e["file"])]
        manifest["settings"].keys()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged ({error!r}): remove it and run the 'dmm cache' command again") from error
    if bad:  # it is used as a path
        raise ValueError(f"'{path}' names files that are no shards: {first_few(bad)}")
    return manifest


def shard_entries(content: Any) -> list[dict[str, Any]]:
    """Every shard's entry anywhere in a manifest: they lie in lists called ``shards``."""
    if isinstance(content, dict):
        direct = content.get("shards", [])
        return [*direct, *(e for key, value in content.items() if key != "shards" for e in shard_entries(value))]
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return [entry for value in content for entry in shard_entries(value)]
    return []


def check_shards(folder: str | os.PathLike, entries: Iterable[Mapping[str, Any]], verify: bool = False) -> None:
    """Raises ValueError naming the shards that are missing or of another size, with ``verify`` also of other
    content."""
    problems = []
    for entry in entries:
        path = Path(folder) / entry["file"]
        if not path.is_file():
            problems.append(f"{path.name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif verify and file_sha256(path) != entry["sha256"]:
            problems.append(f"{path.name} has other content than it was written with")
    if problems:
        raise ValueError(
            f"the cache in '{folder}' is damaged: {first_few(problems)}. Run the 'dmm cache' command that made it again: "
            "it makes those shards anew"
        )


class ShardReader:
    """Rows of tensors that lie in a list of shards, numbered through all of them. entries: of the shards in the
    manifest, each of which has ``count`` rows of every tensor. names: what the rows are of, for messages."""

    def __init__(self, folder: str | os.PathLike, entries: Sequence[Mapping[str, Any]], names: Sequence[str] = ()):
        self.folder, self.entries, self.names = Path(folder), list(entries), names
        self.ends = torch.tensor([entry["count"] for entry in self.entries], dtype=torch.long).cumsum(0)
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def _open_shard(self, shard: int) -> safe_open:
        path = self.folder / self.entries[shard]["file"]
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} of the cache cannot be read ({error}): run the 'dmm cache' command again"
            ) from error

    def place(self, row: int) -> tuple[int, int]:
        """(shard, row in it). Raises IndexError outside 0..len - 1."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a cache of {len(self)}")
        shard = int(torch.searchsorted(self.ends, row, right=True))
        return shard, row - (int(self.ends[shard - 1]) if shard else 0)

    def span(self, shard: int, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop - 1 of one shard's tensor, in the dtype of the file. Raises ValueError where they are not
        as they were written, and naming the row with NaN or infinity."""
        entry = self.entries[shard]
        path = self.folder / entry["file"]
        again = "Run the 'dmm cache' command that made the cache again: it makes this file anew"
        try:
            rows = self._open(shard).get_slice(name)[start:stop]
        except SafetensorError as error:
            raise ValueError(f"{path} of the cache is damaged ({error}). {again}") from error
        if rows.is_floating_point() and (bad := bad_rows(rows)):
            row = start + bad[0]
            place = row + (int(self.ends[shard - 1]) if shard else 0)
            whose = f", of {self.names[place]!r}" if place < len(self.names) else ""
            raise ValueError(
                f"{path} has NaN or infinite numbers in row {row} of '{name}'{whose}: remove the file and run the 'dmm cache' command that "
                "made it again"
            )
        digests = entry.get(DIGESTS, {}).get(name)
        if digests is not None and row_digests(rows) != digests[ROW_DIGITS * start : ROW_DIGITS * stop]:
            raise ValueError(
                f"{path} of the cache is damaged: '{name}' is not as it was written in rows {start} to {stop - 1}. {again}"
            )
        return rows

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Row numbers (B,) -> (B, ...), in the dtype of the file."""
        places = [self.place(row) for row in index.tolist()]
        return torch.cat([self.span(shard, name, row, row + 1) for shard, row in places])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that a tensor would have in one file: all rows, and the other sizes of the first shard."""
        return len(self), *self._open(0).get_slice(name).get_shape()[1:]

    def fingerprint(self) -> str:
        return "".join(entry["sha256"] for entry in self.entries)
