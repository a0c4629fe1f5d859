"""Names of LoRA files -> the weights of a checkpoint that they mean: the names that ComfyUI's LoRA loader knows, and
PEFT's.

PEFT        base_model.model.down_blocks.0.attentions.0.proj_in, base_model.model.text_model...
kohya       lora_unet_input_blocks_1_1_proj_in, lora_unet_down_blocks_0_attentions_0_proj_in, lora_te_text_model_...
diffusers   unet.down_blocks.0.attentions.0.proj_in, ...attn1.to_q or ...attn1.processor.to_q,
text_encoder.text_model... plain       diffusion_model.input_blocks.1.1.proj_in,
text_encoders.clip_l.transformer.text_model...
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.diffusers_layout import diffusers_names
from ..files.clip_layout import OPEN_CLIP_KEYS, OPEN_CLIP_LAYER

FIRST_TEXT = ("lora_te_", "lora_te1_", "text_encoder.")
SECOND_TEXT = ("lora_te2_", "text_encoder_2.")
TEXT_TOWERS = (
    ("cond_stage_model.transformer.", "clip_l", FIRST_TEXT),  # SD1.x
    ("cond_stage_model.model.", "clip_h", FIRST_TEXT),  # SD2.x
    ("conditioner.embedders.0.transformer.", "clip_l", FIRST_TEXT),  # SDXL
    ("conditioner.embedders.1.model.", "clip_g", SECOND_TEXT),
)
"""(prefix in the file, the host's name for the encoder, how LoRA files begin the names of its linear layers)."""
_LINEAR = re.compile(r"text_model\.encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.(q|k|v|out)_proj)")


@dataclass(frozen=True)
class Target:
    """A weight of a checkpoint, as its LoRAs see it.

    part: "unet" or "text"; key: in that part of a ``Checkpoint``; third: 0, 1 or 2 for query, key or value of a joint
    ``in_proj``; transposed: the file keeps it as (in, out).
    """

    part: str
    key: str
    third: int | None = None
    transposed: bool = False

    @property
    def bias(self) -> Target:
        """The bias beside the weight."""
        return Target(self.part, self.key.removesuffix("weight") + "bias", self.third)

    def view(self, tensor: Tensor) -> Tensor:
        """The LoRA's weight as a view of the file's tensor."""
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return tensor.T if self.transposed else tensor


def lora_names(checkpoint: Checkpoint) -> dict[str, Target]:
    """Every name that a LoRA file may use -> the weight it means."""
    return {**dict(_unet(checkpoint.unet)), **dict(_text(checkpoint.text))}


Names = Iterator[tuple[str, Target]]


def _unet(unet: Mapping[str, Tensor]) -> Names:
    diffusers = diffusers_names(unet)
    for key in unet:
        module, target = key.removesuffix(".weight"), Target("unet", key)
        yield f"diffusion_model.{module}", target
        if module == key:  # a bias or the like, which only the plain names can mean
            continue
        yield f"lora_unet_{_flat(module)}", target
        if key in diffusers:
            theirs = diffusers[key].removesuffix(".weight")
            yield f"lora_unet_{_flat(theirs)}", target
            yield f"lycoris_{_flat(theirs)}", target
            processor = theirs.replace(".to_", ".processor.to_")
            if processor.endswith(".to_out.0"):
                processor = processor.removesuffix(".0")
            for name in (theirs, processor):
                yield name, target
                yield f"unet.{name}", target
            yield f"base_model.model.{theirs}", target


def _text(text: Mapping[str, Tensor]) -> Names:
    for prefix, encoder, begins in TEXT_TOWERS:
        for key in text:
            if not key.startswith(prefix):
                continue
            for module, target in _modules(key, prefix):
                yield f"text_encoders.{encoder}.transformer.{module}", target
                if prefix.endswith("0.transformer.") or not prefix.startswith("conditioner."):
                    yield f"base_model.model.{module}", target
                for begin in begins if _LINEAR.fullmatch(module) else ():
                    yield begin + (module if begin.endswith(".") else _flat(module)), target
                if (encoder, module) == ("clip_g", "text_projection"):
                    yield "lora_te2_text_projection", target


def _modules(key: str, prefix: str) -> Names:
    """(transformers' name of the module, weight) for a key of a text encoder; nothing for biases and counters."""
    name = key.removeprefix(prefix)
    if prefix.endswith("transformer."):
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            yield module if module.startswith("text_") else f"text_model.{module}", Target("text", key)
        return
    if name in ("text_projection", "text_projection.weight"):
        yield "text_projection", Target("text", key, transposed=name == "text_projection")
    elif name in OPEN_CLIP_KEYS and OPEN_CLIP_KEYS[name].endswith(".weight"):
        yield f"text_model.{OPEN_CLIP_KEYS[name].removesuffix('.weight')}", Target("text", key)
    elif match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._]weight", name):
        layer = f"text_model.encoder.layers.{match[1]}"
        if match[2] == "attn.in_proj":
            for third, letter in enumerate("qkv"):
                yield f"{layer}.self_attn.{letter}_proj", Target("text", key, third)
        elif match[2] in OPEN_CLIP_LAYER:
            yield f"{layer}.{OPEN_CLIP_LAYER[match[2]]}", Target("text", key)


def _flat(module: str) -> str:
    return module.replace(".", "_")
