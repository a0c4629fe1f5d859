"""Styles and regions together with the rest of ComfyUI: every feature on the pack's MODEL against the host without this pack.

The oracle is a twin: the same UNet without its style weights, loaded by the host alone, whose torch modules get the style that a
rule, written down by hand, gives to each row of the batch: added to the time embedding, or for a style map normalised per style in
every ResBlock and mixed per pixel. Regions are the host's own areas and masks there, and hints are cut by hand. A feature is a function
that paints with either side, so it needs no oracle of its own: whatever it does to the twin, it must do to the pack's MODEL, at every
call of the UNet and in as many forwards. With a style bank, each row of a layer gets that row's change of the weights, computed from the
bank by hand.

Tolerance: 2e-4 of the largest output of each call, and of the painting (float32 sums in another order; seen: under 2e-5).
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from comfyui_dmm.dmm_core.bank import layer_change
from comfyui_dmm.dmm_core.checkpoint import STYLE_KEYS, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.style import no_style_row, style_delta, style_row
from comfyui_dmm.dmm_core.style_value import PerItem, Strength, parse_style
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.training.files.style_file import save_style

from .conftest import HOST
from .families import DEMO, NAMES, checkpoint_of, random_unet, with_bank
from .sampling import conditioning, watch
from .server import PACK, Server
from .test_sampling_equals_core import load, with_style
from .test_workflows import painting, pictures

POSITIVE, NEGATIVE, LEFT, RIGHT, LEFT_NEGATIVE, RIGHT_NEGATIVE, EMPTY, OTHER = (
    conditioning(DEMO, seed) for seed in range(20, 28)
)
PROMPTS = (POSITIVE, NEGATIVE, LEFT, RIGHT, LEFT_NEGATIVE, RIGHT_NEGATIVE, EMPTY, OTHER)
ROWS = [style_row(4, i)[0] for i in range(4)]
NONE = no_style_row(4)[0]
TOLERANCE = 2e-4


# --- the oracle -------------------------------------------------------------------------------------------------------


def host_alone(unet):
    """The host's own MODEL of a UNet without its styles, as the host's loader would make it."""
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.model_detection import detect_unet_config

    sd = {k: v.clone() for k, v in unet.state_dict().items() if not k.startswith(STYLE_KEYS)}
    config = comfy.supported_models.SD15(detect_unet_config(sd, ""))
    config.set_inference_dtype(torch.float32, None)
    config.unet_config |= {"num_heads": -1, "num_head_channels": 64}
    cpu = torch.device("cpu")
    model = config.get_model(sd).load_model_weights(sd)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def twin(unet, rule):
    """The host's own MODEL of a UNet, styled by torch's hooks.

    rule(prompt, progress, picture) -> a style row, or [(share, style row), ...] for a style per pixel, where share(height, width)
    is a tensor. prompt is the index in PROMPTS, progress 0 .. 1 over the timesteps, picture the index in the batch.
    """
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    patcher = host_alone(unet)
    model = patcher.model
    now = {}

    def delta(row):
        return style_delta(unet.model_embedding, unet.style_mlp, row[None])[0]

    def begin(module, args, kwargs):
        x, t = args[:2]
        chunks = len(kwargs["transformer_options"]["cond_or_uncond"])
        styles = []
        for i, context in enumerate(kwargs["context"]):
            prompt = next(k for k, p in enumerate(PROMPTS) if torch.equal(p[0][0][0], context))
            styles.append(rule(prompt, 1 - t[i].item() / 999, i % (len(x) // chunks)))
        now["maps"] = [style if isinstance(style, list) else [(torch.ones, style)] for style in styles]
        now["canvas"] = x.shape[-2:]
        now["whole"] = not any(isinstance(style, list) for style in styles)

    def time_embed(module, args, out):
        return out + torch.stack([delta(one[0][1]) for one in now["maps"]]) if now["whole"] else out

    def project(module, emb, row):
        now["row"] = row
        try:
            return module[1](module[0](emb + delta(row))[None])[0]
        finally:
            now["row"] = None

    def emb_layers(module, args, out):  # (B, D) -> (B, C); with maps it is kept, and nothing is added yet
        if now["whole"]:
            return out
        now["added"] = [[project(module, emb, row) for _, row in one] for emb, one in zip(args[0], now["maps"])]
        return torch.zeros_like(out)

    def normalise(module, args, out):
        if now["whole"]:
            return out
        rows = []
        for h, added, one in zip(args[0], now["added"], now["maps"]):
            shares = [share(*now["canvas"])[None, None] for share, _ in one]
            shares = [F.interpolate(share, size=h.shape[-2:], mode="area")[0] for share in shares]
            styled = [module.forward((h + a[:, None, None])[None])[0] for a in added]
            rows.append(sum(share * part for share, part in zip(shares, styled)))
        return torch.stack(rows)

    def from_bank(name):
        keys = {what: f"style_bank.{name}.{what}.weight" for what in ("up", "down", "cores", "bias")}
        weights = unet.state_dict()
        parts = {what: weights[key] for what, key in keys.items() if key in weights}

        def changed(module, x, row):  # x of one row of the batch
            masses = torch.cat([row[:-1] * row[-1], 1 - (row[:-1] * row[-1]).sum()[None]])
            weight, bias = layer_change(parts, masses)
            if x.ndim == 4:
                return F.conv2d(x, weight, bias, module.stride, module.padding)
            return F.linear(x, weight.flatten(1), bias)

        def hook(module, args, out):
            if now.get("row") is not None:
                return out + changed(module, args[0], now["row"])
            rows = []
            for x, y, one in zip(args[0], out, now["maps"]):
                added = [changed(module, x[None], row)[0] for _, row in one]
                shares = [share(*now["canvas"])[None, None] for share, _ in one]
                if y.ndim == 3:
                    shares = [F.interpolate(share, size=y.shape[1:], mode="area")[0] for share in shares]
                elif y.ndim == 2 and "attn2.to_k" not in name and "attn2.to_v" not in name:
                    scale = (now["canvas"][0] * now["canvas"][1] / len(y)) ** 0.5
                    size = tuple(round(side / scale) for side in now["canvas"])
                    shares = [F.interpolate(share, size=size, mode="area").flatten()[:, None] for share in shares]
                else:
                    shares = [share.mean() for share in shares]
                rows.append(y + sum(share * part for share, part in zip(shares, added)))
            return torch.stack(rows)

        return hook

    for name, _, _ in unet.config.bank.ranks if unet.config.bank else ():
        model.diffusion_model.get_submodule(name).register_forward_hook(from_bank(name))
    model.diffusion_model.register_forward_pre_hook(begin, with_kwargs=True)
    model.diffusion_model.time_embed.register_forward_hook(time_embed)
    for block in model.diffusion_model.modules():
        if isinstance(block, ResBlock):
            block.emb_layers.register_forward_hook(emb_layers)
            block.out_layers[0].register_forward_hook(normalise)
    return patcher


# --- scenes: the same painting by the pack's nodes and by the host alone ------------------------------------------------


@dataclass(frozen=True)
class Side:
    """What a feature paints with. prompts(height, width) -> (positive, negative); restyle puts a style on a prompt."""

    model: object
    prompts: Callable
    restyle: Callable


@pytest.fixture(scope="module", params=["codes", "bank", pytest.param("add-on", marks=pytest.mark.slow)])
def kind(request):
    """Where the styles are: codes in the UNet, a bank too, or all of it beside a UNet of the host's (quick tests: test_add_styles.py)."""
    return request.param


