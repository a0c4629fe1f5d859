"""Reads a folder of captioned pictures as users keep them, where every file may be broken.

Pictures are found in the folder and the folders in it, in the order of their relative names. A caption is a line of
``metadata.jsonl`` in the top folder ({"file_name": "a/b.png", "text": "..."}, as Hugging Face's ImageFolder has it) or
else the content of the text file beside the picture: "b.txt" or "b.caption" beside "b.png", or "b.png.txt", whatever the case of
the ending. Names are the same in any Unicode normal form: what a Mac writes comes back from a zip file in another one.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, features

from ..progress import ProgressCallback

METADATA = "metadata.jsonl"
FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".jif": "JPEG", ".webp": "WEBP", ".apng": "PNG",
    ".bmp": "BMP", ".dib": "BMP", ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".avif": "AVIF",
    ".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF",
}  # fmt: skip
"""File names that are taken for pictures. Pillow tries these formats only: some others run programs."""
NEEDS = {"AVIF": "Pillow 11.3 or newer", "HEIF": "the package pillow-heif"}
"""What reads a format that not every Pillow does."""
STRANGERS = (
    ".jxl", ".jp2", ".j2k", ".jpx", ".jxr", ".tga", ".psd", ".psb", ".svg", ".ico", ".icns", ".exr", ".hdr", ".pcx", ".ppm", ".pgm",
    ".pbm", ".pnm", ".qoi", ".dds", ".xcf", ".kra", ".eps", ".ai", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
)  # fmt: skip
"""Endings of pictures that are not read, so that they are named and not just missing."""
CAPTIONS = (".txt", ".caption")
"""Endings of the text file beside a picture."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Picture:
    """A picture that was read once to its end. name: relative to the folder, with slashes; size: (width, height) after
    EXIF rotation."""

    name: str
    path: Path
    caption: str
    size: tuple[int, int]
    sha256: str


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name!r}: {self.reason}"  # repr: a file's name may hold control characters of the terminal


@functools.cache
def readable_formats() -> frozenset[str]:
    """Of ``FORMATS``, what Pillow reads on this machine; HEIF with the package pillow-heif."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    missing = set() if "AVIF" in Image.OPEN and features.check("avif") else {"AVIF"}
    return frozenset(FORMATS.values()) & Image.OPEN.keys() - missing


def normal(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which names are compared."""
    return unicodedata.normalize("NFC", name)


def find_files(folder: str | os.PathLike) -> dict[str, Path]:
    """Relative name (with slashes) -> path of every file, sorted by name. Hidden files and folders are left out.

    Links to files are followed, links to folders inside are not: they may lead round in a circle.
    Raises ValueError when there is no such folder.
    """
    top = Path(folder)
    if not top.is_dir():
        raise ValueError(f"there is no folder '{folder}'")
    found = {}
    for parent, folders, files in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(parent, name)
            if not name.startswith("."):
                found[path.relative_to(top).as_posix()] = path
    return dict(sorted(found.items()))


def find_pictures(folder: str | os.PathLike) -> dict[str, Path]:
    """Of ``find_files``, the pictures that can be read here. Raises ValueError when there is no such folder, or no picture in it."""
    files = find_files(folder)
    found = {name: path for name, path in files.items() if FORMATS.get(path.suffix.lower()) in readable_formats()}
    if not found:
        strange = unreadable_pictures(files)
        raise ValueError(
            f"no pictures in '{folder}': expected files that end in {', '.join(FORMATS)}"
            + (f"; there are {len(strange)} that cannot be read, as {strange[0]}" if strange else "")
        )
    return found


def unreadable_pictures(files: Mapping[str, Path]) -> list[Problem]:
    """The pictures among files that are of a kind that is not read here, and why."""
    problems = []
    for name, path in files.items():
        ending = path.suffix.lower()
        kind = FORMATS.get(ending)
        if ending in STRANGERS:
            problems.append(Problem(name, f"pictures that end in {ending} are not read: save it as .png or .jpg"))
        elif kind and kind not in readable_formats():
            reason = f"Pillow cannot read {ending} on this machine ({NEEDS.get(kind, 'another Pillow')} can): save it as .png or .jpg"
            problems.append(Problem(name, reason))
    return problems


