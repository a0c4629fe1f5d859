"""A DMM checkpoint as the host's MODEL, CLIP and VAE, and back.

The host's own UNet class does the sampling; the style modules are attached to it as submodules, so that the host
manages, patches and saves them like its other weights. What the weights cannot tell (style names, recipe) travels with
the MODEL.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import comfy.model_base
import comfy.model_detection
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ..dmm_core.bank import BANK, StyleBank, bank_config, with_blends
from ..dmm_core.checkpoint import STYLE_KEYS, TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX, Checkpoint
from ..dmm_core.heads import heads_by_level
from ..dmm_core.metadata import StyleInfo, architecture
from ..dmm_core.scaled_fp8 import dequantised
from ..dmm_core.sdxl import SIZE_CHANNELS
from ..dmm_core.style import CODEBOOK, MLP_NAMES, StyleMLP
from ..dmm_core.style_value import NO_STYLE, Style, check_new_name, find_style, style_rows, vocabulary
from ..dmm_core.unet import UNetConfig, missing_weights, unet_config_from_state_dict, with_heads
from ..dmm_core.vae import vae_config_from_state_dict
from ..training.config import ModelSettings
from ..training.files.model_files import load_any
from ..training.files.model_settings import guessed_heads, told
from ..training.files.style_file import (
    MadeFor,
    StyleFile,
    centred_at_base,
    check_fits,
    is_style_file,
    read_style_file,
    unet_fingerprint,
)
from . import few_step_check, region_patch, style_ops, style_patch
from .folded import unfolded
from .lost_names import with_names
from .weights import HostWeights, numbers

TEXT_WIDTHS = {"clip_l": 768, "clip_h": 1024, "clip_g": 1280}
"""The host's text encoders of SD1.x and SDXL, of SD2.x, of SDXL, and the one width of each that it builds unasked."""
ATTACHMENT = "dmm"
SD_WIDTH = 320
"""``model_channels`` of every released Stable Diffusion model, or more."""


@dataclass(frozen=True)
class ModelInfo:
    """What a MODEL from a DMM file knows beyond its weights.

    styles: one per code of the codebook; blends: named mixes of them, with weights (N,); dtype: of the file's UNet. Of an add-on, made_for:
    the UNet that its styles were made for; style_dtype: of its file. remark: what was guessed in reading the file, for the user.
    """

    styles: tuple[StyleInfo, ...]
    recipe: dict
    metadata: dict[str, str]
    prediction: str
    zero_snr: bool
    dtype: torch.dtype
    blends: tuple[tuple[StyleInfo, tuple[float, ...]], ...] = ()
    made_for: MadeFor | None = None
    style_dtype: torch.dtype | None = None
    remark: str = ""

    @property
    def all_styles(self) -> list[StyleInfo]:
        """Learned ones first, then the named blends."""
        return [*self.styles, *(style for style, _ in self.blends)]

    @property
    def known(self) -> dict[str, tuple[float, ...]]:
        """All styles by name, learned ones first."""
        learned = vocabulary([style.name for style in self.styles])
        return {**learned, **{style.name: weights for style, weights in self.blends}}


def model_info(patcher) -> ModelInfo:
    """The information on a MODEL. Raises ValueError when it did not come from Load DMM Model or Add DMM Styles to Model."""
    info = patcher.get_attachment(ATTACHMENT)
    if info is None:
        raise ValueError(
            "this MODEL carries no DMM styles: take it from Load DMM Model (other loaders drop them) or Add DMM Styles to Model"
        )
    return info


def styled(model, style: Style):
    """A clone of a MODEL that paints in ``style``. Raises ValueError for a style that the MODEL does not have."""
    info = model_info(model)
    style.check(info.known)
    model = model.clone()
    if info.styles:
        style_patch.set_style(model, style)
    return model


