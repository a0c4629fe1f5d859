"""How a style gets into the host's own UNet: an emb_patch and wrappers, installed once by the loader.

Song et al., arXiv:2504.12364, Sec. 3.2: ``emb = time_embed(t) + MLP(sum_i w_i e_i)``.

A style travels as a value in names (``dmm_core.style_value``): on a CONDITIONING, else as the MODEL's own. Before each call of
the UNet it becomes style rows (B, N+1) for the noise level at hand. Nothing is kept on the shared model, so any number of
differently styled clones of one model can be used in one workflow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import comfy.conds
from comfy.patcher_extension import WrappersMP
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..dmm_core.style import CODEBOOK, MLP_NAMES, style_delta
from ..dmm_core.style_value import NONE, Style, Vocabulary, progress_at, style_rows
from . import style_map
from .style_map import MAP, MAP_ROWS, Blender, StyleMap

STYLE = "dmm_style"
"""Where a Style is: in a CONDITIONING's entries; a ModelStyle: in a MODEL's transformer options; rows: in ``model_conds``."""
DELTA = "dmm_delta"
KEY = "dmm"


@dataclass(frozen=True, eq=False)
class ModelStyle:
    """The styles that a MODEL knows, by name, and the one it paints with."""

    known: Vocabulary
    style: Style = NONE


def install(patcher, known: Vocabulary) -> None:
    """Put patch and wrappers on a fresh MODEL whose UNet holds the style modules; it paints with no style."""
    patcher.set_model_emb_patch(add_delta)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, check_styles)
    patcher.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, fill_conditionings)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, compute_delta)
    patcher.model_options["transformer_options"][STYLE] = ModelStyle(known)


def set_style(patcher, style: Style) -> None:
    """Make ``style`` the style of this MODEL instead of the one it had. Raises ValueError for names it does not know."""
    options = patcher.model_options["transformer_options"]
    known = options[STYLE].known
    style.check(known)
    options[STYLE] = ModelStyle(known, style)


def set_known(patcher, known: Vocabulary) -> None:
    """Change the styles that this MODEL knows by name."""
    options = patcher.model_options["transformer_options"]
    options[STYLE] = ModelStyle(known, options[STYLE].style)


def check_styles(executor, noise, *args, **kwargs):
    """OUTER_SAMPLE wrapper: styles that this MODEL does not know are named before the first step; maps get their size."""
    guider = executor.class_obj
    known = guider.model_options["transformer_options"][STYLE].known
    height, width = noise.shape[-2:]
    for conds in guider.conds.values():
        for i, c in enumerate(conds):
            styles = c[MAP].styles if MAP in c else [c.get(STYLE, NONE)]
            for style in styles:
                style.check(known)
            if MAP in c:  # a new dict: the guider's shares its values with the CONDITIONING that the host has cached
                shares = comfy.conds.CONDNoiseShape(c[MAP].shares(height, width))
                conds[i] = {**c, "model_conds": {**c["model_conds"], MAP: shares}}
    if any(MAP in c for conds in guider.conds.values() for c in conds):
        style_map.install(guider.model_options)
    return executor(noise, *args, **kwargs)


def fill_conditionings(executor, x, timestep, *args, **kwargs):
    """PREDICT_NOISE wrapper: give every conditioning the style rows for this noise level.

    All get some: conditionings are batched into one forward only if they have the same kinds of entries.
    """
    guider = executor.class_obj
    default = guider.model_options["transformer_options"][STYLE]
    now = progress(guider.inner_model, timestep)
    made = {}

    def rows(style: Style | StyleMap) -> comfy.conds.CONDRegular:
        if id(style) not in made:
            of = style.rows if isinstance(style, StyleMap) else functools.partial(style_rows, style)
            made[id(style)] = comfy.conds.CONDRegular(of(default.known, now, len(x)).to(x.device))
        return made[id(style)]

    def filled(c: dict) -> dict:
        own = {MAP_ROWS: rows(c[MAP]), STYLE: rows(NONE)} if MAP in c else {STYLE: rows(c.get(STYLE, default.style))}
        return {**c, "model_conds": {**c["model_conds"], **own}}

    guider.conds = {name: [filled(c) for c in conds] for name, conds in guider.conds.items()}
    return executor(x, timestep, *args, **kwargs)


def progress(model, sigma: Tensor) -> float:
    """Noise level -> 0 at t = 999 .. 1 at t = 0: the inverse of the host's ``percent_to_sigma``."""
    return progress_at(float(model.model_sampling.timestep(sigma[:1])))


def compute_delta(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    """APPLY_MODEL wrapper: style rows -> time-embedding offsets, left where ``add_delta`` finds them.

    The offset is always there (zero for no style): a compiled UNet must meet the same options on every call.
    """
    rows = kwargs.pop(STYLE, None)
    if rows is None:  # a conditioning that never passed through the guider, as PerpNeg's empty one
        default = transformer_options[STYLE]
        chunks = len(transformer_options["cond_or_uncond"])
        now = progress(executor.class_obj, transformer_options["sigmas"])
        rows = style_rows(default.style, default.known, now, x.shape[0] // chunks)
        rows = repeat_to_batch_size(rows, x.shape[0] // chunks).repeat(chunks, 1)
    unet = executor.class_obj.diffusion_model
    mlp = next(getattr(unet, name) for name in MLP_NAMES if hasattr(unet, name))
    shares, map_rows = kwargs.pop(MAP, None), kwargs.pop(MAP_ROWS, None)

    def delta(rows: Tensor) -> Tensor:  # (rows, N+1) -> (rows, D)
        return style_delta(getattr(unet, CODEBOOK), mlp, rows.to(x.device))

    options = {**transformer_options, DELTA: delta(rows)}
    if shares is not None:
        deltas = delta(map_rows.flatten(0, 1)).unflatten(0, map_rows.shape[:2])  # (rows, K, N+1) -> (rows, K, D)
        options[MAP] = Blender(deltas, shares.to(x.device))
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def add_delta(emb: Tensor, model_channels: int, transformer_options: dict) -> Tensor:
    """emb_patch: the style's offset onto the time embedding (rows, D)."""
    delta: Tensor | None = transformer_options.get(DELTA)
    if delta is None:  # apply_model called outside of sampling, where the host runs no wrappers
        return emb
    return emb + delta.to(emb.dtype)
