"""Reads and writes the metadata of a DMM checkpoint: its styles, its recipe, and the common ``modelspec.*`` keys.

safetensors metadata are strings, so lists and dictionaries are stored as JSON. They may come from untrusted files: they
are checked both when read and when written, and are only ever data, never a path, a format string or markup.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from typing import Any

from .style_value import NO_STYLE
from .unet import UNetConfig

FORMAT = 3
"""The newest version of a file that this code reads. It writes 3 for a model with other attention heads than the usual ones, 2 for another
with a style bank, and 1 for one without, which older versions of this pack read too."""

STYLES = "dmm.styles"
"""Metadata key: what is known of the styles, a list in JSON in the order of their codes."""

LONGEST = {
    "name": 100,
    "description": 4000,
    "thumbnail": 200_000,
    "teacher": 255,
    "sha256": 64,
    "licence": 20_000,
    "recommended": 4000,
}
"""Characters allowed per field of a style; a licence may be given in full, a thumbnail is one small picture."""

MAX_DEPTH = 20
"""Levels of nesting accepted in a file's JSON, so that code which walks it may recurse."""

MAX_VALUES = 1_000_000
"""Commas and brackets in a file's JSON: a list takes 60 bytes of memory where its text takes three."""

_THUMBNAIL = re.compile(r"data:image/(jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LINE_BREAKS = "\n\r\t"
_TURNS = "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
"""Unicode's embeddings, overrides and isolates (UAX 9); the plain marks of right-to-left scripts are no part of them."""
LONGEST_TITLE = 1000
"""Characters of a model's title."""
_STALE_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True)
class StyleInfo:
    """The description of one style of a checkpoint; every field but the name may be empty.

    thumbnail: ``data:image/jpeg;base64,...`` or ``image/webp``; teacher: file name of the model that the style was
    learned from, and sha256 its digest; recommended: sampling settings such as ``{"cfg": 7, "sampler": "dpmpp_2m"}``.
    Raises ValueError, naming the field, for anything that could not be shown or stored.
    """

    name: str
    description: str = ""
    thumbnail: str = ""
    teacher: str = ""
    sha256: str = ""
    licence: str = ""
    recommended: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for key in ("name", "description", "thumbnail", "teacher", "sha256", "licence"):
            _check_text(key, getattr(self, key), breaks=key in ("description", "licence"))
        if not self.name.strip():
            raise ValueError("a style has an empty name: give it one")
        if self.thumbnail and not _THUMBNAIL.fullmatch(self.thumbnail):
            raise ValueError(f"the thumbnail of style '{self.name}' is not a base64 data URI of a JPEG or WebP image")
        if self.sha256 and not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"the sha256 of style '{self.name}' is not 64 lower-case hexadecimal digits")
        if not isinstance(self.recommended, dict):
            raise ValueError(f"the recommended settings of style '{self.name}' are not a dictionary")
        what = f"the recommended settings of style '{self.name}'"
        if len(_to_json(what, self.recommended)) > LONGEST["recommended"]:
            raise ValueError(f"{what} are longer than {LONGEST['recommended']} characters")


def unstorable(text: str, breaks: bool = False) -> str | None:
    """The first character of a new text that must not be stored: control characters, halves of a character and marks that turn the
    direction of what follows them (a name must not look like another one). breaks: of lines, which are then allowed."""
    for c in text:
        if (unicodedata.category(c) in ("Cc", "Cs") and not (breaks and c in _LINE_BREAKS)) or c in _TURNS:
            return c
    return None


def check_new_text(key: str, text: str) -> None:
    """Raise ValueError for a new ``name``, ``description`` or ``licence`` of a style, or a ``title`` of a model, that is too long or holds
    characters that must not be stored. (What files hold already is read as it is, marks of direction included.)"""
    what, limit = ("a model's title", LONGEST_TITLE) if key == "title" else (f"a style's {key}", LONGEST[key])
    if len(text) > limit:
        raise ValueError(f"{what} has {len(text)} characters, at most {limit} are allowed: '{text[:40]}...'")
    if bad := unstorable(text, breaks=key in ("description", "licence")):
        raise ValueError(f"{what} holds the control character {bad!r}: remove it")


def default_styles(num_styles: int) -> list[StyleInfo]:
    """Names for a file that has none, such as the authors' own: "style 0" .. "style N-1"."""
    return [StyleInfo(f"style {i}") for i in range(num_styles)]


