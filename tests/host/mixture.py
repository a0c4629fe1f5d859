"""Regions of any family of models by the host's nodes and KSampler, against Mixture of Diffusers written out with our own UNet."""

from dataclasses import dataclass

import torch
from comfyui_dmm.dmm_core.regions import MOD_VARIANCE, gaussian, tiles
from comfyui_dmm.dmm_core.sampling import cfg_denoiser, host_noise, sigmas_for
from comfyui_dmm.dmm_core.sampling import sample as our_sample
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.sdxl import sdxl_vector
from comfyui_dmm.dmm_core.style import style_row
from torch import Tensor

from .families import NAMES
from .sampling import watch
from .test_regions_host import paint, per_pixel

SIZE = (8, 20)
"""Of the canvas, in latents."""


@dataclass
class Place:
    """Where a prompt counts: a crop (h, w, top, left) in latents or all, weights (height, width), its two prompts and style row."""

    area: tuple | None
    weights: Tensor
    positive: list
    negative: list
    row: Tensor


@torch.no_grad()
def mixture(unet, places: list[Place], prediction: str, zero_snr: bool, cfg=4.0, steps=2, seed=0) -> Tensor:
    """sum w x0 / sum w over the places (arXiv:2302.02412), then CFG, then Euler -> latents (1, 4, *SIZE), scaled.

    SDXL's sizes are those of the whole canvas at every place, as the host tells its areas.
    """
    schedule = NoiseSchedule(zero_snr)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sides = []
        for side in ("positive", "negative"):
            total, norm = torch.zeros_like(x), torch.zeros_like(x)
            for place in places:
                h, w, top, left = place.area or (*SIZE, 0, 0)
                window = (..., slice(top, top + h), slice(left, left + w))
                context, entries = getattr(place, side)[0]
                y = None
                if unet.config.adm_channels:
                    y = sdxl_vector(entries["pooled_output"], *(8 * n for n in SIZE))
                one = cfg_denoiser(unet, schedule, context, style=place.row, y=y, prediction=prediction)
                total[window] += one(x[window].contiguous(), sigma) * place.weights[window[1:]]
                norm[window] += place.weights[window[1:]]
            sides.append(total / norm)
        return sides[1] + cfg * (sides[0] - sides[1])

    noise = host_noise((1, unet.config.in_channels, *SIZE), seed)
    return our_sample(denoise, schedule, noise, sigmas_for(schedule, steps, "normal"), sampler="euler")


def check_regions(model, unet, prompts: list, scale: float, prediction: str, zero_snr: bool = False) -> None:
    """Style Mix in both modes and Style Panorama; prompts: four CONDITIONINGs; scale: of the family's latents."""
    from comfyui_dmm.nodes.regions import DMMRegion, StyleMix, StylePanorama

    rows = [style_row(unet.config.num_styles, i) for i in range(2)]
    positive, negative, own, own_negative = prompts
    left = DMMRegion.execute(NAMES[0], 0, 0, 0.4, 1, "feather", 0, positive=own, negative=own_negative)[0]
    rest = DMMRegion.execute(NAMES[1], 0, 0, 1, 1, "feather", 0)[0]

    cover = torch.zeros(SIZE)
    cover[:, :8] = 1
    places = [
        Place((8, 8, 0, 0), cover, own, own_negative, rows[0]),
        Place(None, 1 - cover, positive, negative, rows[1]),
    ]
    mixed = StyleMix.execute(model, positive, negative, NAMES[1], "own prompts", {"left": left}).args
    assert_same(scale * paint(model, mixed, *SIZE), mixture(unet, places, prediction, zero_snr), zero_snr)

    places = []
    for areas in tiles(*SIZE, 8, 8, overlap=0.5):
        for i, area in enumerate(areas):
            part = (own, own_negative, rows[0]) if i < len(areas) / 2 else (positive, negative, rows[1])
            places.append(Place(area, gaussian(area, *SIZE, MOD_VARIANCE).float(), *part))
    parts = {"left": left, "right": rest}
    panorama = StylePanorama.execute(model, positive, negative, 64, 64, 0.5, parts).args
    assert_same(scale * paint(model, panorama, *SIZE), mixture(unet, places, prediction, zero_snr), zero_snr)

    halves = [DMMRegion.execute(NAMES[i], 0.5 * i, 0, 0.5, 1, "feather", 0)[0] for i in range(2)]
    one_pass = StyleMix.execute(model, positive, negative, NAMES[0], "one pass", dict(zip("ab", halves))).args
    with watch(model) as calls:
        paint(model, one_pass, *SIZE)
    assert len(calls) == 2  # one forward a step
    for call in calls:
        assert_same(call.out, per_pixel(unet, call, rows))


def assert_same(host: Tensor, ours: Tensor, zero_snr: bool = False) -> None:
    """To 2e-4 of the largest value; 3e-3 where float32 steps down from sigma 4518 (seen: 1.2e-3)."""
    close = 3e-3 if zero_snr else 2e-4
    torch.testing.assert_close(host, ours, rtol=0, atol=close * ours.abs().max().item())
