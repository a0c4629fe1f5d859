"""The host's UNet with this pack's patch against dmm_core's UNet: same file, same inputs, same eps.

Every comparison is between outputs of one UNet call, recorded while the host's KSampler runs; tolerance 1e-4 of the
largest output (float32 sums in another order; seen: under 1e-5).
"""

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import STYLE_KEYS, save_checkpoint
from comfyui_dmm.dmm_core.style import no_style_row, style_row
from comfyui_dmm.dmm_core.style_value import PerItem, Strength, parse_style

from .families import DEMO, FAMILIES, KNOWN_AS, NAMES, checkpoint_of, random_unet
from .sampling import conditioning, sample, watch


def load(models, checkpoint, name="equal"):
    from comfyui_dmm.nodes import host_model

    path = models / "dmm" / f"{name}.safetensors"
    save_checkpoint(path, checkpoint)
    with torch.inference_mode():
        return host_model.load(str(path))[0]


def select(model, style, strength=1.0):
    from comfyui_dmm.nodes.style import StyleSelector

    return StyleSelector.execute(model, style, strength)[0]


def with_style(model, conds, text):
    from comfyui_dmm.nodes.style_apply import StyleForPrompt

    return StyleForPrompt.execute(conds, model, text)[0]


@torch.no_grad()
def assert_equal(call, unet, rows):
    """One recorded call against our UNet with style rows (1 or batch, N+1); and the style must matter."""
    rows = rows.expand(len(call.x), -1)
    ours = unet(call.x, call.t, call.context, call.y, style=rows)
    scale = ours.abs().max().item()
    torch.testing.assert_close(call.out, ours, rtol=0, atol=1e-4 * scale)
    if rows[:, -1].any():
        plain = unet(call.x, call.t, call.context, call.y)
        assert (ours - plain).abs().max() > 50 * 1e-4 * scale, "the style does not show in this test"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(models, family):
    config = FAMILIES[family]
    unet = random_unet(config)
    model = load(models, checkpoint_of(unet))
    assert type(model.model.model_config).__name__ == KNOWN_AS[family]
    rows = {"none": no_style_row(config.num_styles), NAMES[1]: style_row(config.num_styles, 1, 0.75)}
    for name, row in rows.items():
        with watch(model) as calls:
            sample(select(model, name, 0.75), conditioning(config, 1), conditioning(config, 2), batch=2)
        assert [sorted(call.chunks) for call in calls] == [[0, 1]] * 2  # one forward a step
        for call in calls:
            assert_equal(call, unet, row)


def test_prediction_and_schedule_come_from_the_file(models):
    import comfy.model_sampling

    unet = random_unet(DEMO)
    model = load(models, checkpoint_of(unet))
    assert isinstance(model.model.model_sampling, comfy.model_sampling.EPS)
    assert not isinstance(model.model.model_sampling, comfy.model_sampling.V_PREDICTION)
    plain = model.model.model_sampling.sigma_max.item()
    model = load(models, checkpoint_of(unet, prediction="v", zero_snr=True))
    assert isinstance(model.model.model_sampling, comfy.model_sampling.V_PREDICTION)
    assert model.model.model_sampling.sigma_max > 100 * plain


@pytest.fixture(scope="module")
def unet():
    return random_unet(DEMO)


@pytest.fixture(scope="module")
def model(models, unet):
    return load(models, checkpoint_of(unet), "shared")


POSITIVE, NEGATIVE = conditioning(DEMO, 1), conditioning(DEMO, 2)


def test_different_styles_for_the_two_prompts_take_one_forward(model, unet):
    ink, mixed = style_row(4, 0), style_row(4, {1: 0.5, 2: 0.5})
    positive, negative = with_style(model, POSITIVE, "ink"), with_style(model, NEGATIVE, "Neon lines, paper: cut-out")
    with watch(model) as calls:
        sample(model, positive, negative, batch=2)
    assert len(calls) == 2
    for call in calls:
        rows = torch.cat([(ink, mixed)[chunk].expand(2, -1) for chunk in call.chunks])
        assert_equal(call, unet, rows)


def test_a_prompt_without_style_takes_the_models_and_stays_in_the_same_forward(model, unet):
    neon = style_row(4, 1)
    with watch(model) as calls:
        sample(select(model, "ink"), with_style(model, POSITIVE, "neon LINES"), NEGATIVE)
    assert len(calls) == 2
    for call in calls:
        assert_equal(call, unet, torch.cat([(neon, style_row(4, 0))[chunk] for chunk in call.chunks]))


