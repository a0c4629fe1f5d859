"""Room for one more style: what was there keeps every bit, and only the new style's own numbers come back."""

import pytest
import torch
from comfyui_dmm.dmm_core.bank import BANK, bank_key, bank_masses, folded_bank, layer_change, layer_parts
from comfyui_dmm.dmm_core.bank_room import last_alone, put_last, with_room
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.dmm_core.style import CODEBOOK, no_style_row, style_row
from comfyui_dmm.dmm_core.unet import load_unet

from ..host.server import PACK

DEMO = PACK / "models" / "dmm" / "demo-dmm.safetensors"


@pytest.fixture(scope="module")
def demo():
    return load_checkpoint(DEMO).unet


@pytest.fixture(scope="module")
def question():
    g = torch.Generator().manual_seed(2)
    return torch.randn(2, 4, 16, 16, generator=g), torch.tensor([40, 800]), torch.randn(2, 77, 64, generator=g)


def predicted(weights, question, row):
    with torch.no_grad():
        return load_unet(weights)(*question, style=row.expand(2, -1))


@pytest.mark.parametrize("rank", [0, 3])
def test_old_styles_keep_every_bit(demo, rank, question):
    roomy = with_room(demo, rank, [0.0] * 7)
    for key, value in demo.items():
        now = roomy[key]
        if key.startswith(BANK):
            assert torch.equal(value, now[tuple(map(slice, value.shape))]) or key.endswith("cores.weight")
        elif key == f"{CODEBOOK}.weight":
            assert torch.equal(now[:7], value) and len(now) == 8
        else:
            assert now is value, key
    for style in (*range(7), None):
        before = bank_masses(no_style_row(7) if style is None else style_row(7, style), 8)[0]
        after = bank_masses(no_style_row(8) if style is None else style_row(8, style), 9)[0]
        one, two = folded_bank(demo, before), folded_bank(roomy, after)
        plain = [key for key in one if key != f"{CODEBOOK}.weight"]
        assert all(torch.equal(one[key], two[key]) for key in plain)
        # As hosts paint that fold the bank: bit for bit. With the bank beside the weights only the order of sums can differ.
        row7, row8 = (no_style_row(n) if style is None else style_row(n, style) for n in (7, 8))
        assert torch.allclose(predicted(demo, question, row7), predicted(roomy, question, row8), atol=2e-5)


def test_the_new_style_begins_as_a_blend(demo, question):
    """Independently: the blend of the old rows, computed by the model itself."""
    start = [0.5, 0.0, 0.25, 0.0, 0.25, 0.0, 0.0]
    roomy = with_room(demo, 4, start)
    blend = style_row(7, {0: 0.5, 2: 0.25, 4: 0.25})
    assert torch.allclose(
        predicted(roomy, question, style_row(8, 7)), predicted(demo, question, blend), atol=2e-3
    )  # float16


@pytest.mark.parametrize(
    ("start", "left"), [([0.0] * 7, 0.1), ([0.28, 0, 0, 0, 0, 0, 0], 0.15), ([0, 0, 0, 0.2, 0.3, 0, 0], 0.15)]
)
def test_a_blend_with_a_share_of_no_style_is_begun_as_that(demo, question, start, left):
    """Independently: the blend at its strength, by the model itself. left: of the error of the blended code, which has no share of none."""
    strength = sum(start)
    blend = style_row(7, {i: w / strength for i, w in enumerate(start)}, strength) if strength else no_style_row(7)
    roomy, expected = with_room(demo, 0, start), predicted(demo, question, blend)
    error = (predicted(roomy, question, style_row(8, 7)) - expected).square().mean()
    codes = f"{CODEBOOK}.weight"
    mean = torch.tensor([start]) @ demo[codes].float()
    blended = roomy | {codes: torch.cat([demo[codes], mean.to(demo[codes])])}
    before = (predicted(blended, question, style_row(8, 7)) - expected).square().mean()
    assert error < left * before, (error, before)


def test_alone_it_paints_the_same_and_nothing_is_left_of_the_others(demo, question):
    roomy = with_room(demo, 2, [0.0, 1.0, 0, 0, 0, 0, 0])
    alone = last_alone(roomy)
    assert alone[f"{CODEBOOK}.weight"].shape[0] == 1
    assert torch.allclose(
        predicted(alone, question, style_row(1, 0)), predicted(roomy, question, style_row(8, 7)), atol=2e-5
    )
    assert torch.allclose(
        predicted(alone, question, no_style_row(1)), predicted(demo, question, no_style_row(7)), atol=2e-5
    )


def test_only_its_own_numbers_come_back(demo):
    """Everything of the trained copy is changed; of the result only the new row, columns and rows are."""
    roomy = with_room(demo, 3, [0.0] * 7)
    alone = {key: value.float() + 1 for key, value in last_alone(roomy).items()}
    after = put_last(roomy, alone, demo)
    assert after.keys() == demo.keys() and {v.dtype for v in after.values()} == {v.dtype for v in demo.values()}
    for key, value in demo.items():
        if not key.startswith(BANK):
            assert torch.equal(after[key][: len(value)], value)
    name = "input_blocks.1.0.in_layers.2"
    up, down, cores = (after[bank_key(name, part)] for part in ("up", "down", "cores"))
    old = layer_parts(demo, name)
    assert torch.equal(up[:, :7], old["up"]) and (up[:, 7:] != roomy[bank_key(name, "up")][:, 7:]).all()
    assert torch.equal(down[:7], old["down"]) and (down[7:] != roomy[bank_key(name, "down")][7:]).all()
    same = (cores == roomy[bank_key(name, "cores")]).all(1)
    assert same.tolist() == [True] * 7 + [False, True]  # the last one is of "no style"
    for style in range(7):
        one, two = (
            layer_change(layer_parts(w, name), bank_masses(style_row(n, style), n + 1)[0])
            for w, n in ((demo, 7), (after, 8))
        )
        assert torch.equal(one[0], two[0])


def test_a_start_of_another_model_is_refused(demo):
    with pytest.raises(ValueError, match="3 weights for a model with 7 styles"):
        with_room(demo, 0, [0.0] * 3)