def with_blend(model, style: Style, info: StyleInfo):
    """A clone of a MODEL that also knows ``style`` by the name in ``info``; Save DMM Model writes it as a style of its own.

    Raises ValueError for a name that is taken and for a style that is not one blend at full strength: only that can become a
    code of the codebook.
    """
    before = model_info(model)
    if not before.styles:
        raise ValueError("this MODEL has no styles to blend (it is a plain checkpoint): use one from Load DMM Model")
    row = style_rows(style, before.known)
    if style.changes or len(row) > 1:
        raise ValueError(
            f"'{style}' changes over the steps or between pictures: only one fixed blend can become a style"
        )
    if abs(row[0, -1].item() - 1) > 1e-4:
        raise ValueError(
            f"'{style}' has strength {row[0, -1].item():.3g}: only a blend of strength 1 can become a style"
        )
    info = replace(info, name=check_new_name(list(before.known), info.name))
    model = model.clone()
    after = replace(before, blends=(*before.blends, (info, tuple(row[0, :-1].tolist()))))
    model.set_attachments(ATTACHMENT, after)
    style_patch.set_known(model, after.known)
    return model


def with_edited_style(model, style: str, changes: dict[str, str]):
    """A clone of a MODEL that describes one of its styles, learned or a named blend, otherwise. changes: fields of StyleInfo.

    Under a new name the style stays what the MODEL paints with, if it was; to the nodes behind, the old name is unknown.
    Raises ValueError for a style that the MODEL does not have, a name that is taken, and texts that cannot be stored.
    """
    before = model_info(model)
    known = list(before.known)
    old = find_style(known, style)
    if "name" in changes:
        changes = {**changes, "name": check_new_name([name for name in known if name != old], changes["name"])}

    def edited(info: StyleInfo) -> StyleInfo:
        return replace(info, **changes) if info.name == old else info

    def renamed(name: str) -> str:
        return changes.get("name", old) if name != NO_STYLE and find_style(known, name) == old else name

    model = model.clone()
    blends = tuple((edited(info), weights) for info, weights in before.blends)
    after = replace(before, styles=tuple(map(edited, before.styles)), blends=blends)
    model.set_attachments(ATTACHMENT, after)
    chosen = style_patch.chosen_style(model)
    style_patch.set_known(model, after.known)
    style_patch.set_style(model, chosen.renamed(renamed))
    return model


# --- file to host -----------------------------------------------------------------------------------------------------


def load(path: str, settings: ModelSettings | None = None) -> tuple:
    """A file or folder that ``load_any`` reads, DMM or plain -> (MODEL, CLIP or None, VAE, ModelInfo). settings: what the user says of it.

    One without a VAE gives the host's empty VAE, whose use names the problem.
    Raises ValueError for files that are no Stable Diffusion checkpoint.
    """
    if is_style_file(path):
        raise ValueError(
            f"{path} holds styles without a model: put it into models/dmm_styles and use Add DMM Styles to Model on the MODEL they are for"
        )
    settings = settings or ModelSettings()
    checkpoint, about_names = with_names(told(load_any(path), settings), path)
    # The host would only log them, and paint with what lies in memory.
    if missing := missing_weights(checkpoint.unet, checkpoint.heads):
        raise ValueError(
            f"{path}: {len(missing)} of its UNet's weights missing ({', '.join(missing[:3])}): download or save it again"
        )
    model = build_model(checkpoint)
    clip, vae = build_clip(checkpoint, model.model.model_config), build_vae(checkpoint)
    # The host reloads from these when it needs a second copy (torch.compile and hooks under DynamicVRAM, several GPUs).
    model.cached_patcher_init = (reload_model, (path, settings))
    if clip is not None:
        clip.patcher.cached_patcher_init = (reload_clip, (path,))
    if checkpoint.vae:
        vae.patcher.cached_patcher_init = (reload_vae, (path,))
    info = model_info(model)
    if about_names:
        info = replace(info, remark="\n".join(filter(None, (info.remark, about_names))))
        model.set_attachments(ATTACHMENT, info)
    return model, clip, vae, info


