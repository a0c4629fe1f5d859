"""Merging without training: the result paints as its teachers do, from files, again after an interruption, and refuses in words."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core.bank import bank_masses, folded_bank
from comfyui_dmm.dmm_core.bank_drop import drop_styles
from comfyui_dmm.dmm_core.bank_size import bank_of, is_banked
from comfyui_dmm.dmm_core.checkpoint import STYLE_KEYS, Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.dmm_core.unet import UNetConfig, load_unet
from comfyui_dmm.dmm_core.weights_file import read_weights
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.files.convert import convert
from comfyui_dmm.training.files.style_file import centred_at_base
from comfyui_dmm.training.merge.grow import add_teachers, delete_styles
from comfyui_dmm.training.merge.merge import MergeConfig, Source, merge
from comfyui_dmm.training.merge.report import LayerFigures, MergeReport
from comfyui_dmm.training.teachers.models import as_checkpoint
from PIL import Image

from ..core.test_unet import make
from .random_loras import mixed_lora, save_lora

SIZES = UNetConfig(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=(1, 1), depth_input=(0, 1), depth_output=(1, 1, 0, 0), context_dim=64,
)  # fmt: skip
TEXT = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(64)}


def moved(base: dict, seed: int, size=0.1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: v + size * v.std().nan_to_num(0.1) * torch.randn(v.shape, generator=g) for k, v in base.items()}


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return make(SIZES).state_dict()


@pytest.fixture
def files(tmp_path, base) -> Path:
    """base.safetensors with a text encoder, and the UNets a, b, c."""
    save_checkpoint(tmp_path / "base.safetensors", Checkpoint(base, dict(TEXT)))
    for i, name in enumerate("abc"):
        save_checkpoint(tmp_path / f"{name}.safetensors", Checkpoint(moved(base, i + 1)))
    return tmp_path


def command(folder: Path, *more: str, names="abc", output="out.safetensors", budget="200%") -> list[str]:
    teachers = [word for name in names for word in ("--teacher", f"{name}={folder / f'{name}.safetensors'}")]
    return ["merge", *teachers, "--budget", budget, "--output", str(folder / output), *more]


def source(name: str, unet: dict, stamp: str, **changes) -> Source:
    return Source(StyleInfo(name), unet, {k: tuple(v.shape) for k, v in unet.items()}, stamp, **changes)


def with_unet(one: Source, unet: dict) -> Source:
    return source(one.name, unet, one.stamp)


def sources(base, count=3, **changes) -> list[Source]:
    return [source(f"t{i}", moved(base, i + 1), f"stamp {i}", **changes) for i in range(count)]


def merged(base, tmp_path, teachers=None, foundation=True, progress=None, **config):
    config = MergeConfig(**{"budget": "200%", "dtype": torch.float32, **config})
    none = source("base", base, "base") if foundation else None
    parts = Checkpoint({}, dict(TEXT))
    return merge(teachers or sources(base), none, parts, config, folder=tmp_path / "parts", progress=progress)


# --- the result -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_from_files_to_a_file_that_paints_like_its_teachers(files, base, capsys):
    """With a budget for everything: nearer to each teacher than a hundredth of what separates it from the mean (float16 file; norms
    are the mean's, with which the teachers are compared)."""
    assert main(command(files, "--base", str(files / "base.safetensors"), budget="900%", output="m.safetensors")) == 0
    read = load_checkpoint(files / "m.safetensors")
    assert [s.name for s in read.styles] == ["a", "b", "c"] and read.styles[0].teacher == "a.safetensors"
    assert (
        len(read.styles[0].sha256) == 64
        and read.recipe["merge"]["biases"]
        and read.recipe["base"]["file"] == "base.safetensors"
    )
    assert read.text.keys() == TEXT.keys()
    unet = load_unet(read.unet).eval()
    g = torch.Generator().manual_seed(0)
    x, t, context = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([500]), torch.randn(1, 7, 64, generator=g)
    mean = {k: sum(moved(base, i + 1)[k] for i in range(3)) / 3 for k in base}
    vectors = {
        k: v for k, v in mean.items() if v.ndim < 2 and "norm" in k or ".0.in_layers.0" in k or "out_layers.0" in k
    }
    vectors |= {k: v for k, v in mean.items() if k.startswith("out.0")}
    for i, name in enumerate("abc"):
        own = {**moved(base, i + 1), **vectors}
        want = load_unet(own).eval()(x, t, context)
        got = unet(x, t, context, style=style_row(3, i))
        far = (load_unet(mean).eval()(x, t, context) - want).norm()
        assert (got - want).norm() < 0.05 * far, name
    report = (files / "m-merge.md").read_text()
    assert re.search(r"\| a \| (99|100)% \|", report) and report.strip() in capsys.readouterr().out
    assert not list(files.glob(".*"))  # no parts are left
    assert Image.open(files / "m-merge.png").size[0] > 200
    assert json.loads((files / "m-merge.json").read_text())["teachers"][1]["name"] == "b"


def test_energy_kept_is_what_the_folded_weights_miss(base, tmp_path):
    """The report's share against the weights themselves: 1 - |folded - teacher|^2 / |mean - teacher|^2 over all weights."""
    checkpoint, report = merged(base, tmp_path, budget="30%")
    mean = {k: v for k, v in checkpoint.unet.items() if k in base}
    figures = report.teachers()
    for i in range(3):
        own, mine = moved(base, i + 1), torch.eye(4)[i]
        folded = folded_bank(checkpoint.unet, mine)
        layers = {k for k in base if base[k].ndim > 1 and k.split(".")[0] != "label_emb"}
        ours = {k: folded[k] if k in layers else mean[k] for k in base}
        missed = sum((ours[k] - own[k]).double().square().sum() for k in base)
        change = sum((mean[k] - own[k]).double().square().sum() for k in base)
        assert abs(figures[i].kept - (1 - missed / change).item()) < 1e-4
        norm = sum(v.double().square().sum() for v in mean.values())
        assert abs(figures[i].change - (change / norm).sqrt().item()) < 1e-5


def test_more_budget_keeps_more_and_half_of_it_is_a_file_of_half_the_bank(base, tmp_path):
    kept = []
    for budget in ("20%", "60%", "200%"):
        checkpoint, report = merged(base, tmp_path, budget=budget)
        share = sum(v.numel() for k, v in checkpoint.unet.items() if k.startswith("style_bank.")) / sum(
            v.numel() for v in base.values()
        )
        assert 0.8 * float(budget[:-1]) / 100 < share <= float(budget[:-1]) / 100
        assert share == pytest.approx(report.size.share)
        kept.append(report.teachers()[0].kept)
    assert kept[0] < kept[1] < kept[2]


def test_without_a_base_no_style_is_the_mean(files, base):
    assert main(command(files, "--parts-from", str(files / "base.safetensors"))) == 0
    read = load_checkpoint(files / "out.safetensors")
    folded = folded_bank(read.unet, torch.zeros(3))
    want = sum(moved(base, i + 1)["out.2.weight"] for i in range(3)) / 3
    torch.testing.assert_close(folded["out.2.weight"].float(), want.half().float(), atol=1e-3, rtol=1e-2)
    assert read.recipe["merge"] and "base" not in read.recipe


@torch.no_grad()
def test_centred_at_the_base_the_model_is_the_base(base, tmp_path):
    """Bit for bit and in its own precision, with a core for each style alone; what the bank has no part for is counted as lost."""
    checkpoint, report = merged(base, tmp_path, dtype=torch.float16, centre="base")
    plain = {k: v for k, v in checkpoint.unet.items() if k in base}
    assert plain.keys() == base.keys()
    assert all(v.dtype == base[k].dtype and torch.equal(v, base[k]) for k, v in plain.items())
    unet = load_unet(checkpoint.unet)
    assert unet.config.bank.cores == 3 and checkpoint.unet["style_bank.out.2.up.weight"].dtype == torch.float16
    assert checkpoint.recipe["merge"]["centre"] == "base" and checkpoint.recipe["base"]["file"] == ""
    for i, figures in enumerate(report.teachers()):
        own, folded = moved(base, i + 1), folded_bank(checkpoint.unet, torch.eye(3)[i])
        banked = {k for k in base if is_banked(k, base[k].shape)}
        missed = sum(((folded if k in banked else base)[k] - own[k]).double().square().sum() for k in base)
        change = sum((own[k] - base[k]).double().square().sum() for k in base)
        assert abs(figures.kept - (1 - missed / change).item()) < 1e-4
        assert abs(figures.kept - checkpoint.recipe["merge"]["kept"][figures.name]) < 1e-4
    assert "apart from the base is in the bank" in report.text() and "changed in norms is lost" in report.text()


def test_styles_alone_and_the_whole_file_become_each_other(files, capsys):
    """``dmm merge --to style`` gives what ``dmm convert`` takes out of the whole file, and puts back onto the base, bit for bit."""
    foundation = str(files / "base.safetensors")
    centred = ("--base", foundation, "--centre", "base")
    assert main(command(files, *centred, output="whole.safetensors")) == 0
    assert main(command(files, *centred, "--to", "style", output="styles.safetensors")) == 0
    convert(files / "whole.safetensors", files / "out-of-whole.safetensors", "style")
    assert convert(files / "styles.safetensors", files / "put-back.safetensors", "single", onto=foundation) == []
    for one, other in (("styles", "out-of-whole"), ("put-back", "whole")):
        (ours, said), (theirs, says) = (read_weights(files / f"{name}.safetensors") for name in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(v.dtype == theirs[k].dtype and torch.equal(v, theirs[k]) for k, v in ours.items())
        date = {"modelspec.date": ""}
        assert said | date == says | date and said["dmm.format"] == "2"
    assert all(key.startswith(STYLE_KEYS) for key in read_weights(files / "styles.safetensors")[0])
    assert (files / "styles-merge.md").exists() and not list(files.glob(".*"))
    capsys.readouterr()
    assert main(["info", str(files / "styles.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "layout        styles alone" in told and "style bank" in told and "base.safetensors" in told


@torch.no_grad()
@pytest.mark.parametrize("centre", ["mean", "base"])
def test_loras_of_one_base_are_merged_exactly(tmp_path, base, files, centre):
    """Three LoRAs of rank 3 fit into a bank of rank 12: the merged UNet against ones with a LoRA folded in. Tolerance 1e-4 of the largest
    eps (file in float32)."""
    foundation = files / "base.safetensors"
    layers = {k.removesuffix(".weight"): tuple(v.shape) for k, v in base.items() if is_banked(k, v.shape)}
    names = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in layers.items()}
    styles = []
    for i in range(3):
        save_lora(tmp_path / f"lora{i}.safetensors", mixed_lora(names, seed=i, only=("lora without alpha",)))
        styles.append(f"{foundation}+{tmp_path / f'lora{i}.safetensors'}:0.9")
    teachers = [word for i, file in enumerate(styles) for word in ("--teacher", f"l{i}={file}")]
    out = tmp_path / "loras.safetensors"
    common = ["--base", str(foundation), "--budget", "100%", "--precision", "fp32", "--output", str(out)]
    common += ["--centre", centre]
    assert main(["merge", *teachers, *common]) == 0
    read = load_checkpoint(out)
    assert read.recipe["merge"]["rank"] >= 12 and min(read.recipe["merge"]["kept"].values()) > 0.9999
    unet = load_unet(read.unet).eval()
    g = torch.Generator().manual_seed(0)
    x, t, context = torch.randn(2, 4, 16, 16, generator=g), torch.tensor([900, 40]), torch.randn(2, 7, 64, generator=g)
    for i, file in enumerate(styles):
        want = load_unet(as_checkpoint(file).unet).eval()(x, t, context)
        got = unet(x, t, context, style=style_row(3, i).expand(2, -1))
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
        assert (got - unet(x, t, context)).abs().max() > 0.01 * want.abs().max()
    atol = 1e-4 if centre == "mean" else 0
    torch.testing.assert_close(unet(x, t, context), load_unet(base).eval()(x, t, context), atol=atol, rtol=atol)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_merge_goes_on_and_ends_the_same(base, tmp_path):
    whole, _ = merged(base, tmp_path / "one")
    calls = []

    def stop(done, total, what):
        calls.append((done, what))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(base, tmp_path / "two", progress=stop)
    left = sorted((tmp_path / "two" / "parts").iterdir())
    before = {path: path.stat().st_mtime_ns for path in left}
    assert left and not [path for path in left if not path.name.endswith(".safetensors")]
    seen = []
    again, _ = merged(base, tmp_path / "two", progress=lambda done, total, what: seen.append(done))
    assert {path: path.stat().st_mtime_ns for path in left} == before  # read, not computed again
    assert seen == sorted(seen) and seen[-1] == len(base)
    assert whole.unet.keys() == again.unet.keys()
    assert all(torch.equal(whole.unet[k], again.unet[k]) for k in whole.unet)


def test_parts_of_another_merge_are_not_taken(base, tmp_path):
    one, _ = merged(base, tmp_path, budget="30%")
    teachers = sources(base)
    teachers[0] = source("t0", moved(base, 77), "another file")
    other, _ = merged(base, tmp_path, teachers=teachers, budget="30%")
    assert not torch.equal(one.unet["out.2.weight"], other.unet["out.2.weight"])


# --- the report -------------------------------------------------------------------------------------------------------


def test_twins_outliers_and_doubles_are_named(base, tmp_path):
    near, far = moved(base, 1), moved(base, 5, size=0.4)
    twin = {k: near[k] + 0.01 * moved(base, 9)[k].std().nan_to_num(0) for k in base}
    everyone = {"a": near, "b": twin, "c": moved(base, 2), "d": moved(base, 3), "far": far, "e": dict(moved(base, 2))}
    teachers = [source(name, unet, name) for name, unet in everyone.items()]
    _, report = merged(base, tmp_path, teachers=teachers)
    found = {one.name: one for one in report.teachers()}
    assert found["a"].nearest == "b" and found["a"].distance < 0.5 and not found["a"].same
    assert found["c"].same and found["c"].nearest == "e"
    assert [name for name, one in found.items() if one.outlier] == ["far"]
    text = report.text()
    assert "twins" in text and "Far from the others: far" in text and "The same weights: c = e, e = c" in text


def test_a_report_of_nothing_changed():
    """Two identical models: no change at all, nothing to keep, no division by zero."""
    layer = LayerFigures("middle_block.0.in_layers.2.weight", [0.0, 0.0], [0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]], 4.0)
    report = MergeReport(["a", "b"], [layer], bank_of("50%", {"middle_block.0.in_layers.2.weight": (64, 64)}, 2, 2), 2)
    assert [one.kept for one in report.teachers()] == [1.0, 1.0] and all(one.same for one in report.teachers())
    assert report.blocks() == {"middle": [None, None]}
    report.picture()
    report.text()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "0.1%",
            r"the budget 0.1% is too small for 3 styles and the base: the smallest is [\d.]+% of the model, [\d.]+ MB",
        ),
        (
            "1KB",
            "the size of the style bank is '1KB': expected a share of the model such as 10%, or a size such as 150MB",
        ),
        ("-5%", "expected a share of the model"),
        ("", "expected a share of the model"),
        ("nan%", "expected a share of the model"),
    ],
)
def test_budgets_that_make_no_sense(base, tmp_path, budget, message):
    with pytest.raises(ValueError, match=message):
        merged(base, tmp_path, budget=budget)
    assert not (tmp_path / "parts").exists()


