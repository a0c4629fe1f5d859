"""Style Mix and Style Panorama in the real host, against Mixture of Diffusers (arXiv:2302.02412) written out with our own UNet."""

import pytest
import torch
import torch.nn.functional as F
from comfyui_dmm.dmm_core.regions import BOX_VARIANCE, MOD_VARIANCE, gaussian, tiles
from comfyui_dmm.dmm_core.sampling import host_noise, sigmas_for
from comfyui_dmm.dmm_core.sampling import sample as our_sample
from comfyui_dmm.dmm_core.schedule import NoiseSchedule
from comfyui_dmm.dmm_core.style import style_delta, style_row
from comfyui_dmm.dmm_core.unet import ResBlock

from .families import DEMO, FAMILIES, NAMES, checkpoint_of, random_unet
from .sampling import conditioning, watch
from .test_sampling_equals_core import load

POSITIVE, NEGATIVE = conditioning(DEMO, 1), conditioning(DEMO, 2)
LEFT, RIGHT = conditioning(DEMO, 3), conditioning(DEMO, 4)
ROWS = [style_row(4, i) for i in range(4)]


@pytest.fixture(scope="module")
def unet():
    return random_unet(DEMO)


@pytest.fixture(scope="module")
def model(models, unet):
    return load(models, checkpoint_of(unet), "regions")


def region(style, box=(0.0, 0.0, 0.5, 1.0), fall_off="feather", feather=16, **kwargs):
    from comfyui_dmm.nodes.regions import DMMRegion

    return DMMRegion.execute(style, *box, fall_off, feather, **kwargs)[0]


def mix(model, *regions, mode="own prompts", background="none"):
    from comfyui_dmm.nodes.regions import StyleMix

    named = {f"region{i}": r for i, r in enumerate(regions)}
    return StyleMix.execute(model, POSITIVE, NEGATIVE, background, mode, named).args


def panorama(model, *regions, tile=64, overlap=0.5):
    from comfyui_dmm.nodes.regions import StylePanorama

    named = {f"region{i}": r for i, r in enumerate(regions)}
    return StylePanorama.execute(model, POSITIVE, NEGATIVE, tile, tile, overlap, named).args


@torch.inference_mode()
def paint(model, prompts, height=8, width=8, cfg=4.0, steps=2, batch=1, seed=0, start=None, denoise=1.0):
    """Latents (batch, 4, height, width) by the host's own KSampler code."""
    import comfy.sample

    latent = torch.zeros(batch, 4, height, width) if start is None else start
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        *(model, noise, steps, cfg, "euler", "normal", *prompts, latent), denoise=denoise, disable_pbar=True, seed=seed
    )


@torch.no_grad()
def mixture(unet, places, height, width, cfg=4.0, steps=2, seed=0, batch=1):
    """eps = sum w eps / sum w over places (area or None, weights (h, w), positive, negative, row), then CFG, then Euler."""
    schedule = NoiseSchedule()

    def denoise(x, sigma):
        scaled = x / (sigma[:, None, None, None] ** 2 + 1).sqrt()
        t = schedule.t_from_sigma(sigma)
        eps = []
        for side in (2, 3):
            total, norm = torch.zeros_like(x), torch.zeros_like(x)
            for place in places:
                h, w, top, left = place[0] or (height, width, 0, 0)
                window = (..., slice(top, top + h), slice(left, left + w))
                context = place[side][0][0].expand(len(x), -1, -1)
                out = unet(scaled[window].contiguous(), t, context, style=place[4].expand(len(x), -1))
                total[window] += out * place[1][window[1:]]
                norm[window] += place[1][window[1:]]
            eps.append(total / norm)
        guided = eps[1] + cfg * (eps[0] - eps[1])
        return x - sigma[:, None, None, None] * guided

    noise = host_noise((batch, 4, height, width), seed)
    return our_sample(denoise, schedule, noise, sigmas_for(schedule, steps, "normal"), sampler="euler")