def reload_model(path: str, settings: ModelSettings, disable_dynamic: bool = False):
    return build_model(told(load_any(path), settings), disable_dynamic)


def reload_clip(path: str, disable_dynamic: bool = False):
    return build_clip(load_any(path), disable_dynamic=disable_dynamic).patcher


def reload_vae(path: str, disable_dynamic: bool = False):
    return build_vae(load_any(path)).patcher  # the host's VAE offers no choice here


def build_model(checkpoint: Checkpoint, disable_dynamic: bool = False):
    """The MODEL of a checkpoint, styles attached and set to no style."""
    sd = plain_unet(checkpoint)
    dtype = comfy.utils.weight_dtype(sd, UNET_PREFIX)
    config, is_known = model_config(sd, checkpoint.config)
    if is_known:
        patcher = comfy.sd.load_state_dict_guess_config(
            sd, output_vae=False, output_clip=False, disable_dynamic=disable_dynamic
        )[0]
    else:
        patcher = build_small_model(config, sd, dtype, disable_dynamic)
    set_sampling(patcher.model, checkpoint)
    region_patch.install(patcher)
    if checkpoint.num_styles:
        attach_styles(patcher, checkpoint.unet, dtype)
        style_patch.install(patcher, vocabulary([style.name for style in checkpoint.styles]))
    few_step_check.install(patcher, checkpoint.recipe)
    info = ModelInfo(
        styles=tuple(checkpoint.styles),
        recipe=checkpoint.recipe,
        metadata=checkpoint.metadata,
        prediction=checkpoint.prediction,
        zero_snr=checkpoint.zero_snr,
        dtype=dtype,
        remark=guessed_heads({"this file": checkpoint}),
    )
    patcher.set_attachments(ATTACHMENT, info)
    return patcher


def plain_unet(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The UNet without its styles, in the host's key names (the host's detection misreads ``add_embedding``)."""
    return {UNET_PREFIX + k: v for k, v in checkpoint.unet.items() if not k.startswith(STYLE_KEYS)}


def model_config(sd: dict[str, Tensor], unet: UNetConfig) -> tuple:
    """The host's description of a UNet, and whether its own loader knows these sizes and this number of attention heads.

    The host tells models apart by their exact widths; the small ones of the demo family are described by hand.
    """
    if len(sd[UNET_PREFIX + "input_blocks.0.0.weight"]) >= SD_WIDTH:
        config = comfy.model_detection.model_config_from_unet(sd, UNET_PREFIX)
        if config is not None:
            known = with_heads(unet, heads_by_level(unet, config.unet_config)) == unet
            config.unet_config |= {} if known else host_heads(unet)
            return config, known
    sizes = comfy.model_detection.detect_unet_config(sd, UNET_PREFIX)
    if sizes["model_channels"] < SD_WIDTH and (kind := small_kind(sizes)):
        config = kind(sizes)
        config.unet_config |= host_heads(unet)
        return config, False
    raise ValueError(
        f"ComfyUI knows no model of these sizes: width {sizes['model_channels']}, context {sizes['context_dim']}, "
        f"pooled conditioning {sizes['adm_in_channels']}; use an SD1.x, SD2.x or SDXL model"
    )


def host_heads(unet: UNetConfig) -> dict[str, int]:
    """The attention heads of a UNet in the host's words. Raises ValueError for heads that it has no words for."""
    heads = [unet.heads(level) for level in unet.attention_levels]
    each = {unet.channel_mult[level] * unet.model_channels // n for level, n in zip(unet.attention_levels, heads)}
    if len(each) == 1:
        return {"num_heads": -1, "num_head_channels": each.pop()}
    if len(set(heads)) == 1:
        return {"num_heads": heads[0], "num_head_channels": -1}
    raise ValueError(
        f"its UNet has {', '.join(map(str, heads))} attention heads at its levels: ComfyUI's have one number of heads, or one number of "
        "channels a head"
    )


def model_heads(patcher) -> tuple[int, ...]:
    """The attention heads of each level of a MODEL's UNet, from any loader, as a ``Checkpoint`` has them; () for the usual ones."""
    sizes = patcher.model.model_config.unet_config
    unet = UNetConfig(
        model_channels=sizes["model_channels"],
        channel_mult=tuple(sizes["channel_mult"]),
        linear_proj=bool(sizes["use_linear_in_transformer"]),
    )
    each = sizes["num_head_channels"]
    channels = [mult * unet.model_channels for mult in unet.channel_mult]
    heads = tuple(sizes["num_heads"] if each == -1 else max(1, width // each) for width in channels)
    return () if heads == unet.usual_heads else heads


def small_kind(sizes: dict):
    """Which of the host's models has the shape of these sizes, whatever their widths; None for none."""
    linear, pooled = sizes["use_linear_in_transformer"], sizes["adm_in_channels"]
    if pooled is None:
        return comfy.supported_models.SD20 if linear else comfy.supported_models.SD15
    return comfy.supported_models.SDXL if linear and pooled > SIZE_CHANNELS else None


def build_small_model(config, sd: dict[str, Tensor], weight_dtype: torch.dtype, disable_dynamic: bool):
    """A MODEL of sizes that the host's loader refuses, by that loader's own steps."""
    load_device = mm.get_torch_device()
    dtypes = config.supported_inference_dtypes
    parameters = comfy.utils.calculate_parameters(sd)
    dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=dtypes, weight_dtype=weight_dtype)
    config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, load_device, dtypes))
    offload_device = mm.unet_offload_device()
    model = config.get_model(sd, UNET_PREFIX, device=offload_device)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    model.load_model_weights(sd, UNET_PREFIX, assign=patcher.is_dynamic())
    return patcher