@pytest.fixture(scope="module")
def unet(kind):
    return random_unet(DEMO) if kind == "codes" else with_bank(random_unet(DEMO))


@pytest.fixture(scope="module")
def model(models, unet, kind, tmp_path_factory):
    if kind != "add-on":
        return load(models, checkpoint_of(unet), f"compatible-{kind}")
    from comfyui_dmm.nodes import host_model

    path = tmp_path_factory.mktemp("styles") / "styles.safetensors"
    save_style(path, checkpoint_of(unet))
    with torch.inference_mode():
        return host_model.with_added_styles(host_alone(unet), str(path))[0]


def apply(model, style):
    from comfyui_dmm.nodes.host_model import styled

    return styled(model, parse_style(style) if isinstance(style, str) else style)


def late(progress):
    return progress >= 0.5


def prompt_index(prompt):
    return next(i for i, p in enumerate(PROMPTS) if p is prompt)


def rule_of(styles: dict[int, Callable], others: Callable):
    """A rule for ``twin``: functions (progress, picture) -> style, by prompt; OTHER is always in the last style."""
    by_prompt = {prompt_index(OTHER): lambda progress, picture: ROWS[3], **styles}
    return lambda prompt, progress, picture: by_prompt.get(prompt, others)(progress, picture)


def scheduled(model):
    """A schedule on the MODEL, another style on the negative prompt."""
    styled = apply(model, f"{NAMES[0]}; 50%: {NAMES[1]}")
    negative = with_style(model, NEGATIVE, NAMES[2])
    rule = rule_of({prompt_index(NEGATIVE): lambda p, i: ROWS[2]}, lambda p, i: ROWS[1] if late(p) else ROWS[0])
    return styled, lambda h, w: (POSITIVE, negative), rule, lambda h, w: (POSITIVE, NEGATIVE)


def per_picture(model):
    """Another style for each of three pictures, the last one twice as strong."""
    each = (parse_style(NAMES[2]), parse_style("none"), Strength(parse_style(NAMES[3]), 2.0))
    rows = [ROWS[2], NONE, style_row(4, 3, 2.0)[0]]

    def prompts(h, w):
        return (POSITIVE, NEGATIVE)

    return apply(model, PerItem(each)), prompts, rule_of({}, lambda p, i: rows[i % 3]), prompts


def region(style, box, **kwargs):
    from comfyui_dmm.nodes.regions import DMMRegion

    return DMMRegion.execute(style, *box, "feather", 0, **kwargs)[0]


def mix(model, positive, negative, *regions, mode, background):
    from comfyui_dmm.nodes.regions import StyleMix

    named = {f"region{i}": r for i, r in enumerate(regions)}
    return StyleMix.execute(model, positive, negative, background, mode, named).args


