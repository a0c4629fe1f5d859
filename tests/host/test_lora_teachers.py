"""LoRA teachers: a LoRA folded in headless, and one on a MODEL's socket, are the host's own patched model.

Weights are compared within 1e-5 of the largest, outputs of one UNet call, recorded while the host's KSampler runs, within
1e-4 of the largest (float32 sums in another order; seen: 2e-6), texts within 1e-4.
"""

import dataclasses
import logging

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import save_checkpoint
from comfyui_dmm.training.config import LoraSpec
from comfyui_dmm.training.teachers.lora_files import apply_loras
from comfyui_dmm.training.teachers.teacher import plain_unet
from comfyui_dmm.training.text import ClipText
from safetensors.torch import load_file

from ..training.random_loras import CONVOLUTION, mixed_lora, save_lora
from .families import FAMILIES, checkpoint_of, random_unet
from .sampling import conditioning, sample, watch

PLAIN = {name: dataclasses.replace(config, num_styles=0) for name, config in FAMILIES.items()}
PROMPTS = ["", "a red star on hills", "word " * 80]


@pytest.fixture(scope="module")
def family(host):
    """Of a name: (config, plain checkpoint, the host's MODEL and CLIP of it), made once."""
    from comfyui_dmm.nodes import host_model

    made = {}

    def get(name):
        if name not in made:
            checkpoint = checkpoint_of(random_unet(PLAIN[name]), whole=name in ("demo", "small sd20", "small sdxl"))
            with torch.inference_mode():
                made[name] = PLAIN[name], checkpoint, host_model.build_model(checkpoint), float_clip(host, checkpoint)
        return made[name]

    return get


def float_clip(host, checkpoint):
    """The host's CLIP of a checkpoint, in float32: unasked it holds text encoders in float16."""
    from comfyui_dmm.nodes import host_model

    config, _ = host_model.model_config(host_model.plain_unet(checkpoint), checkpoint.config)
    weights = config.process_clip_state_dict({k: v.clone() for k, v in checkpoint.text.items()})
    if not weights:
        return None
    options = {"dtype": torch.float32, **host_model.text_model_options(weights)}
    return host.sd.CLIP(
        config.clip_target(state_dict=checkpoint.text), state_dict=weights, model_options=options, parameters=1
    )


def diffusers(model) -> dict[str, str]:
    """diffusers' module name -> the single file's, by the host's own table."""
    import comfy.utils

    table = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    modules = {k.removesuffix(".weight"): v.removesuffix(".weight") for k, v in table.items() if k.endswith(".weight")}
    return {
        k: v for k, v in modules.items() if not k.startswith("class_embedding.")
    }  # its other name for add_embedding


def processor(name):
    name = name.replace(".to_", ".processor.to_")
    return "unet." + (name.removesuffix(".0") if name.endswith("to_out.0") else name)


def names_of(style, checkpoint, model) -> dict[str, str]:
    """Name in a LoRA file of this style -> weight."""
    single = [k.removesuffix(".weight") for k in checkpoint.unet if k.endswith(".weight")]
    if style == "kohya, single file":
        names = {"lora_unet_" + k.replace(".", "_"): k for k in single}
    elif style == "plain":
        names = {f"diffusion_model.{k}": k for k in single}
    else:
        spell = {
            "kohya, diffusers": lambda k: "lora_unet_" + k.replace(".", "_"),
            "lycoris": lambda k: "lycoris_" + k.replace(".", "_"),
            "diffusers": processor,
            "diffusers, bare": lambda k: processor(k).removeprefix("unet."),
        }[style]
        names = {
            spell(theirs): ours for theirs, ours in diffusers(model).items() if f"{ours}.weight" in checkpoint.unet
        }
    return {name: f"{k}.weight" for name, k in names.items()}


STYLES = ("kohya, single file", "plain", "kohya, diffusers", "lycoris", "diffusers", "diffusers, bare")


def host_patched(host, model, clip, path, strength, clip_strength=None):
    clip_strength = strength if clip_strength is None else clip_strength
    return host.sd.load_lora_for_models(model, clip, load_file(path), strength, clip_strength)