def set_sampling(model, checkpoint: Checkpoint) -> None:
    """Prediction and noise schedule of a fresh model: the host guesses them from the weights, the file knows."""
    types = comfy.model_base.ModelType
    model.model_type = types.V_PREDICTION if checkpoint.prediction == "v" else types.EPS
    model.model_config.sampling_settings["zsnr"] = checkpoint.zero_snr
    model.model_sampling = comfy.model_base.model_sampling(model.model_config, model.model_type)


def attach_styles(patcher, weights: dict[str, Tensor], file_dtype: torch.dtype) -> None:
    """Make codebook, MLP and style bank submodules of a fresh MODEL's UNet. weights: of a UNet with styles."""
    unet = patcher.model.diffusion_model
    device = next(unet.parameters()).device
    modules = build_style_modules(patcher.model, weights, file_dtype, device=device, assign=patcher.is_dynamic())
    for name, module in modules.items():
        unet.add_module(name, module)
    if BANK in modules:
        unet.style_bank.attach(unet)
    patcher.size = 0  # counted anew, styles included


def build_style_modules(
    model, weights: dict[str, Tensor], file_dtype: torch.dtype, *, device: torch.device, assign: bool
) -> dict[str, torch.nn.Module]:
    """Codebook, MLP and style bank for a BaseModel, of layers that the host can cast and offload, by their names in a UNet.

    weights: of a UNet with styles, or of its styles and, of the layers with a part in the bank, anything of the right shape. assign: take
    the tensors themselves where the dtype allows.
    """
    dtype = model.get_dtype()
    dtype = dtype if dtype.itemsize > 1 else file_dtype  # eight bits are too few for the codes
    ops = style_ops
    num_styles, dim = weights[f"{CODEBOOK}.weight"].shape
    mlp = next(name for name in MLP_NAMES if f"{name}.linear_1.weight" in weights)
    meta = torch.device("meta")
    modules = {
        CODEBOOK: ops.Embedding(num_styles, dim, dtype=dtype, device=meta),
        mlp: StyleMLP(dim, operations=ops, dtype=dtype, device=meta),
    }
    if bank := bank_config(weights, num_styles):  # the host names its layers as the file does
        modules[BANK] = StyleBank(model.diffusion_model, bank, ops, dtype=dtype, device=meta)
    for name, module in modules.items():
        own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
        # Each weight is made once, in its dtype and place, and is the module's own unless it may be the file's.
        module.load_state_dict({k: v.to(device, dtype, copy=not assign) for k, v in own.items()}, assign=True)
        mm.archive_model_dtypes(module.requires_grad_(False).eval())
    return modules


