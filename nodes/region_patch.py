"""Regions while sampling: what each prompt's place means on the canvas at hand, in the host's own areas and masks.

A CONDITIONING's entry says where it counts under PLACE (``dmm_core.regions``), in fractions of any canvas. An OUTER_SAMPLE
wrapper, installed by the loader, turns that into the host's "area" and "mask" when the size of the canvas is known, so one graph
serves every size and both passes of a hires fix. Everything after that is the host's own work: batching, ControlNet, hooks.
"""

from __future__ import annotations

import logging

import comfy.utils
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..dmm_core.region_check import box_warnings
from .style_patch import STYLE

log = logging.getLogger(__name__)
PLACE = "dmm_place"
KEY = "dmm_regions"


def install(patcher) -> None:
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, place_conditionings)


def warn_of_thin_boxes(guider, height: int, width: int) -> None:
    """Say in the log which boxes are thinner than a latent or two on this canvas: only here is its size known."""
    places = {id(c[PLACE]): c for conds in guider.conds.values() for c in conds or [] if PLACE in c}
    for c in places.values():
        box = getattr(c[PLACE], "box", None)
        if box is not None:
            for line in box_warnings(f"the region in style '{c[STYLE]}'", box, (8 * height, 8 * width)):
                log.warning(line)


def place_conditionings(executor, noise, *args, **kwargs):
    """OUTER_SAMPLE wrapper. Raises ValueError for places that the canvas has no room for."""
    guider = executor.class_obj
    height, width = noise.shape[-2:]
    warn_of_thin_boxes(guider, height, width)
    hints = CroppedHints()
    # New dicts: those of the guider share their values with the CONDITIONING that the host has cached.
    guider.conds = {
        name: [placed for c in conds for placed in place(c, height, width, hints)]
        for name, conds in guider.conds.items()
    }
    return executor(noise, *args, **kwargs)


def place(c: dict, height: int, width: int, hints: CroppedHints) -> list[dict]:
    """One entry -> as many as it has places on a canvas of height x width latents.

    A mask of its own narrows a place, an area of its own one that takes the whole canvas. Raises ValueError for an area of its own
    where the place is a crop: an entry has room for one.
    """
    if PLACE not in c:
        return [c]
    entries, mask = [], own_mask(c, height, width)
    for area, weights in c[PLACE].placed(height, width):
        entry = {**c, "mask": weights * mask}
        entry.pop(PLACE)
        if area is not None:
            if "area" in c:
                h, w, top, left = (8 * n for n in area)
                raise ValueError(
                    f"the prompt of the region in style '{c[STYLE]}' ({w} x {h} pixels at {left}, {top}) has an area of its own, "
                    "as from Conditioning (Set Area): remove that, a Style Region's box or a panorama's tile says where a prompt "
                    "counts, or set the region's paint_on to 'whole canvas'"
                )
            entry["area"] = area
            entry.pop("set_area_to_bounds", None)  # the host would move the crop to the bounds of the mask
            if "control" in c:
                entry["control"] = hints.cropped(c["control"], area, height, width)
        entries.append(entry)
    return entries


def own_mask(c: dict, height: int, width: int) -> Tensor | float:
    """The mask that the user's own nodes gave an entry (1 or B, height, width), or 1."""
    if "mask" not in c:
        return 1.0
    mask = c["mask"] if c["mask"].ndim == 3 else c["mask"][None]
    return F.interpolate(mask[:, None].float(), size=(height, width), mode="bilinear")[:, 0]


class CroppedHints:
    """ControlNets and T2I-Adapters whose hint is cut to an area: the host would squeeze the whole hint into it.

    One copy per ControlNet and area: entries share a forward only when they share the object.
    """

    def __init__(self):
        self.copies = {}

    def cropped(self, control, area, height: int, width: int):
        key = (id(control), area)
        if key not in self.copies:
            self.copies[key] = copy = control.copy()
            if copy.cond_hint_original is not None:
                hint = copy.cond_hint_original
                copy.cond_hint_original = crop_hint(hint, area, height, width, control.compression_ratio)
            if control.previous_controlnet is not None:  # which the host's copy leaves behind
                copy.set_previous_controlnet(self.cropped(control.previous_controlnet, area, height, width))
        return self.copies[key]


def crop_hint(hint: Tensor, area, height: int, width: int, ratio: int) -> Tensor:
    """The part of a hint (B, C, H, W) over an area in latents, after fitting it to the canvas as the host does."""
    hint = comfy.utils.common_upscale(hint, width * ratio, height * ratio, "nearest-exact", "center")
    h, w, top, left = (n * ratio for n in area)
    return hint[..., top : top + h, left : left + w]


def with_place(conditioning: list, where) -> list:
    """A CONDITIONING whose entries count only ``where``."""
    for _, entries in conditioning:
        if PLACE in entries:
            raise ValueError("a prompt that is already in a Style Mix cannot be put into another one")
    return [[context, {**entries, PLACE: where}] for context, entries in conditioning]
