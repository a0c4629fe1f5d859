"""Merge Checkpoints to DMM in the real host: the file, the MODEL it gives, cancel, errors; saving and named blends of a bank."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from comfyui_dmm.dmm_core.bank import folded_bank
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.style import style_row
from comfyui_dmm.dmm_core.unet import load_unet, unet_config_from_state_dict

from .families import DEMO, FAMILIES, checkpoint_of, random_unet, with_bank
from .sampling import conditioning, sample, watch
from .test_sampling_equals_core import load

PLAIN = {**vars(DEMO), "num_styles": 0}
POSITIVE, NEGATIVE = conditioning(DEMO, 1), conditioning(DEMO, 2)


def plain_unet(seed: int):
    """Random UNets that are relatives: a common part, and a tenth of their own."""
    common = random_unet(type(DEMO)(**PLAIN), 0)
    own = random_unet(type(DEMO)(**PLAIN), seed)
    for p, q in zip(common.parameters(), own.parameters()):
        p += 0.1 * q
    return common


@pytest.fixture(scope="module")
def loaded(models):
    """base and three teachers, as the host's loader gives them: (model, clip, vae, unet)."""
    from comfyui_dmm.nodes import host_model

    out = {}
    for seed, name in enumerate(("base", "a", "b", "c")):
        unet = plain_unet(seed + 1)
        path = models / "checkpoints" / f"merge-{name}.safetensors"
        save_checkpoint(path, checkpoint_of(unet, whole=True))
        with torch.inference_mode():
            out[name] = (*host_model.load(str(path))[:3], unet)
    return out


def merge(loaded, names="abc", budget="900%", name="together", base="base", teachers=None, **more):
    from comfyui_dmm.nodes.merge import MergeCheckpoints
    from comfyui_dmm.nodes.teacher import TeacherInput

    model, clip, vae, _ = loaded[base]
    teachers = teachers or [TeacherInput(one, loaded[one][0]) for one in names]
    sockets = {f"teacher{i}": teacher for i, teacher in enumerate(teachers)}
    MergeCheckpoints.hidden = SimpleNamespace(unique_id="merge")  # as the host's executor sets it
    with torch.inference_mode():
        return MergeCheckpoints.execute(model, clip, vae, sockets, budget, name, **more)


def files(name: str) -> list:
    from pathlib import Path

    from comfyui_dmm.nodes import paths

    return sorted(Path(paths.output_folder()).glob(f"{name}-*.safetensors"))


def apply(model, style):
    from comfyui_dmm.nodes.style_apply import ApplyStyle

    return ApplyStyle.execute(model, style)[0]


def test_the_model_paints_what_its_file_says(loaded):
    """Each style in the host against our own UNet of the saved file, and against the teacher (whose norms the mean does not share)."""
    out = merge(loaded)
    model, picture, report = out.args
    (path,) = files("together")
    read = load_checkpoint(path)
    assert [style.name for style in read.styles] == ["a", "b", "c"] and read.text and read.vae
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and "| a | " in report
    unet = load_unet(read.unet).eval()
    for i, name in enumerate("abc"):
        with watch(model) as calls:
            sample(apply(model, name), POSITIVE, NEGATIVE)
        with watch(loaded[name][0]) as theirs:
            sample(loaded[name][0], POSITIVE, NEGATIVE)
        for call in calls:
            assert_bank_equal(call, unet, style_row(3, i))
        far = (theirs[0].out - call_of(model, "none")).norm()
        assert (calls[0].out - theirs[0].out).norm() < 0.1 * far, name


