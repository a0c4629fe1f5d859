"""Add DMM Styles to Model in the real host: a base and a file of styles paint what the whole file paints, and the base stays itself."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import STYLE_KEYS, Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.style_value import PerItem, parse_style
from comfyui_dmm.training.files.convert import convert
from comfyui_dmm.training.files.style_file import read_style_file, save_style
from safetensors.torch import save_file

from .families import DEMO, FAMILIES, NAMES, SD15, SDXL, checkpoint_of, random_unet, with_bank
from .sampling import conditioning, sample, watch
from .test_compatible import (
    LEFT,
    NEGATIVE,
    POSITIVE,
    TOLERANCE,
    Side,
    apply,
    assert_close,
    controlled,
    controls,  # noqa: F401 (a fixture)
    differ,
    host_alone,
    lora,
    mix,
    paint,
    region,
)
from .test_sampling_equals_core import load
from .test_workflows import painting, pictures


def plain_of(checkpoint: Checkpoint) -> Checkpoint:
    unet = {k: v for k, v in checkpoint.unet.items() if not k.startswith(STYLE_KEYS)}
    return dataclasses.replace(checkpoint, unet=unet, styles=[], recipe={})


def add(model, path):
    from comfyui_dmm.nodes.host_model import with_added_styles

    with torch.inference_mode():
        return with_added_styles(model, str(path))


@pytest.fixture(scope="module")
def unet():
    return with_bank(random_unet(DEMO))


@pytest.fixture(scope="module")
def folder(unet, tmp_path_factory):
    """whole.safetensors, its base alone, and its styles alone; one folder for each test file that asks."""
    folder = tmp_path_factory.mktemp("add-on")
    whole = checkpoint_of(unet, whole=True)
    save_checkpoint(folder / "whole.safetensors", whole)
    save_checkpoint(folder / "base.safetensors", plain_of(whole))
    convert(folder / "whole.safetensors", folder / "styles.safetensors", "style")
    return folder


@pytest.fixture(scope="module")
def whole(models, unet):
    return load(models, checkpoint_of(unet), "add-on-whole")


@pytest.fixture
def base(unet):
    """A MODEL that knows nothing of this pack."""
    return host_alone(unet)


@pytest.fixture
def styled(base, folder):
    return add(base, folder / "styles.safetensors")[0]


def paintings(model, *jobs):
    with torch.inference_mode():
        return [paint(job(model) if callable(job) else apply(model, job), POSITIVE, NEGATIVE) for job in jobs]


def untouched(base) -> bool:
    """Nothing of ours is on a MODEL or on the UNet that it shares."""
    layers = list(base.model.modules())
    hooks = [hook for layer in layers for hook in (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())]
    ours = [key for key in base.model.state_dict() if any(name in key for name in STYLE_KEYS)]
    wrappers = any(key and key.startswith("dmm") for kind in base.wrappers.values() for key in kind)
    options = [key for key in base.model_options["transformer_options"] if key.startswith("dmm")]
    lists = base.additional_models or base.attachments or base.injections or base.model_options.get("patches")
    return not (hooks or ours or wrappers or options or lists)


# --- the same as the whole file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["none", NAMES[1], f"{NAMES[0]}:0.5, {NAMES[3]}:0.5", f"{NAMES[0]}; 50%: {NAMES[2]}"])
def test_base_and_styles_are_the_whole_file(whole, styled, style):
    """Every call of the UNet, bit for bit: only the place of the weights is another."""
    calls = []
    for model in (whole, styled):
        with watch(model) as seen:
            sample(apply(model, style), POSITIVE, NEGATIVE, batch=2)
        calls.append(seen)
    for ours, theirs in zip(*calls, strict=True):
        assert ours.chunks == theirs.chunks and torch.equal(ours.out, theirs.out)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "demo"])
def test_every_family_from_the_hosts_own_loader(models, tmp_path, family):
    """SD1.x, SD2.x and SDXL; those that the host's loader takes come from it, the small ones from Load DMM Model without styles."""
    import comfy.sd
    from comfyui_dmm.nodes import host_model

    config = FAMILIES[family]
    checkpoint = checkpoint_of(with_bank(random_unet(config)))
    whole = load(models, checkpoint, "add-on-family")
    save_style(tmp_path / "styles.safetensors", checkpoint)
    save_checkpoint(tmp_path / "base.safetensors", plain_of(checkpoint))
    with torch.inference_mode():
        if family.startswith("small"):
            model = host_model.load(str(tmp_path / "base.safetensors"))[0]
        else:
            model = comfy.sd.load_diffusion_model(str(tmp_path / "base.safetensors"))
    assert model.model is not whole.model
    styled, said = add(model, tmp_path / "styles.safetensors")
    assert said.startswith("on the base they were made for")
    positive, negative = conditioning(config, 1), conditioning(config, 2)
    results = [sample(apply(one, NAMES[1]), positive, negative, batch=2) for one in (whole, styled)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5 * results[0].abs().max().item())