def assert_same_painting(model, host, ours):
    host = model.model.process_latent_in(host)
    torch.testing.assert_close(host, ours, rtol=0, atol=2e-4 * ours.abs().max().item())


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
@pytest.mark.parametrize("fall_off", ["feather", "gaussian"])
def test_boxes_over_a_background_are_mixture_of_diffusers(model, unet, size, fall_off):
    height, width = size
    prompts = mix(
        model,
        region(NAMES[0], (0, 0, 0.5, 1), fall_off, 0, positive=LEFT),
        region(NAMES[2], (0.4, 0.3, 0.9, 0.6), fall_off, 0, positive=RIGHT, negative=LEFT, weight=2.0),
        background=NAMES[1],
    )
    places = []
    for box, prompt, negative, row, weight in (
        ((0, 0, 0.5, 1), LEFT, NEGATIVE, ROWS[0], 1.0),
        ((0.4, 0.3, 0.6, 0.6), RIGHT, LEFT, ROWS[2], 2.0),  # cut at the right border
    ):
        left, top = round(box[0] * width), round(box[1] * height)
        area = (round((box[1] + box[3]) * height) - top, round((box[0] + box[2]) * width) - left, top, left)
        cover = torch.zeros(size)
        cover[top : top + area[0], left : left + area[1]] = 1
        if fall_off == "gaussian":
            cover = gaussian(area, height, width, BOX_VARIANCE).float()
        places.append((area, weight * cover, prompt, negative, row))
    cover = places[0][1] + places[1][1] / 2
    places.append((None, (1 - cover).clamp(min=0), POSITIVE, NEGATIVE, ROWS[1]))
    assert_same_painting(model, paint(model, prompts, height, width), mixture(unet, places, height, width))


@pytest.mark.parametrize("size, overlap", [((8, 24), 0.5), ((11, 21), 0.25)])
def test_panoramas_are_mixture_of_diffusers(model, unet, size, overlap):
    prompts = panorama(
        model, region(NAMES[0], positive=LEFT), region(NAMES[3]), region(NAMES[2], positive=RIGHT), overlap=overlap
    )
    places = []
    for row in tiles(*size, 8, 8, overlap=overlap):
        for i, area in enumerate(row):
            part = i * 3 // len(row)
            prompt, style = [(LEFT, ROWS[0]), (POSITIVE, ROWS[3]), (RIGHT, ROWS[2])][part]
            places.append((area, gaussian(area, *size, MOD_VARIANCE).float(), prompt, NEGATIVE, style))
    with watch(model) as calls:
        host = paint(model, prompts, *size)
    assert len(calls) == 2 and all(len(call.x) == 2 * len(places) for call in calls)  # one forward a step
    assert_same_painting(model, host, mixture(unet, places, *size))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equal_regions_that_fill_the_canvas_take_one_forward(model, count):
    regions = [
        region(NAMES[i], (i / count, 0, 1 / count, 1), feather=0, positive=(LEFT, RIGHT)[i % 2]) for i in range(count)
    ]
    with watch(model) as calls:
        paint(model, mix(model, *regions), 8, 12)
    assert [sorted(call.chunks) for call in calls] == [[0] * count + [1] * count] * 2


def test_masks_and_whole_canvas_boxes_take_one_forward_with_the_background(model, unet):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :24] = 1
    left = region(NAMES[0], mask=mask, feather=0, positive=LEFT)
    right = region(NAMES[2], (0.75, 0, 0.25, 1), feather=0, positive=RIGHT, paint_on="whole canvas")
    with watch(model) as calls:
        host = paint(model, mix(model, left, right, background=NAMES[1]))
    assert [sorted(call.chunks) for call in calls] == [[0] * 3 + [1] * 3] * 2
    covers = [torch.zeros(8, 8) for _ in range(3)]
    covers[0][:, :3], covers[1][:, 6:], covers[2][:, 3:6] = 1, 1, 1
    parts = zip(covers, (LEFT, RIGHT, POSITIVE), (ROWS[0], ROWS[2], ROWS[1]))
    places = [(None, cover, prompt, NEGATIVE, row) for cover, prompt, row in parts]
    assert_same_painting(model, host, mixture(unet, places, 8, 8))


