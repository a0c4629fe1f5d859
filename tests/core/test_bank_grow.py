"""A style bank that grows and shrinks without training: against least squares and SVDs of numpy, and what stays bitwise the same."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.bank import BankConfig, bank_key, folded_bank
from comfyui_dmm.dmm_core.bank_drop import drop_styles, recentred, what_is_told
from comfyui_dmm.dmm_core.bank_fit import fit_bank, fit_layer, neutral_style
from comfyui_dmm.dmm_core.bank_grow import grow_codes, grow_layer, grown_unet, growth_of, growth_size
from comfyui_dmm.dmm_core.bank_size import bank_size, is_banked
from comfyui_dmm.dmm_core.style import CODEBOOK, style_row
from comfyui_dmm.dmm_core.unet import load_unet, unet_config_from_state_dict

from .test_bank import banked_unet
from .test_unet import DEMO, inputs, make

PLAIN = dataclasses.replace(DEMO, num_styles=0)
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3}


def moved(base: dict, seed: int, size=0.1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: v + size * v.std().nan_to_num(0.1) * torch.randn(v.shape, generator=g) for k, v in base.items()}


BASE = make(PLAIN).state_dict()
SHAPES = {key: tuple(value.shape) for key, value in BASE.items()}
TEACHERS = [moved(BASE, i) for i in range(5)]


def merged(count=3, rank=3, none=True, bias=True, dtype=torch.float32) -> dict[str, torch.Tensor]:
    fitted = fit_bank(TEACHERS[:count], BASE if none else None, rank, shapes=SHAPES, bias=bias, dtype=dtype)
    weights = {key: value for one in fitted for key, value in one.weights.items()}
    return {**weights, **neutral_style(count, PLAIN.embed_dim, "add_embedding", dtype)}


def parts_of(seed: int, shape, rank=4, cores=3, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A layer's bank as after training: no columns of it orthonormal, one nearly twice the sum of others."""
    g = torch.Generator().manual_seed(seed)
    up, down = torch.randn(shape[0], rank, generator=g), torch.randn(rank, *shape[1:], generator=g)
    up[:, 1] = up[:, 0] + 0.1 * up[:, 1]
    cores = torch.randn(cores, rank * rank, generator=g)
    return {"up": up.to(dtype), "down": down.to(dtype), "cores": cores.to(dtype)}


# --- growing: one layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("shape", ((24, 18), (20, 6, 3, 3)))
def test_in_the_old_basis_the_core_is_numpys_least_squares(shape, dtype):
    """min ||D - U C V|| over C by lstsq on the Kronecker product; the fit's figures against the dense residual."""
    parts, change = parts_of(0, shape, dtype=dtype), torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    grown = grow_layer(parts, change, 0)
    up, down = parts["up"].double().numpy(), parts["down"].double().flatten(1).numpy()
    d = change[0].double().flatten(1).numpy()
    core, *_ = np.linalg.lstsq(np.kron(up, down.T), d.flatten(), rcond=None)  # vec by rows
    got = grown.cores[-1].double().numpy()
    assert np.abs(got - core).max() < ROUNDING[dtype] * np.abs(core).max()
    missed = np.square(d - up @ core.reshape(4, 4) @ down).sum()
    assert grown.total[0] == pytest.approx(np.square(d).sum(), rel=1e-6)
    assert grown.kept[0] == pytest.approx(np.square(d).sum() - missed, rel=1e-3)
    assert grown.before[0] == pytest.approx(np.square(d).sum() - missed, rel=1e-3)
    assert torch.equal(grown.up, parts["up"]) and torch.equal(grown.down, parts["down"])


def test_new_directions_are_near_the_best_there_are():
    """Where the old basis holds nothing of a change they are the leading singular directions of numpy's SVD; rank r is exact."""
    r = 3
    g = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(24, 24, generator=g))
    other, _ = torch.linalg.qr(torch.randn(18, 18, generator=g))
    parts = {"up": basis[:, :2].clone(), "down": other[:, :2].T.clone(), "cores": torch.randn(2, 4, generator=g)}
    change = (basis[:, 2:] @ torch.randn(22, 16, generator=g) @ other[:, 2:].T)[None]
    grown = grow_layer(parts, change, r)
    values = np.linalg.svd(change[0].numpy(), compute_uv=False)
    best = np.square(values[:r]).sum()
    assert best * 0.97 < grown.kept[0] <= best * (1 + 1e-5) and grown.before[0] < 1e-6 * best
    low = torch.randn(1, 24, r, generator=g) @ torch.randn(1, r, 18, generator=g)
    exact = grow_layer(parts, low, r)
    assert exact.kept[0] == pytest.approx(exact.total[0], rel=1e-6)
    assert grow_layer(parts, low, r - 1).kept[0] < 0.99 * exact.total[0]