def own_prompts(model):
    """The left half on its own crop with a style per picture, the lower right by a mask with a schedule, a background."""
    each = PerItem((parse_style(NAMES[0]), parse_style(NAMES[1])))
    mask = torch.zeros(1, 64, 64)
    mask[:, 32:, 32:] = 1
    left = region(each, (0, 0, 0.5, 1), positive=LEFT, negative=LEFT_NEGATIVE)
    right = region(f"{NAMES[3]}; 50%: {NAMES[0]}", (0, 0, 1, 1), mask=mask, positive=RIGHT, negative=RIGHT_NEGATIVE)
    mixed = mix(model, POSITIVE, NEGATIVE, left, right, mode="own prompts", background=NAMES[2])

    def by_hand(h, w):
        covers = [torch.zeros(1, h, w) for _ in range(3)]
        covers[0][:, : h // 2, w // 2 :], covers[1][:, :, : w // 2], covers[2][:, h // 2 :, w // 2 :] = 1, 1, 1
        crop = {"area": (h, w // 2, 0, 0)}
        entries = [{"mask": covers[0]}, {"mask": covers[1], **crop}, {"mask": covers[2]}]
        sides = (POSITIVE, LEFT, RIGHT), (NEGATIVE, LEFT_NEGATIVE, RIGHT_NEGATIVE)
        return tuple([[p[0][0], {**p[0][1], **e}] for p, e in zip(side, entries)] for side in sides)

    def left_row(p, i):
        return ROWS[i % 2]

    def right_row(p, i):
        return ROWS[0] if late(p) else ROWS[3]

    styles = {prompt_index(p): left_row for p in (LEFT, LEFT_NEGATIVE)}
    styles |= {prompt_index(p): right_row for p in (RIGHT, RIGHT_NEGATIVE)}
    styles[prompt_index(EMPTY)] = lambda p, i: ROWS[1]  # the MODEL's own style
    return apply(model, NAMES[1]), lambda h, w: mixed, rule_of(styles, lambda p, i: ROWS[2]), by_hand


def halves(left, right):
    """The style map of a canvas whose left half is in one style; 5x5 is what ``and_an_area`` cuts out of 8x8."""

    def share(height, width):
        if (height, width) == (5, 5):
            return share(8, 8)[3:8, 2:7]
        return (torch.arange(width) < width / 2).float().expand(height, width)

    return [(share, left), (lambda height, width: 1 - share(height, width), right)]


def one_pass(model):
    """A map: the left half in a style per picture, the rest in a schedule."""
    each = PerItem((parse_style(NAMES[0]), parse_style(NAMES[1])))
    left = region(each, (0, 0, 0.5, 1))
    mixed = mix(model, POSITIVE, NEGATIVE, left, mode="one pass", background=f"{NAMES[3]}; 50%: {NAMES[2]}")

    def both(p, i):
        return halves(ROWS[i % 2], ROWS[2] if late(p) else ROWS[3])

    rule = rule_of({prompt_index(EMPTY): lambda p, i: ROWS[1]}, both)
    return apply(model, NAMES[1]), lambda h, w: mixed, rule, lambda h, w: (POSITIVE, NEGATIVE)


SCENES = {"schedule": scheduled, "per picture": per_picture, "own prompts": own_prompts, "one pass": one_pass}


@pytest.fixture(scope="module", params=SCENES)
def scene(request, model, unet):
    """(name, the pack's side, the host's side)."""
    with torch.inference_mode():
        styled, prompts, rule, by_hand = SCENES[request.param](model)
        plain = twin(unet, rule)

    def restyle(prompt):
        return with_style(model, prompt, NAMES[3])

    return request.param, Side(styled, prompts, restyle), Side(plain, by_hand, lambda prompt: prompt)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * theirs.abs().max().item())


def assert_same(feature, ours: Side, theirs: Side, forwards: bool = True):
    """The feature paints the same on both sides -> that painting. With ``forwards``, every call of the UNet is the same too."""
    paintings, calls = [], []
    for side in (ours, theirs):
        with watch(side.model) as seen, torch.inference_mode():
            paintings.append(feature(side))
        calls.append(seen)
    if forwards:
        assert [c.chunks for c in calls[0]] == [c.chunks for c in calls[1]]  # batched as the host batches plain prompts
        for our, their in zip(*calls):
            assert torch.equal(our.t, their.t)
            assert_close(our.x, their.x)
            assert_close(our.out, their.out)
    assert_close(*paintings)
    return paintings[0]


def differ(a, b):
    return (a - b).abs().max() > 10 * TOLERANCE * b.abs().max()


# --- painting ---------------------------------------------------------------------------------------------------------


def paint(
    model, positive, negative, latent=None, cfg=4.0, steps=3, sampler="euler", scheduler="normal", denoise=1.0, batch=2
):
    """Latents by the host's KSampler; latent: a LATENT, or none for 8x8."""
    import nodes

    latent = latent or {"samples": torch.zeros(batch, 4, 8, 8)}
    return nodes.common_ksampler(model, 3, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise)[
        0
    ]["samples"]


def picture(height=8, width=8, batch=2):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(5)) * 3


def patched(*patches):
    """A feature: paint with a MODEL that these functions have patched, one after the other."""

    def feature(side):
        model = side.model
        for patch in patches:
            model = patch(model)
        return paint(model, *side.prompts(8, 8))

    return feature


def plain(side):
    return paint(side.model, *side.prompts(8, 8))


def test_the_scenes_themselves(scene, model):
    _, ours, theirs = scene
    painting = assert_same(plain, ours, theirs)
    unstyled = paint(apply(model, "none"), *theirs.prompts(8, 8))
    assert differ(painting, unstyled), "the styles do not show"


# --- patches of the MODEL -----------------------------------------------------------------------------------------------


def extra(module: str, node: str, *args):
    """A patch: a node of comfy_extras."""
    import importlib

    def patch(model):
        cls = getattr(importlib.import_module(f"comfy_extras.{module}"), node)
        if hasattr(cls, "patch") and not hasattr(cls, "execute"):
            return cls().patch(model, *args)[0]
        return cls.execute(model, *args)[0]

    return patch


def lora_weights(model, scale=0.2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    weights, lora = model.model.diffusion_model.state_dict(), {}
    for key in ("time_embed.0", "input_blocks.3.0.emb_layers.1", "middle_block.1.transformer_blocks.0.attn2.to_k"):
        out, inner = weights[f"{key}.weight"].shape
        lora[f"diffusion_model.{key}.lora_up.weight"] = torch.randn(out, 2, generator=generator) * scale
        lora[f"diffusion_model.{key}.lora_down.weight"] = torch.randn(2, inner, generator=generator) * scale
    return lora


def lora(model):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora_weights(model), 0.8, 0)[0]


IMAGE_TOKENS = 3 * torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(9))


