"""Key names and config of diffusers' UNet and VAE, from and to those of the single file.

No table of keys: the names follow from how many blocks there are, which either side's keys tell. A DMM UNet in the
diffusers layout (as the authors of arXiv:2504.12364 publish theirs) has ``model_embedding`` and ``add_embedding``
beside diffusers' modules; in an SDXL one ``add_embedding`` is SDXL's own MLP (``label_emb``), and the style's is
``add_embedding2``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .bank import BANK
from .heads import heads_by_level
from .sdxl import FEATURES_PER_SIZE
from .style import CODEBOOK, MLP_NAMES
from .unet import UNetConfig, unet_config_from_state_dict

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

Pairs = Iterator[tuple[str, str]]
"""(module of the single file, module of diffusers)."""


def is_diffusers_unet(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a UNet in the diffusers layout."""
    return {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"} <= set(keys)


# --- UNet -------------------------------------------------------------------------------------------------------------


def unet_to_diffusers(unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's tensors under diffusers' names. unet: under LDM names without ``model.diffusion_model.``.

    Raises ValueError for sizes that diffusers' ``UNet2DConditionModel`` cannot have, and for keys of neither.
    """
    config = unet_config_from_state_dict(unet)
    unet_config_to_diffusers(config)  # refuses what has no place there
    return _renamed(unet, _unet_modules(config))


def diffusers_names(unet: Mapping[str, Tensor]) -> dict[str, str]:
    """The single file's key (without prefix) -> diffusers' key, of every weight of a UNet that diffusers has a name
    for.

    Also for sizes that ``unet_to_diffusers`` refuses: LoRA files name weights this way, whatever the UNet.
    """
    modules = _unet_modules(unet_config_from_state_dict(unet))
    names = {key: _new_name(key, modules) for key in unet}
    return {key: name for key, name in names.items() if name is not None}


def unet_from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's tensors under LDM names without prefix. Raises ValueError for keys that such a UNet does not have."""
    if not is_diffusers_unet(weights):
        raise ValueError("not a UNet in the diffusers layout: 'conv_in' or 'down_blocks.0' is missing")
    if any(key.startswith("class_embedding.") for key in weights):
        raise ValueError(
            "this UNet has a class embedding (an unCLIP or upscaling model); only SD1.x, SD2.x and SDXL are"
        )
    levels = _count(weights, "down_blocks.{}.resnets.0.conv1.weight")
    res_blocks = [_count(weights, f"down_blocks.{i}.resnets.{{}}.conv1.weight") for i in range(levels)]
    attention = [
        f"up_blocks.{i}.attentions.{j}.norm.weight" in weights
        for i in range(levels)
        for j in range(res_blocks[-1 - i] + 1)
    ]
    mlps = [name for name in MLP_NAMES if f"{name}.linear_1.weight" in weights]
    pooled = len(mlps) == 2 or (bool(mlps) and f"{CODEBOOK}.weight" not in weights)
    pairs = _unet_pairs(res_blocks, attention, pooled, (MLP_NAMES[pooled], MLP_NAMES[pooled]))
    return _renamed(weights, {theirs: ours for ours, theirs in pairs})


def unet_config_to_diffusers(config: UNetConfig, sample_size: int | None = None) -> dict[str, Any]:
    """The config.json of a UNet's folder; ``sample_size``: latent pixels a side that the model was made for.

    A DMM UNet's says ``addition_embed_type: model_merge`` (SDXL: ``model_merge_xl``) and ``num_models``, as the
    authors'. Raises ValueError for a UNet that diffusers cannot describe.
    """
    levels = len(config.channel_mult)
    down = _per_level(config.depth_input, config.num_res_blocks)
    up = _per_level(config.depth_output, [n + 1 for n in reversed(config.num_res_blocks)])[::-1]
    depths = [{*down[i], *up[i], *([config.depth_middle] if i == levels - 1 else [])} for i in range(levels)]
    for i in range(levels):
        if not config.depth_middle or len({d > 0 for d in down[i]}) > 1 or len({d > 0 for d in up[i]}) > 1:
            raise ValueError("diffusers has no place for a UNet with attention behind only some blocks of a level")
        if len(depths[i] - {0}) > 1:
            raise ValueError(
                f"diffusers has no place for different transformer depths {sorted(depths[i])} in one level"
            )
    per_block = [max(d) or 1 for d in depths]
    channels = [mult * config.model_channels for mult in config.channel_mult]
    addition = None
    if config.adm_channels or config.num_styles:
        addition = "text_time" if not config.num_styles else "model_merge_xl" if config.adm_channels else "model_merge"
    described = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": addition,
        "addition_time_embed_dim": FEATURES_PER_SIZE if config.adm_channels else None,
        # By an old mistake this is the number of heads.
        "attention_head_dim": _one_or_list(config.all_heads),
        "block_out_channels": channels,
        "center_input_sample": False,
        "cross_attention_dim": config.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in down],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": _one_or_list(config.num_res_blocks),
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": config.out_channels,
        "projection_class_embeddings_input_dim": config.adm_channels or None,
        "sample_size": sample_size,
        "transformer_layers_per_block": _one_or_list(per_block),
        "up_block_types": ["CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in reversed(up)],
        "use_linear_projection": config.linear_proj,
    }
    return {**described, "num_models": config.num_styles} if config.num_styles else described


def check_diffusers_config(described: Mapping[str, Any], config: UNetConfig) -> None:
    """Raise ValueError where a config.json says what the weights do not, or what the single file cannot say."""
    count = described.get("num_models") or 0
    if count != config.num_styles:
        raise ValueError(
            f"its config.json says num_models {str(count)[:200]}, but the weights hold {config.num_styles} styles"
        )
    if not described.get("flip_sin_to_cos", True) or described.get("freq_shift", 0):
        raise ValueError(
            "its config.json asks for other time features (flip_sin_to_cos, freq_shift) than Stable Diffusion's"
        )


def heads_in_config(described: Mapping[str, Any], config: UNetConfig) -> tuple[int, ...]:
    """The attention heads of each level by a config.json. Raises ValueError for what is no such number."""
    # UNet2DConditionModel's own rule: "attention_head_dim" is the number of heads, 8 where neither is there.
    heads = described.get("num_attention_heads") or described.get("attention_head_dim", 8)
    try:
        return heads_by_level(config, {"attention_head_dim": heads})
    except ValueError as error:
        raise ValueError(f"its config.json does not fit the weights: {error}") from error


def _unet_modules(config: UNetConfig) -> dict[str, str]:
    """Module of the single file -> module of diffusers."""
    attention = [depth > 0 for depth in config.depth_output]
    pooled = bool(config.adm_channels)
    return dict(_unet_pairs(config.num_res_blocks, attention, pooled, (config.style_mlp, MLP_NAMES[pooled])))


def _unet_pairs(res_blocks: Iterable[int], attention: list[bool], pooled: bool, mlp: tuple[str, str]) -> Pairs:
    """attention: of every output block, in order; pooled: SDXL's vector is there; mlp: the style MLP's two names."""
    res_blocks = list(res_blocks)
    last = len(res_blocks) - 1
    yield "time_embed.0", "time_embedding.linear_1"
    yield "time_embed.2", "time_embedding.linear_2"
    if pooled:
        yield "label_emb.0.0", "add_embedding.linear_1"
        yield "label_emb.0.2", "add_embedding.linear_2"
    yield CODEBOOK, CODEBOOK
    yield mlp
    yield "input_blocks.0.0", "conv_in"
    n = 1
    for level, blocks in enumerate(res_blocks):
        for j in range(blocks):
            yield from _inside(_RESNET, f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{j}")
            yield f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{j}"
            n += 1
        if level < last:
            yield f"input_blocks.{n}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            n += 1
    yield from _inside(_RESNET, "middle_block.0", "mid_block.resnets.0")
    yield "middle_block.1", "mid_block.attentions.0"
    yield from _inside(_RESNET, "middle_block.2", "mid_block.resnets.1")
    n = 0
    for level, blocks in enumerate(reversed(res_blocks)):
        for j in range(blocks + 1):
            yield from _inside(_RESNET, f"output_blocks.{n}.0", f"up_blocks.{level}.resnets.{j}")
            if attention[n]:
                yield f"output_blocks.{n}.1", f"up_blocks.{level}.attentions.{j}"
            if j == blocks and level < last:
                yield f"output_blocks.{n}.{1 + attention[n]}.conv", f"up_blocks.{level}.upsamplers.0.conv"
            n += 1
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"


def _per_level(depths: Iterable[int], counts: Iterable[int]) -> list[list[int]]:
    depths = iter(depths)
    return [[next(depths) for _ in range(count)] for count in counts]


def _one_or_list(values: Iterable[int]) -> int | list[int]:
    values = list(values)
    return values[0] if len(set(values)) == 1 else values


# --- VAE --------------------------------------------------------------------------------------------------------------


def vae_from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' AutoencoderKL -> the single file's names without ``first_stage_model.``; the same numbers.

    The middle's attention is Linear there and a 1x1 convolution here: (C, C) -> (C, C, 1, 1). Files from before
    diffusers 0.17 name it otherwise. Raises ValueError for keys that are no such VAE's.
    """
    levels = _count(weights, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    blocks = _count(weights, "encoder.down_blocks.0.resnets.{}.conv1.weight")
    if not levels:
        raise ValueError("not a VAE in the diffusers layout: 'encoder.down_blocks.0' is missing")
    modules = {theirs: ours for ours, theirs in _vae_pairs(levels, blocks)}
    for old, new in _OLD_VAE_ATTENTION.items():
        for side in ("encoder", "decoder"):
            modules[f"{side}.mid_block.attentions.0.{old}"] = modules[f"{side}.mid_block.attentions.0.{new}"]
    vae = _renamed(weights, modules)
    attention = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")
    return {k: v[:, :, None, None] if attention.search(k) and v.ndim == 2 else v for k, v in vae.items()}


def _vae_pairs(levels: int, blocks: int) -> Pairs:
    for side, ours, theirs, count in (("encoder", "down", "down", blocks), ("decoder", "up", "up", blocks + 1)):
        for name in ("conv_in", "conv_out"):
            yield f"{side}.{name}", f"{side}.{name}"
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        for i in range(levels):
            level = i if side == "encoder" else levels - 1 - i  # the single file numbers both from the finest
            for j in range(count):
                pair = (f"{side}.{ours}.{level}.block.{j}", f"{side}.{theirs}_blocks.{i}.resnets.{j}")
                yield from _inside(_VAE_RESNET, *pair)
            yield f"{side}.{ours}.{level}.{ours}sample.conv", f"{side}.{theirs}_blocks.{i}.{theirs}samplers.0.conv"
        for j in (0, 1):
            yield from _inside(_VAE_RESNET, f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}")
        yield from _inside(_VAE_ATTENTION, f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name


# --- both -------------------------------------------------------------------------------------------------------------


def _inside(names: Mapping[str, str], ours: str, theirs: str) -> Pairs:
    return ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in names.items())


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    n = 0
    while pattern.format(n) in weights:
        n += 1
    return n


def _renamed(weights: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    """Every key with its module's new name. Raises ValueError for keys of modules that are not listed, and
    collisions."""
    renamed, unknown = {}, []
    for key, tensor in weights.items():
        name = _new_name(key, modules)
        if name is None:
            unknown.append(key)
        else:
            renamed[name] = tensor
    if any(key.startswith(f"{BANK}.") for key in unknown):
        raise ValueError(
            "the model has a style bank, for which diffusers has no layout: keep it as a single file (--to single)"
        )
    if unknown:
        raise ValueError(f"{len(unknown)} keys that Stable Diffusion does not have: {sorted(unknown)[:8]}")
    if len(renamed) != len(weights):
        raise ValueError("two keys mean the same weight: the file mixes two layouts")
    return renamed


def _new_name(key: str, modules: Mapping[str, str]) -> str | None:
    """A key with its module's new name; None for a module that is not listed."""
    module = key
    while module and module not in modules:
        module = module.rpartition(".")[0]
    return modules[module] + key[len(module) :] if module else None