def test_several_models_share_their_new_directions():
    """Two changes with one column and one row space between them: r directions hold both."""
    g = torch.Generator().manual_seed(4)
    left, right = torch.randn(24, 2, generator=g), torch.randn(2, 54, generator=g)
    changes = torch.stack([left @ torch.randn(2, 2, generator=g) @ right for _ in range(2)]).view(2, 24, 6, 3, 3)
    grown = grow_layer(parts_of(5, (24, 6, 3, 3)), changes, 2)
    assert grown.kept == pytest.approx(grown.total, rel=1e-5)
    assert grown.cores.shape == (5, 36) and grown.down.shape == (6, 6, 3, 3)


def test_a_layer_without_room_gains_what_there_is():
    parts = parts_of(6, (4, 3), rank=3)
    change = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(7))
    grown = grow_layer(parts, change, 5)
    assert grown.up.shape == (4, 4) and grown.down.shape == (3, 3)
    assert grown.kept[0] == pytest.approx(grown.total[0], rel=1e-4)


# --- growing: a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("none", (True, False))
def test_old_styles_keep_every_bit(dtype, none):
    """``folded_bank`` of each old style and of no style, bitwise; W, MLP and old codes are not touched at all."""
    old = merged(none=none, dtype=dtype)
    new = grown_unet(old, TEACHERS[3:], 2, shapes=SHAPES)
    config = unet_config_from_state_dict(new)
    assert config.num_styles == 5 and config.bank.cores == 5 + none
    for style in range(3 + none):
        before, after = torch.zeros(3 + none), torch.zeros(5 + none)
        before[style], after[style if style < 3 else 5] = 1, 1
        one, two = folded_bank(old, before), folded_bank(new, after)
        for key in SHAPES:
            assert torch.equal(one[key], two[key]), (style, key)
    changed = {key for key in old if not torch.equal(old[key], new[key]) if old[key].shape == new[key].shape}
    assert not changed and torch.equal(new[f"{CODEBOOK}.weight"][:3], old[f"{CODEBOOK}.weight"])