def check_styles(styles: Sequence[StyleInfo], num_styles: int) -> None:
    """Raise ValueError unless there is one description per style of the weights, each with a name of its own."""
    _check_count(len(styles), num_styles)
    names = [style.name for style in styles]
    if any(name.strip().casefold() == NO_STYLE for name in names):
        raise ValueError(f"a style is called '{NO_STYLE}', which means painting without a style: rename it")
    doubles = sorted(name for name, count in Counter(names).items() if count > 1)
    if doubles:
        raise ValueError(f"style names must differ, but {doubles[:8]} appear more than once: rename them")


def _check_count(named: int, num_styles: int) -> None:
    if named != num_styles:
        raise ValueError(
            f"the style list names {named} styles but the weights hold {num_styles}: "
            "the list and the weights must come from the same model"
        )


def read_metadata(
    metadata: Mapping[str, str], num_styles: int
) -> tuple[list[StyleInfo], dict[str, Any], str | None, dict[str, str]]:
    """Styles, recipe, prediction ("eps", "v" or None if not said) and all other keys, from a file's metadata.

    Raises ValueError for a newer format and for damaged entries, naming the key.
    """
    rest = dict(metadata)
    version = rest.pop("dmm.format", "1")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise ValueError(f"metadata 'dmm.format' is {version[:40]!r}, not a version number: the file is damaged")
    if int(version) > FORMAT:
        raise ValueError(
            f"the file has DMM format {version}, this version of comfyui-dmm reads up to {FORMAT}: update comfyui-dmm"
        )
    styles = default_styles(num_styles)
    if STYLES in rest:
        entries = _from_json(STYLES, rest.pop(STYLES), list)
        if len(entries) > num_styles:  # before making something of each
            _check_count(len(entries), num_styles)
        styles = [_style(i, entry) for i, entry in enumerate(entries)]
        check_styles(styles, num_styles)
    recipe = _from_json("dmm.recipe", rest.pop("dmm.recipe", "{}"), dict)
    prediction = rest.pop("dmm.prediction", None)
    if prediction not in ("eps", "v", None):
        raise ValueError(f"metadata 'dmm.prediction' is {prediction[:40]!r}, expected 'eps' or 'v'")
    return styles, recipe, prediction, rest


def write_metadata(
    styles: Sequence[StyleInfo],
    recipe: Mapping[str, Any],
    prediction: str,
    *,
    rest: Mapping[str, str],
    config: UNetConfig,
    title: str,
) -> dict[str, str]:
    """A file's metadata: ``rest`` as it is, the ``dmm.*`` keys, and the ``modelspec.*`` keys that ``rest`` lacks.

    Raises ValueError for what cannot be stored: a value that is not a string, NaN in JSON.
    """
    for key, value in rest.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata {key!r} is {type(value).__name__}: safetensors stores strings only")
    metadata = {**_modelspec(styles, prediction, config, title), **rest}
    for key in _STALE_HASHES:  # they are digests of the weights that the metadata came with
        metadata.pop(key, None)
    # Both spellings in use: the specification's, and the one that ComfyUI writes.
    metadata["modelspec.prediction_type"] = metadata["modelspec.predict_key"] = "v" if prediction == "v" else "epsilon"
    metadata["dmm.format"] = "3" if config.num_heads else "2" if config.bank else "1"
    metadata["dmm.prediction"] = prediction
    if styles:
        entries = [{k: v for k, v in asdict(style).items() if v} for style in styles]
        metadata[STYLES] = _to_json(STYLES, entries)
    if recipe:
        metadata["dmm.recipe"] = _to_json("dmm.recipe", recipe)
    return metadata


def modelspec_prediction(metadata: Mapping[str, str]) -> str | None:
    """The prediction by the community's ``modelspec.*`` keys: "eps", "v", or None where they do not say."""
    said = metadata.get("modelspec.prediction_type", metadata.get("modelspec.predict_key", "")).lower()
    if said in ("v", "v_prediction", "v-prediction") or metadata.get("modelspec.architecture", "").endswith("-768-v"):
        return "v"
    return "eps" if said in ("epsilon", "eps") else None


def trainer_prediction(metadata: Mapping[str, str]) -> str | None:
    """The prediction by kohya's ``ss_v_parameterization`` ("True" or "False"): "eps", "v", or None where it is not there."""
    said = {"true": "v", "false": "eps"}
    return said.get(metadata.get("ss_v_parameterization", "").strip().lower())


