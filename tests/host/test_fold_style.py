"""Fold Style into Weights in the real host: folded paints what unfolded paints (1e-4 of the scale), other styles still work, and nothing
of it is saved or stays on the shared model."""

import dataclasses

import pytest
import torch
from comfyui_dmm.dmm_core.bank import BANK
from comfyui_dmm.dmm_core.style_value import PerItem, parse_style

from .families import DEMO, FAMILIES, NAMES, checkpoint_of, random_unet, with_bank
from .sampling import conditioning, sample
from .test_add_styles import add, folder, unet  # noqa: F401  (fixtures)
from .test_compatible import LEFT, NEGATIVE, POSITIVE, apply, host_alone, lora, mix, paint, region
from .test_sampling_equals_core import load


def fold(model):
    from comfyui_dmm.nodes.fold_style import FoldStyle

    with torch.inference_mode():
        return FoldStyle.execute(model).args[0]


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.fixture(scope="module")
def model(models, unet):  # noqa: F811
    return load(models, checkpoint_of(unet), "fold")


@pytest.fixture
def bank_calls(model, monkeypatch):
    """How many layers of the bank were computed."""
    from comfyui_dmm.dmm_core.bank import BankLayer

    calls = []
    plain = BankLayer.forward
    monkeypatch.setattr(BankLayer, "forward", lambda self, *args: calls.append(1) or plain(self, *args))
    return calls


@pytest.mark.parametrize("style", ["none", NAMES[1], f"{NAMES[0]}:0.5, {NAMES[3]}:0.5"])
def test_folded_is_unfolded_and_costs_nothing(model, bank_calls, style):
    chosen = apply(model, style)
    want = sample(chosen, POSITIVE, NEGATIVE, batch=2)
    assert bank_calls
    bank_calls.clear()
    folded = fold(chosen)
    close(sample(folded, POSITIVE, NEGATIVE, batch=2), want)
    assert not bank_calls
    torch.testing.assert_close(
        sample(chosen, POSITIVE, NEGATIVE, batch=2), want, rtol=0, atol=0
    )  # the MODEL before is as it was


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "demo"])
def test_every_family(models, family):
    config = FAMILIES[family]
    chosen = apply(load(models, checkpoint_of(with_bank(random_unet(config))), "fold-family"), NAMES[1])
    positive, negative = conditioning(config, 1), conditioning(config, 2)
    close(sample(fold(chosen), positive, negative), sample(chosen, positive, negative))


def test_other_styles_on_a_folded_model(model):
    """Another style on the MODEL, on a prompt, per item, over the steps and per region: the bank adds what they differ by."""
    folded = fold(apply(model, NAMES[1]))
    each = PerItem((parse_style(NAMES[0]), parse_style("none"), parse_style(NAMES[1])))
    for style in (NAMES[0], each, f"{NAMES[0]}; 50%: {NAMES[2]}"):
        close(*(sample(apply(one, style), POSITIVE, NEGATIVE, batch=3) for one in (folded, model)))
    own = [[POSITIVE[0][0], {**POSITIVE[0][1], "dmm_style": parse_style(NAMES[3])}]]
    close(sample(folded, own, NEGATIVE), sample(apply(model, NAMES[1]), own, NEGATIVE))


@pytest.mark.parametrize("mode", ["one pass", "own prompts"])
def test_regions_on_a_folded_model(model, mode):
    left = region(NAMES[0], (0, 0, 0.5, 1), positive=LEFT if mode == "own prompts" else None)
    results = []
    for one in (fold(apply(model, NAMES[1])), apply(model, NAMES[1])):
        mixed = mix(one, POSITIVE, NEGATIVE, left, mode=mode, background=NAMES[2])
        results.append(paint(one, *mixed))
    close(*results)


def test_a_lora_beside_it(model):
    with_lora = lora(apply(model, NAMES[0]))
    close(sample(fold(with_lora), POSITIVE, NEGATIVE), sample(with_lora, POSITIVE, NEGATIVE))
    close(sample(lora(fold(apply(model, NAMES[0]))), POSITIVE, NEGATIVE), sample(with_lora, POSITIVE, NEGATIVE))