def test_every_style_has_a_thumbnail(loaded, monkeypatch):
    """Painted by the host in each style, in the file and on the MODEL, which is loaded once and says and paints what one from the finished
    file does; an empty prompt paints none, and the weights are the same."""
    from pathlib import Path

    from comfyui_dmm.nodes import host_model, paths

    loads, load_once = [], host_model.load
    with monkeypatch.context() as m:
        m.setattr(host_model, "load", lambda path: loads.append(path) or load_once(path))
        model, *_ = merge(loaded, name="seen", thumbnail_prompt="a red star").args
    assert loads == [str(path) for path in files("seen")]
    with torch.inference_mode():
        again = host_model.load(loads[0])[0]
    assert host_model.model_info(model) == host_model.model_info(again)
    assert torch.equal(call_of(model, "b"), call_of(again, "b"))
    assert not list((Path(paths.output_folder()).parent / "dmm_runs").glob("seen-*-merge"))
    merge(loaded, name="unseen", thumbnail_prompt="  ")
    (seen,), (unseen,) = files("seen"), files("unseen")
    thumbnails = [style.thumbnail for style in load_checkpoint(seen).styles]
    assert len(set(thumbnails)) == 3 and all(thumbnails)
    assert [style.thumbnail for style in host_model.model_info(model).styles] == thumbnails
    read = load_checkpoint(unseen)
    assert not any(style.thumbnail for style in read.styles)
    assert all(torch.equal(weight, read.unet[key]) for key, weight in load_checkpoint(seen).unet.items())


def test_a_large_model_paints_none_without_a_gpu(loaded, monkeypatch):
    from comfyui_dmm.nodes import thumbnails

    monkeypatch.setattr(thumbnails, "LARGEST_ON_CPU", 1000)
    said = merge(loaded, name="large").ui["text"][0]
    (path,) = files("large")
    assert "no thumbnails" in said and not any(style.thumbnail for style in load_checkpoint(path).styles)


def test_the_host_can_interrupt_the_thumbnails(loaded, monkeypatch):
    """The merged model is saved, without any; the same graph finds it and paints them, and another text encoder merges anew."""
    import comfy.model_management as mm
    from comfyui_dmm.nodes import merge as node
    from comfyui_dmm.nodes import thumbnails

    def interrupted(**more):
        with monkeypatch.context() as m:
            m.setattr(thumbnails, "send_text", lambda text, _: mm.interrupt_current_processing("1 of" in text))
            with pytest.raises(mm.InterruptProcessingException):
                merge(loaded, name="stopped", **more)
        mm.interrupt_current_processing(False)

    interrupted()
    (path,) = files("stopped")
    before = load_checkpoint(path)
    assert not any(style.thumbnail for style in before.styles)
    merges, merge_once = [], node.merge
    monkeypatch.setattr(node, "merge", lambda *a, **k: merges.append(a) or merge_once(*a, **k))
    interrupted()
    again = merge(loaded, name="stopped")
    assert not merges and files("stopped") == [path]
    after = load_checkpoint(path)
    assert all(style.thumbnail for style in after.styles) and after.recipe == before.recipe
    assert all(torch.equal(weight, after.unet[key]) for key, weight in before.unet.items())
    whole = merge(loaded, name="at once")
    assert len(merges) == 1 and again.args[2] == whole.args[2] and torch.equal(again.args[1], whole.args[1])
    interrupted()  # what was painted to the end is not remembered
    assert len(merges) == 2
    model, clip, vae, unet = loaded["base"]
    with torch.inference_mode():
        skipped = clip.clone()
        skipped.clip_layer(-2)
    monkeypatch.setitem(loaded, "base", (model, skipped, vae, unet))
    merge(loaded, name="stopped")
    (new,) = set(files("stopped")) - {path}
    assert len(merges) == 3 and load_checkpoint(new).clip_skip == 2 and load_checkpoint(path).clip_skip is None


def call_of(model, style):
    with watch(model) as calls:
        sample(apply(model, style), POSITIVE, NEGATIVE)
    return calls[0].out


@torch.no_grad()
def assert_bank_equal(call, unet, row):
    ours = unet(call.x, call.t, call.context, call.y, style=row.expand(len(call.x), -1))
    torch.testing.assert_close(call.out, ours, rtol=0, atol=1e-4 * ours.abs().max().item())


