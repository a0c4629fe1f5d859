"""Thumbnails of styles, small enough for a file's metadata (with Pillow alone)."""

from __future__ import annotations

import base64
import io

from PIL import Image

SIDE = 256
QUALITY = 85
"""With these even noise has fewer than the 200,000 characters that ``StyleInfo`` takes."""


def thumbnail_uri(picture: Image.Image) -> str:
    """A picture as the JPEG data URI that ``StyleInfo`` takes: at most SIDE pixels a side, transparent parts on
    white."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if small.mode in ("RGBA", "LA"):
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small.convert("RGBA"))
    file = io.BytesIO()
    small.convert("RGB").save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