def assert_same_weights(ours, model, before, least):
    """All weights as the host computes them, of which at least a share ``least`` has changed."""
    from comfyui_dmm.nodes.weights import unet_weights

    theirs, changed = unet_weights(model), 0
    assert theirs.keys() == ours.keys()
    for key, weight in theirs.items():
        atol = 1e-5 * max(weight.abs().max().item(), 1e-3)
        torch.testing.assert_close(ours[key].float(), weight, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
        changed += (weight - before[key]).abs().max().item() > 100 * atol
    assert changed >= least * len(theirs), f"{changed} of {len(theirs)} weights changed"


@torch.no_grad()
def assert_same_eps(config, model, unet, other):
    """Two steps of the host's sampler; ``other``: a UNet that must not give the same."""
    with watch(model) as calls:
        sample(model, conditioning(config, 1), conditioning(config, 2), batch=2)
    assert len(calls) == 2
    for call in calls:
        ours, plain = (u(call.x, call.t, call.context, call.y) for u in (unet, other))
        scale = call.out.abs().max().item()
        torch.testing.assert_close(ours, call.out, rtol=0, atol=1e-4 * scale)
        assert (plain - call.out).abs().max() > 50 * 1e-4 * scale, "the LoRA does not show in this test"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["demo", "small sd20", "small sdxl"])
def test_every_key_style_is_the_hosts_patched_model(host, family, tmp_path, caplog, name, style):
    """Every kind in turn over all weights that the style can name."""
    config, checkpoint, model, _ = family(name)
    names = names_of(style, checkpoint, model)
    shapes = {name: tuple(checkpoint.unet[key].shape) for name, key in names.items()}
    biases = {name for name, key in names.items() if key.replace(".weight", ".bias") in checkpoint.unet}
    path = save_lora(tmp_path / "a.safetensors", mixed_lora(shapes, STYLES.index(style), biases=biases))
    patched, _ = host_patched(host, model, None, path, 0.7)
    caplog.set_level(logging.WARNING)
    caplog.clear()
    ours = apply_loras(checkpoint, [LoraSpec(path, 0.7)])
    assert not caplog.records
    assert_same_weights(ours.unet, patched, checkpoint.unet, 0.45)
    assert_same_eps(config, patched, plain_unet(ours.unet, "ours"), plain_unet(checkpoint.unet, "base"))
    assert all(ours.text[k] is v for k, v in checkpoint.text.items())


@pytest.mark.parametrize("name", ["sd15", "sd20", "sdxl"])
def test_released_widths(host, family, tmp_path, name):
    config, checkpoint, model, _ = family(name)
    names = names_of("kohya, diffusers", checkpoint, model)
    names = {k: v for i, (k, v) in enumerate(names.items()) if i % 3 == 0}
    shapes = {name: tuple(checkpoint.unet[key].shape) for name, key in names.items()}
    path = save_lora(tmp_path / "a.safetensors", mixed_lora(shapes, 1, ("lora",)), torch.float16)
    patched, _ = host_patched(host, model, None, path, 1.0)
    ours = apply_loras(checkpoint, [LoraSpec(path)])
    assert_same_weights(ours.unet, patched, checkpoint.unet, 0.1)
    assert_same_eps(config, patched, plain_unet(ours.unet, "ours"), plain_unet(checkpoint.unet, "base"))


@pytest.mark.parametrize("kind", CONVOLUTION)
def test_every_kind_alone(host, family, tmp_path, kind):
    """One kind on all 3x3 convolutions of the demo family, stronger than 1 and negative."""
    _, checkpoint, model, _ = family("demo")
    keys = [k for k, v in checkpoint.unet.items() if v.ndim == 4 and v.shape[-1] == 3]
    shapes = {"lora_unet_" + k.removesuffix(".weight").replace(".", "_"): tuple(checkpoint.unet[k].shape) for k in keys}
    path = save_lora(tmp_path / "a.safetensors", mixed_lora(shapes, only=(kind,)))
    for strength in (1.0, 1.6, -0.5):
        patched, _ = host_patched(host, model, None, path, strength)
        ours = apply_loras(checkpoint, [LoraSpec(path, strength)])
        assert_same_weights(ours.unet, patched, checkpoint.unet, 0.05)


# --- text encoders ----------------------------------------------------------------------------------------------------