def test_a_mask_per_picture(model, unet):
    masks = torch.zeros(2, 64, 64)
    masks[0, :32], masks[1, :, 40:] = 1, 1
    host = paint(model, mix(model, region(NAMES[0], mask=masks, feather=0, positive=LEFT)), batch=2)
    for i, mask in enumerate(masks):
        cover = F.avg_pool2d(mask[None], 8)[0]
        places = [(None, cover, LEFT, NEGATIVE, ROWS[0]), (None, 1 - cover, POSITIVE, NEGATIVE, torch.zeros(1, 5))]
        assert_same_painting(model, host[i : i + 1], mixture(unet, places, 8, 8, batch=2)[i : i + 1])


def test_uncovered_pixels_are_background(model):
    """Where no region is, one step is the background's alone, whatever the region paints."""
    hole = region(NAMES[0], (0.25, 0.25, 0.5, 0.5), feather=0, positive=LEFT)
    mixed, plain = (paint(model, prompts, steps=1) for prompts in (mix(model, hole), (POSITIVE, NEGATIVE)))
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[2:6, 2:6] = False
    close = (mixed - plain).abs() <= 1e-4 * plain.abs().max()
    assert close[..., outside].all() and not close[..., ~outside].all()


def test_one_graph_for_every_size(model):
    """A hires fix: the same conditionings on a larger canvas, from the first picture."""
    prompts = mix(model, region(NAMES[0], (0.3, 0.1, 0.5, 0.7)), region(NAMES[1], mask=torch.rand(1, 33, 47) + 0.1))
    small = paint(model, prompts, 8, 12, batch=2)
    large = F.interpolate(small, size=(15, 21), mode="bilinear")
    for out in (small, paint(model, prompts, start=large, denoise=0.5), paint(model, prompts, 7, 9, cfg=1.0)):
        assert out.isfinite().all() and out.std() > 0.1


@pytest.mark.parametrize("mode", ["own prompts", "one pass"])
def test_one_style_everywhere_is_that_style(model, mode):
    regions = [region(NAMES[1], (0, 0, 0.4, 1)), region(NAMES[1], (0.5, 0.2, 0.4, 0.5), paint_on="whole canvas")]
    if mode == "own prompts":
        regions = regions[1:]  # a crop is another picture
    from comfyui_dmm.nodes.style_apply import ApplyStyle

    plain = paint(ApplyStyle.execute(model, NAMES[1])[0], (POSITIVE, NEGATIVE), 9, 8, steps=4)
    mixed = paint(model, mix(model, *regions, mode=mode, background=NAMES[1]), 9, 8, steps=4)
    torch.testing.assert_close(mixed, plain, rtol=0, atol=2e-4 * plain.abs().max().item())


@pytest.mark.parametrize("family", ["demo", "sd15"])
def test_one_pass_is_another_time_embedding_at_every_pixel(models, family):
    """Against our UNet whose ResBlocks take, pixel by pixel, the normalised features of the style that is there."""
    from comfyui_dmm.nodes.regions import DMMRegion, StyleMix

    config = FAMILIES[family]
    unet = random_unet(config)
    model = load(models, checkpoint_of(unet), f"one-pass-{family}")
    positive, negative = conditioning(config, 1), conditioning(config, 2)
    parts = [DMMRegion.execute(NAMES[i], 0.5 * i, 0.0, 0.5, 1.0, "feather", 0)[0] for i in range(2)]
    named = dict(zip(("a", "b"), parts))
    prompts = StyleMix.execute(model, positive, negative, NAMES[2], "one pass", named).args
    with watch(model) as calls:
        paint(model, prompts, 8, 8, batch=2)
    assert [sorted(call.chunks) for call in calls] == [[0, 1]] * 2  # one forward a step, whatever the styles
    for call in calls:
        ours = per_pixel(unet, call, [style_row(config.num_styles, i) for i in range(2)])
        torch.testing.assert_close(call.out, ours, rtol=0, atol=1e-4 * ours.abs().max().item())