def test_a_base_with_nan_is_refused_as_the_centre(base, tmp_path):
    damaged = {**base, "out.2.bias": torch.full_like(base["out.2.bias"], torch.nan)}
    with pytest.raises(ValueError, match="weight 'out.2.bias' of the base holds NaN"):
        merged(damaged, tmp_path, teachers=sources(base), centre="base")
    assert not (tmp_path / "parts").exists()  # a refusal leaves nothing behind
    with pytest.raises(ValueError, match="the centre is 'median', expected mean or base"):
        merged(base, tmp_path, centre="median")


def test_megabytes_are_bytes_of_the_file(base):
    shapes = {k: tuple(v.shape) for k, v in base.items()}
    size = bank_of("0.4MB", shapes, 4, 2)
    assert 0.3e6 < 2 * size.numbers <= 0.4e6
    assert bank_of("0.0004GB", shapes, 4, 2) == size


def bad(base, what: str) -> list[Source]:
    teachers = sources(base)
    odd = teachers[1]
    if what == "one model":
        return teachers[:1]
    if what == "names":
        return [teachers[0], dataclasses.replace(odd, info=StyleInfo("T0 "))]
    if what == "sizes":
        return [
            teachers[0],
            with_unet(odd, make(dataclasses.replace(SIZES, context_dim=32)).state_dict()),
        ]
    if what == "prediction":
        return [teachers[0], dataclasses.replace(odd, prediction="v")]
    if what == "schedule":
        return [teachers[0], dataclasses.replace(odd, zero_snr=True)]
    if what == "styles":
        return [teachers[0], with_unet(odd, make(dataclasses.replace(SIZES, num_styles=2)).state_dict())]
    if what == "extra":
        return [teachers[0], with_unet(odd, {**odd.unet, "strange.weight": torch.zeros(2)})]
    if what == "nan":
        return [teachers[0], with_unet(odd, {**odd.unet, "out.2.bias": torch.full((4,), torch.nan)})]
    return [teachers[0], with_unet(odd, {"a": torch.zeros(1)})]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("one model", "1 models to merge: expected 2 to 64"),
        ("names", "are the same style name"),
        ("sizes", "'t1' has context_dim 32 instead of 64"),
        ("prediction", "another prediction do not add up .*'t1' has v"),
        ("schedule", "another zero snr do not add up"),
        ("styles", "'t1' is a DMM model with styles of its own"),
        ("extra", "'t1' and 't0' differ in the weights strange.weight"),
        ("nan", "'out.2.bias' of 't1' holds NaN"),
        ("no unet", "'t1': not a Stable Diffusion UNet"),
    ],
)
def test_models_that_do_not_belong_together(base, tmp_path, what, message):
    with pytest.raises(ValueError, match=message):
        merged(base, tmp_path, teachers=bad(base, what), foundation=False)
    assert what == "nan" or not (tmp_path / "parts").exists()


