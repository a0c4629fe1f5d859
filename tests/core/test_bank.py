"""The style bank: what its layers compute against folded weights, what the fit keeps against an SVD, and what is refused."""

import copy
import dataclasses

import pytest
import torch
from comfyui_dmm.dmm_core import bank_fit
from comfyui_dmm.dmm_core.bank import (
    BANK,
    BankConfig,
    BankLayer,
    bank_config,
    bank_key,
    bank_masses,
    folded_bank,
    layer_change,
)
from comfyui_dmm.dmm_core.bank_fit import fit_bank, fit_layer, neutral_style
from comfyui_dmm.dmm_core.bank_size import bank_size, biases_of, is_banked, rank_within
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, read_info, save_checkpoint
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.dmm_core.unet import UNet, init_style, load_unet, unet_config_from_state_dict
from safetensors import safe_open

from .test_unet import CONFIGS, DEMO, SDXL, inputs, make

SD15 = CONFIGS["sd15 layout"]


def banked_unet(config=DEMO, rank=3, none=True, bias=True, seed=0) -> UNet:
    """A UNet whose bank is random and of another rank in every layer; the norm of its parts is that of a real one."""
    plain = make(config, seed)
    names = sorted(key.removesuffix(".weight") for key, w in plain.state_dict().items() if is_banked(key, w.shape))
    ranks = tuple((name, 1 + (i + rank) % 4, 2 + (i + rank) % 3) for i, name in enumerate(names))
    styles = config.num_styles
    unet = UNet(dataclasses.replace(config, bank=BankConfig(ranks, styles + none, bias))).eval()
    unet.load_state_dict(plain.state_dict(), strict=False)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in unet.bank_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return unet


def rows(*given) -> torch.Tensor:
    return torch.cat([style_row(3, weights, strength) for weights, strength in given])


MIXED = rows((0, 1.0), ({1: 0.3, 2: 0.7}, 0.8), (2, 0.0), ({0: -0.5, 1: 1.5}, 1.0))


# --- a forward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("none", (True, False))
@torch.no_grad()
def test_every_row_is_a_plain_unet_with_that_rows_bank_in_its_weights(none, bias):
    """Four rows in one forward against four UNets with folded weights, with each row's code. Tolerance 2e-5 of the largest."""
    unet = banked_unet(none=none, bias=bias)
    x, _, context, _ = inputs(DEMO, 2)
    x, t, context = torch.cat([x, x.flip(0)]), torch.tensor([3, 250, 700, 990]), torch.cat([context, context])
    out, blocks = unet(x, t, context, style=MIXED, features=True)
    for i, masses in enumerate(bank_masses(MIXED, unet.config.bank.cores)):
        alone = load_unet(folded_bank(unet.state_dict(), masses)).eval()
        assert alone.config == dataclasses.replace(unet.config, bank=None)
        want, features = alone(x[i : i + 1], t[i : i + 1], context[i : i + 1], style=MIXED[i : i + 1], features=True)
        assert (out[i] - want[0]).abs().max() < 2e-5 * want.abs().max()
        for block, feature in zip(blocks, features):
            torch.testing.assert_close(block[i : i + 1], feature, atol=1e-4, rtol=1e-4)
    assert unet.style_bank.masses is None


@torch.no_grad()
def test_the_layouts_of_sdxl_and_sd15_too():
    """Linear projections and pooled conditioning; convolutions with stride, projections that are convolutions. As above."""
    for config, styles in ((SDXL, 2), (dataclasses.replace(SD15, num_styles=2), 2)):
        unet = banked_unet(config)
        x, t, context, y = inputs(config)
        style = torch.cat([style_row(styles, 1), style_row(styles, {0: 0.5, 1: 0.5}, 0.4)])
        out = unet(x, t, context, y=y, style=style)
        for i, masses in enumerate(bank_masses(style, unet.config.bank.cores)):
            alone = load_unet(folded_bank(unet.state_dict(), masses)).eval()
            want = alone(x[i:][:1], t[i:][:1], context[i:][:1], y=None if y is None else y[i:][:1], style=style[i:][:1])
            assert (out[i] - want[0]).abs().max() < 2e-5 * want.abs().max()


@torch.no_grad()
def test_no_style_is_the_last_core_or_nothing():
    x, t, context, _ = inputs(DEMO)
    for none in (True, False):
        unet = banked_unet(none=none)
        masses = torch.tensor([0.0, 0, 0, 1][: 3 + none])
        want = load_unet(folded_bank(unet.state_dict(), masses)).eval()(x, t, context)
        torch.testing.assert_close(unet(x, t, context), want, atol=1e-5, rtol=1e-4)
        alone = load_unet(folded_bank(unet.state_dict(), masses)).eval()
        torch.testing.assert_close(unet.middle(x, t, context), alone.middle(x, t, context), atol=1e-5, rtol=1e-4)