def test_an_add_on(folder, unet):  # noqa: F811
    base = host_alone(unet)
    before = sample(base, POSITIVE, NEGATIVE)
    chosen = apply(add(base, folder / "styles.safetensors")[0], NAMES[1])
    close(sample(fold(chosen), POSITIVE, NEGATIVE), sample(chosen, POSITIVE, NEGATIVE))
    torch.testing.assert_close(sample(base, POSITIVE, NEGATIVE), before, rtol=0, atol=0)


def test_folding_again_replaces_what_was_folded(model):
    twice = fold(apply(fold(apply(model, NAMES[1])), NAMES[2]))
    close(sample(twice, POSITIVE, NEGATIVE), sample(apply(model, NAMES[2]), POSITIVE, NEGATIVE))
    (many,) = {len(patches) for patches in twice.patches.values()}
    assert many == 1


def test_saved_and_read_for_training_as_it_was(model):
    from comfyui_dmm.nodes.host_model import to_checkpoint
    from comfyui_dmm.nodes.weights import unet_weights

    with torch.inference_mode():
        plain, folded = (to_checkpoint(one).unet for one in (model, fold(apply(model, NAMES[1]))))
        assert plain.keys() == folded.keys() and all(torch.equal(plain[key], folded[key]) for key in plain)
        folded = unet_weights(fold(apply(model, NAMES[1])), styles=True)
        assert all(torch.equal(weight, folded[key]) for key, weight in unet_weights(model, styles=True).items())


def test_what_cannot_be_folded_is_said(models, model, unet):  # noqa: F811
    with pytest.raises(ValueError, match="changes over the steps or between pictures"):
        fold(apply(model, f"{NAMES[0]}; 50%: {NAMES[2]}"))
    whole = checkpoint_of(unet)
    bare = load(
        models, dataclasses.replace(whole, unet={k: v for k, v in whole.unet.items() if BANK not in k}), "fold-bare"
    )
    folded = fold(apply(bare, NAMES[0]))
    assert not folded.patches
    torch.testing.assert_close(
        sample(folded, POSITIVE, NEGATIVE), sample(apply(bare, NAMES[0]), POSITIVE, NEGATIVE), rtol=0, atol=0
    )
    assert DEMO  # the family of ``unet``


# --- how the host holds the weights -----------------------------------------------------------------------------------


def test_weights_that_the_host_patches_as_they_are_used(model, monkeypatch):
    """Low VRAM: what does not fit stays as it is, and its patches, the folded style among them, are added in each forward. Newer hosts
    copy a patch to the GPU before it is used; here the copies stay where they are."""
    from comfy.model_patcher import LowVramPatch, ModelPatcher

    whole = ModelPatcher.load
    late = []

    def tight(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        whole(self, device_to, lowvram_model_memory=1, force_patch_weights=force_patch_weights, full_load=False)
        functions = [f for m in self.model.modules() for f in getattr(m, "weight_function", [])]
        late.extend(f for f in functions if isinstance(f, LowVramPatch))
        for function in late:
            if hasattr(function, "prepare"):
                function.prepare(None, None)

    chosen = apply(model, NAMES[1])
    want = sample(chosen, POSITIVE, NEGATIVE), sample(apply(model, NAMES[2]), POSITIVE, NEGATIVE)
    monkeypatch.setattr(ModelPatcher, "load", tight)
    folded = fold(chosen)
    close(sample(folded, POSITIVE, NEGATIVE), want[0])
    close(sample(apply(folded, NAMES[2]), POSITIVE, NEGATIVE), want[1])
    assert late


def test_compiled(model, monkeypatch):
    """The backend runs the graphs as they are, one UNet folded in two ways and not at all."""
    from comfy.ldm.modules import attention
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    for name in ("optimized_attention", "optimized_attention_masked"):  # the CPU's asks for free memory: no whole graph
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    torch._dynamo.reset()
    chosen = {name: apply(model, name) for name in NAMES[:3]}
    want = {name: sample(one, POSITIVE, NEGATIVE) for name, one in chosen.items()}
    folded = {name: fold(one) for name, one in chosen.items()}
    with torch.inference_mode():
        compiled = {name: TorchCompileModel.execute(one, "eager")[0] for name, one in folded.items()}
        other = TorchCompileModel.execute(apply(folded[NAMES[0]], NAMES[1]), "eager")[0]
    for name in (NAMES[0], NAMES[1], NAMES[0], NAMES[2]):
        close(sample(compiled[name], POSITIVE, NEGATIVE), want[name])
        close(sample(other, POSITIVE, NEGATIVE), want[NAMES[1]])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