def test_the_command_explains_and_writes_nothing(files, capsys):
    before = sorted(path.name for path in files.iterdir())
    for changed, message in (
        (command(files), "no model has a text encoder"),
        (command(files, output="out.ckpt"), "must end in .safetensors"),
        (command(files, "--base", str(files / "missing.safetensors")), "missing.safetensors"),
        (command(files, "--base", str(files / "base.safetensors"), budget="0.01%"), "too small"),
        (command(files, "--centre", "base", "--to", "style"), "needs the base: name its file with --base"),
        (command(files, "--base", str(files / "base.safetensors"), "--to", "style"), "centre them at the base"),
    ):
        assert main(changed) == 1
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in files.iterdir()) == before


@torch.no_grad()
def test_blends_of_the_merged_model_are_blends_of_weights(base, tmp_path):
    """Half of one style and half of another is the UNet whose bank layers are half-way between the two. Tolerance 1e-5."""
    checkpoint, _ = merged(base, tmp_path, budget="40%")
    unet = load_unet(checkpoint.unet).eval()
    g = torch.Generator().manual_seed(0)
    x, t, context = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([300]), torch.randn(1, 7, 64, generator=g)
    row = style_row(3, {0: 0.5, 2: 0.5})
    one, two = (folded_bank(checkpoint.unet, torch.eye(4)[i]) for i in (0, 2))
    between = load_unet({k: (one[k] + two[k]) / 2 for k in one}).eval()
    torch.testing.assert_close(unet(x, t, context, style=row), between(x, t, context), atol=1e-5, rtol=1e-4)
    assert bank_masses(row, 4).tolist() == [[0.5, 0.0, 0.5, 0.0]]