def said_clip_skip(metadata: Mapping[str, str]) -> int | None:
    """The clip skip by what trainers write (``modelspec.encoder_layer``, ``ss_clip_skip``); None where they say nothing, or 1, which they
    write for SDXL too, whatever it reads."""
    for key in ("modelspec.encoder_layer", "ss_clip_skip"):
        said = metadata.get(key, "").strip()
        if re.fullmatch(r"[1-9][0-9]?", said) and int(said) > 1:
            return int(said)
    return None


def architecture(config: UNetConfig, prediction: str) -> tuple[str, str | None]:
    """The ``modelspec.architecture`` of a UNet, and its base resolution "WxH", or None for sizes of its own."""
    v2 = ("stable-diffusion-v2-768-v", "768x768") if prediction == "v" else ("stable-diffusion-v2-512", "512x512")
    known = {
        (320, 768, 0, 4): ("stable-diffusion-v1", "512x512"),
        (320, 768, 0, 9): ("stable-diffusion-v1-inpainting", "512x512"),
        (320, 1024, 0, 4): v2,
        (320, 1024, 0, 9): ("stable-diffusion-v2-inpainting", "512x512"),
        (320, 2048, 2816, 4): ("stable-diffusion-xl-v1-base", "1024x1024"),
        (384, 1280, 2560, 4): ("stable-diffusion-xl-v1-refiner", "1024x1024"),
    }
    sizes = (config.model_channels, config.context_dim, config.adm_channels, config.in_channels)
    return known.get(sizes, ("stable-diffusion-custom", None))


def _modelspec(styles: Sequence[StyleInfo], prediction: str, config: UNetConfig, title: str) -> dict[str, str]:
    """Stability AI's Model Metadata Standard 1.0.0: its mandatory keys, the date, the teachers as ``merged_from``."""
    name, resolution = architecture(config, prediction)
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": name,
        "implementation": "sgm",
        "title": title,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "resolution": resolution,
        "merged_from": ", ".join(style.teacher for style in styles if style.teacher),
    }
    return {f"modelspec.{key}": value for key, value in spec.items() if value}


def _style(index: int, entry: Any) -> StyleInfo:
    if not isinstance(entry, dict) or "name" not in entry:
        raise ValueError(f"metadata 'dmm.styles': entry {index} is not a style with a name: the file is damaged")
    known = {f.name for f in fields(StyleInfo)}  # a field that a later version added is not an error
    try:
        return StyleInfo(**{k: v for k, v in entry.items() if k in known})
    except ValueError as error:
        raise ValueError(f"metadata 'dmm.styles': entry {index}: {error}") from error


def _check_text(key: str, value: Any, breaks: bool) -> None:
    if not isinstance(value, str):
        raise ValueError(f"a style's {key} is {type(value).__name__}, expected text")
    if len(value) > LONGEST[key]:
        raise ValueError(
            f"a style's {key} has {len(value)} characters, at most {LONGEST[key]} are allowed: '{value[:40]}...'"
        )
    # Control characters and lone surrogates break terminals, menus and UTF-8.
    bad = [c for c in value if unicodedata.category(c) in ("Cc", "Cs") and not (breaks and c in _LINE_BREAKS)]
    if bad:
        raise ValueError(f"a style's {key} holds the control character {bad[0]!r}: remove it")


def _from_json(key: str, text: str, expected: type) -> Any:
    """The value of a metadata entry. Raises ValueError naming its key for what is no JSON, too large or of another
    type."""
    try:
        _check_size(text)
        # NaN and infinity, which Python reads and JSON does not have, could not be written again.
        value = json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata '{key}' is not valid JSON ({error}): the file is damaged, get it again") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for v in level if isinstance(v, (dict, list)) for child in _children(v)]
    if level:
        raise ValueError(f"metadata '{key}' is nested deeper than {MAX_DEPTH} levels: the file is damaged")
    if not isinstance(value, expected):
        raise ValueError(f"metadata '{key}' is a JSON {type(value).__name__}, expected a {expected.__name__}")
    return value


def _check_size(text: str) -> None:
    if sum(map(text.count, ",[{")) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _children(value: dict | list) -> Iterable:
    return value.values() if isinstance(value, dict) else value


def _to_json(key: str, value: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
        _check_size(text)
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{key} cannot be written as JSON: {error}") from error