def test_rows_of_a_mixed_batch_are_separate_runs(styled):
    each = PerItem((parse_style(NAMES[0]), parse_style("none"), parse_style(NAMES[3])))
    with torch.inference_mode():
        mixed = sample(apply(styled, each), POSITIVE, NEGATIVE, batch=3)
        for i, style in enumerate(each.styles):
            alone = sample(apply(styled, style), POSITIVE, NEGATIVE, batch=3)
            torch.testing.assert_close(mixed[i], alone[i], rtol=0, atol=1e-5 * alone.abs().max().item())


def test_regions_and_maps_are_those_of_the_whole_file(whole, styled):
    for mode in ("own prompts", "one pass"):
        results = []
        for model in (whole, styled):
            with torch.inference_mode():
                left = region(NAMES[0], (0, 0, 0.5, 1), **({"positive": LEFT} if mode == "own prompts" else {}))
                mixed = mix(model, POSITIVE, NEGATIVE, left, mode=mode, background=NAMES[2])
                results.append(paint(model, *mixed))
        assert torch.equal(*results), mode


def test_a_controlnet_beside_it(whole, styled, controls):  # noqa: F811
    results = []
    for model in (whole, styled):
        side = Side(apply(model, NAMES[1]), lambda h, w: (POSITIVE, NEGATIVE), None)
        with torch.inference_mode():
            results.append(paint(side.model, *controlled(side, controls["ControlNet"])))
    assert torch.equal(*results)
    assert differ(results[0], paintings(whole, NAMES[1])[0])


def test_loras_before_and_behind(whole, styled, base, folder):
    """A LoRA on the MODEL that the styles are put on, and one on what comes out, are the one on the whole file; so are both."""
    before, said = add(lora(base), folder / "styles.safetensors")
    assert "with LoRAs or merges" in said
    (want,) = paintings(whole, lambda model: lora(apply(model, NAMES[1])))
    assert torch.equal(paintings(before, NAMES[1])[0], want)
    assert torch.equal(paintings(styled, lambda model: lora(apply(model, NAMES[1])))[0], want)
    assert (want - paintings(whole, NAMES[1])[0]).abs().max() > 10 * TOLERANCE * want.abs().max()


# --- the base stays itself --------------------------------------------------------------------------------------------


def test_plain_and_styled_in_any_order(base, styled, whole):
    """Differently styled, patched and plain clones of one UNet, in turn: each as it is painted alone."""
    jobs = {
        "plain": lambda: paint(base, POSITIVE, NEGATIVE),
        "plain lora": lambda: paint(lora(base), POSITIVE, NEGATIVE),
        "none": lambda: paint(styled, POSITIVE, NEGATIVE),
        "ink": lambda: paint(apply(styled, NAMES[0]), POSITIVE, NEGATIVE),
        "neon lora": lambda: paint(lora(apply(styled, NAMES[1])), POSITIVE, NEGATIVE),
    }
    with torch.inference_mode():
        alone = {name: job() for name, job in jobs.items()}
        for order in ("plain,ink,plain,neon lora,plain", "ink,plain lora,ink,none,neon lora,plain lora,none,plain"):
            for name in order.split(","):
                assert torch.equal(jobs[name](), alone[name]), (order, name)
    assert untouched(base)
    # The bank of ``with_bank`` has a core for no style, so only the plain one is the base.
    assert len({tensor.sum().item() for tensor in alone.values()}) == len(alone)


def test_an_error_and_a_cancel_leave_nothing(base, styled):
    import comfy.model_management as mm

    (want,), (plain,) = paintings(styled, NAMES[0]), paintings(base, lambda model: model)
    inside = base.model.diffusion_model

    def fail(*_):
        assert inside.middle_block[0].in_layers[2]._forward_hooks
        raise error

    for error in (RuntimeError("out of memory"), mm.InterruptProcessingException()):
        handle = inside.out.register_forward_hook(fail)
        with pytest.raises(type(error)):
            paintings(styled, NAMES[0])
        handle.remove()
        assert untouched(base)
    assert torch.equal(paintings(base, lambda model: model)[0], plain)
    assert torch.equal(paintings(styled, NAMES[0])[0], want)


