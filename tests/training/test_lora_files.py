"""LoRA files: every kind against its definition written out, every way of naming a weight, and what is refused.

Without a host. Values are compared within 1e-6 of a weight of order 1 (float32 sums in another order), unless said otherwise.
"""

import dataclasses
import json
import logging
import pickle

import numpy as np
import pytest
import torch
import yaml
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.files import file_sha256
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.commands.demo import MODELS
from comfyui_dmm.training.config import LoraSpec
from comfyui_dmm.training.config_file import load_config
from comfyui_dmm.training.data.cache import add_text
from comfyui_dmm.training.data.rollout_data import open_rollouts
from comfyui_dmm.training.data.rollout_paths import RolloutSettings
from comfyui_dmm.training.data.rollouts import build_rollouts
from comfyui_dmm.training.files.hashing import weights_sha256
from comfyui_dmm.training.run.load import load_run
from comfyui_dmm.training.teachers.lora_files import apply_loras, recorded, split_loras, with_loras
from comfyui_dmm.training.teachers.lora_names import lora_names
from comfyui_dmm.training.teachers.models import as_checkpoint
from comfyui_dmm.training.text import ClipText, init_text
from safetensors.torch import load_file, save_file

from .families import SMALL
from .random_loras import CONVOLUTION, LINEAR, entries_of, save_lora

ATTENTION = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
"""A Linear of SMALL, (64, 64) with no bias; the next three: a 3x3 and a 1x1 convolution, and a norm, all with biases."""
CONV, CONV1, NORM = "input_blocks.1.0.in_layers.2", "input_blocks.3.1.proj_in", "out.0"
DEMO_BASE, DEMO_FULL = f"{MODELS}/dmm/demo-base.safetensors", f"{MODELS}/dmm/demo-dmm.safetensors"
DEMO_LORA = f"{MODELS}/loras/demo-frame.safetensors"


def unet(seed=0, config=SMALL):
    torch.manual_seed(seed)
    return dict(UNet(config).state_dict())


@pytest.fixture(scope="module")
def base():
    return Checkpoint(unet=unet(), text=init_text(16, 2))


def kohya(module):
    return "lora_unet_" + module.replace(".", "_")


def fold(checkpoint, tmp_path, tensors, strength=1.0, clip_strength=None, dtype=torch.float32, **options) -> Checkpoint:
    path = save_lora(tmp_path / "a.safetensors", tensors, dtype)
    return apply_loras(checkpoint, [LoraSpec(path, strength, clip_strength)], **options)


def refused(checkpoint, tmp_path, tensors, *parts):
    """The message, which names the file and all ``parts``."""
    path = tmp_path / "bad.safetensors"
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    with pytest.raises(ValueError) as error:
        apply_loras(checkpoint, [LoraSpec(str(path))])
    for part in (str(path), *parts):
        assert part in str(error.value), error.value
    return str(error.value)


# --- kinds ------------------------------------------------------------------------------------------------------------


def loops(core, rows, columns):
    """sum over r, s of rows[r, o] core[r, s, k, l] columns[s, i], one product at a time."""
    out = np.zeros((rows.shape[1], columns.shape[1], *core.shape[2:]))
    for r in range(core.shape[0]):
        for s in range(core.shape[1]):
            out += np.multiply.outer(np.multiply.outer(rows[r], columns[s]), core[r, s])
    return out