def missed_pictures(files: Mapping[str, Path]) -> list[Problem]:
    """Of ``unreadable_pictures``, those that were meant to be used: a caption is beside them, and no other picture that it could be for."""
    texts = {normal(_stem(name)) for name, path in files.items() if path.suffix.lower() in CAPTIONS}
    read = (name for name, path in files.items() if FORMATS.get(path.suffix.lower()) in readable_formats())
    served = {normal(_stem(name)) for name in read}
    meant = []
    for problem in unreadable_pictures(files):
        name = normal(problem.name)
        if name in texts or (_stem(name) in texts and _stem(name) not in served):
            meant.append(problem)
    return meant


def captions_alone(folder: str | os.PathLike) -> list[str]:
    """Names of the caption files that no picture of any kind stands beside."""
    files = find_files(folder)
    kinds = {*FORMATS, *STRANGERS}
    pictures = [normal(name) for name, path in files.items() if path.suffix.lower() in kinds]
    owners = {*pictures, *(_stem(name) for name in pictures)}
    texts = (name for name, path in files.items() if path.suffix.lower() in CAPTIONS)
    return [name for name in texts if normal(_stem(name)) not in owners]


def _stem(name: str) -> str:
    """A relative name without its ending."""
    return name[: len(name) - len(PurePosixPath(name).suffix)]


# --- captions ---------------------------------------------------------------------------------------------------------


NO_CAPTION, EMPTY = "it has no caption", "its caption is empty"
"""How reasons begin where nobody has said anything."""


def clean_caption(text: str) -> str:
    """One line, single spaces. Raises ValueError for an empty caption and for broken Unicode."""
    text = " ".join(text.split())
    if not text:
        raise ValueError(EMPTY)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("its caption is not valid Unicode") from None
    return text


def read_captions(folder: str | os.PathLike, pictures: dict[str, Path]) -> tuple[dict[str, str], list[Problem]]:
    """Captions by the pictures' names, and everything that is wrong with them."""
    files = find_files(folder)
    strange = {problem.name: problem for problem in unreadable_pictures(files)}
    listed, problems = read_metadata(Path(folder) / METADATA, [*pictures, *strange])
    texts: dict[str, list[str]] = {}
    for name, path in files.items():
        if path.suffix.lower() in CAPTIONS:
            texts.setdefault(normal(_stem(name)), []).append(name)
    problems += [strange[name] for name in listed if name in strange]
    captions = {}
    for name in pictures:
        try:
            captions[name] = clean_caption(listed[name] if name in listed else read_text_beside(name, files, texts))
        except ValueError as error:
            problems.append(Problem(name, str(error)))
    return captions, problems


def read_text_beside(picture: str, files: Mapping[str, Path], texts: Mapping[str, Sequence[str]]) -> str:
    """What the text file beside a picture says. texts: names of caption files by their names without the ending, ``normal``.

    Raises ValueError when there is none, when two say different things, or it is not UTF-8 text.
    """
    for owner in (picture, _stem(picture)):  # "b.png.txt" is of this picture alone, "b.txt" of "b.jpg" too
        names = texts.get(normal(owner), ())
        names = [name for name in names if _stem(name) == owner] or names
        said = {name: read_text(files[name]) for name in names}
        if len({" ".join(text.split()) for text in said.values()}) > 1:
            raise ValueError(f"it has two captions, in {' and '.join(repr(name) for name in said)}: keep one of them")
        if said:
            return next(iter(said.values()))
    expected = f"{PurePosixPath(picture).stem}.txt"
    raise ValueError(f"{NO_CAPTION}: neither a file {expected!r} nor a line in {METADATA}")


