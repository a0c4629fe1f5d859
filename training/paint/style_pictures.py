"""A picture of every style of a model, small enough to be its thumbnail."""

from __future__ import annotations

from collections.abc import Sequence

from ..progress import ProgressCallback
from .painter import Painter, Settings
from .thumbnails import thumbnail_uri


def style_thumbnails(
    brush: Painter,
    names: Sequence[str],
    prompt: str,
    *,
    seed: int,
    settings: Settings,
    tick: ProgressCallback | None = None,
) -> dict[str, str]:
    """{style: data URI} for these styles of a model, all of one prompt and one noise. Raises ValueError for names that it does not have."""
    styles = [brush.style(name) for name in names]
    thumbnails = {}
    for done, (name, style) in enumerate(zip(names, styles)):
        if tick:
            tick(done, len(names), "thumbnails")
        thumbnails[name] = thumbnail_uri(brush.pictures(brush.latents([prompt], style, seed, settings))[0])
    if tick:
        tick(len(names), len(names), "thumbnails")
    return thumbnails