def expected(kind, e, weight, strength):
    """The kind's definition in float64: the changed weight."""
    w, e = weight.double().numpy(), {k: v.double().numpy() for k, v in e.items()}
    alpha = e.get(".alpha")
    if kind == "difference":
        return w + strength * e[".diff"]
    if kind == "locon with mid":
        rank = len(e[".lora_down.weight"])
        up, down = e[".lora_up.weight"][:, :, 0, 0].T, e[".lora_down.weight"][:, :, 0, 0]
        delta = alpha / rank * loops(e[".lora_mid.weight"], up, down)
    elif ".lora_up.weight" in e:
        up, down = e[".lora_up.weight"], e[".lora_down.weight"]
        delta = sum(np.multiply.outer(up.reshape(len(up), -1)[:, r], down[r]) for r in range(len(down)))
        delta = delta * (1 if alpha is None else alpha / len(down))
    elif kind == "loha with core":
        one, two = (loops(e[f".hada_t{n}"], e[f".hada_w{n}_a"], e[f".hada_w{n}_b"]) for n in (1, 2))
        delta = alpha / len(e[".hada_w1_b"]) * one * two
    elif ".hada_w1_a" in e:
        one, two = ((e[f".hada_w{n}_a"] @ e[f".hada_w{n}_b"]).reshape(w.shape) for n in (1, 2))
        delta = alpha / len(e[".hada_w1_b"]) * one * two
    else:
        w1 = e[".lokr_w1"] if ".lokr_w1" in e else e[".lokr_w1_a"] @ e[".lokr_w1_b"]
        scale = 1.0
        if kind == "lokr with core":
            w2 = loops(e[".lokr_t2"], e[".lokr_w2_a"], e[".lokr_w2_b"])
        else:
            w2 = e[".lokr_w2"] if ".lokr_w2" in e else e[".lokr_w2_a"] @ e[".lokr_w2_b"]
        if ".lokr_w2_b" in e:
            scale = alpha / len(e[".lokr_w2_b"])
        w2 = w2.reshape(w.shape[0] // len(w1), -1, *w.shape[2:])
        blocks = [[factor * w2 for factor in row] for row in w1]  # block (i, j) of the change is w1[i, j] w2
        delta = scale * np.concatenate([np.concatenate(row, axis=1) for row in blocks], axis=0)
    if ".dora_scale" in e:
        other = tuple(range(1, w.ndim)) if kind != "dora of inputs" else (0, *range(2, w.ndim))
        of = w if kind != "dora of inputs" else w + delta
        length = np.sqrt((of**2).sum(axis=other, keepdims=True))
        return w + strength * (e[".dora_scale"] * (w + delta) / length - w)
    return w + strength * delta


@pytest.mark.parametrize("strength", [1.0, -0.4])
@pytest.mark.parametrize("module", [ATTENTION, CONV, CONV1])
@pytest.mark.parametrize("kind", [*CONVOLUTION, "lokr with core"])
def test_every_kind_is_its_definition(base, tmp_path, kind, module, strength):
    weight = base.unet[f"{module}.weight"]
    if kind not in LINEAR and module != CONV:
        return  # cores are for kernels
    entries = entries_of(kind, tuple(weight.shape), torch.Generator().manual_seed(5))
    if f"{module}.bias" not in base.unet:
        entries.pop(".diff_b", None)
    folded = fold(base, tmp_path, {kohya(module) + end: value for end, value in entries.items()}, strength)
    want = torch.from_numpy(expected(kind, entries, weight, strength))
    torch.testing.assert_close(folded.unet[f"{module}.weight"].double(), want, rtol=0, atol=2e-6)
    assert (want - weight).abs().max() > 0.01
    changed = {f"{module}.weight"} | ({f"{module}.bias"} if ".diff_b" in entries else set())
    assert {k for k, v in folded.unet.items() if v is not base.unet[k]} == changed
    if ".diff_b" in entries:
        bias = base.unet[f"{module}.bias"] + strength * entries[".diff_b"]
        torch.testing.assert_close(folded.unet[f"{module}.bias"], bias)


def test_norms_and_a_bias_alone(base, tmp_path):
    name = kohya(NORM)
    tensors = {
        f"{name}.w_norm": torch.rand(64),
        f"{name}.b_norm": torch.rand(64),
        f"{kohya(CONV)}.diff_b": torch.rand(64),
    }
    tensors |= {"diffusion_model.out.2.bias.diff": torch.rand(4)}
    folded = fold(base, tmp_path, tensors, 0.5)
    for key, entry in (
        (f"{NORM}.weight", f"{name}.w_norm"),
        (f"{NORM}.bias", f"{name}.b_norm"),
        (f"{CONV}.bias", f"{kohya(CONV)}.diff_b"),
    ):
        torch.testing.assert_close(folded.unet[key], base.unet[key] + 0.5 * tensors[entry])
    assert folded.unet[f"{CONV}.weight"] is base.unet[f"{CONV}.weight"]
    torch.testing.assert_close(
        folded.unet["out.2.bias"], base.unet["out.2.bias"] + 0.5 * tensors["diffusion_model.out.2.bias.diff"]
    )


def test_a_matrix_for_a_1x1_convolution_and_flattened_kernels(base, tmp_path):
    up, down = torch.randn(64, 2), torch.randn(2, 64)
    folded = fold(base, tmp_path, {f"{kohya(CONV1)}.lora_up.weight": up, f"{kohya(CONV1)}.lora_down.weight": down})
    torch.testing.assert_close(
        folded.unet[f"{CONV1}.weight"], base.unet[f"{CONV1}.weight"] + (up @ down)[:, :, None, None]
    )


def test_several_loras_add_up_and_dora_comes_in_order(base, tmp_path):
    g = torch.Generator().manual_seed(1)
    paths = [
        save_lora(
            tmp_path / f"{kind}.safetensors",
            {kohya(ATTENTION) + end: v for end, v in entries_of(kind, (64, 64), g).items()},
        )
        for kind in ("lora", "loha", "dora")
    ]
    key = f"{ATTENTION}.weight"

    def weight(*which):
        return apply_loras(base, [LoraSpec(paths[i], 0.5 + i) for i in which]).unet[key]

    plain = base.unet[key]
    torch.testing.assert_close(weight(0, 1) - plain, (weight(0) - plain) + (weight(1) - plain), rtol=0, atol=2e-6)
    torch.testing.assert_close(weight(0, 0) - plain, 2 * (weight(0) - plain), rtol=0, atol=2e-6)
    assert (weight(0, 2) - weight(2, 0)).abs().max() > 0.01
    step = dataclasses.replace(base, unet={**base.unet, key: weight(0)})
    torch.testing.assert_close(weight(0, 2), apply_loras(step, [LoraSpec(paths[2], 2.5)]).unet[key], rtol=0, atol=2e-6)


def test_precision_and_what_is_shared(base, tmp_path):
    half = dataclasses.replace(base, unet={k: v.half() for k, v in base.unet.items()})
    tensors = {
        kohya(ATTENTION) + end: v for end, v in entries_of("lora", (64, 64), torch.Generator().manual_seed(1)).items()
    }
    full = fold(half, tmp_path, tensors, dtype=torch.float16)
    key = f"{ATTENTION}.weight"
    assert full.unet[key].dtype == torch.float16
    path = str(tmp_path / "a.safetensors")
    exact = apply_loras(half, [LoraSpec(path)], torch.float32).unet[key]
    assert (
        exact.dtype == torch.float32
        and torch.equal(full.unet[key], exact.half())
        and not torch.equal(exact, exact.half().float())
    )
    twice = apply_loras(half, [LoraSpec(path), LoraSpec(path)]).unet[key]  # rounded once, at the end
    assert torch.equal(twice, apply_loras(half, [LoraSpec(path), LoraSpec(path)], torch.float32).unet[key].half())
    nothing = apply_loras(half, [LoraSpec(path, 0.0)])
    assert all(nothing.unet[k] is v for k, v in half.unet.items())
    assert torch.equal(half.unet[key], base.unet[key].half())  # the caller's stay as they are


# --- names ------------------------------------------------------------------------------------------------------------

SDXL = UNetConfig(
    channel_mult=(1, 2, 4), num_res_blocks=(2, 2, 2), depth_input=(0, 0, 2, 2, 10, 10), depth_middle=10,
    depth_output=(10, 10, 10, 2, 2, 2, 0, 0, 0), context_dim=2048, linear_proj=True, adm_channels=2816,
)  # fmt: skip


@pytest.fixture(scope="module")
def names():
    """Of the released SD1.5 and SDXL."""

    def of(config):
        with torch.device("meta"):
            return lora_names(Checkpoint(unet=dict(UNet(config).state_dict())))

    return {"sd15": of(UNetConfig()), "sdxl": of(SDXL)}


@pytest.mark.parametrize(
    "model, name, key",
    [
        ("sd15", "lora_unet_down_blocks_0_attentions_0_T_0_attn1_to_q", "input_blocks.1.1.T.0.attn1.to_q"),
        ("sd15", "lora_unet_down_blocks_2_attentions_1_proj_in", "input_blocks.8.1.proj_in"),
        ("sd15", "lora_unet_down_blocks_1_resnets_0_conv1", "input_blocks.4.0.in_layers.2"),
        ("sd15", "lora_unet_down_blocks_1_resnets_0_conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("sd15", "lora_unet_down_blocks_0_downsamplers_0_conv", "input_blocks.3.0.op"),
        ("sd15", "lora_unet_mid_block_attentions_0_T_0_ff_net_0_proj", "middle_block.1.T.0.ff.net.0.proj"),
        ("sd15", "lora_unet_mid_block_resnets_1_time_emb_proj", "middle_block.2.emb_layers.1"),
        ("sd15", "lora_unet_up_blocks_1_attentions_2_T_0_attn2_to_out_0", "output_blocks.5.1.T.0.attn2.to_out.0"),
        ("sd15", "lora_unet_up_blocks_3_attentions_2_proj_out", "output_blocks.11.1.proj_out"),
        ("sd15", "lora_unet_up_blocks_0_upsamplers_0_conv", "output_blocks.2.1.conv"),
        ("sd15", "lora_unet_up_blocks_1_upsamplers_0_conv", "output_blocks.5.2.conv"),
        ("sd15", "lora_unet_time_embedding_linear_1", "time_embed.0"),
        ("sd15", "lora_unet_conv_in", "input_blocks.0.0"),
        ("sd15", "lora_unet_output_blocks_3_1_T_0_attn2_to_k", "output_blocks.3.1.T.0.attn2.to_k"),
        ("sd15", "unet.down_blocks.0.attentions.0.T.0.attn1.processor.to_q", "input_blocks.1.1.T.0.attn1.to_q"),
        ("sd15", "unet.up_blocks.3.attentions.2.T.0.attn1.processor.to_out", "output_blocks.11.1.T.0.attn1.to_out.0"),
        ("sd15", "unet.up_blocks.3.attentions.2.T.0.attn1.to_out.0", "output_blocks.11.1.T.0.attn1.to_out.0"),
        ("sd15", "down_blocks.0.attentions.0.T.0.attn1.to_v", "input_blocks.1.1.T.0.attn1.to_v"),
        ("sd15", "lycoris_down_blocks_0_attentions_0_proj_in", "input_blocks.1.1.proj_in"),
        ("sd15", "diffusion_model.middle_block.1.proj_in", "middle_block.1.proj_in"),
        ("sdxl", "lora_unet_down_blocks_1_attentions_0_T_1_attn2_to_k", "input_blocks.4.1.T.1.attn2.to_k"),
        ("sdxl", "lora_unet_down_blocks_2_attentions_1_T_9_ff_net_2", "input_blocks.8.1.T.9.ff.net.2"),
        ("sdxl", "lora_unet_input_blocks_8_1_T_9_ff_net_2", "input_blocks.8.1.T.9.ff.net.2"),
        ("sdxl", "lora_unet_up_blocks_0_attentions_2_proj_in", "output_blocks.2.1.proj_in"),
        ("sdxl", "lora_unet_up_blocks_0_upsamplers_0_conv", "output_blocks.2.2.conv"),
        ("sdxl", "unet.add_embedding.linear_1", "label_emb.0.0"),
        ("sdxl", "lora_unet_label_emb_0_0", "label_emb.0.0"),
    ],
)  # fmt: skip
def test_names_of_the_released_models(names, model, name, key):
    name, key = (text.replace("T", "transformer_blocks") for text in (name, key))
    target = names[model][name]
    assert (target.part, target.key, target.third) == ("unet", f"{key}.weight", None)


def test_every_weight_has_its_names(names):
    for model in names.values():
        keys = {target.key for target in model.values()}
        for begin in ("lora_unet_", "lycoris_", "unet.", "diffusion_model."):
            assert {t.key for n, t in model.items() if n.startswith(begin)} >= {
                k for k in keys if k.endswith(".weight")
            }


SUFFIXES = [
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
]


@pytest.mark.parametrize("up, down", SUFFIXES)
def test_every_spelling_of_up_and_down(base, tmp_path, up, down):
    """PEFT's A is down (r, in) and its B is up (out, r)."""
    diffusers = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    b, a = torch.randn(64, 2), torch.randn(2, 64)
    for name in (f"{diffusers}.to_q", f"{diffusers}.processor.to_q", kohya(ATTENTION)):
        folded = fold(base, tmp_path, {name + up: b, name + down: a}, 0.5)
        torch.testing.assert_close(folded.unet[f"{ATTENTION}.weight"], base.unet[f"{ATTENTION}.weight"] + 0.5 * b @ a)


# --- text encoders ----------------------------------------------------------------------------------------------------


def open_clip(prefix, width=16, layers=2, seed=3):
    g = torch.Generator().manual_seed(seed)
    shapes = {"positional_embedding": (77, width), "token_embedding.weight": (50, width), "ln_final.weight": (width,)}
    for n in range(layers):
        block = f"transformer.resblocks.{n}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}.attn.out_proj.weight": (width, width), f"{block}.mlp.c_fc.weight": (4 * width, width)}
        shapes |= {f"{block}.mlp.c_proj.weight": (width, 4 * width), f"{block}.ln_1.weight": (width,)}
    shapes["text_projection"] = (width, width)
    return {prefix + k: torch.randn(s, generator=g) for k, s in shapes.items()}


def sdxl_text():
    first = {k.replace("cond_stage_model", "conditioner.embedders.0"): v for k, v in init_text(16, 2).items()}
    return first | open_clip("conditioner.embedders.1.model.")


LAYER = "text_model.encoder.layers.1"
SD1_LAYER = "cond_stage_model.transformer.text_model.encoder.layers.1"


@pytest.mark.parametrize("begin", ["lora_te_", "lora_te1_", "text_encoder."])
@pytest.mark.parametrize(
    "module, shape", [("self_attn.k_proj", (16, 16)), ("self_attn.out_proj", (16, 16)), ("mlp.fc1", (64, 16))]
)
def test_sd1_text(base, tmp_path, begin, module, shape):
    name = begin + (f"{LAYER}.{module}" if begin.endswith(".") else f"{LAYER}.{module}".replace(".", "_"))
    tensors = {f"{name}.lora_up.weight": torch.randn(shape[0], 2), f"{name}.lora_down.weight": torch.randn(2, shape[1])}
    delta = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    key = f"{SD1_LAYER}.{module}.weight"
    folded = fold(base, tmp_path, tensors, 1.0, 0.25)
    torch.testing.assert_close(folded.text[key], base.text[key] + 0.25 * delta)
    assert {k for k, v in folded.text.items() if v is not base.text[k]} == {key}
    torch.testing.assert_close(fold(base, tmp_path, tensors, 0.5).text[key], base.text[key] + 0.5 * delta)
    assert fold(base, tmp_path, tensors, 1.0, 0.0).text[key] is base.text[key]
    old = dataclasses.replace(
        base, text={k.replace("text_model.", ""): v for k, v in base.text.items()}
    )  # SD1.4's own files
    torch.testing.assert_close(
        fold(old, tmp_path, tensors).text[key.replace("text_model.", "")], base.text[key] + delta
    )


@pytest.mark.parametrize("part, third", [("q", 0), ("k", 1), ("v", 2)])
@pytest.mark.parametrize(
    "prefix, begins",
    [
        ("cond_stage_model.model.", ("lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_h.transformer.")),
        ("conditioner.embedders.1.model.", ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.")),
    ],
)
def test_a_third_of_open_clips_joint_weight(tmp_path, prefix, begins, part, third):
    text = open_clip(prefix) if prefix.startswith("cond") else sdxl_text()
    checkpoint = Checkpoint(unet=unet(), text=text)
    for begin in begins:
        module = f"{LAYER}.self_attn.{part}_proj"
        name = begin + (module if begin.endswith(".") else module.replace(".", "_"))
        up, down, bias = torch.randn(16, 2), torch.randn(2, 16), torch.randn(16)
        folded = fold(
            checkpoint,
            tmp_path,
            {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.diff_b": bias},
        )
        for kind, delta in (("weight", up @ down), ("bias", bias)):
            key = f"{prefix}transformer.resblocks.1.attn.in_proj_{kind}"
            change, rows = folded.text[key] - text[key], slice(16 * third, 16 * third + 16)
            torch.testing.assert_close(change[rows], delta, rtol=0, atol=2e-6)
            change[rows] = 0
            assert not change.any()
        assert sum(v is not text[k] for k, v in folded.text.items()) == 2


def test_other_modules_of_open_clip(tmp_path):
    text, prefix = sdxl_text(), "conditioner.embedders.1.model."
    checkpoint = Checkpoint(unet=unet(), text=text)
    named = {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": ("transformer.resblocks.0.mlp.c_fc.weight", (64, 16)),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": ("transformer.resblocks.0.mlp.c_proj.weight", (16, 64)),
        "lora_te2_text_model_encoder_layers_1_self_attn_out_proj": (
            "transformer.resblocks.1.attn.out_proj.weight",
            (16, 16),
        ),
        "text_encoders.clip_g.transformer.text_model.embeddings.token_embedding": ("token_embedding.weight", (50, 16)),
    }
    tensors = {f"{name}.diff": torch.randn(shape) for name, (_, shape) in named.items()}
    tensors["lora_te2_text_projection.diff"] = torch.randn(16, 16)
    folded = fold(checkpoint, tmp_path, tensors)
    for name, (key, _) in named.items():
        torch.testing.assert_close(folded.text[prefix + key], text[prefix + key] + tensors[f"{name}.diff"])
    key = f"{prefix}text_projection"  # (in, out) in the file
    torch.testing.assert_close(folded.text[key], text[key] + tensors["lora_te2_text_projection.diff"].T)
    first = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.diff": torch.randn(64, 16)}
    changed = {k for k, v in fold(checkpoint, tmp_path, first).text.items() if v is not text[k]}
    assert changed == {"conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight"}


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_demo_lora(caplog):
    checkpoint, lora = load_checkpoint(DEMO_BASE), load_file(DEMO_LORA)
    folded = apply_loras(checkpoint, [LoraSpec(DEMO_LORA, 0.8)], torch.float32)
    changed = [k for k, v in folded.unet.items() if v is not checkpoint.unet[k]]
    assert len(changed) == len(lora) / 3 == 80 and not caplog.records
    for key in changed:
        up, down, alpha = (
            lora[f"{kohya(key.removesuffix('.weight'))}.{end}"].double()
            for end in ("lora_up.weight", "lora_down.weight", "alpha")
        )
        want = checkpoint.unet[key].double() + 0.8 * alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(
            checkpoint.unet[key].shape
        )
        torch.testing.assert_close(folded.unet[key].double(), want, rtol=0, atol=1e-6)


def lora_entries(name=kohya(ATTENTION), up=(64, 2), down=(2, 64)):
    return {f"{name}.lora_up.weight": torch.randn(up), f"{name}.lora_down.weight": torch.randn(down)}


def test_keys_that_do_not_fit_are_counted_once(base, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    strange = lora_entries("lora_unet_input_blocks_9_1_proj_in") | lora_entries("lora_te3_x")
    folded = fold(base, tmp_path, lora_entries() | strange)
    (record,) = caplog.records
    assert "4 of 6 keys do not fit" in record.getMessage() and "'lora_te3_x.lora_down.weight'" in record.getMessage()
    assert sum(v is not base.unet[k] for k, v in folded.unet.items()) == 1


@pytest.mark.parametrize(
    "tensors, parts",
    [
        (lora_entries("lora_of_flux"), ["none of its 2 keys fits", "'lora_of_flux.lora_down.weight'"]),
        ({}, ["none of its 0 keys"]),
        ({f"{kohya(ATTENTION)}.lora_up.weight": torch.ones(64, 2)}, [".lora_up.weight' has no counterpart 'down'"]),
        ({f"{kohya(ATTENTION)}.lora_down.weight": torch.ones(2, 64)}, [".lora_down.weight' has no counterpart 'up'"]),
        (lora_entries(down=(2, 32)), [".lora_down.weight' (2, 32)", "shape (64, 64)"]),
        (lora_entries(down=(3, 64)), [".lora_up.weight' (64, 2)", "(3, 64)"]),
        (lora_entries(up=(64, 0), down=(0, 64)), ["do not fit"]),
        (lora_entries(up=(32, 2), down=(2, 128)), ["do not fit a weight of shape (64, 64)"]),  # as many numbers, another shape
        (lora_entries() | {f"{kohya(ATTENTION)}.alpha": torch.ones(2)}, [".alpha' has shape (2,), expected one number"]),
        (lora_entries() | {f"{kohya(ATTENTION)}.alpha": torch.tensor(float("nan"))}, [".alpha' holds NaN"]),
        ({k: v / 0 for k, v in lora_entries().items()}, ["holds NaN or infinity"]),
        ({k: v.to(torch.int32) for k, v in lora_entries().items()}, ["torch.int32, expected floating point"]),
        ({f"{kohya(CONV)}.diff": torch.ones(64, 64)}, [".diff' (64, 64)", "(64, 64, 3, 3)"]),
        ({f"{kohya(CONV)}.diff": torch.ones(64, 576)}, [".diff' (64, 576)", "(64, 64, 3, 3)"]),
        ({f"{kohya(CONV)}.diff_b": torch.ones(32)}, [".diff_b' (32,) does not fit a bias of shape (64,)"]),
        ({f"{kohya(ATTENTION)}.diff_b": torch.ones(64)}, [".diff_b' is for a bias that the model does not have"]),
        (lora_entries() | {f"{kohya(ATTENTION)}.dora_scale": torch.ones(64)}, [".dora_scale' (64,) does not fit"]),
        (lora_entries() | {f"{kohya(ATTENTION)}.dora_scale": torch.ones(1, 32)}, [".dora_scale' (1, 32) does not fit"]),
        ({f"{kohya(ATTENTION)}.dora_scale": torch.ones(64, 1)}, ["has no LoRA, LoHa or LoKr to go with"]),
        (lora_entries() | {f"{kohya(ATTENTION)}.diff": torch.ones(64, 64)}, ["LoRA and a difference for one weight"]),
        ({f"{kohya(ATTENTION)}.hada_w1_a": torch.ones(64, 2)}, ["has no counterpart 'hada_w1_b'"]),
        ({f"{kohya(ATTENTION)}.lokr_w1": torch.ones(2, 2)}, ["'lokr_w2' is missing"]),
        ({f"{kohya(ATTENTION)}.lokr_w{n}": torch.ones(8, 4) for n in "12"}, ["do not fit"]),
        ({f"{kohya(ATTENTION)}.oft_blocks": torch.ones(4, 16, 16)}, [".oft_blocks' is of the kind OFT or BOFT"]),
        ({f"{kohya(ATTENTION)}.a1.weight": torch.ones(4, 16)}, ["of the kind GLoRA"]),
        (lora_entries() | {f"{kohya(ATTENTION)}.lora_magnitude_vector": torch.ones(64)}, ["DoRA as PEFT writes it"]),
        (lora_entries() | {f"{kohya(ATTENTION)}.set_weight": torch.ones(64, 64)}, ["a replacement of weights"]),
        (lora_entries() | {f"{kohya(ATTENTION)}.wavelet.low": torch.ones(64, 64)}, ["LoRA files with '.wavelet.low' are not read here"]),
        (lora_entries() | lora_entries(f"diffusion_model.{ATTENTION}"), ["are the same entry for one weight"]),
        (lora_entries() | {k: 1e25 * v for k, v in lora_entries(kohya(CONV1)).items()}, ["becomes NaN or infinite"]),
    ],
)  # fmt: skip
def test_refusals_name_file_and_key(base, tmp_path, tensors, parts):
    before = weights_sha256(base.unet)
    refused(base, tmp_path, tensors, *parts)
    assert weights_sha256(base.unet) == before


def test_a_text_lora_needs_a_text_encoder(base, tmp_path):
    tensors = lora_entries("lora_te_text_model_encoder_layers_0_mlp_fc1", (64, 2), (2, 16))
    message = refused(
        dataclasses.replace(base, text={}), tmp_path, tensors, "for a text encoder, and the model has none"
    )
    assert "other kind" not in message


def test_only_safetensors(base, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        apply_loras(base, [LoraSpec(str(tmp_path / "no.safetensors"))])
    with pytest.raises(ValueError, match="is a folder"):
        apply_loras(base, [LoraSpec(str(tmp_path))])
    (tmp_path / "p.safetensors").write_bytes(pickle.dumps({"a": 1}) + bytes(100))
    with pytest.raises(ValueError, match="is a pickle"):
        apply_loras(base, [LoraSpec(str(tmp_path / "p.safetensors"))])
    path = save_lora(tmp_path / "cut.safetensors", lora_entries())
    with open(path, "rb+") as file:
        file.truncate(700)
    with pytest.raises(ValueError, match="is cut off"):
        apply_loras(base, [LoraSpec(path)])
    for strength in (float("nan"), "strong", True):
        with pytest.raises(ValueError, match="strength is"):
            apply_loras(base, [LoraSpec(path, strength)])


@pytest.mark.parametrize("kind", [*CONVOLUTION, "lokr with core"])
def test_any_wrong_shape_is_a_value_error(base, tmp_path, kind):
    """One size of one tensor changed, a dimension dropped or added, to all tensors in turn; what still fits by its numbers must load."""
    module = CONV
    entries = entries_of(kind, tuple(base.unet[f"{module}.weight"].shape), torch.Generator().manual_seed(2))
    tried = wrong = 0
    for end, value in entries.items():
        shapes = [
            tuple(s + d if i == j else s for j, s in enumerate(value.shape))
            for i in range(value.ndim)
            for d in (-1, 1, 7)
        ]
        shapes += [value.shape[1:], (1, *value.shape), (*value.shape, 2), (), (0,), (10**5, 1)]
        for shape in shapes:
            tensors = {kohya(module) + k: v for k, v in entries.items()} | {kohya(module) + end: torch.ones(shape)}
            tried += 1
            try:
                fold(base, tmp_path, tensors)
            except ValueError as error:
                assert str(tmp_path) in str(error) and kohya(module) in str(error), error
                wrong += 1
    assert wrong >= tried - 5 and tried > 10, (tried, wrong)  # an alpha of (), (1,), or a rank-less shape may be right


def test_a_huge_product_is_refused_before_it_is_made(base, tmp_path):
    """Two vectors of 8 MB whose product has 4e12 numbers."""
    wide = {
        f"{kohya(ATTENTION)}.lora_up.weight": torch.ones(2_000_000, 1),
        f"{kohya(ATTENTION)}.lora_down.weight": torch.ones(1, 2_000_000),
    }
    refused(base, tmp_path, wide, "do not fit")
    refused(base, tmp_path, {f"{kohya(ATTENTION)}.lokr_w{n}": torch.ones(1000, 1000) for n in (1, 2)}, "do not fit")


# --- the text form ----------------------------------------------------------------------------------------------------


def test_the_text_form(tmp_path):
    for name in ("a.safetensors", "a+b.safetensors", "folder"):
        (tmp_path / name).touch()
    a, ab, folder = (str(tmp_path / name) for name in ("a.safetensors", "a+b.safetensors", "folder"))
    assert split_loras(a) == (a, []) and split_loras(ab) == (ab, [])
    for file in (a, ab, folder):
        loras = [
            LoraSpec("x+y.safetensors", 0.8),
            LoraSpec("/l/z:1.safetensors"),
            LoraSpec("w.safetensors", -0.5, 0.25),
        ]
        text = with_loras(file, loras)
        assert split_loras(text) == (file, loras), text
    assert with_loras(a, [LoraSpec("x.safetensors", 0.5, 0.5)]) == f"{a}+x.safetensors:0.5"
    assert split_loras(f"{tmp_path}/no.safetensors+x.safetensors") == (f"{tmp_path}/no.safetensors+x.safetensors", [])
    with pytest.raises(ValueError, match="'x.safetensors:strong': expected a strength"):
        split_loras(f"{a}+x.safetensors:strong")


def test_what_is_recorded(tmp_path):
    (tmp_path / "sd15.safetensors").write_bytes(b"weights")
    file = str(tmp_path / "sd15.safetensors")
    assert recorded(file, []) == ("sd15.safetensors", file_sha256(file))
    loras = [LoraSpec("/l/ink.safetensors"), LoraSpec("pen.safetensors", 0.5)]
    assert recorded(file, loras) == ("sd15.safetensors + ink.safetensors + pen.safetensors:0.5", "")
    assert recorded(file, loras * 10) == ("sd15.safetensors + 20 LoRAs", "")


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(base, tmp_path):
    """A base with a text encoder, a UNet without one, a UNet LoRA, a text LoRA, captioned latents."""
    save_checkpoint(tmp_path / "base.safetensors", base)
    save_checkpoint(tmp_path / "other.safetensors", Checkpoint(unet=unet(7)))
    save_lora(tmp_path / "look.safetensors", lora_entries())
    save_lora(
        tmp_path / "words.safetensors",
        lora_entries() | lora_entries("lora_te_text_model_encoder_layers_0_mlp_fc1", (64, 2), (2, 16)),
    )
    captions = json.dumps([f"a picture of {i % 3}" for i in range(10)])
    save_file({"latents": torch.randn(10, 4, 8, 8)}, tmp_path / "data.safetensors", {"captions": captions})
    return tmp_path


TEACHERS = [
    {"name": "look", "loras": [{"file": "look.safetensors"}]},
    {"name": "weak", "loras": [{"file": "look.safetensors", "strength": 0.3}]},
    {
        "name": "words",
        "loras": [{"file": "look.safetensors"}, {"file": "words.safetensors", "strength": 0.5, "clip_strength": 1}],
    },
    {"name": "other", "file": "other.safetensors", "loras": [{"file": "words.safetensors"}]},
]


def config(folder, teachers=TEACHERS, **changes):
    values = {
        "base": "base.safetensors", "teachers": teachers, "output": "out/dmm.safetensors", "run_dir": "out/run",
        "data": {"kind": "latents", "file": "data.safetensors"},
        "train": {"steps": 2, "batch_size": 4, "device": "cpu", "lambda_adv": 0.0, "validation": 0},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump({**values, **changes}))
    return folder / "run.yaml"


def test_teachers_of_a_run(base, folder):
    run = load_run(load_config(config(folder)), torch.device("cpu"))
    look, weak, words, other = run.teachers
    key = f"{ATTENTION}.weight"
    delta = {n: load_file(folder / f"{n}.safetensors") for n in ("look", "words")}
    delta = {
        n: t[f"{kohya(ATTENTION)}.lora_up.weight"] @ t[f"{kohya(ATTENTION)}.lora_down.weight"] for n, t in delta.items()
    }
    plain = base.unet[key]
    for teacher, want in (
        (run.base, plain), (look, plain + delta["look"]), (weak, plain + 0.3 * delta["look"]),
        (words, plain + delta["look"] + 0.5 * delta["words"]), (other, unet(7)[key] + delta["words"]),
    ):  # fmt: skip
        torch.testing.assert_close(teacher.unet.state_dict()[key], want, rtol=0, atol=2e-6)
    torch.testing.assert_close(weak.unet.state_dict()["out.2.weight"], base.unet["out.2.weight"])
    assert [t.file for t in run.teachers] == [
        "base.safetensors + look.safetensors",
        "base.safetensors + look.safetensors:0.3",
        "base.safetensors + look.safetensors + words.safetensors:0.5:1",
        "other.safetensors + words.safetensors",
    ]
    assert len({t.sha256 for t in run.teachers}) == 4 and look.sha256 == weights_sha256(look.unet.state_dict())
    assert run.base.sha256 == file_sha256(folder / "base.safetensors")
    assert look.contexts is run.base.contexts  # one encoding for those who share an encoder
    patched = ClipText(apply_loras(base, [LoraSpec(str(folder / "words.safetensors"))]).text)
    torch.testing.assert_close(words.contexts, patched.encode(run.data.prompts), rtol=0, atol=1e-5)
    assert words.contexts is other.contexts and (words.contexts - look.contexts).abs().max() > 0.01


def test_distil_and_dry_run(folder, capsys, caplog):
    path = config(folder)
    assert main(["distill", "--config", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert str(folder / "words.safetensors") in printed and not (folder / "out").exists()
    assert main(["distill", "--config", str(path)]) == 0
    styles = load_checkpoint(folder / "out" / "dmm.safetensors").styles
    assert styles[1].teacher == "base.safetensors + look.safetensors:0.3" and len(styles[1].sha256) == 64
    save_lora(folder / "look.safetensors", lora_entries(down=(2, 32)))
    assert main(["distill", "--config", str(path), "--dry-run"]) == 1
    assert "look.safetensors" in (message := capsys.readouterr().err) and "(2, 32)" in message


@pytest.mark.parametrize(
    "teacher, message",
    [
        ({"name": "A"}, "teacher 'A' has neither a file nor loras"),
        ({"name": "A", "loras": []}, "teacher 'A' has neither a file nor loras"),
        ({"name": "A", "loras": "look.safetensors"}, r"teachers\[0\].loras must be a list"),
        ({"name": "A", "loras": None}, r"teachers\[0\].loras must be a list"),
        ({"name": "A", "loras": ["look.safetensors"]}, r"teachers\[0\].loras\[0\] must be a mapping"),
        ({"name": "A", "loras": [{"strength": 1}]}, r"teachers\[0\].loras\[0\] lacks the settings file"),
        ({"name": "A", "loras": [{"file": ""}]}, "LoRA's file is ''"),
        ({"name": "A", "loras": [{"file": 3}]}, "file is 3, which YAML reads as a number"),
        ({"name": "A", "loras": [{"file": "look.safetensors", "strenght": 1}]}, "did you mean 'strength'"),
        ({"name": "A", "loras": [{"file": "look.safetensors", "strength": "much"}]}, "strength is 'much'"),
        ({"name": "A", "loras": [{"file": "look.safetensors", "clip_strength": float("inf")}]}, "clip_strength is inf"),
        ({"name": "A", "loras": [{"file": "no.safetensors"}]}, "LoRA of teacher 'A': there is no file"),
    ],
)
def test_mistakes_in_a_config(folder, teacher, message):
    with pytest.raises(ValueError, match=message):
        load_config(config(folder, [teacher]))


# --- caches -----------------------------------------------------------------------------------------------------------


def test_rollouts_of_lora_teachers(base, folder):
    """Painted by the patched UNet under the patched encoder; the config's teachers, made another way, are recognised."""
    texts = {
        "look": f"{folder}/base.safetensors+{folder}/look.safetensors",
        "other": f"{folder}/other.safetensors+{folder}/words.safetensors",
    }
    settings = RolloutSettings(paths=2, base_share=0.0, states=1, sizes=((64, 64),), steps=2, batch_size=2)
    build_rollouts(folder / "cache", f"{folder}/base.safetensors", texts, ["a cat", "a dog"], settings=settings)
    owners = open_rollouts(folder / "cache").owners
    assert owners["other"].file == "other.safetensors + words.safetensors" and owners["other"].sha256 == ""
    assert owners["other"].text != owners["look"].text
    teachers = [TEACHERS[0], TEACHERS[3]]
    data = {"kind": "cache", "file": "cache"}
    loaded = load_run(load_config(config(folder, teachers, data=data)), torch.device("cpu"))
    want = ClipText(as_checkpoint(texts["other"], base).text).encode(loaded.data.prompts)
    rows = torch.arange(len(loaded.data.prompts))
    torch.testing.assert_close(loaded.teachers[1].contexts[rows], want, rtol=0, atol=5e-3)  # float16 on disk
    with pytest.raises(ValueError, match="were not painted by teacher 'weak'"):
        load_run(load_config(config(folder, [TEACHERS[1]], data=data)), torch.device("cpu"))


def test_the_command_that_adds_a_patched_text_encoder(folder):
    """For a UNet LoRA nothing is missing; for a text LoRA the message names a command that works, even where the teacher has no encoder."""
    settings = RolloutSettings(paths=2, base_share=0.0, states=1, sizes=((64, 64),), steps=2, batch_size=2)
    plain = {"other": f"{folder}/other.safetensors"}
    build_rollouts(folder / "cache", f"{folder}/base.safetensors", plain, ["a cat", "a dog"], settings=settings)
    words = {
        "name": "words",
        "file": "other.safetensors",
        "loras": [{"file": "words.safetensors", "strength": 0.0, "clip_strength": 1.0}],
    }
    run = load_config(config(folder, [words], data={"kind": "cache", "file": "cache"}))
    with pytest.raises(ValueError, match="This adds it: dmm cache text") as error:
        load_run(run, torch.device("cpu"))
    named = str(error.value).split("--teacher ")[1]
    assert named == f"{folder}/base.safetensors+{folder}/words.safetensors:0:1"
    assert add_text(folder / "cache", [named]) == 1
    assert load_run(run, torch.device("cpu")).teachers[0].contexts is not None