def three_styles(model):
    """A MODEL with another style for each of three latents, and their rows."""
    from comfyui_dmm.nodes.host_model import styled

    strong = Strength(parse_style(NAMES[3]), 2.0)
    style = PerItem((parse_style(NAMES[2]), parse_style("none"), strong))
    return styled(model, style), torch.cat([style_row(4, 2), no_style_row(4), style_row(4, 3, 2.0)])


def test_one_style_per_latent(model, unet):
    styled, rows = three_styles(model)
    with watch(model) as calls:
        sample(styled, POSITIVE, NEGATIVE, batch=3)
        sample(styled, POSITIVE, NEGATIVE, batch=2)  # fewer latents: the first rows
    for call in calls[:2]:
        assert_equal(call, unet, rows.repeat(2, 1))
    for call in calls[2:]:
        assert_equal(call, unet, rows[:2].repeat(2, 1))


def test_conditionings_that_the_guider_never_sees_take_the_models_style(model, unet):
    """PerpNeg's node evaluates its empty prompt on its own path."""
    from comfy_extras.nodes_perpneg import PerpNeg

    with torch.inference_mode():
        patched = PerpNeg.execute(select(model, "ink"), conditioning(DEMO, 3), 1.0)[0]
    with watch(model) as calls:
        sample(patched, POSITIVE, NEGATIVE, batch=2)
    assert len(calls) == 4  # two steps of: both prompts, the empty prompt
    for call in calls:
        assert_equal(call, unet, style_row(4, 0))


def test_one_style_per_latent_without_the_guiders_help(model, unet):
    """The same way in, for a whole batch of prompts."""
    from comfy.patcher_extension import WrappersMP
    from comfyui_dmm.nodes import style_patch

    styled, rows = three_styles(model)
    styled.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, style_patch.KEY)
    with watch(model) as calls:
        sample(styled, POSITIVE, NEGATIVE, batch=2)
    assert [len(call.chunks) for call in calls] == [2, 2]
    for call in calls:
        assert_equal(call, unet, rows[:2].repeat(2, 1))


def test_regions_keep_their_styles(model, unet):
    """Two half-picture prompts in two styles: equal sizes, so they share the forward with each other."""
    rows = [style_row(4, 0), style_row(4, 2)]
    areas = [conditioning(DEMO, i, area=(8, 4, 0, 4 * i)) for i in range(2)]
    left, right = (with_style(model, area, name) for area, name in zip(areas, (NAMES[0], NAMES[2])))
    with watch(model) as calls:
        sample(model, left + right, [], cfg=1.0, steps=1)
    (call,) = calls
    by_prompt = {float(c[0][0].sum()): row for c, row in zip((left[0], right[0]), rows)}
    assert_equal(call, unet, torch.cat([by_prompt[float(c.sum())] for c in call.context[:, None]]))


