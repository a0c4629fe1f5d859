"""Room for one more style in a model: a code, and of a bank a core, biases and directions, all still to be learnt.

    W x + U' C' V' x    with U' = [U U2], V' = [V V2] and C' = [[C, 0], [0, 0]] of the new style

C is a blend of the cores that are there, where a search begins. U2 and V2 are random and of the size of U and V; they add nothing until the
new style's core uses them, and the old cores never do: they are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import BANK, PARTS, bank_key, banked_layers, layer_parts, split_key
from .bank_drop import has_style_rows, without_rows
from .bank_grow import code_offsets, gained, insert, searched_codes
from .style import CODEBOOK

SEED = 17
FAR = 1e-3
"""Weight of its distance from where it began, in codes' sizes, beside the miss."""


def with_room(model: Mapping[str, Tensor], rank: int, start: Sequence[float]) -> dict[str, Tensor]:
    """A UNet's state dict with a style more, in the dtypes that it had.

    start: weights (N,) of the old styles, whose blend the new one begins as. What they lack of 1 is no style, and zeros begin it as that:
    the cores do exactly, the code as far as one can be found for it (``blend_code``). rank: directions that every layer of the bank gains,
    where it has as many left; 0 leaves the basis as it is. Old codes, cores, rows and columns keep every bit.
    """
    styles = model[f"{CODEBOOK}.weight"].shape[0]
    weights = torch.tensor([list(start)], dtype=torch.float32)
    if weights.shape != (1, styles):
        raise ValueError(f"{weights.shape[1]} weights for a model with {styles} styles")
    shares = torch.cat([weights, 1 - weights.sum(1, keepdim=True)], 1)

    def begun(key: str, value: Tensor) -> Tensor:
        """(1, ...), the new row of a weight with one for each style, and in a bank perhaps one for no style."""
        if key == f"{CODEBOOK}.weight":
            return blend_code(model, weights[0])[None].to(value)
        return (shares[:, : len(value)].to(value.device) @ value.float()).to(value.dtype)

    out = {key: insert(v, begun(key, v), styles) if has_style_rows(key) else v for key, v in model.items()}
    g = torch.Generator().manual_seed(SEED)
    for name in banked_layers(model) if rank else ():
        out |= {bank_key(name, part): value for part, value in wider(layer_parts(out, name), rank, g).items()}
    return out


def blend_code(model: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """The code (D,) float32 that is, alone and at strength 1, what a blend with a share of no style is: weights (N,), their sum s at most
    1.

    MLP(code) = s MLP(w / s @ codebook). The mean of the codes has it where s is 1; below, its MLP says too much, as MLP(0) is not 0. So the
    code is looked for (L-BFGS, from that mean), and comes as near as the MLP lets it.
    """
    codes = model[f"{CODEBOOK}.weight"]
    mean, share = weights.to(codes.device) @ codes.float(), float(weights.sum())
    if share > 1 - 1e-4:
        return mean
    offset, begun = code_offsets(model), mean[None].double()
    target = share * offset(begun / share) if share > 0 else torch.zeros_like(begun)
    pull = FAR / codes.double().square().sum(1).mean().clamp_min(1e-12).item()
    return searched_codes(offset, begun, target, pull)[0].float()


def wider(parts: Mapping[str, Tensor], rank: int, g: torch.Generator) -> dict[str, Tensor]:
    """``up``, ``down`` and ``cores`` of a layer with ``rank`` more directions, drawn from ``g``."""
    up, down, cores = (parts[what] for what in PARTS[:3])
    ranks = (up.shape[1], down.shape[0])
    more_up, more_down = gained((up.shape[0], *down.shape[1:]), ranks, rank, 1)
    new_up = torch.randn(up.shape[0], more_up, generator=g) * rms(up)
    new_down = torch.randn(more_down, *down.shape[1:], generator=g) * rms(down)
    padded = F.pad(cores.view(-1, *ranks), (0, more_down, 0, more_up)).flatten(1)
    return {
        "up": torch.cat([up, new_up.to(up)], 1),
        "down": torch.cat([down, new_down.to(down)]),
        "cores": padded,
    }


def rms(values: Tensor) -> float:
    """The size of a tensor's numbers; never 0."""
    return max(values.detach().float().square().mean().sqrt().item(), 1e-6)


def last_alone(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model that has the last style only, as it is, and paints the same without a style."""
    styles = model[f"{CODEBOOK}.weight"].shape[0]
    gone = range(styles - 1)
    return {key: without_rows(value, gone, styles) if has_style_rows(key) else value for key, value in model.items()}


def put_last(model: Mapping[str, Tensor], alone: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``model`` with its last style, and the directions that ``old`` does not have, from ``alone`` (``last_alone``, trained), in the
    dtypes of ``model``. All else keeps every bit."""
    styles, out = model[f"{CODEBOOK}.weight"].shape[0], dict(model)
    for key, value in model.items():
        if has_style_rows(key):
            out[key] = value.clone()
            out[key][styles - 1] = alone[key][0].to(value)
        elif key.startswith(f"{BANK}.") and value.shape != old[key].shape:
            out[key], known = value.clone(), old[key].shape
            if split_key(key)[1] == "up":
                out[key][:, known[1] :] = alone[key][:, known[1] :].to(value)
            else:
                out[key][known[0] :] = alone[key][known[0] :].to(value)
    return out