def test_it_is_loaded_and_unloaded_with_the_model(styled, base):
    import comfy.model_management as mm
    from comfyui_dmm.nodes.style_patch import KEY, added_styles

    paintings(styled, NAMES[0])
    (patcher,) = styled.get_additional_models_with_key(KEY)
    assert any(loaded.model.model is added_styles(styled) for loaded in mm.current_loaded_models)
    assert patcher.model_size() == sum(p.nbytes for p in added_styles(styled).parameters())
    assert base.model_size() == sum(p.nbytes for p in base.model.state_dict().values())
    mm.unload_all_models()
    assert not mm.current_loaded_models
    assert torch.equal(*(paintings(model, NAMES[0])[0] for model in (styled, styled.clone())))


def test_the_styles_go_when_the_last_clone_goes(base, folder):
    """No cycle and no list of ours keeps them."""
    import gc
    import weakref

    import comfy.model_management as mm
    from comfyui_dmm.nodes.style_patch import added_styles

    styled = add(base, folder / "styles.safetensors")[0]
    paintings(styled, NAMES[0])
    left = weakref.ref(added_styles(styled))
    del styled
    mm.cleanup_models_gc()
    gc.collect()
    assert left() is None
    paintings(base, lambda model: model)
    assert untouched(base)


def test_compiled_with_other_styles_and_without(base, styled, tmp_path, monkeypatch):
    """Graphs of one UNet with this bank, with that one and without are not mixed up; the backend runs them as they are."""
    from comfy.ldm.modules import attention
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    torch._dynamo.reset()
    save_style(tmp_path / "other.safetensors", checkpoint_of(with_bank(random_unet(DEMO), seed=9)))
    other = add(base, tmp_path / "other.safetensors")[0]
    save_style(tmp_path / "codes.safetensors", checkpoint_of(random_unet(DEMO)))
    codes = add(base, tmp_path / "codes.safetensors")[0]
    jobs = {"ink": lambda model: apply(model, NAMES[0])}
    jobs |= {"plain": lambda model: model, "none": lambda model: model, "other": jobs["ink"], "codes": jobs["ink"]}
    sources = {"plain": base, "ink": styled, "none": styled, "other": other, "codes": codes}
    with torch.inference_mode():
        compiled = {name: TorchCompileModel.execute(model, "eager")[0] for name, model in sources.items()}
        for name in ("plain", "codes", "ink", "other", "plain", "none", "other", "codes", "ink", "plain"):
            want, got = (paintings(model, jobs[name])[0] for model in (sources[name], compiled[name]))
            assert_close(got, want)


# --- saving -----------------------------------------------------------------------------------------------------------


def test_saved_it_is_the_whole_file(folder, base, styled, unet):
    from comfyui_dmm.nodes.host_model import to_checkpoint

    with torch.inference_mode():
        saved = to_checkpoint(styled)
    want = load_checkpoint(folder / "whole.safetensors")
    assert saved.unet.keys() == want.unet.keys()
    assert all(saved.unet[key].dtype == want.unet[key].dtype for key in want.unet)
    assert all(torch.equal(saved.unet[key], want.unet[key]) for key in want.unet)
    assert (saved.styles, saved.recipe, saved.prediction, saved.zero_snr) == (want.styles, {"steps": 7}, "eps", False)


def test_saved_with_loras_edits_and_blends_it_paints_the_same(models, styled, base):
    from comfyui_dmm.nodes.edit_style import EditStyle
    from comfyui_dmm.nodes.host_model import to_checkpoint
    from comfyui_dmm.nodes.named_blend import NameBlend

    with torch.inference_mode():
        made = NameBlend.execute(lora(styled), f"{NAMES[0]}:0.5, {NAMES[2]}:0.5", "half").args[0]
        made = EditStyle.execute(made, NAMES[1], "tubes", "glowing").args[0]
        again = load(models, to_checkpoint(made), "add-on-saved")
        for style in ("half", "tubes", "none"):
            want, got = (paintings(model, style)[0] for model in (made, again))
            assert_close(got, want)
    assert untouched(base)


