"""Boxes that paint less than they seem to: mostly off the canvas, or thinner than a latent or two."""

from __future__ import annotations

from .regions import Box

THIN = 2
"""Latents: a box that is thinner has no room for its prompt, and the soft edge takes what is left."""
LATENT = 8
"""Pixels of a latent's side."""
USUAL = 512
"""Pixels: the shorter side of a canvas whose size is not known yet."""


def box_warnings(name: str, box: Box, size: tuple[int, int] | None = None) -> list[str]:
    """What to look at about a box, in words; none for a sound one.

    size: (height, width) of the canvas in pixels; None when it is not known, and then the words say from which size on a thin box is
    thick enough.
    """
    found = []
    if box.inside < 0.5:
        found.append(f"{name}: {1 - box.inside:.0%} of the box lies outside of the canvas, and is not painted")
    height, width = size or (USUAL, USUAL)
    for side, share, pixels in (("wide", box.width, width), ("high", box.height, height)):
        latents = share * pixels / LATENT
        if latents >= THIN:
            continue
        if size is None:
            why = f"under {THIN} latents on canvases up to {THIN * LATENT / share:.0f} pixels {side}"
        else:
            why = f"{latents:.2g} latents of a canvas {pixels} pixels {side}"
        found.append(f"{name}: the box is {share:.3g} {side}, {why}: too thin to show much")
    return found