# --- styles beside a model --------------------------------------------------------------------------------------------


def with_added_styles(model, path: str) -> tuple:
    """(A clone of a MODEL, from any loader, that has the styles of a style file beside its UNet; what to tell the user).

    Raises ValueError for a MODEL of another kind than the styles are for, or with styles already, and for what is no style file.
    """
    before, file = model.get_attachment(ATTACHMENT), read_add_on(path)
    if before is not None and before.styles:
        names = ", ".join(style.name for style in before.styles[:8])
        raise ValueError(
            f"this MODEL has styles already ({names}): connect one without, as from Load Checkpoint. To have the styles of both, merge the "
            "models that they were made of (Merge Checkpoints to DMM)"
        )
    held = held_unet(model)
    predicts = "v" if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION) else "eps"
    check_add_on(path, file, model, held, predicts)
    model = model.clone()
    model.set_additional_models(style_patch.KEY, [build_added_styles(model.model, path)])
    if before is None:
        region_patch.install(model)
    style_patch.install(model, vocabulary([style.name for style in file.styles]))
    dtype = codebook_dtype(file)
    info = ModelInfo(
        styles=tuple(file.styles),
        recipe=file.recipe,
        metadata=file.metadata,
        prediction=predicts,
        zero_snr=bool(getattr(model.get_model_object("model_sampling"), "zsnr", False)),
        dtype=before.dtype if before is not None else max(model.model.get_dtype(), dtype, key=lambda d: d.itemsize),
        made_for=file.made_for,
        style_dtype=dtype,
    )
    model.set_attachments(ATTACHMENT, info)
    patched = any(key.startswith("diffusion_model.") for key in model.patches)
    return model, which_base(file, unet_fingerprint(held), patched)


def read_add_on(path: str) -> StyleFile:
    """A style file. Raises ValueError naming the file for another, with what to do for a whole model."""
    if not is_style_file(path):
        raise ValueError(f"{path} is no file of styles alone: Load DMM Model loads whole models")
    return read_style_file(path)


def held_unet(model) -> dict[str, Tensor]:
    """A MODEL's UNet without patches, in the LDM key names, where and as the host holds it. Not to be changed."""
    return {key: numbers(patches[0][0]) for key, patches in HostWeights(model).held.items()}


def check_add_on(path: str, file: StyleFile, model, held: dict[str, Tensor], predicts: str) -> None:
    """Raise ValueError, naming both, unless the styles of a file are for models of the kind of this MODEL."""
    kind, alike = type(model.model).__name__, False
    said, prediction = file.metadata.get("modelspec.architecture"), file.prediction or "eps"
    style_width = file.weights[f"{CODEBOOK}.weight"].shape[1]
    theirs = f"{(said or 'unknown')[:60]}, width {style_width}, {prediction}"
    try:
        ours = architecture(unet_config_from_state_dict(held), predicts)[0]
        width = held["time_embed.2.weight"].shape[0]
        kind = f"{ours}, width {width}, {predicts}"
        alike = said in (None, ours) and (style_width, prediction) == (width, predicts)
        check_fits(held, file.weights)
        if file.prediction not in (None, predicts):
            raise ValueError("the two predict differently")
    except ValueError as error:
        if alike:
            raise ValueError(f"{path} is damaged, or its style bank is another model's: {error}") from error
        raise ValueError(
            f"{path} holds styles for another kind of model ({theirs}) than this MODEL ({kind}): {error}"
        ) from error