def test_a_layer_multiplies_in_the_order_that_takes_less():
    """U (C z) and (U C) z are the same but for rounding; which one is taken goes by counting products (here by hand)."""
    torch.manual_seed(0)
    masses, made = torch.rand(2, 3), {}
    for tokens in (2, 200):  # of rank 8 and 16 outputs: 8 * (8 + 16) a token, or once 8 * 16 * 8 and 8 * 16 a token
        for layer, shape in ((torch.nn.Linear(12, 16), (tokens, 12)), (torch.nn.Conv2d(12, 16, 1), (12, tokens, 1))):
            part = BankLayer(layer, (8, 8), 3, bias=True).double()
            x = torch.randn(2, *shape, dtype=torch.float64)
            y = layer.double()(x)
            core = torch.einsum("bk,krs->brs", masses.double(), part.cores.weight.view(3, 8, 8))
            z = part.down(x) if y.ndim == 3 else part.down(x).flatten(2).transpose(1, 2)
            added = (
                torch.einsum("or,brs,bls->blo", part.up.weight, core, z) + (masses.double() @ part.bias.weight)[:, None]
            )
            wanted = y + (added if y.ndim == 3 else added.transpose(1, 2).view(y.shape))
            torch.testing.assert_close(part(x, y, masses.double()), wanted, rtol=1e-12, atol=1e-12)
            made[tokens, y.ndim] = part._core_first(y)
    assert made == {(2, 3): True, (2, 4): True, (200, 3): False, (200, 4): False}
    assert 2 * 8 * (8 + 16) < 8 * 16 * (8 + 2) and 200 * 8 * (8 + 16) > 8 * 16 * (8 + 200)


def test_masses_by_hand():
    got = bank_masses(MIXED, 4)
    want = torch.tensor([[1, 0, 0, 0], [0, 0.24, 0.56, 0.2], [0, 0, 0, 1], [-0.5, 1.5, 0, 0]])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(bank_masses(MIXED, 3), want[:, :3])


def gradients(unet, checkpointing) -> dict[str, torch.Tensor]:
    unet.gradient_checkpointing = checkpointing
    unet.zero_grad()
    x, t, context, _ = inputs(DEMO)
    unet(x, t, context, style=MIXED[:2]).square().mean().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters()}


def test_gradients_reach_every_part_with_and_without_recomputing():
    """Recomputed blocks meet the same masses. Tolerance 1e-6 of the largest. And against a difference quotient, 1% of it."""
    unet = banked_unet()
    plain, again = gradients(unet, False), gradients(unet, True)
    for name, grad in plain.items():
        assert (grad - again[name]).abs().max() <= 1e-6 * grad.abs().max().clamp(min=1e-12)
    missing = [name for name, grad in plain.items() if not grad.any() and f".{BANK}" not in f".{name}"]
    assert not missing
    x, t, context, _ = inputs(DEMO)
    for what in ("up", "down", "cores"):
        double = copy.deepcopy(unet).double()
        name = bank_key("input_blocks.1.0.in_layers.2", what)
        p = double.get_parameter(name)
        place = tuple((plain[name].abs() == plain[name].abs().max()).nonzero()[0].tolist())
        ends = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                p[place] += step
                ends.append(double(x.double(), t, context.double(), style=MIXED[:2].double()).square().mean())
                p[place] -= step
        quotient = (ends[0] - ends[1]) / 2e-4
        assert abs(quotient - plain[name][place]) < 0.01 * abs(quotient)


@torch.no_grad()
def test_a_copy_has_a_bank_of_its_own():
    unet = banked_unet()
    x, t, context, _ = inputs(DEMO)
    before = unet(x, t, context, style=MIXED[:2])
    other = copy.deepcopy(unet)
    for p in other.bank_parameters():
        p.zero_()
    assert torch.equal(unet(x, t, context, style=MIXED[:2]), before)
    assert not torch.allclose(other(x, t, context, style=MIXED[:2]), before)


# --- the fit ----------------------------------------------------------------------------------------------------------


