"""Key names of CLIP text encoders: transformers' from and to those of SD1.x, SD2.x and SDXL single files."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OPEN_CLIP_KEYS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
"""OpenCLIP's names -> transformers': LAYER of the modules of a layer, KEYS of the tensors outside of layers."""


def to_single_file(weights: Mapping[str, Tensor], *, second: bool, alone: bool, open_clip: bool) -> dict[str, Tensor]:
    """The tensors of one encoder of a pipeline: SD1.x's, SD2.x's, or the first or second of SDXL.

    second: it is ``text_encoder_2``; alone: the pipeline has no other (SDXL's refiner has only the second); open_clip:
    it has OpenCLIP's activation, not OpenAI's, which tells SD2.x's encoder from SD1.x's. Raises ValueError for what is
    no CLIP text encoder.
    """
    if second:
        return _prefixed(f"conditioner.embedders.{int(not alone)}.model.", to_open_clip(weights))
    if alone and open_clip:
        return _prefixed("cond_stage_model.model.", to_open_clip(weights))
    prefix = "cond_stage_model.transformer." if alone else "conditioner.embedders.0.transformer."
    if not any(k.removeprefix("text_model.") == "embeddings.token_embedding.weight" for k in weights):
        raise ValueError("not a CLIP text encoder: 'embeddings.token_embedding.weight' is missing")
    bare = ("text_model.", "text_projection.")
    return _prefixed(prefix, {k if k.startswith(bare) else f"text_model.{k}": v for k, v in weights.items()})


def to_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' key names -> OpenCLIP's, the inverse of ``from_open_clip``; query, key and value as one.

    Raises ValueError for keys that a CLIP text encoder does not have.
    """
    weights = {k.removeprefix("text_model."): v for k, v in weights.items() if not k.endswith("position_ids")}
    modules, keys = ({ours: theirs for theirs, ours in table.items()} for table in (OPEN_CLIP_LAYER, OPEN_CLIP_KEYS))
    missing, out = sorted(keys.keys() - weights.keys()), {}
    if missing:
        raise ValueError(f"not a CLIP text encoder: {missing} are missing")
    for key, weight in weights.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key in keys:
            out[keys[key]] = weight
        elif key == "text_projection.weight" and weight.ndim == 2:
            out["text_projection"] = weight.T.contiguous()
        elif match and match[2] in modules:
            out[f"transformer.resblocks.{match[1]}.{modules[match[2]]}.{match[3]}"] = weight
        elif match and match[2] == "self_attn.q_proj":
            names = [key.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            qkv = [weights[name] for name in names if name in weights]
            fits = all(p.shape == weight.shape and p.dtype == weight.dtype for p in qkv)
            if len(qkv) < 3 or not fits or not weight.ndim:
                raise ValueError(f"not a CLIP text encoder: '{key}' and its k_proj and v_proj do not fit together")
            out[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = torch.cat(qkv)
        elif not match or match[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise ValueError(f"not a CLIP text encoder: key '{key}'")
    return out


def _prefixed(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: weight for key, weight in weights.items()}


def from_open_clip(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """OpenCLIP's key names -> transformers', and the text projection (d, p) on its own.

    OpenCLIP keeps query, key and value in one ``in_proj``. Its logit scale and attention mask are left out.
    """
    out, projection = {}, weights.get("text_projection")
    for key, weight in weights.items():
        if key in OPEN_CLIP_KEYS:
            out[OPEN_CLIP_KEYS[key]] = weight
        elif match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", key):
            layer, name, suffix = match.groups()
            if name == "attn.in_proj":
                for letter, chunk in zip("qkv", weight.chunk(3)):
                    out[f"encoder.layers.{layer}.self_attn.{letter}_proj.{suffix}"] = chunk
            else:
                out[f"encoder.layers.{layer}.{OPEN_CLIP_LAYER.get(name, name)}.{suffix}"] = weight
        elif key == "text_projection.weight":  # a Linear's orientation, as some converters write it
            projection = weight.T
    return out, projection
