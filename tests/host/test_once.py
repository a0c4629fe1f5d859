"""What is computed once in a sampling: how often, when it is computed again, the same pictures bit for bit, and nothing left afterwards."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from comfyui_dmm.dmm_core.style import MLP_NAMES
from comfyui_dmm.dmm_core.style_value import PerItem, parse_style

from .families import DEMO, NAMES, checkpoint_of, random_unet
from .sampling import conditioning
from .test_regions_host import mix, paint, region
from .test_sampling_equals_core import load, with_style

POSITIVE, NEGATIVE = conditioning(DEMO, 1), conditioning(DEMO, 2)
INK, NEON = NAMES[0], NAMES[1]


@pytest.fixture(scope="module")
def model(models):
    return load(models, checkpoint_of(random_unet(DEMO)), "once")


def styled(model, text):
    from comfyui_dmm.nodes.host_model import styled

    return styled(model, parse_style(text) if isinstance(text, str) else text)


def mlp_of(model):
    unet = model.model.diffusion_model
    return next(getattr(unet, name) for name in MLP_NAMES if hasattr(unet, name))


@contextmanager
def counted(module):
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def nothing_kept(monkeypatch):
    """Everything is computed at every step, by the host's own entries."""
    import comfy.conds
    from comfyui_dmm.nodes import once

    with monkeypatch.context() as patched:
        patched.setattr(once.OfSampling, "once", lambda self, source, what, make: make())
        patched.setattr(
            once.OfSampling, "entry", lambda self, key, rows, device: comfy.conds.CONDRegular(rows.to(device))
        )
        patched.setattr(once.LastingShares, "process_cond", comfy.conds.CONDNoiseShape.process_cond)
        patched.setattr(once.Lasting, "concat", comfy.conds.CONDRegular.concat)
        yield


def plain(model):
    return styled(model, INK), (POSITIVE, NEGATIVE), {}


def scheduled(model):
    return styled(model, f"{INK}; 50%: {NEON}"), (POSITIVE, NEGATIVE), {}


def faded(model):
    return styled(model, f"{INK}; 20%-80%: {NEON}"), (POSITIVE, NEGATIVE), {}


def per_item(model):
    styles = PerItem((parse_style(INK), parse_style(f"none; 40%: {NEON}"), parse_style(f"{INK}:0.3, {NEON}:0.7")))
    return styled(model, styles), (POSITIVE, NEGATIVE), {"batch": 4}


def of_prompts(model):
    return model, (with_style(model, POSITIVE, INK), with_style(model, NEGATIVE, f"{NEON}; 50%: none")), {}


def crops(model):
    regions = region(INK), region(f"{NEON}; 30%: {INK}", (0.4, 0, 0.6, 1))
    return model, mix(model, *regions, background=NEON), {"width": 16, "batch": 2}


def one_pass(model):
    regions = region(INK), region(f"{NEON}; 30%: {INK}", (0.4, 0, 0.6, 1))
    return model, mix(model, *regions, mode="one pass", background=NEON), {"width": 16, "batch": 2}


CASES = [plain, scheduled, faded, per_item, of_prompts, crops, one_pass]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_same_picture_bit_for_bit(model, monkeypatch, case):
    patched, prompts, canvas = case(model)
    found = paint(patched, prompts, steps=5, **canvas)
    with nothing_kept(monkeypatch):
        wanted = paint(patched, prompts, steps=5, **canvas)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("case", "times"), [(plain, 1), (scheduled, 2), (of_prompts, 2), (per_item, 2), (faded, 3)])
def test_how_often_offsets_are_computed(model, monkeypatch, case, times):
    """Five steps: once for each moment at which a row is another one; a fade has three steps within it, and one before or after."""
    patched, prompts, canvas = case(model)
    with counted(mlp_of(model)) as calls:
        paint(patched, prompts, steps=5, **canvas)
    assert times <= len(calls) <= times + (case is faded) * 2
    with nothing_kept(monkeypatch), counted(mlp_of(model)) as every:
        paint(patched, prompts, steps=5, **canvas)
    assert len(every) == 5


def test_two_samplings_share_nothing(model):
    patched, prompts, _ = plain(model)
    with counted(mlp_of(model)) as calls:
        for _ in range(2):
            paint(patched, prompts, steps=3)
    assert len(calls) == 2


def test_prompts_that_share_a_forward_in_some_steps_only(model, monkeypatch):
    """The host joins what has room at that moment."""
    from comfy.model_patcher import ModelPatcher

    patched, prompts, _ = of_prompts(model)
    together = paint(patched, prompts, steps=6)
    rooms, sizes = iter([1e15, 0, 1e15, 0, 0, 1e15] * 2), []
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: next(rooms))
    handle = model.model.diffusion_model.register_forward_hook(lambda unet, args, out: sizes.append(len(args[0])))
    try:
        found = paint(patched, prompts, steps=6)
    finally:
        handle.remove()
    assert {1, 2} == set(sizes)
    torch.testing.assert_close(found, together, rtol=0, atol=1e-4 * together.abs().max().item())


def test_a_hook_on_the_style_side(model, monkeypatch):
    """A LoRA of one prompt that changes over the steps, and changes the very layers whose results are kept."""
    import comfy.hooks

    name = next(name for name in MLP_NAMES if hasattr(model.model.diffusion_model, name))
    width, generator = DEMO.model_channels * 4, torch.Generator().manual_seed(0)
    lora = {
        f"diffusion_model.{name}.linear_2.lora_up.weight": torch.randn(width, 2, generator=generator),
        f"diffusion_model.{name}.linear_2.lora_down.weight": torch.randn(2, width, generator=generator),
    }

    def painted():
        hooks = comfy.hooks.create_hook_lora(lora, 1.0, 1.0)
        frames = comfy.hooks.HookKeyframeGroup()
        for strength, start in ((1.0, 0.0), (0.3, 0.5)):
            frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        hooks.set_keyframes_on_hooks(frames)
        positive, negative = comfy.hooks.set_conds_props((POSITIVE, NEGATIVE), 1.0, "default", hooks=hooks)
        return paint(styled(model, INK), (positive, NEGATIVE), steps=4)

    without = paint(styled(model, INK), (POSITIVE, NEGATIVE), steps=4)
    found = painted()
    assert (found - without).abs().max() > 0.05  # the LoRA is seen
    with nothing_kept(monkeypatch):
        assert torch.equal(painted(), found)


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), "cancel"])
def test_nothing_is_left(model, error):
    import comfy.model_management as mm
    from comfyui_dmm.nodes import once, style_patch

    paint(model, (POSITIVE, NEGATIVE))  # the host marks the layers it has loaded
    kept, unet = [], model.model.diffusion_model
    attributes = [set(vars(module)) for module in unet.modules()]
    made = once.OfSampling.__init__

    def watched(self):
        made(self)
        kept.append(weakref.ref(self))

    def fail(*_):
        if error is not None and len(kept) and len(kept[0]().rows):
            raise mm.InterruptProcessingException() if error == "cancel" else error

    patched, prompts, canvas = one_pass(model)
    handle = unet.out.register_forward_hook(fail)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(once.OfSampling, "__init__", watched)
        try:
            paint(patched, prompts, **canvas)
            assert error is None
        except (RuntimeError, mm.InterruptProcessingException) as raised:
            assert error is not None
            raised.__traceback__ = None
        finally:
            handle.remove()
    gc.collect()
    assert len(kept) == 1 and kept[0]() is None
    assert style_patch.ONCE not in patched.model_options["transformer_options"]
    assert [set(vars(module)) for module in unet.modules()] == attributes