def test_a_fit_of_one_model_is_its_svd():
    """One change: the best rank-R approximation (Eckart and Young). Kept energy within 1e-3 of the SVD's."""
    g = torch.Generator().manual_seed(3)
    change = torch.randn(40, 40, generator=g) @ torch.diag(0.8 ** torch.arange(40)) @ torch.randn(40, 216, generator=g)
    change = change.view(1, 40, 24, 3, 3)
    values = torch.linalg.svdvals(change[0].flatten(1).double()).square()
    for rank in (1, 5, 20, 40):
        fit = fit_layer(change, rank, iterations=10)
        best = values[:rank].sum().item()
        assert best * (1 - 2e-3) < fit.kept[0] < best * (1 + 1e-6)
        assert abs(fit.total[0] - values.sum().item()) < 1e-4 * fit.total[0]
        parts = {"up": fit.up, "down": fit.down, "cores": fit.cores}
        rest = change[0] - layer_change(parts, torch.ones(1))[0]
        assert abs(rest.double().square().sum().item() - (fit.total[0] - fit.kept[0])) < 1e-3 * fit.total[0]


def test_changes_of_low_rank_are_held_exactly():
    """Five changes of rank 3 in a bank of rank 15: as LoRAs of one base. Tolerance 1e-5 of the largest."""
    g = torch.Generator().manual_seed(0)
    changes = torch.randn(5, 64, 3, generator=g) @ torch.randn(5, 3, 90, generator=g)
    for rank in (15, 40, 64):  # with directions to spare, and with all there are
        fit = fit_layer(changes.view(5, 64, 10, 3, 3), rank)
        for k, change in enumerate(changes):
            masses = torch.eye(5)[k]
            got, _ = layer_change({"up": fit.up, "down": fit.down, "cores": fit.cores}, masses)
            assert (got.flatten(1) - change).abs().max() < 1e-5 * change.abs().max()
    assert sum(fit_layer(changes.view(5, 64, 10, 3, 3), 14).kept) < 0.999 * sum(fit.total)


def test_the_basis_of_large_layers_is_as_good_as_the_exact_one(monkeypatch):
    """Wide layers take a randomized range finder: within 1% of the energy that all eigenvectors keep, and as orthonormal; what has few
    directions is held exactly by both."""
    g = torch.Generator().manual_seed(5)
    sizes = torch.arange(1, 97).float() ** -0.7
    slow = torch.stack(
        [(torch.randn(96, 96, generator=g) * sizes) @ torch.randn(96, 200, generator=g) for _ in range(4)]
    )
    few = torch.stack([torch.randn(96, 3, generator=g) @ torch.randn(3, 200, generator=g) for _ in range(4)])
    exact = fit_layer(slow, 12)
    monkeypatch.setattr(bank_fit, "EXACT", 16)
    asked = []
    monkeypatch.setattr(bank_fit, "leading", lambda c, r, plain=bank_fit.leading: asked.append(c.shape) or plain(c, r))
    near = fit_layer(slow, 12)
    assert any(shape[0] == 1 for shape in asked)  # within a subspace
    assert sum(exact.kept) * 0.99 < sum(near.kept) <= sum(exact.kept) * 1.001 and not torch.equal(near.up, exact.up)
    assert torch.allclose(near.up.T @ near.up, torch.eye(12), atol=1e-5)
    held = fit_layer(few, 12)
    made = held.up @ held.cores.view(4, 12, 12) @ held.down
    assert torch.allclose(made, few, atol=1e-4 * few.abs().max())