def test_lora_teachers_and_the_models_are_untouched(loaded):
    """A LoRA on the MODEL becomes part of the style; the connected models paint as before."""
    import comfy.sd
    from comfyui_dmm.nodes.teacher import TeacherInput

    from .test_compatible import lora_weights

    base = loaded["base"][0]
    before = call_of_plain(base)
    with torch.inference_mode():
        patched, _ = comfy.sd.load_lora_for_models(base, None, lora_weights(base), 1.0, 0.0)
        wanted = call_of_plain(patched)
    teachers = [TeacherInput("lora", patched), TeacherInput("a", loaded["a"][0])]
    model = merge(loaded, teachers=teachers, name="with lora").args[0]
    assert torch.equal(call_of_plain(base), before)
    got = call_of(model, "lora")
    assert (got - wanted).norm() < 0.1 * (wanted - before).norm()


def call_of_plain(model):
    with watch(model) as calls:
        sample(model, POSITIVE, NEGATIVE)
    return calls[0].out


def test_cancel_keeps_what_is_computed(loaded, monkeypatch):
    """The host's interrupt in the middle; the second time nothing that is there is computed again, and the result is the same."""
    from pathlib import Path

    import comfy.model_management as mm
    from comfyui_dmm.nodes import merge as node
    from comfyui_dmm.nodes import paths

    whole = merge(loaded, budget="80%", name="whole")
    calls = []

    def stop(done, *_):
        calls.append(done)
        if len(calls) == 120:
            mm.interrupt_current_processing()

    with monkeypatch.context() as m:
        m.setattr(node.comfy.utils.ProgressBar, "update_absolute", lambda self, done, *more: stop(done))
        with pytest.raises(mm.InterruptProcessingException):
            merge(loaded, budget="80%", name="cancelled")
    mm.interrupt_current_processing(False)
    (parts,) = (Path(paths.output_folder()).parent / "dmm_runs").glob("cancelled-*-merge")
    kept = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert kept and not files("cancelled")
    seen = []
    with monkeypatch.context() as m:
        m.setattr(node.comfy.utils.ProgressBar, "update_absolute", lambda self, done, *more: seen.append(done))
        again = merge(loaded, budget="80%", name="cancelled")
    assert seen[0] > 1 and not parts.exists()  # the first block was there
    one, two = (load_checkpoint(files(name)[0]).unet for name in ("whole", "cancelled"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert again.args[2] == whole.args[2]


def test_another_vae_is_another_file(loaded):
    """What the model inherits is in its file's name: the merge with the first VAE stays."""
    model, clip, vae, unet = loaded["base"]
    first = merge(loaded, budget="80%", name="which-vae").args[2]
    (path,) = files("which-vae")
    before = path.read_bytes()
    other = copy.deepcopy(vae)
    with torch.inference_mode():
        for p in other.first_stage_model.decoder.parameters():
            p.mul_(1.5)
    again = merge({**loaded, "base": (model, clip, other, unet)}, budget="80%", name="which-vae").args[2]
    assert first == again and path.read_bytes() == before
    (new,) = set(files("which-vae")) - {path}
    one, two = load_checkpoint(path), load_checkpoint(new)
    assert all(torch.equal(one.unet[key], two.unet[key]) for key in one.unet)
    assert any(not torch.equal(one.vae[key], two.vae[key]) for key in one.vae)


@pytest.mark.parametrize(
    ("budget", "names", "name", "message"),
    [
        ("0.01%", "abc", "x", "too small"),
        ("much", "abc", "x", "the size of the style bank is 'much'"),
        ("10%", "a", "x", "1 models to merge: expected 2"),
        ("10%", "abc", "../x", "use a plain file name"),
    ],
)
def test_what_makes_no_sense(loaded, budget, names, name, message):
    with pytest.raises(ValueError, match=message):
        merge(loaded, names, budget, name)
    assert not files("x")


def test_another_kind_of_model_is_named(loaded, models):
    from comfyui_dmm.nodes.teacher import TeacherInput

    other = load(models, checkpoint_of(random_unet(FAMILIES["small sd20"])), "merge-other")
    teachers = [TeacherInput("a", loaded["a"][0]), TeacherInput("other", other)]
    with pytest.raises(ValueError, match="'other' is a DMM model with styles of its own"):
        merge(loaded, teachers=teachers)


# --- models with a bank in the other nodes ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_a_bank(models, family):
    config = FAMILIES[family]
    unet = with_bank(random_unet(config))
    model = load(models, checkpoint_of(unet), "banked")
    rows = {"none": torch.zeros(1, config.num_styles + 1), "Neon lines": style_row(config.num_styles, 1, 0.75)}
    for name, row in rows.items():
        with watch(model) as calls:
            from comfyui_dmm.nodes.style import StyleSelector

            sample(
                StyleSelector.execute(model, name, 0.75)[0], conditioning(config, 1), conditioning(config, 2), batch=2
            )
        for call in calls:
            assert_bank_equal(call, unet, row)
    with pytest.raises(AssertionError):  # the bank shows: without it the same call is another
        with torch.no_grad():
            bare = load_unet({k: v for k, v in unet.state_dict().items() if not k.startswith("style_bank.")}).eval()
        assert_bank_equal(call, bare, row)
    assert model.model.diffusion_model.style_bank.masses is None


def test_saved_again_it_is_the_same_and_named_blends_join_the_bank(models):
    from comfyui_dmm.nodes import host_model
    from comfyui_dmm.nodes.named_blend import NameBlend

    unet = with_bank(random_unet(DEMO))
    model = load(models, checkpoint_of(unet), "banked-again")
    with torch.inference_mode():
        saved = host_model.to_checkpoint(model)
        blended = NameBlend.execute(model, "ink:0.5, 墨:0.5", "half").args[0]
        more = host_model.to_checkpoint(blended)
    assert all(torch.equal(v, saved.unet[k]) for k, v in unet.state_dict().items())
    assert [style.name for style in more.styles][-1] == "half" and unet_config_from_state_dict(
        more.unet
    ).bank.cores == 6
    five, four = load_unet(more.unet).eval(), load_unet(saved.unet).eval()
    g = torch.Generator().manual_seed(0)
    x, t, context = torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500]), torch.randn(1, 7, 64, generator=g)
    with torch.no_grad():
        got, want = (
            five(x, t, context, style=style_row(5, 4)),
            four(x, t, context, style=style_row(4, {0: 0.5, 3: 0.5})),
        )
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(five(x, t, context), four(x, t, context), atol=1e-6, rtol=1e-5)


