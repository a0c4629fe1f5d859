"""How a style gets into the host's own UNet: an emb_patch and wrappers, installed once by the loader.

Song et al., arXiv:2504.12364, Sec. 3.2: ``emb = time_embed(t) + MLP(sum_i w_i e_i)``.

A style travels as a value in names (``dmm_core.style_value``): on a CONDITIONING, else as the MODEL's own. Before each call of
the UNet it becomes style rows (B, N+1) for the noise level at hand. Nothing is kept on the shared model, so any number of
differently styled clones of one model can be used in one workflow.

Codebook, MLP and bank are part of the UNet of a DMM file. Those of an add-on (``added_styles``) are a model of their own beside the MODEL,
which the host loads and offloads with it; the hooks of their bank are on the UNet's layers during a call of the UNet and no longer. (The
host's injections would stay there while the model is loaded, between the calls.)
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import comfy.conds
import torch
from comfy.patcher_extension import WrappersMP
from comfy.utils import repeat_to_batch_size
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..dmm_core.bank import BANK, PixelMasses, StyleBank, bank_masses
from ..dmm_core.style import CODEBOOK, MLP_NAMES, style_delta
from ..dmm_core.style_value import NONE, Style, Vocabulary, progress_at, style_rows
from . import style_map
from .once import LastingShares, Made, OfSampling
from .style_map import MAP, MAP_ROWS, Blender, StyleMap

STYLE = "dmm_style"
"""Where a Style is: in a CONDITIONING's entries, later in ``model_conds``, and rows there; in a MODEL's options a ModelStyle."""
ONCE = "dmm_once"
"""In the options of one sampling: its ``OfSampling``."""
IDLE = "dmm_idle"
"""In the options of one sampling: whether the bank has nothing to add in this step, as all styles are the one in the weights."""
DELTA = "dmm_delta"
AGAIN = "dmm_again"
"""Of a style bank, while a LoRA is trained: ends ``bank_in_backward``."""
KEY = "dmm"
"""Of our wrappers, and of the styles beside a MODEL among its additional models."""


@dataclass(frozen=True)
class Folded:
    """The style that is in a MODEL's weights, and what the cores count there (K)."""

    style: Style
    masses: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ModelStyle:
    """The styles that a MODEL knows, by name, the one it paints with, and the one that is in its weights already."""

    known: Vocabulary
    style: Style = NONE
    folded: Folded | None = None


class AddedStyles(torch.nn.Module):
    """Codebook, MLP and bank of an add-on, under the names that they have in a UNet. mark: a name that no other has."""

    def __init__(self):
        super().__init__()
        self.mark = f"dmm_added_{uuid.uuid4().hex}"
        self._hooks = (None, [])

    def attach(self, unet: torch.nn.Module) -> list[RemovableHandle]:
        """Let the layers of a UNet add their part of the bank until the handles are removed: 0.6 ms for SD1.5, on one thread of a CPU."""
        if self._hooks[0] is not unet:  # to search the layers takes ten times as long
            self._hooks = (unet, self.style_bank.hooks(unet))  # in a tuple, and so no submodule
        return [layer.register_forward_hook(hook) for layer, hook in self._hooks[1]]


def added_styles(patcher) -> AddedStyles | None:
    """The style modules beside a MODEL; None where they are part of its UNet, or there are none."""
    return next((one.model for one in patcher.get_additional_models_with_key(KEY)), None)


def style_modules(model) -> torch.nn.Module | None:
    """What has codebook, MLP and bank as submodules for a BaseModel that is sampling: its UNet, or an add-on. None for a plain one."""
    if hasattr(model.diffusion_model, CODEBOOK):
        return model.diffusion_model
    return None if model.current_patcher is None else added_styles(model.current_patcher)


def install(patcher, known: Vocabulary) -> None:
    """Put patch and wrappers on a fresh MODEL that has style modules; it paints with no style."""
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
    options[STYLE] = replace(options[STYLE], style=style)


def chosen_style(patcher) -> Style:
    """The style that this MODEL paints with."""
    return patcher.model_options["transformer_options"][STYLE].style


def set_known(patcher, known: Vocabulary) -> None:
    """Change the styles that this MODEL knows by name."""
    options = patcher.model_options["transformer_options"]
    options[STYLE] = replace(options[STYLE], known=known)


def known_styles(patcher) -> Vocabulary:
    """The styles that this MODEL knows by name."""
    return patcher.model_options["transformer_options"][STYLE].known


def has_styles(patcher) -> bool:
    """Whether this MODEL has styles at all."""
    return STYLE in patcher.model_options["transformer_options"]


def set_folded(patcher, folded: Folded | None) -> None:
    """Say which style is in the weights of this MODEL, so that its bank adds what the others differ by."""
    options = patcher.model_options["transformer_options"]
    options[STYLE] = replace(options[STYLE], folded=folded)