def test_a_shared_basis_beats_separate_ones_of_the_same_size():
    """Three noisy changes with much in common. 3 separate SVDs of rank 4: 12 (out + in) numbers; a shared basis of rank 9 and 3 cores
    has fewer."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(64, 10, generator=g), torch.randn(10, 80, generator=g)
    changes = torch.stack([common[0] @ torch.randn(10, 10, generator=g) @ common[1] / 3 for _ in range(3)])
    changes += torch.randn(changes.shape, generator=g)
    shared = sum(fit_layer(changes, 9).kept)
    separate = sum(torch.linalg.svdvals(c)[:4].square().sum().item() for c in changes)
    assert 9 * (64 + 80) + 3 * 9**2 < 12 * (64 + 80)
    assert shared > 1.1 * separate


def teachers_of(base: dict, count: int, size: float, seed=0) -> list[dict]:
    g = torch.Generator().manual_seed(seed)

    def moved(weight):
        return weight + size * weight.std().nan_to_num(0.1) * torch.randn(weight.shape, generator=g)

    return [{key: moved(weight) for key, weight in base.items()} for _ in range(count)]


def shapes_of(sd: dict) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in sd.items()}


def whole_unet(teachers, none, rank, dtype=torch.float32, **more):
    sd: dict[str, torch.Tensor] = {}
    for one in fit_bank(teachers, none, rank, shapes=shapes_of(teachers[0]), dtype=dtype, **more):
        sd |= one.weights
    config = unet_config_from_state_dict(teachers[0])
    return sd | neutral_style(len(teachers), config.embed_dim, "add_embedding", dtype)


PLAIN = dataclasses.replace(DEMO, num_styles=0)


@torch.no_grad()
def test_a_bank_of_full_rank_is_every_teacher():
    """With the largest rank, the layers of the bank are the teachers' own, and so are the biases; norms are the mean's. The oracle is a
    UNet with exactly these weights. Tolerance 1e-4 of the largest."""
    base = make(PLAIN).state_dict()
    teachers = teachers_of(base, 3, 0.1)
    unet = load_unet(whole_unet(teachers, base, 10_000)).eval()
    x, t, context, _ = inputs(DEMO)
    keys = {key for key, w in base.items() if is_banked(key, w.shape)} | set(
        biases_of({k: v.shape for k, v in base.items()})
    )
    for i, own in enumerate([*teachers, base]):
        mixed = {k: own[k] if k in keys else torch.stack([t[k] for t in teachers]).mean(0) for k in base}
        want = load_unet(mixed).eval()(x, t, context)
        style = style_row(3, i).expand(2, -1) if i < 3 else None
        got = unet(x, t, context, style=style)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


@torch.no_grad()
def test_the_parts_are_the_mean_and_what_apart_says():
    base = make(PLAIN).state_dict()
    teachers = teachers_of(base, 3, 0.1)
    for one in fit_bank(teachers, None, 4, shapes=shapes_of(base), dtype=torch.float32):
        stack = torch.stack([t[one.key].double() for t in teachers])
        mean = stack.mean(0)
        torch.testing.assert_close(one.weights[one.key].double(), mean, atol=1e-6, rtol=1e-5)
        changes = (stack - mean).flatten(1)
        torch.testing.assert_close(one.apart, changes @ changes.T, atol=1e-6, rtol=1e-4)
        assert all(0 <= k <= t * (1 + 1e-6) for k, t in zip(one.kept, one.total))


@torch.no_grad()
def test_centred_at_the_base_no_style_is_the_base():
    base = make(PLAIN).state_dict()
    sd = whole_unet(teachers_of(base, 2, 0.1), None, 5, torch.bfloat16, centre=base)
    assert all(torch.equal(sd[key], value) and sd[key].dtype == value.dtype for key, value in base.items())
    unet = load_unet({key: value.float() for key, value in sd.items()}).eval()
    x, t, context, _ = inputs(DEMO)
    torch.testing.assert_close(unet(x, t, context), load_unet(base).eval()(x, t, context))


def test_half_precision_takes_up_what_rounding_left():
    """A model whose mean is not representable: in float16 the bank is of the rounded mean. Tolerance: half a thousandth, one rounding."""
    base = make(PLAIN).state_dict()
    teachers = teachers_of(base, 2, 0.05)
    sd = whole_unet(teachers, None, 10_000, torch.float16)
    assert all(v.dtype == torch.float16 for v in sd.values())
    key = "input_blocks.1.0.in_layers.2.weight"
    for k, teacher in enumerate(teachers):
        got = folded_bank({n: v.float() for n, v in sd.items()}, torch.eye(2)[k])[key]
        assert (got - teacher[key]).abs().max() < 2e-3 * teacher[key].abs().max()


def test_nan_is_refused_by_name():
    base = make(PLAIN).state_dict()
    bad = {k: v.clone() for k, v in base.items()}
    bad["middle_block.0.in_layers.2.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'middle_block.0.in_layers.2.weight' of model 1 holds NaN"):
        list(fit_bank([base, bad], None, 2, shapes=shapes_of(base)))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("none", (True, False))
def test_the_size_is_what_the_bank_holds(none):
    base = make(PLAIN).state_dict()
    shapes = {k: tuple(v.shape) for k, v in base.items()}
    teachers = teachers_of(base, 3, 0.1)
    for rank in (1, 7, 100):
        sd = whole_unet(teachers, base if none else None, rank)
        held = sum(v.numel() for k, v in sd.items() if k.startswith(f"{BANK}."))
        assert held == bank_size(shapes, rank, 3 + none)
        assert bank_size(shapes, rank_within(shapes, held, 3 + none), 3 + none) == held
        assert rank != 7 or rank_within(shapes, held - 1, 3 + none) == 6


def test_too_small_a_size_says_the_smallest():
    shapes = {k: tuple(v.shape) for k, v in make(PLAIN).state_dict().items()}
    smallest = bank_size(shapes, 1, 2)
    with pytest.raises(ValueError, match=f"is too small: 2 cores need {smallest} at least"):
        rank_within(shapes, smallest - 1, 2)


def test_sizes_of_sd15_by_hand():
    """Counted by hand for the blocks alone: 67.3 million numbers for U and V of SD1.5 at R = 64, and 9.1 for the cores of eight styles."""
    from comfyui_dmm.dmm_core.unet import UNetConfig

    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in UNet(UNetConfig()).state_dict().items() if "_block" in k.split(".")[0]}
    cores = sum(min(64, s[0]) * min(64, torch.Size(s[1:]).numel()) for k, s in shapes.items() if is_banked(k, s)) * 8
    biases = 8 * sum(shapes[key][0] for key in biases_of(shapes))
    basis = bank_size(shapes, 64, 8) - cores - biases
    assert round(basis / 1e6, 1) == 67.3 and round(cores / 1e6, 1) == 9.1


# --- files ------------------------------------------------------------------------------------------------------------


def file_of(tmp_path, unet, name="banked.safetensors"):
    path = tmp_path / name
    save_checkpoint(path, Checkpoint(unet.state_dict()))
    return path


def test_a_file_holds_the_bank_and_is_of_format_2(tmp_path):
    unet = banked_unet()
    path = file_of(tmp_path, unet)
    read = load_checkpoint(path)
    assert unet_config_from_state_dict(read.unet) == unet.config and read.num_styles == 3
    assert all(torch.equal(v, read.unet[k]) for k, v in unet.state_dict().items())
    assert unet_config_from_state_dict(read_info(path).unet) == unet.config
    with safe_open(path, "pt") as file:
        assert file.metadata()["dmm.format"] == "2"
    plain = make(DEMO)
    with safe_open(file_of(tmp_path, plain, "plain.safetensors"), "pt") as file:
        assert file.metadata()["dmm.format"] == "1"  # older versions of the pack read it


def change(sd, key, value):
    return {**{k: v for k, v in sd.items() if k != key}, **({} if value is None else {key: value})}


LAYER = "input_blocks.1.0.in_layers.2"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (bank_key(LAYER, "up"), None, rf"'{LAYER}' is not complete: missing \['up'\]"),
        (bank_key(LAYER, "bias"), None, rf"'{LAYER}' is not complete: missing \['bias'\]"),
        (bank_key(LAYER, "cores"), torch.zeros(6, 4), "has 4, 6 cores for 3 styles"),
        (bank_key(LAYER, "cores"), torch.zeros(4, 5), r"cores.weight' has shape \(4, 5\), expected \(4, "),
        (bank_key(LAYER, "down"), torch.zeros(2, 32, 1, 1), "(cores|down).weight' has shape"),
        (bank_key(LAYER, "down"), torch.zeros(()), "expected two from 1 to"),
        (bank_key("input_blocks.1.0.in_layers.0", "up"), torch.zeros(3, 2), "which is no layer of this UNet"),
        (bank_key("model_embedding", "up"), torch.zeros(3, 2), "which is no layer of this UNet"),
        (bank_key("../../etc", "up"), torch.zeros(3, 2), "which is no layer of this UNet"),
        (f"{BANK}.{LAYER}.weird.weight", torch.zeros(3, 2), "is no weight of a style bank"),
        (f"{BANK}.up.weight", torch.zeros(3, 2), "is no weight of a style bank"),
        (f"{BANK}.", torch.zeros(3, 2), "is no weight of a style bank"),
    ],
)
def test_damaged_banks_are_refused_by_key(tmp_path, key, value, message):
    sd = change(banked_unet().state_dict(), key, value)
    with pytest.raises(ValueError, match=message):
        bank_config(sd, 3)
    with pytest.raises(ValueError, match=message):
        load_unet(sd)
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "x.safetensors", Checkpoint(sd))
    assert not list(tmp_path.iterdir())


def test_a_bank_without_codebook_or_for_other_styles_is_refused(tmp_path):
    sd = banked_unet().state_dict()
    without = {k: v for k, v in sd.items() if not k.startswith(("model_embedding", "add_embedding"))}
    with pytest.raises(ValueError, match="without a codebook"):
        save_checkpoint(tmp_path / "x.safetensors", Checkpoint(without))
    with pytest.raises(ValueError, match="has 4 cores for 7 styles: they belong to different models"):
        save_checkpoint(
            tmp_path / "x.safetensors", Checkpoint(change(sd, "model_embedding.weight", torch.zeros(7, DEMO.embed_dim)))
        )


def test_init_style_leaves_the_bank_alone():
    unet = banked_unet()
    before = [p.clone() for p in unet.bank_parameters()]
    init_style(unet, torch.Generator().manual_seed(9))
    assert all(torch.equal(a, b) for a, b in zip(before, unet.bank_parameters()))