TEXT_STYLES = {  # host's encoder -> how LoRA files begin its names
    "kohya": {"clip_l": "lora_te_", "clip_h": "lora_te_", "clip_g": "lora_te2_"},
    "kohya te1": {"clip_l": "lora_te1_", "clip_h": "lora_te1_", "clip_g": "lora_te2_"},
    "diffusers": {"clip_l": "text_encoder.", "clip_h": "text_encoder.", "clip_g": "text_encoder_2."},
    "plain": {name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_h", "clip_g")},
}


@pytest.mark.parametrize("style", TEXT_STYLES)
@pytest.mark.parametrize("name", ["demo", "small sd20", "small sdxl"])
def test_texts_are_those_of_the_hosts_patched_clip(host, family, tmp_path, caplog, name, style):
    _, checkpoint, model, clip = family(name)
    linear = ("mlp.fc1", "mlp.fc2", "q_proj", "k_proj", "v_proj", "out_proj")
    shapes = {}
    for key, weight in clip.cond_stage_model.state_dict().items():
        encoder, _, module = key.removesuffix(".weight").partition(".transformer.")
        end = module.endswith(linear) or style == "plain" and not module.endswith("text_projection")
        if key.endswith(".weight") and module.startswith("text_model.") and end:
            begin = TEXT_STYLES[style][encoder]
            spelled = begin + (module.replace(".", "_") if begin.endswith("_") else module)
            shapes[spelled] = tuple(weight.shape)
    if style == "kohya" and name == "small sdxl":
        shapes["lora_te2_text_projection"] = (128, 128)
    embeddings = {k for k in shapes if "embedding" in k}
    tensors = mixed_lora({k: v for k, v in shapes.items() if k not in embeddings}, 2)
    tensors |= mixed_lora({k: shapes[k] for k in embeddings}, 3, ("lora",))
    path = save_lora(tmp_path / "a.safetensors", tensors)
    caplog.set_level(logging.WARNING)
    _, patched = host_patched(host, model, clip, path, 0.3, 0.8)
    caplog.clear()
    ours = apply_loras(checkpoint, [LoraSpec(path, 0.3, 0.8)])
    assert not caplog.records
    assert all(ours.unet[k] is v for k, v in checkpoint.unet.items())
    encoder, plain = ClipText(ours.text), ClipText(checkpoint.text)
    for prompt in PROMPTS:
        context, pooled = encoder.encode_pooled([prompt])
        theirs, their_pooled = patched.encode_from_tokens(patched.tokenize(prompt), return_pooled=True)
        scale = theirs.abs().max().item()
        torch.testing.assert_close(context, theirs, rtol=0, atol=1e-4 * max(scale, 1))
        assert (plain.encode([prompt]) - theirs).abs().max() > 0.02 * scale, "the LoRA does not show"
        if pooled is not None:
            torch.testing.assert_close(
                pooled, their_pooled, rtol=0, atol=1e-4 * max(their_pooled.abs().max().item(), 1)
            )


# --- teachers of one base -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variants(host, tmp_path_factory):
    """A base with text encoder in half precision, as files are, two LoRAs (the second with a part for the text encoder), and of
    each teacher the LoRAs that it is made of."""
    folder = tmp_path_factory.mktemp("variants")
    checkpoint = checkpoint_of(random_unet(PLAIN["demo"]), torch.float16, whole=True)
    save_checkpoint(folder / "base.safetensors", checkpoint)
    weights = [k for k, v in checkpoint.unet.items() if k.endswith(".weight") and v.ndim > 1]
    shapes = {
        "lora_unet_" + k.removesuffix(".weight").replace(".", "_"): tuple(checkpoint.unet[k].shape) for k in weights
    }
    layer = "lora_te_text_model_encoder_layers_1_self_attn_"
    text = {f"{layer}{part}_proj": (64, 64) for part in ("q", "v", "out")}
    look = save_lora(folder / "look.safetensors", mixed_lora(shapes, 1, ("lora",)), torch.float16)
    words = save_lora(folder / "words.safetensors", mixed_lora(shapes | text, 2, ("lora", "loha")), torch.float16)
    teachers = {
        "look": [LoraSpec(look)],
        "weak look": [LoraSpec(look, 0.4)],
        "both": [LoraSpec(look, 0.8), LoraSpec(words, 0.6, 1.5)],
    }
    return folder, checkpoint, teachers


def test_three_variants_of_one_base_in_a_graph(host, variants):
    """The MODELs share one UNet module in the host; each DMM Teacher is what its own MODEL paints with, and so is the folded file."""
    from comfyui_dmm.nodes import host_model
    from comfyui_dmm.nodes.teacher import TeacherInput
    from comfyui_dmm.nodes.training_inputs import gather
    from comfyui_dmm.training.config import TrainConfig

    folder, checkpoint, teachers = variants
    with torch.inference_mode():
        model, clip, *_ = host_model.load(str(folder / "base.safetensors"))
        patched = {}
        for name, loras in teachers.items():
            pair = model, clip
            for lora in loras:
                pair = host_patched(host, *pair, lora.file, lora.strength, lora.text_strength)
            patched[name] = pair
    wires = [TeacherInput(name, *pair) for name, pair in patched.items()]
    with torch.inference_mode():  # which variant the host has loaded must not matter
        sample(patched["weak look"][0], conditioning(PLAIN["demo"], 1), conditioning(PLAIN["demo"], 2))
    latents = [{"samples": torch.randn(1, 4, 8, 8)} for _ in range(3)]
    config = TrainConfig(steps=1, batch_size=4, device="cpu")
    with torch.inference_mode(False):
        run = gather(
            model, clip, wires, latents=latents, captions=[*PROMPTS[1:], "a cat"], config=config, say=lambda text: None
        )
    base = run.base.unet
    assert [t.name for t in run.teachers] == list(teachers) and len({t.sha256 for t in [run.base, *run.teachers]}) == 4
    for teacher in run.teachers:
        unet, (their_model, their_clip) = teacher.unet, patched[teacher.name]
        assert_same_eps(PLAIN["demo"], their_model, unet, base)
        folded = apply_loras(checkpoint, teachers[teacher.name], torch.float32)
        assert_same_eps(PLAIN["demo"], their_model, plain_unet(folded.unet, "folded"), base)
        for key, weight in unet.state_dict().items():
            torch.testing.assert_close(folded.unet[key].float(), weight, rtol=0, atol=1e-5)
        for row, prompt in enumerate(run.data.prompts):
            theirs = their_clip.encode_from_tokens(their_clip.tokenize(prompt))[0]
            torch.testing.assert_close(teacher.contexts[row, : len(theirs)], theirs, rtol=0, atol=1e-5)
        ours = ClipText(folded.text).encode(run.data.prompts)
        # The host rounds text encoders to float16 here.
        torch.testing.assert_close(ours, teacher.contexts, rtol=0, atol=0.01 * teacher.contexts.abs().max().item())
    apart = [run.teachers[i].unet.state_dict()["out.2.weight"] for i in range(3)]
    assert all((apart[i] - apart[j]).abs().max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    contexts = [t.contexts for t in run.teachers]
    assert (
        torch.equal(contexts[0], contexts[1])
        and (contexts[2] - contexts[0]).abs().max() > 0.05 * contexts[0].abs().max()
    )


# --- PEFT's names -----------------------------------------------------------------------------------------------------


def test_peft_files_are_read_whole(host, family, tmp_path, caplog):
    """diffusers writes today ``unet....to_q.lora_A.weight``: the same numbers in kohya's names are the host's model, and the host
    itself leaves the attention of such a file out."""
    config, checkpoint, model, _ = family("small sdxl")
    names = {
        k: v
        for k, v in diffusers(model).items()
        if f"{v}.weight" in checkpoint.unet and ".transformer_blocks." in k and "norm" not in k
    }
    shapes = {k: tuple(checkpoint.unet[f"{v}.weight"].shape) for k, v in names.items()}
    tensors = mixed_lora(shapes, 4, ("lora without alpha",))
    ends = {".lora_up.weight": ".lora_B.weight", ".lora_down.weight": ".lora_A.weight"}
    peft, kohya = {}, {}
    for key, tensor in tensors.items():
        name, end = next((key.removesuffix(e), e) for e in ends if key.endswith(e))
        peft[f"unet.{name}{ends[end]}"] = tensor
        kohya["lora_unet_" + name.replace(".", "_") + end] = tensor
    ours = apply_loras(checkpoint, [LoraSpec(save_lora(tmp_path / "peft.safetensors", peft), 0.9)])
    path = save_lora(tmp_path / "kohya.safetensors", kohya)
    patched, _ = host_patched(host, model, None, path, 0.9)
    assert_same_weights(ours.unet, patched, checkpoint.unet, 0.25)
    assert_same_eps(config, patched, plain_unet(ours.unet, "ours"), plain_unet(checkpoint.unet, "base"))
    alone, _ = host_patched(host, model, None, tmp_path / "peft.safetensors", 0.9)
    assert {k for k in alone.patches if ".attn" in k} == set() and alone.patches