@torch.no_grad()
def per_pixel(unet, call, rows):
    """Our UNet; left half of the picture in the first style, right half in the second, each normalised as if everywhere."""
    deltas = [style_delta(unet.model_embedding, unet.style_mlp, row)[0] for row in rows]

    def forward(block, x, emb, context):
        h = block.in_layers(x)
        halves = [block.out_layers[0](h + block.emb_layers(emb + delta)[:, :, None, None]) for delta in deltas]
        left = torch.arange(h.shape[-1]) < h.shape[-1] / 2
        return block.skip_connection(x) + block.out_layers[1:](torch.where(left, *halves))

    before = ResBlock.forward
    ResBlock.forward = forward
    try:
        return unet(call.x, call.t, call.context, call.y)
    finally:
        ResBlock.forward = before


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-4), (torch.float16, 0.01), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
@pytest.mark.parametrize("channels", [32, 64])
def test_normalised_as_if_a_style_were_everywhere(host, channels, size, dtype, close):
    """Against the normalisations written out, also for groups of one channel, and for channels without any variance."""
    from comfyui_dmm.nodes.style_map import styled_norm

    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(32, channels).requires_grad_(False)
    norm.weight.uniform_(0.5, 2), norm.bias.normal_()
    h = torch.randn(2, channels, *size) + 3 * torch.randn(2, channels, 1, 1)
    h[:, ::5] = 2.0
    added, shares = torch.randn(2, 3, channels), torch.rand(2, 3, *size).softmax(1)
    out = styled_norm(norm.to(dtype), *(part.to(dtype) for part in (h, added, shares)))
    norm, h, added, shares = norm.double(), *(part.to(dtype).double() for part in (h, added, shares))
    ours = sum(norm(h + added[:, k, :, None, None]) * shares[:, k, None] for k in range(3))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), ours, rtol=0, atol=close * ours.abs().max().item())


def test_schedules_and_batches_inside_regions(model, unet):
    from comfyui_dmm.dmm_core.style_value import PerItem, parse_style

    each = PerItem((parse_style(NAMES[0]), parse_style(f"{NAMES[1]}; 50%: {NAMES[2]}")))
    for mode in ("own prompts", "one pass"):
        both = paint(
            model, mix(model, region(each, (0, 0, 0.5, 1), paint_on="whole canvas"), mode=mode), batch=2, steps=3
        )
        for i, style in enumerate(each.styles):
            one = mix(model, region(style, (0, 0, 0.5, 1), paint_on="whole canvas"), mode=mode)
            alone = paint(model, one, batch=2, steps=3)
            torch.testing.assert_close(both[i], alone[i], rtol=0, atol=2e-4 * alone.abs().max().item())


def test_hints_are_cut_and_not_squeezed(host):
    from comfyui_dmm.nodes.region_patch import CroppedHints, crop_hint

    hint = torch.arange(64 * 96, dtype=torch.float32).reshape(1, 1, 64, 96)
    assert torch.equal(crop_hint(hint, (4, 6, 2, 3), 8, 12, 8), hint[..., 16:48, 24:72])
    wide = crop_hint(F.interpolate(hint, scale_factor=2), (4, 6, 2, 3), 8, 12, 8)  # another size: fitted first
    assert wide.shape == (1, 1, 32, 48)

    import comfy.controlnet

    first, second = (comfy.controlnet.T2IAdapter(None, 3, 8, "nearest-exact", "cpu") for _ in range(2))
    first.cond_hint_original, second.cond_hint_original = hint, hint + 1
    second.set_previous_controlnet(first)
    second.strength = 0.3
    hints = CroppedHints()
    cut = hints.cropped(second, (4, 6, 2, 3), 8, 12)
    assert cut is hints.cropped(second, (4, 6, 2, 3), 8, 12) is not hints.cropped(second, (4, 6, 1, 3), 8, 12)
    assert cut.strength == 0.3 and torch.equal(cut.cond_hint_original, hint[..., 16:48, 24:72] + 1)
    assert torch.equal(cut.previous_controlnet.cond_hint_original, hint[..., 16:48, 24:72])
    assert torch.equal(second.cond_hint_original, hint + 1) and second.previous_controlnet is first