def ip_adapter(model):
    """IP-Adapter's kind: the positive rows also attend to picture tokens, in the middle and in an output block."""
    from comfy.ldm.modules.attention import optimized_attention

    def attend(q, k, v, options):
        chunks = options["cond_or_uncond"]
        each = len(q) // len(chunks)
        weight = torch.tensor([0.8 * (chunk == 0) for chunk in chunks]).repeat_interleave(each)[:, None, None]
        tokens = IMAGE_TOKENS.repeat(len(q), 1, 1)
        heads = options["n_heads"]
        return optimized_attention(q, k, v, heads) + weight * optimized_attention(q, tokens, 2 * tokens, heads)

    model = model.clone()
    for block in (("middle", 0), ("output", 0)):
        model.set_model_attn2_replace(attend, *block)
    return model


def more_context(model):
    """set_model_attn2_patch: picture tokens behind those of the text."""

    def lengthen(n, context, value, options):
        tokens = IMAGE_TOKENS.expand(len(context), -1, -1)
        return n, torch.cat([context, tokens], 1), torch.cat([value, 2 * tokens], 1)

    model = model.clone()
    model.set_model_attn2_patch(lengthen)
    return model


PATCHES = {
    "LoRA": lora,
    "IP-Adapter": ip_adapter,
    "attn2 patch": more_context,
    "FreeU": extra("nodes_freelunch", "FreeU", 1.3, 1.4, 0.6, 0.2),
    "FreeU_V2": extra("nodes_freelunch", "FreeU_V2", 1.3, 1.4, 0.6, 0.2),
    "PAG": extra("nodes_pag", "PerturbedAttentionGuidance", 3.0),
    "SAG": extra("nodes_sag", "SelfAttentionGuidance", 0.8, 2.0),
    "RescaleCFG": extra("nodes_model_advanced", "RescaleCFG", 8.0),
    "TCFG": extra("nodes_tcfg", "TCFG"),
    "APG": extra("nodes_apg", "APG", 0.0, 0.5, -0.5),
    "NAG": extra("nodes_nag", "NAGuidance", 11.0, 1.0, 5.0),
    "Deep Shrink": extra(
        "nodes_model_downscale", "PatchModelAddDownscale", 2, 2.0, 0.0, 0.6, True, "bilinear", "bilinear"
    ),
    "PerpNeg": lambda model: extra("nodes_perpneg", "PerpNeg", EMPTY, 0.7)(model),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches_of_the_model(scene, name):
    which, ours, theirs = scene
    if (which, name) == ("own prompts", "SAG"):  # the host's own node cannot: its map of attention knows no areas
        with pytest.raises(TypeError), torch.inference_mode():
            patched(PATCHES[name])(theirs)
        return
    painting = assert_same(patched(PATCHES[name]), ours, theirs)
    with torch.inference_mode():
        assert differ(painting, plain(ours)), f"{name} does not show"


def test_many_patches_at_once_in_either_order(scene, model):
    """LoRA, IP-Adapter and FreeU below and above the style nodes: the same painting."""
    name, ours, theirs = scene
    patches = [PATCHES[n] for n in ("LoRA", "IP-Adapter", "FreeU_V2")]
    after = assert_same(patched(*patches), ours, theirs)

    with torch.inference_mode():
        first = model
        for patch in patches:
            first = patch(first)
        styled, prompts, _, _ = SCENES[name](first)
        assert torch.equal(paint(styled, *prompts(8, 8)), after)


# --- guiders ------------------------------------------------------------------------------------------------------------


def guided(make):
    """A feature: SamplerCustomAdvanced with a guider made by make(model, positive, negative)."""

    def feature(side):
        import comfy.samplers
        from comfy_extras.nodes_custom_sampler import BasicScheduler, RandomNoise, SamplerCustomAdvanced

        sigmas = BasicScheduler.execute(side.model, "karras", 3, 1.0)[0]
        latent = {"samples": torch.zeros(2, 4, 8, 8)}
        sampler = comfy.samplers.sampler_object("dpmpp_2m")
        guider = make(side.model, *side.prompts(8, 8))
        return SamplerCustomAdvanced.execute(RandomNoise.execute(3)[0], guider, sampler, sigmas, latent)[0]["samples"]

    return feature


def guider(node, *args, empty=None):
    def make(model, positive, negative):
        from comfy_extras import nodes_custom_sampler, nodes_perpneg

        cls = getattr(nodes_perpneg if node == "PerpNegGuider" else nodes_custom_sampler, node)
        conds = {"BasicGuider": [positive], "CFGGuider": [positive, negative]}
        return cls.execute(model, *conds.get(node, [positive, negative, EMPTY]), *args)[0]

    return guided(make)


GUIDERS = {
    "CFGGuider": guider("CFGGuider", 4.0),
    "BasicGuider": guider("BasicGuider"),
    "DualCFGGuider": guider("DualCFGGuider", 3.0, 2.0, "regular"),
    "nested DualCFGGuider": guider("DualCFGGuider", 3.0, 2.0, "nested"),
    "PerpNegGuider": guider("PerpNegGuider", 5.0, 0.8),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders(scene, name):
    # A prompt without a map cannot share a forward with one that has a map.
    forwards = scene[0] != "one pass" or name in ("CFGGuider", "BasicGuider")
    assert_same(GUIDERS[name], *scene[1:], forwards)


# --- ways to paint ------------------------------------------------------------------------------------------------------


def img2img(side):
    return paint(side.model, *side.prompts(8, 8), latent={"samples": picture()}, denoise=0.6, steps=4)


def inpainting(side):
    import nodes

    mask = torch.zeros(1, 64, 64)
    mask[:, 16:56, 8:40] = 1
    (latent,) = nodes.SetLatentNoiseMask().set_mask({"samples": picture()}, mask)
    return paint(side.model, *side.prompts(8, 8), latent=latent, denoise=0.8)


def differential(side):
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    model = DifferentialDiffusion.execute(side.model)[0]
    latent = {"samples": picture(), "noise_mask": torch.linspace(0, 1, 64).expand(1, 64, 64)}
    return paint(model, *side.prompts(8, 8), latent=latent, denoise=0.9)


def hires_fix(side):
    import nodes

    small = {"samples": paint(side.model, *side.prompts(8, 8))}
    (large,) = nodes.LatentUpscaleBy().upscale(small, "bilinear", 1.5)
    return paint(side.model, *side.prompts(12, 12), latent=large, denoise=0.5, steps=2)


def two_samplers(side):
    """KSampler (Advanced): steps 0 to 2 of 4, then 2 to 4 from the noise that is left."""
    import nodes

    ksampler = nodes.KSamplerAdvanced()
    prompts = side.prompts(8, 8)
    settings = 3, 4, 4.0, "euler", "normal"
    (first,) = ksampler.sample(
        side.model, "enable", *settings, *prompts, {"samples": torch.zeros(2, 4, 8, 8)}, 0, 2, "enable"
    )
    return ksampler.sample(side.model, "disable", *settings, *prompts, first, 2, 10000, "disable")[0]["samples"]


def cfg_one(side):
    return paint(side.model, *side.prompts(8, 8), cfg=1.0)


def batch_of(count):
    return lambda side: paint(side.model, *side.prompts(8, 8), batch=count)


WAYS = {
    "img2img": img2img,
    "inpainting": inpainting,
    "differential": differential,
    "hires fix": hires_fix,
    "two samplers": two_samplers,
    "cfg 1": cfg_one,
    "batch of 1": batch_of(1),
    "batch of 5": batch_of(5),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_paint(scene, name):
    assert_same(WAYS[name], *scene[1:])


SAMPLERS = [
    ("euler_ancestral", "karras"),
    ("heun", "exponential"),
    ("dpm_2", "simple"),
    ("dpm_2_ancestral", "normal"),
    ("dpmpp_sde", "karras"),
    ("dpmpp_2m_sde", "sgm_uniform"),
    ("dpmpp_3m_sde", "beta"),
    ("uni_pc", "normal"),
    ("ddim", "ddim_uniform"),
    ("lcm", "sgm_uniform"),
    ("dpm_fast", "linear_quadratic"),
    ("dpmpp_2s_ancestral", "kl_optimal"),
    ("euler_cfg_pp", "simple"),
    ("res_multistep", "beta"),
]


@pytest.mark.parametrize("sampler, scheduler", SAMPLERS)
def test_samplers_and_schedulers(scene, sampler, scheduler):
    def feature(side):
        torch.manual_seed(1)
        return paint(side.model, *side.prompts(8, 8), sampler=sampler, scheduler=scheduler, steps=4)

    assert_same(feature, *scene[1:])


# --- ControlNet and T2I-Adapter -----------------------------------------------------------------------------------------

HINT = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def controls(unet, tmp_path_factory):
    """The host's ControlNet and T2I-Adapter objects with random weights, by name."""
    import comfy.controlnet
    import comfy.utils
    from comfy.t2i_adapter.adapter import Adapter
    from comfyui_dmm.training.demo.controlnet import ControlNet

    torch.manual_seed(4)
    net = ControlNet(unet).requires_grad_(False)
    for conv in [*(z[0] for z in net.zero_convs), net.middle_block_out[0], net.input_hint_block[-1]]:
        conv.weight.normal_(std=0.3)
    path = tmp_path_factory.mktemp("control") / "net.safetensors"
    comfy.utils.save_torch_file(net.file_state_dict(), str(path))
    adapter = Adapter(channels=[64], nums_rb=1, cin=3 * 16 * 16, ksize=1, sk=True, use_conv=False, xl=True)
    with torch.inference_mode():
        loaded = comfy.controlnet.load_controlnet(str(path))
    return {
        "ControlNet": loaded,
        "T2I-Adapter": comfy.controlnet.T2IAdapter(adapter.eval(), 3, 8, "nearest-exact", "cpu"),
    }


def controlled(side, *controls, until=1.0, size=(8, 8)):
    """The prompts with these controls. By hand, the hint of an entry with an area is cut to it; the pack has none yet."""
    copies = {}

    def copy(area):
        if area not in copies:
            hint = HINT
            if area is not None:
                h, w, top, left = (8 * n for n in area)
                hint = F.interpolate(HINT.movedim(-1, 1), size=tuple(8 * n for n in size), mode="nearest-exact")
                hint = hint.movedim(1, -1)[:, top : top + h, left : left + w]
            chain = None
            for control in controls:
                one = control.copy().set_cond_hint(hint.movedim(-1, 1), 0.7, (0.0, until))
                one.set_previous_controlnet(chain)
                chain = one
            copies[area] = chain
        return copies[area]

    def with_control(entries):
        return {**entries, "control": copy(entries.get("area")), "control_apply_to_uncond": False}

    return [[[c, with_control(entries)] for c, entries in prompts] for prompts in side.prompts(*size)]


def assert_control(scene, feature):
    painting = assert_same(feature, *scene[1:])
    with torch.inference_mode():
        assert differ(painting, plain(scene[1])), "the control does not show"


@pytest.mark.parametrize("name", ["ControlNet", "T2I-Adapter"])
def test_controls(scene, controls, name):
    assert_control(scene, lambda side: paint(side.model, *controlled(side, controls[name])))


def test_controls_in_a_chain_that_ends_early(scene, controls):
    assert_control(scene, lambda side: paint(side.model, *controlled(side, *controls.values(), until=0.5)))


def test_controls_in_a_hires_fix(scene, controls):
    def feature(side):
        latent = {"samples": picture(12, 12)}
        return paint(side.model, *controlled(side, *controls.values(), size=(12, 12)), latent=latent, denoise=0.5)

    assert_same(feature, *scene[1:])


def test_control_on_the_prompts_before_the_mix(model, unet, controls):
    """Apply ControlNet first, Style Mix after it: the same as the other way round."""
    import nodes

    def around(positive, negative):
        applied = nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, controls["ControlNet"], HINT, 0.7, 0.0, 1.0
        )
        return applied

    def mixed(positive, negative):
        left, right = (region(NAMES[i], (0.5 * i, 0, 0.5, 1)) for i in range(2))
        return mix(model, positive, negative, left, right, mode="own prompts", background=NAMES[2])

    with torch.inference_mode(), watch(model) as calls:
        before, after = (
            paint(model, *mixed(*around(POSITIVE, NEGATIVE))),
            paint(model, *around(*mixed(POSITIVE, NEGATIVE))),
        )
    assert_close(before, after)
    assert [c.chunks for c in calls] == [[1, 0]] * 12  # two crops, each for both prompts, three steps, twice


def test_the_shipped_controlnet(host, tmp_path):
    """(a) each region's call sees its part of the hint, (b) the forward is our UNet's with our ControlNet's residuals,
    (c) positive and negative share a forward; strength 0 is no ControlNet; and the file as it is shipped paints the same."""
    import comfy.controlnet
    from comfyui_dmm.nodes import host_model
    from comfyui_dmm.training.demo.controlnet import ControlNet
    from safetensors.torch import load_file, save_file

    import nodes

    file = PACK / "models" / "dmm" / "demo-dmm.safetensors"
    checkpoint = load_checkpoint(file)
    unet = load_unet(checkpoint.unet)
    names = [style.name for style in checkpoint.styles]
    shipped = PACK / "models" / "controlnet" / "demo-outline.safetensors"
    net = ControlNet(unet)
    weights = {k: v for k, v in load_file(shipped).items() if k != "lora_controlnet"}
    net.load_state_dict({k: v.float() for k, v in weights.items()}, strict=True)
    path = (
        tmp_path / "ordinary.safetensors"
    )  # as most ControlNets come; the shipped file borrows its sizes from the MODEL
    save_file({f"control_model.{k}": v for k, v in weights.items()}, path)
    hint = torch.zeros(1, 128, 128, 3)
    hint[:, 20:100, 30:34], hint[:, 60:64, 20:120] = 1, 1
    with torch.inference_mode():
        model = host_model.load(str(file))[0]
        control = comfy.controlnet.load_controlnet(str(path))
        left, right = (region(names[i], (0.5 * i, 0, 0.5, 1)) for i in range(2))
        mixed = mix(model, POSITIVE, NEGATIVE, left, right, mode="own prompts", background="none")

        def painted(prompts, strength, control=control):
            return paint(
                model,
                *nodes.ControlNetApplyAdvanced().apply_controlnet(*prompts, control, hint, strength, 0.0, 1.0),
                latent={"samples": torch.zeros(2, 4, 16, 16)},
                steps=2,
            )

        seen = []
        handle = control.control_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hint"].clone()), with_kwargs=True
        )
        with watch(model) as calls:
            painted(mixed, 0.8)
        handle.remove()
        assert len(calls) == len(seen) == 4
        for k, (call, one) in enumerate(zip(calls, seen)):
            part = k % 2
            cut = hint[:, :, 64 * part : 64 * part + 64].movedim(-1, 1)
            assert torch.equal(one.float(), cut)  # (a)
            assert sorted(call.chunks) == [0, 1]  # (c)
            residuals, middle = net(call.x, cut.expand(4, -1, -1, -1), call.t, call.context)
            row = style_row(len(names), part).expand(4, -1)
            ours = unet(call.x, call.t, call.context, style=row, control=([0.8 * r for r in residuals], 0.8 * middle))
            assert_close(call.out, ours)  # (b)
            assert differ(call.out, unet(call.x, call.t, call.context, style=row))
        latent = {"samples": torch.zeros(2, 4, 16, 16)}
        assert torch.equal(painted(mixed, 0.0), paint(model, *mixed, latent=latent, steps=2))
        assert_close(painted(mixed, 0.8, comfy.controlnet.load_controlnet(str(shipped))), painted(mixed, 0.8))


# --- conditionings: areas, masks, times, defaults, hooks ------------------------------------------------------------------


def changed(*steps):
    """A feature: paint with prompts that these functions (side, positive, negative) have changed."""

    def feature(side):
        prompts = side.prompts(8, 8)
        for step in steps:
            prompts = step(side, *prompts)
        return paint(side.model, *prompts)

    return feature


def and_an_area(side, positive, negative):
    """Another prompt, in a style of its own, in the host's area, which fades at its edges."""
    import nodes

    (other,) = nodes.ConditioningSetArea().append(side.restyle(OTHER), 40, 40, 16, 24, 1.3)
    return positive + other, negative


def and_a_mask(side, positive, negative):
    import nodes

    mask = torch.zeros(64, 64)
    mask[8:40, 16:64] = 0.7
    (other,) = nodes.ConditioningSetMask().append(side.restyle(OTHER), mask, "default", 1.5)
    return positive + other, negative


def and_a_default(side, positive, negative):
    """A prompt for what the others leave, once those have been masked."""
    import comfy.hooks

    mask = torch.zeros(1, 8, 8)
    mask[:, :, 2:6] = 1
    entries = [[c, {**e, "mask": mask * e.get("mask", 1)}] for c, e in positive]
    return comfy.hooks.set_default_conds_and_combine([entries], [side.restyle(OTHER)])[0], negative


def other_in_the_end(side, positive, negative):
    import nodes

    times = nodes.ConditioningSetTimestepRange()
    (first,), (second,) = times.set_range(positive, 0.0, 0.4), times.set_range(side.restyle(OTHER), 0.4, 1.0)
    return first + second, negative


CONDITIONINGS = {"area": and_an_area, "mask": and_a_mask, "default": and_a_default, "timesteps": other_in_the_end}


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_the_hosts_own_conditionings_next_to_styles(scene, name):
    # A prompt without a map cannot share a forward with one that has a map.
    forwards = scene[0] != "one pass"
    painting = assert_same(changed(CONDITIONINGS[name]), *scene[1:], forwards)
    with torch.inference_mode():
        assert differ(painting, plain(scene[1]))


def hooked(side, positive, negative):
    """A LoRA that fades in by keyframes, on both prompts."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora_weights(side.model), 1.0, 1.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.2, 0.0), (1.0, 0.4)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(frames)
    return comfy.hooks.set_conds_props([positive, negative], 1.0, "default", hooks=hooks)


def hooked_in_turn(side, positive, negative):
    """One LoRA at first and none later (Pair Cond Set Props Combine with timesteps)."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora_weights(side.model), 1.0, 1.0)
    first = comfy.hooks.set_conds_props([positive, negative], 1.0, "default", hooks=hooks, timesteps_range=(0.0, 0.5))
    return comfy.hooks.set_conds_props_and_combine(first, [positive, negative], timesteps_range=(0.5, 1.0))


def hooked_positive(side, positive, negative):
    """A LoRA for the positive prompt only: the two prompts take two forwards, on the host as here."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora_weights(side.model), 1.0, 1.0)
    return comfy.hooks.set_hooks_for_conditioning(positive, hooks), negative


@pytest.mark.parametrize("hook", [hooked, hooked_in_turn, hooked_positive])
def test_hooks(scene, hook):
    painting = assert_same(changed(hook), *scene[1:])
    with torch.inference_mode():
        assert differ(painting, plain(scene[1]))
        assert torch.equal(plain(scene[1]), plain(scene[1]))


def test_a_hook_and_an_area_and_a_control(scene, controls):
    def feature(side):
        steps = Side(side.model, lambda h, w: controlled(side, controls["ControlNet"]), side.restyle)
        return changed(hooked, and_a_mask)(steps)

    assert_same(feature, *scene[1:], scene[0] != "one pass")


# --- inside Style Mix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", ["default", "mask bounds"])
def test_a_mask_on_a_regions_own_prompt(model, unet, controls, bounds):
    """A region's prompt with a mask of its own counts where both are, on the region's crop; a ControlNet's hint stays aligned."""
    import nodes

    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    (left,) = nodes.ConditioningSetMask().append(LEFT, mask, bounds, 1.0)
    prompts = mix(
        *(model, POSITIVE, NEGATIVE, region(NAMES[0], (0, 0, 0.5, 1), positive=left, negative=LEFT_NEGATIVE)),
        mode="own prompts",
        background=NAMES[2],
    )
    cover = torch.zeros(1, 8, 8)
    cover[:, :, :4] = 1
    half = torch.zeros(1, 8, 8)
    half[:, :4] = 1
    area = (8, 4, 0, 0)
    by_hand = (
        [[POSITIVE[0][0], {"mask": 1 - cover}], [LEFT[0][0], {"mask": cover * half, "area": area}]],
        [[NEGATIVE[0][0], {"mask": 1 - cover}], [LEFT_NEGATIVE[0][0], {"mask": cover, "area": area}]],
    )
    rule = rule_of({prompt_index(p): lambda p, i: ROWS[0] for p in (LEFT, LEFT_NEGATIVE)}, lambda p, i: ROWS[2])
    ours = Side(model, lambda h, w: prompts, None)
    theirs = Side(twin(unet, rule), lambda h, w: by_hand, None)
    assert_same(lambda side: paint(side.model, *controlled(side, controls["ControlNet"])), ours, theirs)


def test_an_area_on_a_regions_own_prompt(model, unet):
    """The upper half by the host's Conditioning (Set Area), in a region of the left half that is painted on the whole canvas."""
    import nodes

    (left,) = nodes.ConditioningSetArea().append(LEFT, 64, 32, 0, 0, 1.0)
    left_region = region(NAMES[0], (0, 0, 0.5, 1), positive=left, negative=LEFT_NEGATIVE, paint_on="whole canvas")
    prompts = mix(model, POSITIVE, NEGATIVE, left_region, mode="own prompts", background=NAMES[2])
    cover = torch.zeros(1, 8, 8)
    cover[:, :, :4] = 1
    by_hand = (
        [[POSITIVE[0][0], {"mask": 1 - cover}], [LEFT[0][0], {"mask": cover, "area": (4, 8, 0, 0)}]],
        [[NEGATIVE[0][0], {"mask": 1 - cover}], [LEFT_NEGATIVE[0][0], {"mask": cover}]],
    )
    rule = rule_of({prompt_index(p): lambda p, i: ROWS[0] for p in (LEFT, LEFT_NEGATIVE)}, lambda p, i: ROWS[2])
    theirs = Side(twin(unet, rule), lambda h, w: by_hand, None)
    assert_same(plain, Side(model, lambda h, w: prompts, None), theirs)


# --- torch.compile, clones, other models ----------------------------------------------------------------------------------


SHORT_TOUR = [("none", {}), ("one pass", {}), ("schedule", {}), ("none", {})]
LONG_TOUR = [
    *((name, {}) for name in ("none", "one pass", "schedule", "own prompts", "one pass")),
    ("schedule", {"cfg": 1.0}), ("schedule", {"batch": 3}), ("schedule", {"size": 12}), ("one pass", {"size": 12}), ("none", {}),
]  # fmt: skip


@pytest.mark.parametrize("tour", [SHORT_TOUR, pytest.param(LONG_TOUR, marks=pytest.mark.slow)], ids=["short", "long"])
def test_compiled(model, monkeypatch, tour):
    """One TorchCompileModel for everything, in an order in which each kind of painting follows each other kind.

    The backend is "eager": the graphs are the ones that a GPU would get, run as they are. The node drops the guards on
    transformer options, so anything of ours that a graph reads from there would show as the painting before.
    """
    from comfy.ldm.modules import attention
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    for name in ("optimized_attention", "optimized_attention_masked"):  # the CPU's asks for free memory: no whole graph
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled = TorchCompileModel.execute(model, "eager")[0]
        scenes = {name: [make(one) for one in (model, compiled)] for name, make in SCENES.items()}
        scenes["none"] = [(one, lambda h, w: (POSITIVE, NEGATIVE)) for one in (model, compiled)]

        def compare(name, size=8, batch=2, **settings):
            latent = {"samples": picture(size, size, batch)}
            paintings = [paint(s[0], *s[1](size, size), latent=latent, denoise=0.9, **settings) for s in scenes[name]]
            assert_close(paintings[1], paintings[0])

        for name, settings in tour:
            compare(name, **settings)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_clones_of_one_model_side_by_side(model, unet):
    """Differently styled and patched clones, painted in turn: each as it is painted alone."""
    from comfyui_dmm.nodes.host_model import styled

    with torch.inference_mode():
        ink, neon = apply(model, NAMES[0]), lora(apply(model, NAMES[1]))
        mixed = mix(ink, POSITIVE, NEGATIVE, region(NAMES[2], (0, 0, 0.5, 1)), mode="one pass", background=NAMES[0])
        jobs = [
            (ink, (POSITIVE, NEGATIVE)),
            (neon, (POSITIVE, NEGATIVE)),
            (ink, mixed),
            (PATCHES["FreeU"](neon), mixed),
        ]
        alone = [paint(one, *prompts) for one, prompts in jobs]
        for order in ((3, 1, 2, 0), (0, 3, 2, 1)):
            for i in order:
                assert torch.equal(paint(jobs[i][0].clone(), *jobs[i][1]), alone[i])
        assert torch.equal(
            paint(styled(model, parse_style("none")), POSITIVE, NEGATIVE), paint(model, POSITIVE, NEGATIVE)
        )


@pytest.mark.parametrize("negative_model", ["the same", "a plain one"])
def test_another_model_for_the_negative(scene, unet, negative_model):
    """Dual Model CFG Guider: the negative keeps its style although our wrappers never see it; a plain model gets none."""
    import comfy_extras.nodes_custom_sampler as custom

    if not hasattr(custom, "DualModelGuider"):
        pytest.skip("this ComfyUI has no DualModelGuider")
    _, ours, theirs = scene
    unstyled = twin(unet, lambda *_: NONE)

    def feature(side):
        def make(model, positive, negative):
            other = model if negative_model == "the same" else unstyled
            return custom.DualModelGuider.execute(model, positive, 4.0, other, negative)[0]

        return guided(make)(side)

    # Values are not rows yet where our wrapper does not reach: other styles there take forwards of their own.
    assert_same(feature, ours, theirs, forwards=negative_model != "the same")


# --- the host's low-memory flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, levels",
    [
        (("--bf16-unet",), 0.6),
        pytest.param(("--fp16-unet",), 0.1, marks=pytest.mark.slow),
        pytest.param(("--fp8_e4m3fn-unet",), 2.5, marks=pytest.mark.slow),
        pytest.param(("--disable-smart-memory", "--cache-none", "--reserve-vram", "4"), 0, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_low_memory_flags(server, tmp_path, flags, levels):
    """A styled picture by a server with these flags: within ``levels`` of 255 on average of the one without them.

    The flags that only move weights change nothing; narrower numbers round them, and the style still shows. The host takes
    --lowvram and --novram for a GPU only: its parser refuses them with --cpu.
    """
    name = "compatible.safetensors"
    checkpoint = checkpoint_of(random_unet(DEMO), whole=True)
    graphs = painting({"a": NAMES[1]}, name), painting({"a": "none"}, name)
    save_checkpoint(server.base / "models" / "dmm" / name, checkpoint)
    expected, unstyled = (pictures(server, graph)["save a"].astype(float) for graph in graphs)
    with Server(HOST, tmp_path / "base", flags) as other:
        save_checkpoint(other.base / "models" / "dmm" / name, checkpoint)
        painted = pictures(other, graphs[0])["save a"].astype(float)
    distance, style = abs(painted - expected).mean(), abs(unstyled - expected).mean()
    assert distance <= levels, distance
    assert distance < style / 2, (distance, style)