def test_an_error_leaves_no_masses_behind(models):
    unet = with_bank(random_unet(DEMO))
    model = load(models, checkpoint_of(unet), "banked-error")
    inside = model.model.diffusion_model

    def fail(*_):
        assert inside.style_bank.masses is not None
        raise RuntimeError("out of memory")

    handle = inside.out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(apply(model, "ink"), POSITIVE, NEGATIVE)
    handle.remove()
    assert inside.style_bank.masses is None
    with watch(model) as calls:
        sample(apply(model, "ink"), POSITIVE, NEGATIVE)
    assert_bank_equal(calls[0], unet, style_row(4, 0))


def test_the_bank_is_what_the_file_folds_to(models):
    """One style for all: the host with the bank against the host's plain UNet with that style's bank in its weights, and its code."""
    unet = with_bank(random_unet(DEMO))
    model = load(models, checkpoint_of(unet), "banked-folded")
    masses = torch.tensor([0.0, 1, 0, 0, 0])
    folded = load_unet(folded_bank(unet.state_dict(), masses)).eval()
    with watch(model) as calls:
        sample(apply(model, "Neon lines"), POSITIVE, NEGATIVE)
    for call in calls:
        assert_bank_equal(call, folded, style_row(4, 1))


def test_the_report_is_beside_the_runs(loaded):
    from pathlib import Path

    from comfyui_dmm.nodes import paths

    merge(loaded, name="told", budget="50%")
    (path,) = (Path(paths.output_folder()).parent / "dmm_runs").glob("told-*-merge.json")
    assert {teacher["name"] for teacher in json.loads(path.read_text())["teachers"]} == set("abc")