def test_what_cannot_be_mixed_says_why(model, models):
    whole = (0.0, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="lies outside of the canvas"):
        region("ink", (1.2, 0, 0.5, 0.5))
    with pytest.raises(ValueError, match="unknown style 'oil'"):
        mix(model, region("oil", whole))
    with pytest.raises(ValueError, match="unknown style 'oil'"):
        mix(model, region("ink", whole), background="oil")
    with pytest.raises(ValueError, match="disconnect the prompts of the regions"):
        mix(model, region("ink", whole, positive=LEFT), mode="one pass")
    with pytest.raises(ValueError, match="already in a Style Mix"):
        prompts = mix(model, region("ink"))
        mix(model, region("ink", positive=prompts[0]))
    with pytest.raises(ValueError, match="the mask is empty"):
        paint(model, mix(model, region("ink", mask=torch.zeros(1, 64, 64))))
    with pytest.raises(ValueError, match="too few for 2 parts"):
        paint(model, panorama(model, region("ink"), region("ink")))
    with pytest.raises(ValueError, match="sum to 0"):
        region("ink:0")


def test_cached_conditionings_stay_as_they_are(model):
    for mode in ("own prompts", "one pass"):
        prompts = mix(model, region(NAMES[0], positive=LEFT if mode == "own prompts" else None), mode=mode)
        before = [[(id(c), dict(entries)) for c, entries in side] for side in prompts]
        first = paint(model, prompts)
        assert [[(id(c), entries) for c, entries in side] for side in prompts] == before
        assert torch.equal(first, paint(model, prompts))
    assert "forward_timestep_embed_patch" not in model.model_options["transformer_options"]["patches"]


def test_a_lora_for_one_region(model):
    """The host's own Create Hook LoRA on the prompts of one region. Boxes that share no pixel do not see each other, so the one half is
    painted as without the LoRA, and the other as with the LoRA on the whole MODEL."""
    import comfy.hooks
    import comfy.sd

    weights, generator = model.model.diffusion_model.state_dict(), torch.Generator().manual_seed(3)
    key = "middle_block.1.transformer_blocks.0.attn2.to_k"
    out, inner = weights[f"{key}.weight"].shape
    lora = {
        f"diffusion_model.{key}.lora_up.weight": 0.2 * torch.randn(out, 2, generator=generator),
        f"diffusion_model.{key}.lora_down.weight": 0.2 * torch.randn(2, inner, generator=generator),
    }
    halves = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 0.5, 1.0)

    def painted(model, hooks=None):
        right = (RIGHT, NEGATIVE)
        if hooks is not None:
            right = comfy.hooks.set_conds_props(right, 1.0, "default", hooks=hooks)
        return paint(
            model,
            mix(
                model,
                region(NAMES[0], halves[0], feather=0, positive=LEFT, negative=NEGATIVE),
                region(NAMES[1], halves[1], feather=0, positive=right[0], negative=right[1]),
            ),
            height=8,
            width=16,
        )

    plain = painted(model)
    everywhere = painted(comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0])
    one = painted(model, comfy.hooks.create_hook_lora(lora, 1.0, 1.0))
    assert (plain - everywhere).abs().max() > 0.05  # the LoRA is seen
    tolerance = 1e-4 * plain.std()
    assert (one[..., :8] - plain[..., :8]).abs().max() < tolerance
    assert (one[..., 8:] - everywhere[..., 8:]).abs().max() < tolerance
    assert (painted(model) - plain).abs().max() < tolerance  # nothing of it stays on the shared model