def test_styles_only_there_and_back(models, styled, folder, monkeypatch):
    """Save DMM Model's "styles only": into output/dmm_styles, listed by the node, the same file again; of a whole model too."""
    import folder_paths
    from comfyui_dmm.nodes import paths
    from comfyui_dmm.nodes.add_styles import AddStyles
    from comfyui_dmm.nodes.host_model import load as load_model
    from comfyui_dmm.nodes.save import SaveDMMModel

    SaveDMMModel.hidden = SimpleNamespace(prompt=None, extra_pnginfo=None)
    before = read_style_file(folder / "styles.safetensors")
    with torch.inference_mode():
        whole = load_model(str(folder / "whole.safetensors"))[0]
        for name, model in (("added", styled), ("taken out", whole)):
            SaveDMMModel.execute(model, name, what="styles only")
    names = [f"{name}_00001_.safetensors" for name in ("added", "taken out")]
    folder_paths.filename_list_cache.clear()
    assert set(names) <= set(paths.style_files()) and not set(names) & set(paths.model_files())
    for name in names:
        again = read_style_file(paths.style_file_path(name))
        assert (again.styles, again.made_for, again.recipe) == (before.styles, before.made_for, before.recipe)
        assert all(torch.equal(again.weights[key], value) for key, value in before.weights.items())
    with torch.inference_mode():
        out = AddStyles.execute(host_alone(with_bank(random_unet(DEMO))), names[0])
    assert f"4 styles: {', '.join(NAMES)}" in str(out.ui) and "made for" in str(out.ui)
    with pytest.raises(ValueError, match="put it into models/dmm_styles and use Add DMM Styles to Model"):
        load_model(paths.style_file_path(names[0]))
    for outside in ("../dmm/x.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match="not found: put it into models/dmm_styles"):
            paths.style_file_path(outside)


def test_in_a_graph(server):
    """Headless: base and styles paint the whole file's pictures; a file that is replaced is read again."""
    unet = with_bank(random_unet(DEMO))
    whole = checkpoint_of(unet, whole=True)
    models = server.base / "models"
    (models / "dmm_styles").mkdir(exist_ok=True)
    save_checkpoint(models / "dmm" / "graph-whole.safetensors", whole)
    save_checkpoint(models / "dmm" / "graph-base.safetensors", plain_of(whole))
    styles = models / "dmm_styles" / "graph.safetensors"
    save_style(styles, whole)
    graph = painting({"a": NAMES[1], "b": "none"}, "graph-base.safetensors")
    graph["add"] = {"class_type": "DMMAddStyles", "inputs": {"model": ["load", 0], "styles": "graph.safetensors"}}
    for key in "ab":
        graph[f"style {key}"]["inputs"]["model"] = ["add", 0]
    want = pictures(server, painting({"a": NAMES[1], "b": "none"}, "graph-whole.safetensors"))
    got = pictures(server, graph)
    assert got.keys() == want.keys() and all((got[key] == want[key]).all() for key in want)
    save_style(styles, checkpoint_of(with_bank(random_unet(DEMO), seed=9)))
    assert (pictures(server, graph)["save a"] != want["save a"]).any()


# --- a merge, as a user makes it --------------------------------------------------------------------------------------


def test_from_teachers_to_styles_on_another_copy_of_the_base(models):
    """Merge centred at the base, saved as styles only, put onto the base from the host: paints what the merged model paints."""
    from comfyui_dmm.nodes import paths
    from comfyui_dmm.nodes.save import SaveDMMModel

    from .test_merge_host import files, merge, plain_unet

    loaded = {}
    for seed, name in enumerate(("base", "a", "b")):
        checkpoint = checkpoint_of(plain_unet(seed + 1), torch.float16, whole=True)
        from comfyui_dmm.nodes import host_model

        path = models / "checkpoints" / f"centred-{name}.safetensors"
        save_checkpoint(path, checkpoint)
        with torch.inference_mode():
            loaded[name] = (*host_model.load(str(path))[:3], checkpoint)
    model, _, report = merge(loaded, "ab", budget="200%", name="centred", centre="base").args
    assert "the base's, bit for bit" in report
    (path,) = files("centred")
    merged = load_checkpoint(path)
    base = loaded["base"][3].unet
    plain = {key: value for key, value in merged.unet.items() if not key.startswith(STYLE_KEYS)}
    assert plain.keys() == base.keys() and all(torch.equal(plain[key], base[key]) for key in base)
    assert merged.unet["style_bank.input_blocks.0.0.cores.weight"].shape[0] == 2
    SaveDMMModel.hidden = SimpleNamespace(prompt=None, extra_pnginfo=None)
    with torch.inference_mode():
        SaveDMMModel.execute(model, "centred", what="styles only")
    styles = Path(paths.output_folder("dmm_styles"), "centred_00001_.safetensors")
    assert styles.stat().st_size < path.stat().st_size
    bare = host_alone(SimpleNamespace(state_dict=lambda: {k: v.float() for k, v in base.items()}))
    styled, said = add(bare, styles)
    assert said.startswith("on the base they were made for")
    with torch.inference_mode():
        assert torch.equal(*(sample(one, POSITIVE, NEGATIVE) for one in (styled, bare)))  # no style is the base
        for name in "ab":
            want, got = (sample(apply(one, name), POSITIVE, NEGATIVE) for one in (model, styled))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
            assert (got - sample(bare, POSITIVE, NEGATIVE)).abs().max() > 1e-2 * want.abs().max()


# --- what does not belong together ------------------------------------------------------------------------------------


def test_another_base_is_said(folder, unet, tmp_path):
    other, said = add(host_alone(with_bank(random_unet(DEMO, seed=1))), folder / "styles.safetensors")
    assert said.startswith("these styles belong to the DMM model that they were saved from")
    paintings(other, NAMES[0])
    add_on = checkpoint_of(unet, recipe={"merge": {"centre": "base"}, "base": {"file": "plain.safetensors"}})
    save_style(tmp_path / "add-on.safetensors", add_on)
    assert (
        add(host_alone(unet), tmp_path / "add-on.safetensors")[1]
        == "on the base they were made for (plain.safetensors)"
    )
    other, said = add(host_alone(with_bank(random_unet(DEMO, seed=1))), tmp_path / "add-on.safetensors")
    assert said.startswith("another base than the styles were made for (plain.safetensors)")


def test_refusals(base, styled, whole, folder, tmp_path):
    with pytest.raises(ValueError, match=r"this MODEL has styles already \(ink, .*connect one without, as from Load"):
        add(styled, folder / "styles.safetensors")
    with pytest.raises(ValueError, match="has styles already"):
        add(whole, folder / "styles.safetensors")
    with pytest.raises(ValueError, match=r"base\.safetensors is no file of styles alone: Load DMM Model"):
        add(base, folder / "base.safetensors")
    kinds = {"SD15": ("SD15", SD15), "SDXL": ("SDXL", SDXL)}
    for name, (_, config) in kinds.items():
        save_style(tmp_path / f"{name}.safetensors", checkpoint_of(random_unet(config), torch.float16))
    with pytest.raises(ValueError, match=r"SD15\.safetensors holds styles for another kind.*width 1280.*width 128"):
        add(base, tmp_path / "SD15.safetensors")
    import comfy.sd

    sd = checkpoint_of(random_unet(SD15), torch.float16).unet
    with torch.inference_mode():
        sd15 = comfy.sd.load_diffusion_model_state_dict({k: v for k, v in sd.items() if not k.startswith(STYLE_KEYS)})
    with pytest.raises(ValueError, match=r"stable-diffusion-xl-v1-base, .*this MODEL \(stable-diffusion-v1,.*SDXL"):
        add(sd15, tmp_path / "SDXL.safetensors")
    save_style(tmp_path / "v.safetensors", checkpoint_of(with_bank(random_unet(DEMO)), prediction="v"))
    with pytest.raises(ValueError, match=r"width 128, v\) than this MODEL \(.*, eps\): the two predict differently"):
        add(base, tmp_path / "v.safetensors")
    narrower = dataclasses.replace(DEMO, context_dim=128)
    save_style(tmp_path / "text.safetensors", checkpoint_of(with_bank(random_unet(narrower))))
    with pytest.raises(
        ValueError, match=r"text\.safetensors is damaged, or its style bank is another model's: .*attn2"
    ):
        add(base, tmp_path / "text.safetensors")
    damaged = read_style_file(folder / "styles.safetensors").weights
    del damaged["style_bank.middle_block.0.in_layers.2.up.weight"]
    save_file(damaged, tmp_path / "damaged.safetensors")
    with pytest.raises(
        ValueError,
        match=r"damaged\.safetensors: damaged: the style bank of 'middle_block\.0\.in_layers\.2' is not complete",
    ):
        add(base, tmp_path / "damaged.safetensors")
    assert untouched(base)


def test_as_a_teacher_it_is_a_model_with_styles(styled, base):
    from comfyui_dmm.nodes.weights import unet_weights

    weights = unet_weights(styled, styles=True)
    assert any(key.startswith("style_bank.") for key in weights)
    assert not any(key.startswith(STYLE_KEYS) for key in unet_weights(styled))