def folded_of(patcher) -> Folded | None:
    """The style that is in the weights of this MODEL."""
    return patcher.model_options["transformer_options"][STYLE].folded


def check_styles(executor, noise, *args, **kwargs):
    """OUTER_SAMPLE wrapper: styles that this MODEL does not know are named before the first step; maps get their size.

    Styles move into ``model_conds``: the host's copies of a prompt for the areas of the other prompts keep those, and not the rest.
    """
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # a copy for this sampling
    options[ONCE] = OfSampling()
    known = options[STYLE].known
    height, width = noise.shape[-2:]
    for conds in guider.conds.values():
        for i, c in enumerate(conds):
            style = c.get(MAP, c.get(STYLE))
            if style is None:
                continue
            for one in style.styles if isinstance(style, StyleMap) else [style]:
                one.check(known)
            own = {STYLE: comfy.conds.CONDConstant(style)}
            if isinstance(style, StyleMap):
                own[MAP] = LastingShares(style.shares(height, width))
            # A new dict: the guider's shares its values with the CONDITIONING that the host has cached.
            conds[i] = {**c, "model_conds": {**c["model_conds"], **own}}
    if any(MAP in c for conds in guider.conds.values() for c in conds):
        style_map.install(guider.model_options)
    return executor(noise, *args, **kwargs)


def fill_conditionings(executor, x, timestep, model_options={}, seed=None):  # noqa: B006, as the host has it
    """PREDICT_NOISE wrapper: give every conditioning the style rows for this noise level.

    All get some: conditionings are batched into one forward only if they have the same kinds of entries.
    """
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    default, once = options[STYLE], options[ONCE]
    in_step = {}

    def rows(style: Style | StyleMap) -> comfy.conds.CONDRegular:
        key = (style, len(x))
        if key not in in_step:
            in_step[key] = rows_now(style, key)
        return in_step[key]

    def rows_now(style: Style | StyleMap, key) -> comfy.conds.CONDRegular:
        if not style.changes and key in once.rows:
            return once.rows[key][1]
        # On a GPU to ask for the noise level is to wait for the step before.
        now = progress(guider.inner_model, timestep) if style.changes else 0.0
        return once.entry(key, rows_of(style, default.known, now, len(x)), x.device)

    def style_of(c: dict) -> Style | StyleMap:
        held = c["model_conds"]
        return held[STYLE].cond if STYLE in held else default.style

    def filled(c: dict) -> dict:
        held, style = c["model_conds"], style_of(c)
        own = {MAP_ROWS: rows(style), STYLE: rows(NONE)} if MAP in held else {STYLE: rows(style)}
        return {**c, "model_conds": {**held, **own}}

    folded = default.folded
    idle = folded is not None and all(style_of(c) == folded.style for conds in guider.conds.values() for c in conds)
    now = model_options.get("transformer_options", {})  # another copy of the guider's
    model_options = {**model_options, "transformer_options": {**now, IDLE: idle}}
    styles = guider.conds
    guider.conds = {name: [filled(c) for c in conds] for name, conds in styles.items()}
    try:
        return executor(x, timestep, model_options, seed)
    finally:
        guider.conds = styles


def rows_of(style: Style | StyleMap, known: Vocabulary, now: float, batch: int) -> Tensor:
    """Style rows (batch or 1, N+1), for a map (batch or 1, K, N+1)."""
    return style.rows(known, now, batch) if isinstance(style, StyleMap) else style_rows(style, known, now, batch)


def progress(model, sigma: Tensor) -> float:
    """Noise level -> 0 at t = 999 .. 1 at t = 0: the inverse of the host's ``percent_to_sigma``."""
    return progress_at(float(model.model_sampling.timestep(sigma[:1])))