def build_added_styles(model, path: str, disable_dynamic: bool = False):
    """A patcher for the styles of a file, made for a BaseModel. The host loads and offloads it like a ControlNet's."""
    file = read_add_on(path)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    devices = {"load_device": mm.get_torch_device(), "offload_device": mm.unet_offload_device()}
    added = style_patch.AddedStyles()
    patcher = patcher_class(added, **devices)
    layers = {key: value for key, value in model.diffusion_model.state_dict().items() if not key.startswith(STYLE_KEYS)}
    device = torch.device("cpu")
    modules = build_style_modules(
        model, {**layers, **file.weights}, codebook_dtype(file), device=device, assign=patcher.is_dynamic()
    )
    for name, module in modules.items():
        added.add_module(name, module)
    patcher.cached_patcher_init = (build_added_styles, (model, path))
    patcher.size = 0  # counted anew
    return patcher


def codebook_dtype(file: StyleFile) -> torch.dtype:
    return file.weights[f"{CODEBOOK}.weight"].dtype


def which_base(file: StyleFile, fingerprint: str, patched: bool) -> str:
    """Whether the styles were made for a UNet with this fingerprint, in words. patched: LoRAs or merges are on it."""
    base = (file.recipe.get("base") or {}).get("file") if isinstance(file.recipe.get("base"), dict) else None
    name = f" ({base})" if isinstance(base, str) else ""
    if not file.made_for.fingerprint:
        return "the file does not say for which base the styles were made"
    if file.made_for.fingerprint != fingerprint and not centred_at_base(file.recipe):
        return (
            "these styles belong to the DMM model that they were saved from, whose own weights this MODEL does not have: they will look "
            "different on it, or not at all. Styles for any base come from a merge centred at the base (Merge Checkpoints to DMM)"
        )
    if file.made_for.fingerprint != fingerprint:
        return f"another base than the styles were made for{name}, or one in another precision: they will look different on it"
    if patched:
        return f"on the base they were made for{name}, with LoRAs or merges: for the styles that is another base"
    return f"on the base they were made for{name}"


def build_clip(checkpoint: Checkpoint, config=None, disable_dynamic: bool = False):
    """The CLIP of a checkpoint, or None when it holds no text encoder. config: the host's description of the model, if it is known."""
    if config is None:
        config, _ = model_config(plain_unet(checkpoint), checkpoint.config)
    target = config.clip_target(state_dict=checkpoint.text)
    weights = config.process_clip_state_dict(dict(checkpoint.text))
    if target is None or not weights:
        return None
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data=weights,
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=weights,
        model_options=text_model_options(weights),
        disable_dynamic=disable_dynamic,
    )
    if checkpoint.clip_skip:
        clip.clip_layer(-checkpoint.clip_skip)  # as CLIPSetLastLayer does, which can still say otherwise
    return clip


def clip_skip(clip) -> int | None:
    """With which clip skip a CLIP reads prompts, where CLIPSetLastLayer or its file says one."""
    layer = getattr(clip, "layer_idx", None)
    return -layer if layer else None