@torch.no_grad()
def test_old_styles_paint_the_same_in_one_forward():
    """Unfolded, sums have zeros between their terms, and a library may add them up in another order. So in float64, whose rounding is far
    below that of float32 (1.3e-6 in one model, on some processors). Tolerance 1e-12 of the largest."""
    before = merged()
    grown = grown_unet(before, TEACHERS[3:4], 2, shapes=SHAPES)
    old, new = (load_unet(sd).eval().double() for sd in (before, grown))
    x, t, context, _ = inputs(PLAIN, 2)
    x, context = x.double(), context.double()
    for style in ({0: 1.0}, {1: 0.4, 2: 0.6}):
        a = old(x, t, context, style=style_row(3, style).expand(2, -1).double())
        b = new(x, t, context, style=style_row(4, style).expand(2, -1).double())
        assert (a - b).abs().max() <= 1e-12 * a.abs().max()
    torch.testing.assert_close(old(x, t, context), new(x, t, context), atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_a_new_style_with_room_for_everything_is_its_teacher():
    """Against the teacher's own UNet with the merge's norms, in one forward beside an old style. Tolerance 1e-4 of the largest."""
    old = merged(bias=True)
    new = grown_unet(old, TEACHERS[3:4], 4096, shapes=SHAPES)
    x, t, context, _ = inputs(PLAIN, 2)
    layers = {key.removesuffix(".weight") for key in SHAPES if is_banked(key, SHAPES[key])}
    own = {key: TEACHERS[3][key] if key.rpartition(".")[0] in layers else old[key] for key in SHAPES}
    want = load_unet(own).eval()(x, t, context)
    got = load_unet(new).eval()(x, t, context, style=torch.cat([style_row(4, 3), style_row(4, 0)]))
    assert (got[:1] - want[:1]).abs().max() < 1e-4 * want.abs().max()
    assert (got[1:] - want[1:]).abs().max() > 0.01 * want.abs().max()


@pytest.mark.parametrize("bias", (True, False))
@torch.no_grad()
def test_a_trained_models_code_is_taken_back(bias):
    """After training the MLP moves the time embedding for every code: the new code's offset is small, and with biases nothing is left."""
    unet = banked_unet(bias=bias)
    old = unet.state_dict()
    codes, offsets = grow_codes(old, 2)
    size = unet.style_mlp(unet.model_embedding.weight).norm(dim=1).mean()
    assert (offsets.norm(dim=1) < 0.5 * size).all()
    new = load_unet(grown_unet(old, TEACHERS[:2], 1, shapes=SHAPES))
    torch.testing.assert_close(new.style_mlp(new.model_embedding.weight[3:]), offsets, atol=1e-5, rtol=1e-4)
    assert torch.equal(codes[f"{CODEBOOK}.weight"][:3], unet.model_embedding.weight)
    if bias:
        added = new.get_submodule("style_bank.time_embed.2.bias").weight[3:5] + offsets
        want = torch.stack([teacher["time_embed.2.bias"] for teacher in TEACHERS[:2]]) - old["time_embed.2.bias"]
        torch.testing.assert_close(added, want, atol=1e-5, rtol=1e-4)


def test_a_fresh_merges_codes_stay_random():
    codes, offsets = grow_codes(merged(), 2)
    fresh = codes[f"{CODEBOOK}.weight"][3:]
    assert not offsets.any() and 0.7 < fresh.std() < 1.3 and not torch.equal(fresh[0], fresh[1])


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_counts_what_is_added():
    old = merged()
    bank = unet_config_from_state_dict(old).bank
    for budget in ("0%", "8%", "30%", "0.05MB", "900%"):
        growth = growth_of(budget, SHAPES, bank, new=2, itemsize=2)
        new = grown_unet(old, TEACHERS[3:], growth.rank, shapes=SHAPES)
        added = sum(v.numel() for v in new.values()) - sum(v.numel() for v in old.values()) - 2 * PLAIN.embed_dim
        assert added == growth.numbers
        total = sum(map(math.prod, SHAPES.values()))
        if budget in ("8%", "30%"):
            assert growth.share == pytest.approx(added / total) and growth.share <= float(budget[:-1]) / 100
            assert growth_size(SHAPES, bank, 2, growth.rank + 1) > float(budget[:-1]) / 100 * total
    assert growth_of("0%", SHAPES, bank, new=2, itemsize=2).rank == 0
    assert growth_of("900%", SHAPES, bank, new=2, itemsize=2).rank < 4096


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("0.01%", r"the budget 0.01% is too small for 2 more styles: the smallest is [\d.]+% of the model, [\d.]+ MB"),
        ("lots", "expected a share of the model"),
        ("-1%", "expected a share of the model"),
    ],
)
def test_budgets_that_make_no_sense(budget, message):
    with pytest.raises(ValueError, match=message):
        growth_of(budget, SHAPES, unet_config_from_state_dict(merged()).bank, new=2, itemsize=2)


def test_nan_is_named():
    bad = {**TEACHERS[3], "out.2.bias": torch.full((4,), torch.nan)}
    with pytest.raises(ValueError, match="'out.2.bias' of model 0 holds NaN"):
        grown_unet(merged(), [bad], 1, shapes=SHAPES)


# --- deleting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_deleting_an_added_style_gives_the_old_file_back_bitwise(dtype):
    old = merged(dtype=dtype)
    dropped = drop_styles(grown_unet(old, TEACHERS[3:4], 2, shapes=SHAPES), [3])
    assert not dropped.moved and dropped.unet.keys() == old.keys()
    assert all(torch.equal(dropped.unet[key], old[key]) for key in old)


def dense(sd, style: int) -> np.ndarray:
    """All layers' weights in a style, in a row; -1: the centre."""
    cores = next(len(value) for key, value in sd.items() if key.endswith(".cores.weight"))
    folded = sd if style < 0 else folded_bank(sd, torch.eye(cores)[style])
    return torch.cat([folded[key].flatten() for key in sorted(SHAPES) if is_banked(key, SHAPES[key])]).double().numpy()


