"""How a style gets into the host's own UNet: one emb_patch and two wrappers, installed once by the loader.

Song et al., arXiv:2504.12364, Sec. 3.2: ``emb = time_embed(t) + MLP(sum_i w_i e_i)``.

A style travels as style rows (B, N+1) (see ``dmm_core.style``): on a CONDITIONING as ``model_conds["dmm_style"]``, else
as the MODEL's own row in ``transformer_options["dmm_style"]``. The conditioning's rows win. Nothing is kept on the
shared model, so any number of differently styled clones of one model can be used in one workflow.
"""

from __future__ import annotations

import comfy.conds
from comfy.patcher_extension import WrappersMP
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..dmm_core.style import CODEBOOK, MLP_NAMES, style_delta

STYLE = "dmm_style"
DELTA = "dmm_delta"
KEY = "dmm"


def install(patcher, row: Tensor) -> None:
    """Put patch and wrappers on a fresh MODEL whose UNet holds the style modules; ``row`` (1, N+1) is its style."""
    patcher.set_model_emb_patch(add_delta)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, fill_conditionings)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, compute_delta)
    set_style(patcher, row)


def set_style(patcher, rows: Tensor) -> None:
    """Make ``rows`` (B, N+1), one per latent or one for all, the style of this MODEL instead of the one it had."""
    patcher.model_options["transformer_options"][STYLE] = rows


def fill_conditionings(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper: give every conditioning without a style the MODEL's.

    Conditionings are batched into one forward only if they all have the same kinds of entries.
    """
    guider = executor.class_obj
    rows = guider.model_options["transformer_options"][STYLE]
    # New dicts: convert_cond leaves model_conds shared with the CONDITIONING that the host has cached.
    guider.conds = {
        name: [{**c, "model_conds": {STYLE: comfy.conds.CONDRegular(rows), **c["model_conds"]}} for c in conds]
        for name, conds in guider.conds.items()
    }
    return executor(*args, **kwargs)


def compute_delta(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    """APPLY_MODEL wrapper: style rows -> time-embedding offsets, left where ``add_delta`` finds them.

    The offset is always there (zero for no style): a compiled UNet must meet the same options on every call.
    """
    rows = kwargs.pop(STYLE, None)
    if rows is None:  # a conditioning that never passed through the guider, as PerpNeg's empty one
        chunks = len(transformer_options["cond_or_uncond"])
        rows = repeat_to_batch_size(transformer_options[STYLE], x.shape[0] // chunks).repeat(chunks, 1)
    unet = executor.class_obj.diffusion_model
    mlp = next(getattr(unet, name) for name in MLP_NAMES if hasattr(unet, name))
    delta = style_delta(getattr(unet, CODEBOOK), mlp, rows.to(x.device))  # (rows, N+1) -> (rows, D)
    options = {**transformer_options, DELTA: delta}
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def add_delta(emb: Tensor, model_channels: int, transformer_options: dict) -> Tensor:
    """emb_patch: the style's offset onto the time embedding (rows, D)."""
    delta: Tensor | None = transformer_options.get(DELTA)
    if delta is None:  # apply_model called outside of sampling, where the host runs no wrappers
        return emb
    return emb + delta.to(emb.dtype)