# --- a bank that is centred at the base, later ------------------------------------------------------------------------


def test_a_merge_centred_at_the_base_stays_there(base, tmp_path):
    """Models that were all trained the same way tell much of each other, and the base never held a share of them: W stays it bit for bit,
    and the styles go onto it as an add-on, whatever styles come and go."""
    common = moved(base, 9)
    alike = [{k: common[k] + 0.3 * (v - base[k]) for k, v in moved(base, i).items()} for i in (1, 2, 3)]
    teachers = [source(f"t{i}", weights, f"stamp {i}") for i, weights in enumerate(alike)]
    whole, _ = merged(base, tmp_path, teachers=teachers, centre="base")
    assert drop_styles(whole.unet, [1]).moved  # what a merge around the mean needs
    grown, _ = add_teachers(whole, [source("new", moved(base, 4), "")], "40%")
    left, report = delete_styles(grown, ["t1", "new"])
    assert all(torch.equal(left.unet[key], base[key]) for key in base)
    assert not report.moved and "Painting without a style is the base" in report.text()
    for before, now in ((0, 0), (2, 1)):
        want = folded_bank(whole.unet, torch.eye(3)[before])
        got = folded_bank(left.unet, torch.eye(2)[now])
        assert all(torch.equal(got[key], want[key]) for key in base)
    assert all(centred_at_base(one.recipe) for one in (whole, grown, left))
    around_the_mean, _ = merged(base, tmp_path / "mean", teachers=teachers)
    assert not centred_at_base(around_the_mean.recipe) and delete_styles(around_the_mean, ["t1"])[1].moved
    trained = {"train": {"growth": "2%"}, "history": [whole.recipe]}
    assert not centred_at_base(trained)