def read_text(path: Path) -> str:
    """A caption file. Raises ValueError for what is not UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"its caption file {path.name!r} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"its caption file {path.name!r} cannot be read ({error.strerror})") from None


def read_metadata(path: Path, names: Iterable[str]) -> tuple[dict[str, str], list[Problem]]:
    """file_name -> text of a metadata.jsonl (which may be missing), and its bad lines. A file name is only compared, never opened; it may
    be in another Unicode normal form than the picture's, or have backslashes."""
    if not path.is_file():
        return {}, []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        return {}, [Problem(path.name, f"cannot be read as UTF-8 text ({error})")]
    names, texts, problems = set(names), {}, []
    by_normal: dict[str, list[str]] = {}
    for name in names:
        by_normal.setdefault(normal(name), []).append(name)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
            if not isinstance(text, str):
                raise TypeError
            name = PurePosixPath(name).as_posix()  # "./a.png" is "a.png"
        except (ValueError, KeyError, TypeError, RecursionError):
            problems.append(Problem(where, 'expected {"file_name": "...", "text": "..."}'))
            continue
        if name not in names:
            slashes = PurePosixPath(name.replace("\\", "/")).as_posix()
            found = by_normal.get(normal(name)) or by_normal.get(normal(slashes)) or []
            name = found[0] if len(found) == 1 else name
        if name not in names:
            problems.append(Problem(where, f"there is no picture {name!r} in the folder"))
        elif name in texts:
            problems.append(Problem(where, f"a second caption for {name!r}"))
        else:
            texts[name] = text
    return texts, problems


def read_caption_file(path: str | os.PathLike) -> list[str]:
    """A text file with one caption a line -> the distinct captions, in their order; empty lines are left out.

    Raises ValueError when the file cannot be read as UTF-8 text or holds no caption.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"'{path}' is not UTF-8 text: expected one caption a line") from None
    except OSError as error:
        raise ValueError(f"cannot read the captions '{path}': {error.strerror}") from None
    captions = list(dict.fromkeys(clean_caption(line) for line in lines if line.strip()))
    if not captions:
        raise ValueError(f"'{path}' holds no caption: expected one a line")
    return captions


# --- pixels -----------------------------------------------------------------------------------------------------------


def decode(data: bytes) -> Image.Image:
    """The content of a picture file -> an RGB picture as it is to be seen: turned upright (EXIF), transparency on
    white.

    Of an animation, the first frame. Raises ValueError for whatever Pillow cannot read to the end.
    """
    try:
        with Image.open(io.BytesIO(data), formats=sorted(readable_formats())) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise ValueError(f"it is too large ({error})") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is not a picture that can be read") from error
    except (
        Exception
    ) as error:  # a broken file makes Pillow's decoders raise nearly anything: SyntaxError, struct.error, ...
        raise ValueError(f"it is damaged ({error or type(error).__name__})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB; 16 bits a channel become 8 (Pillow itself would clip at 255). Raises ValueError for
    floating point."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64) // 256
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pictures have no known white")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def read_picture(picture: Picture) -> Image.Image:
    """The picture as RGB. Raises ValueError naming it when its file has changed since it was surveyed."""
    try:
        data = picture.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != picture.sha256:
            raise ValueError("it has changed since it was checked: run the command again")
        return decode(data)
    except (ValueError, OSError) as error:
        raise ValueError(f"{picture.name!r}: {error}") from error


def survey(
    folder: str | os.PathLike, workers: int = 4, progress: ProgressCallback | None = None
) -> tuple[list[Picture], list[Problem]]:
    """Read every picture and caption of a folder once -> those that can be used, in order of name, and what is wrong
    with the rest."""
    paths = find_pictures(folder)
    captions, problems = read_captions(folder, paths)
    problems += [problem for problem in missed_pictures(find_files(folder)) if problem not in problems]

    def check(item: tuple[str, Path]) -> Picture | Problem:
        name, path = item
        if not path.is_file():
            return Problem(name, "it is no file, or a link to nothing")
        try:
            data = path.read_bytes()
            size = decode(data).size
        except ValueError as error:
            return Problem(name, str(error))
        except OSError as error:
            return Problem(name, f"it cannot be read ({error.strerror})")
        return Picture(name, path, captions.get(name, ""), size, hashlib.sha256(data).hexdigest())

    pictures: list[Picture] = []
    with ThreadPoolExecutor(workers) as pool:
        for done, checked in enumerate(ahead(pool, check, list(paths.items()), 2 * workers), start=1):
            if isinstance(checked, Problem):
                problems.append(checked)
            elif checked.name in captions:
                pictures.append(checked)
            if progress:
                progress(done, len(paths), "checking pictures")
    return pictures, problems


def ahead(pool: Executor, work: Callable[[Item], Result], items: Sequence[Item], depth: int) -> Iterator[Result]:
    """``map`` in order on other threads, with at most ``depth`` results that nobody has taken yet: pictures are
    large."""
    waiting: collections.deque[Future[Result]] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