def test_none_is_the_plain_unet_bit_for_bit(models, model, unet):
    """Against the same file without its style weights, loaded by the host alone."""
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.model_detection import detect_unet_config

    sd = {k: v.clone() for k, v in unet.state_dict().items() if not k.startswith(STYLE_KEYS)}
    config = comfy.supported_models.SD15(detect_unet_config(sd, ""))
    config.set_inference_dtype(torch.float32, None)
    config.unet_config |= {"num_heads": -1, "num_head_channels": 64}
    plain = config.get_model(sd).load_model_weights(sd)
    plain = comfy.model_patcher.ModelPatcher(plain, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    expected = sample(plain, POSITIVE, NEGATIVE)
    for styled in (model, select(model, "none"), select(model, "ink", 0.0), select(select(model, "ink"), "none")):
        assert torch.equal(sample(styled, POSITIVE, NEGATIVE), expected)
    assert not torch.equal(sample(select(model, "ink"), POSITIVE, NEGATIVE), expected)


def test_a_selector_replaces_and_leaves_its_input_alone(model):
    alone = {name: sample(select(model, name), POSITIVE, NEGATIVE) for name in ("none", "ink", "墨")}
    ink = select(model, "ink")
    both = select(ink, "墨")
    assert torch.equal(sample(both, POSITIVE, NEGATIVE), alone["墨"])
    assert torch.equal(sample(ink, POSITIVE, NEGATIVE), alone["ink"])
    assert torch.equal(sample(model, POSITIVE, NEGATIVE), alone["none"])
    assert both.model is model.model  # one UNet in memory
    for kind, wrappers in model.wrappers.items():
        assert both.wrappers[kind] == wrappers
    patches = both.model_options["transformer_options"]["patches"]
    assert patches == model.model_options["transformer_options"]["patches"]


def test_the_cached_conditioning_is_not_written_to(model):
    positive, negative = with_style(model, POSITIVE, NAMES[1]), conditioning(DEMO, 5, model_conds={})
    before = dict(positive[0][1])
    sample(select(model, "ink"), positive, negative)
    assert negative[0][1] == {"model_conds": {}} and positive[0][1] == before


def test_lora_and_style_together(model, unet):
    """The host's LoRA loading on a styled MODEL, against our UNet with the LoRA folded in by hand."""
    import comfy.sd

    keys = ["time_embed.0", "input_blocks.3.0.emb_layers.1", "middle_block.1.transformer_blocks.0.attn2.to_k"]
    torch.manual_seed(3)
    weights = dict(unet.named_parameters())
    lora, folded = {}, random_unet(DEMO)
    for key in keys:
        out, inner = weights[f"{key}.weight"].shape
        up, down = torch.randn(out, 2) * 0.2, torch.randn(2, inner) * 0.2
        lora |= {f"diffusion_model.{key}.lora_up.weight": up, f"diffusion_model.{key}.lora_down.weight": down}
        folded.get_parameter(f"{key}.weight").data += 0.5 * up @ down
    with torch.inference_mode():
        patched, _ = comfy.sd.load_lora_for_models(select(model, "ink"), None, lora, 0.5, 0)
    with watch(model) as calls:
        sample(patched, POSITIVE, NEGATIVE)
    for call in calls:
        assert_equal(call, folded, style_row(4, 0))
    assert torch.equal(sample(model, POSITIVE, NEGATIVE), sample(select(model, "none"), POSITIVE, NEGATIVE))


def test_a_style_of_another_model_is_refused(model):
    from comfyui_dmm.nodes.host_model import styled

    with pytest.raises(ValueError, match="unknown style 'oil'. The styles of this model: ink, Neon lines"):
        with_style(model, POSITIVE, "oil")
    prompt = [[POSITIVE[0][0], {"dmm_style": parse_style("oil")}]]  # made with another model, painted with this one
    with watch(model) as calls, pytest.raises(ValueError, match="unknown style 'oil'"):
        sample(model, prompt, NEGATIVE)
    with pytest.raises(ValueError, match="unknown style 'oil'"):
        styled(model, parse_style("ink; 50%: oil"))
    assert calls == []


def test_the_host_can_make_a_second_copy(model, unet):
    """torch.compile and hooks (DynamicVRAM) and several GPUs reload a MODEL through its loader."""
    factory, arguments = model.cached_patcher_init
    assert factory(*arguments, disable_dynamic=True).model is not model.model
    copy = select(model, "ink").clone(force_deepcopy=True)
    assert copy.model is not model.model
    with watch(copy) as calls:
        sample(copy, POSITIVE, NEGATIVE)
    for call in calls:
        assert_equal(call, unet, style_row(4, 0))


def test_the_host_counts_the_style_weights(model, unet):
    styles = sum(p.numel() for p in unet.style_parameters())
    assert model.model_size() >= 4 * sum(p.numel() for p in unet.parameters()) > 4 * styles > 0


def test_compiled(model, monkeypatch):
    """One compiled graph across styles, without the guards that the host's TorchCompileModel drops.

    With the attention that the host uses on a GPU: the CPU's asks for free memory, and cuts the graph into pieces.
    """
    from comfy.ldm.modules import attention
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    torch._dynamo.reset()
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    graphs = set()
    for name in ("none", "ink", "墨", "none"):
        expected = sample(select(model, name), POSITIVE, NEGATIVE)
        torch.testing.assert_close(sample(select(compiled, name), POSITIVE, NEGATIVE), expected, rtol=0, atol=1e-4)
        graphs.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(graphs) == 1 and graphs != {0}, "another style made the host compile again, or it never compiled"