def text_model_options(weights: dict[str, Tensor]) -> dict:
    """The sizes of text encoders that are not as wide as the released ones, as the host's CLIP takes them.

    weights: in the host's key names. 64 channels make a head, as in the released ones.
    """
    options = {}
    for name, released in TEXT_WIDTHS.items():
        prefix = f"{name}.transformer.text_model."
        embedding = weights.get(f"{prefix}embeddings.token_embedding.weight")
        if embedding is None or embedding.shape[1] == released:
            continue
        layers = {k[len(prefix) :].split(".")[2] for k in weights if k.startswith(f"{prefix}encoder.layers.")}
        options[f"{name}_model_config"] = {
            "hidden_size": embedding.shape[1],
            "intermediate_size": weights[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": max(1, embedding.shape[1] // 64),
        }
    return options


def build_vae(checkpoint: Checkpoint):
    """The VAE of a checkpoint; the host's empty one, which explains itself when used, if there is none."""
    first = checkpoint.vae.get("encoder.conv_in.weight")
    config = None
    if first is not None and first.shape[0] != 128:  # 128 is the one width that the host's detection builds
        sizes = vae_config_from_state_dict(checkpoint.vae)
        config = {"params": {"ddconfig": sizes.ddconfig(), "embed_dim": sizes.embed_dim}}
    return comfy.sd.VAE(sd=dict(checkpoint.vae), config=config)


# --- host to file -----------------------------------------------------------------------------------------------------


def to_checkpoint(model, clip=None, vae=None) -> Checkpoint:
    """A MODEL, with LoRAs and merges folded in, and optionally CLIP and VAE -> the checkpoint that loads as the same.

    No weight gets wider than in the file that the MODEL came from: without a GPU the host computes in float32 what the
    file has in half. The host may have narrowed weights on loading, as it does with every text encoder.
    Raises ValueError for a MODEL without styles and for a CLIP of another kind of model.
    """
    info = model_info(model)
    if not info.styles:
        raise ValueError("this MODEL has no styles (it is a plain checkpoint): save it with ComfyUI's Save Checkpoint")
    if clip is not None and not isinstance(clip.cond_stage_model, model.model.model_config.clip_target().clip):
        raise ValueError("this CLIP belongs to another kind of model than the MODEL: connect the one from its file")
    model = unfolded(model)
    patchers = [model] if clip is None else [model, clip.load_model()]
    mm.load_models_gpu(patchers)
    clip_sd = None if clip is None else clip.state_dict_for_saving()
    vae_sd = None if vae is None or vae.first_stage_model is None else vae.get_sd()
    sd = model.state_dict_for_saving(clip_sd, vae_sd)
    weights = HostWeights(model)
    if weights.quantised:  # with their scales and marks they would be no weights for anybody but the host
        unet = {key: as_file(weight, info.dtype) for key, weight in weights.items()}
    else:
        unet = part(sd, UNET_PREFIX, info.dtype)
    if added := style_patch.added_styles(model):
        unet |= part(added.state_dict(), "", info.style_dtype)
    unet, styles = with_blend_codes(unet, info)
    return Checkpoint(
        unet=unet,
        text=text_weights(sd, info.dtype),
        vae=part(sd, VAE_PREFIX, info.dtype),
        styles=styles,
        recipe=info.recipe,
        metadata=dict(info.metadata),
        prediction=info.prediction,
        zero_snr=info.zero_snr,
        clip_skip=None if clip is None else clip_skip(clip),
        heads=model_heads(model),
    )


def with_blend_codes(unet: dict[str, Tensor], info: ModelInfo) -> tuple[dict[str, Tensor], list[StyleInfo]]:
    """A UNet's weights whose codebook and bank have the named blends as styles of their own, and what is known of all its styles."""
    styles = info.all_styles
    if not info.blends:
        return unet, styles
    codes = unet[f"{CODEBOOK}.weight"]  # a blend is a code like the others: the MLP comes after the mixing
    weights = torch.tensor([weights for _, weights in info.blends])
    blended = torch.cat([codes, (weights @ codes.float()).to(codes.dtype)])
    return {**with_blends(unet, weights), f"{CODEBOOK}.weight": blended}, styles


def text_weights(sd: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The text encoder of a state dict for saving, no wider than ``dtype``; scaled float8 in half precision."""
    return dequantised({k: as_file(v, dtype) for k, v in sd.items() if k.startswith(TEXT_PREFIXES)}, {})[0]


def part(sd: dict[str, Tensor], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): as_file(v, dtype) for k, v in sd.items() if k.startswith(prefix)}


def as_file(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight on the CPU, and no wider than ``dtype``."""
    # In two steps: the host's lazily patched weights answer only to a device.
    tensor = tensor.to("cpu").detach()
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.itemsize > dtype.itemsize else tensor