def compute_delta(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006, as the host has it; it is not written to
    """APPLY_MODEL wrapper: style rows -> time-embedding offsets, left where ``add_delta`` finds them.

    The offset is always there (zero for no style): a compiled UNet must meet the same options on every call.
    """
    modules = style_modules(executor.class_obj)
    rows, shares, map_rows = (kwargs.pop(key, None) for key in (STYLE, MAP, MAP_ROWS))
    if modules is None:  # another MODEL that a guider paints with, as DualModelGuider's
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    idle = transformer_options.get(IDLE, False) and isinstance(rows, Tensor)
    if not isinstance(rows, Tensor):  # a conditioning that the guider never sees, as PerpNeg's empty one
        default = transformer_options[STYLE]
        chunks = len(transformer_options["cond_or_uncond"])
        now = progress(executor.class_obj, transformer_options["sigmas"])
        batch = x.shape[0] // chunks
        rows = rows_of(default.style if rows is None else rows, default.known, now, batch)
        rows = torch.cat([repeat_to_batch_size(rows, batch)] * chunks)
        if shares is not None:
            rows, map_rows = torch.zeros_like(rows[:, 0]), rows
    mlp = next(getattr(modules, name) for name in MLP_NAMES if hasattr(modules, name))

    once = what_lasts(executor.class_obj, transformer_options)

    def delta(rows: Tensor) -> Tensor:  # (..., N+1) -> (..., D)
        def make() -> Tensor:
            flat = rows.to(x.device).flatten(0, -2)
            return style_delta(getattr(modules, CODEBOOK), mlp, flat).unflatten(0, rows.shape[:-1])

        return once(rows, (DELTA, modules, x.device), make)

    options = {**transformer_options, DELTA: delta(rows)}
    bank: StyleBank | None = getattr(modules, BANK, None)
    if shares is not None:
        by_size = once(shares, (MAP, x.device), lambda: {tuple(shares.shape[-2:]): shares.to(x.device)})
        options[MAP] = Blender(delta(map_rows), by_size)
        # The UNet ignores it, and a compiled one sees by it that another graph is due: the host drops guards on the options.
        kwargs[MAP] = shares
    unet = executor.class_obj.diffusion_model
    if isinstance(modules, AddedStyles):
        kwargs[modules.mark] = True  # as with MAP: a compiled UNet does not see patches and hooks come and go
    if bank is None or idle:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    folded = transformer_options[STYLE].folded
    blender = options.get(MAP)
    if blender is None:
        masses = once(
            rows, (BANK, bank, folded, x.device), lambda: masses_of(bank, rows.to(x.device), None, None, folded)
        )
    else:
        masses = masses_of(bank, rows.to(x.device), map_rows, blender, folded)
    with bank_in_force(modules, unet, masses):
        out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    if out.requires_grad:  # a LoRA is being trained
        out.register_hook(lambda _: bank_in_backward(modules, unet, masses))
    return out


def what_lasts(model, transformer_options: dict) -> Callable[[Tensor, Hashable, Callable[[], Made]], Made]:
    """``OfSampling.once`` of the sampling in which a BaseModel is called; without a sampling, and where the weights of the styles may be
    others in the next step, what computes anew each time: under the host's hooks, and while a LoRA is trained."""
    once: OfSampling | None = transformer_options.get(ONCE)
    hooks = None if model.current_patcher is None else model.current_patcher.current_hooks
    if once is None or hooks is not None or torch.is_grad_enabled():
        return lambda source, what, make: make()
    return once.once


@contextmanager
def bank_in_force(modules: torch.nn.Module, unet: torch.nn.Module, masses: Tensor | PixelMasses) -> Iterator[None]:
    """Inside the block the layers of a UNet add their part of the bank. modules: as of ``style_modules``."""
    handles = modules.attach(unet) if isinstance(modules, AddedStyles) else []
    modules.style_bank.masses = masses
    try:
        yield
    finally:
        modules.style_bank.masses = None
        for handle in handles:
            handle.remove()


def bank_in_backward(modules: torch.nn.Module, unet: torch.nn.Module, masses: Tensor | PixelMasses) -> None:
    """As ``bank_in_force`` for the backward pass of one forward, up to its end, or that of another forward: gradient checkpointing computes
    the layers once more. To be called by autograd when it comes to the forward's output: of several, the last comes first."""
    bank = modules.style_bank
    before = vars(bank).get(AGAIN)
    if before is not None:
        before.close()
    vars(bank)[AGAIN] = again = ExitStack()
    again.enter_context(bank_in_force(modules, unet, masses))
    torch.autograd.Variable._execution_engine.queue_callback(again.close)


def masses_of(
    bank: StyleBank, rows: Tensor, map_rows: Tensor | None, blender: Blender | None, folded: Folded | None = None
) -> Tensor | PixelMasses:
    """What the cores of the bank count in each row (rows, K), or with a map of styles at each pixel; less what is in the weights."""
    there = rows.new_tensor(folded.masses) if folded else 0
    if blender is None or map_rows is None:
        return bank_masses(rows, bank.cores) - there
    masses = bank_masses(map_rows.flatten(0, 1).to(rows), bank.cores).unflatten(0, map_rows.shape[:2]) - there
    shares = blender.mean_shares().to(masses)
    return PixelMasses(masses, blender, torch.einsum("bm,bmk->bk", shares, masses))


def add_delta(emb: Tensor, model_channels: int, transformer_options: dict) -> Tensor:
    """emb_patch: the style's offset onto the time embedding (rows, D)."""
    delta: Tensor | None = transformer_options.get(DELTA)
    if delta is None:  # apply_model called outside of sampling, where the host runs no wrappers
        return emb
    return emb + delta.to(emb.dtype)
