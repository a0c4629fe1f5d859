"""Aspect-ratio buckets: the few sizes that a folder of pictures is resized to, so that batches can be of one size."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageOps

from ...dmm_core.unet import UNetConfig

MAX_ASPECT = 3.0
"""The longest bucket's long side over its short one."""


def size_multiple(config: UNetConfig) -> int:
    """Pixels that width and height must be multiples of: the VAE's 8 times 2 for each halving in the UNet; 64 for every
    SD model.

    SDXL halves less often than SD1.x, but its own buckets are multiples of 64 all the same.
    """
    return 64 if config.model_channels >= 320 else 8 * 2 ** (len(config.channel_mult) - 1)


def default_resolution(config: UNetConfig, prediction: str) -> int:
    """Pixels a side that a family of models was trained at."""
    if config.model_channels < 320:
        return 128
    if config.adm_channels:
        return 1024
    return 768 if prediction == "v" and config.context_dim == 1024 else 512  # SD1.x that was taught v stays at 512


def bucket_sizes(resolution: int, multiple: int, max_aspect: float = MAX_ASPECT) -> list[tuple[int, int]]:
    """(width, height) in pixels, both multiples of ``multiple``, about ``resolution``^2 in area, from tall to wide.

    For each short side from the square's down, the long side that comes nearest to the area. max_aspect 1 leaves the
    square. Raises ValueError for a resolution that is no multiple, and for an aspect below 1.
    """
    if resolution < multiple or resolution % multiple:
        raise ValueError(f"resolution is {resolution}: for these models it must be a multiple of {multiple}")
    if not max_aspect >= 1:
        raise ValueError(f"the largest aspect is {max_aspect}: expected 1 (squares only) or more")
    sizes = {(resolution, resolution)}
    for short in range(multiple, resolution, multiple):
        long = multiple * round(resolution**2 / short / multiple)
        if long <= max_aspect * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def kept_share(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """The share of a picture (width, height) that is left after it was cropped to a bucket's shape; 1 is all of it."""
    a, b = size[0] * bucket[1], size[1] * bucket[0]
    return min(a, b) / max(a, b)


def choose_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket that crops least of a picture of this size; of equals, the larger one."""
    return max(buckets, key=lambda bucket: (kept_share(size, bucket), bucket[0] * bucket[1]))


def enlargement(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """The factor by which a picture must be enlarged to cover the bucket; below 1 it is made smaller."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def fit(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """The picture in the bucket's size: the largest centred part of that shape, resampled (Lanczos).

    The crop comes first: resizing a picture of 1 x 10000 pixels to cover a bucket would fill the memory.
    """
    return ImageOps.fit(image, bucket, Image.Resampling.LANCZOS)