def test_in_a_merge_the_other_cores_give_a_deleted_one_away():
    """Minus the sum of the others IS the deleted core. After the mean moved, numpy's least squares over the dense weights of the new file
    finds nothing of it (the teachers have nothing in common)."""
    old, gone = merged(count=4, rank=4, none=False), 1
    name = next(key.removesuffix(".weight") for key in SHAPES if is_banked(key, SHAPES[key]))
    cores = old[bank_key(name, "cores")]
    torch.testing.assert_close(-cores[[0, 2, 3]].sum(0), cores[gone], atol=1e-5, rtol=1e-4)
    dropped = drop_styles(old, [gone])
    (told,) = dropped.told
    assert told.before > 0.9999 and told.around < 0.01 and dropped.moved
    for sd, count, want in ((old, 4, told.before), (dropped.unet, 3, told.around)):
        stay = [i for i in range(count) if count == 3 or i != gone]
        columns = np.stack([dense(sd, i) - dense(sd, -1) for i in stay], 1)
        d = dense(old, gone) - dense(sd, -1)
        fit, *_ = np.linalg.lstsq(columns, d, rcond=None)
        share = 1 - np.square(d - columns @ fit).sum() / np.square(d).sum()
        assert share == pytest.approx(want, abs=0.02)


def test_the_core_of_no_style_tells_something_too():
    """It is the base, near the mean of all teachers: what it says stays, and is said in the report."""
    (told,) = what_is_told(merged(count=4, rank=24), [1])
    assert told.before > 0.9999 and 0.2 < told.around < 0.6


def test_the_others_paint_as_before_when_the_mean_moves():
    old = merged(count=4, rank=4)
    new = drop_styles(old, [1]).unet
    for before, after in ((0, 0), (2, 1), (3, 2), (4, 3)):  # the last is "no style"
        one, two = folded_bank(old, torch.eye(5)[before]), folded_bank(new, torch.eye(4)[after])
        for key in SHAPES:
            torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-5)
    assert not torch.equal(new["out.2.weight"], old["out.2.weight"])
    again = recentred(old, [0, 2, 3])
    half = torch.tensor([0.5, 0.2, 0, 0, 0.3])
    one, two = folded_bank(old, half), folded_bank(again, half)
    torch.testing.assert_close(one["out.2.weight"], two["out.2.weight"], atol=1e-5, rtol=1e-5)


def test_without_a_bank_the_codes_go():
    old = make(dataclasses.replace(PLAIN, num_styles=3)).state_dict()
    dropped = drop_styles(old, [0, 2])
    assert dropped.told == [] and not dropped.moved
    assert torch.equal(dropped.unet[f"{CODEBOOK}.weight"], old[f"{CODEBOOK}.weight"][1:2])
    with pytest.raises(ValueError, match="all styles would be forgotten"):
        drop_styles(old, [0, 1, 2])


def test_two_styles_go_at_once_and_a_single_one_stays():
    old = merged(count=3, rank=3)
    dropped = drop_styles(old, [0, 2])
    assert len(dropped.told) == 2 and unet_config_from_state_dict(dropped.unet).num_styles == 1
    one, two = folded_bank(old, torch.eye(4)[1]), folded_bank(dropped.unet, torch.eye(2)[0])
    torch.testing.assert_close(one["out.2.weight"], two["out.2.weight"], atol=1e-5, rtol=1e-5)
    assert what_is_told(old, [0])[0].before > 0.9999


def test_the_sizes_of_a_grown_bank_are_those_of_a_larger_one():
    """Where every layer has room, growth_size is the difference of two bank_sizes."""
    shapes = {"middle_block.0.in_layers.2.weight": (64, 64, 3, 3), "middle_block.0.in_layers.2.bias": (64,)}
    bank = BankConfig((("middle_block.0.in_layers.2", 5, 5),), 4, True)
    assert growth_size(shapes, bank, 2, 3) == bank_size(shapes, 8, 6) - bank_size(shapes, 5, 4)


def test_fit_layer_and_grow_layer_agree_on_what_fits():
    """All models at once, and one taken in later: with enough directions both are exact."""
    g = torch.Generator().manual_seed(8)
    changes = torch.stack([torch.randn(24, 2, generator=g) @ torch.randn(2, 18, generator=g) for _ in range(3)])
    fit = fit_layer(changes[:2], 4)
    parts = {"up": fit.up, "down": fit.down, "cores": fit.cores}
    grown = grow_layer(parts, changes[2:], 2)
    change = grown.up @ grown.cores[2].view(6, 6) @ grown.down
    torch.testing.assert_close(change, changes[2], atol=1e-4, rtol=1e-4)
