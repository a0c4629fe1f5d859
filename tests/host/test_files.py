"""DMM files into the host and back: nothing is lost or rounded beyond what the host itself rounds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import STYLE_KEYS, load_checkpoint, save_checkpoint

from .families import DEMO, FAMILIES, NAMES, checkpoint_of, random_unet


@pytest.fixture(scope="module")
def unet():
    return random_unet(DEMO)


@torch.inference_mode()
def load(path):
    """-> (MODEL, CLIP, VAE, ModelInfo)."""
    from comfyui_dmm.nodes import host_model

    return host_model.load(str(path))


@torch.inference_mode()
def save(path, *parts):
    from comfyui_dmm.nodes.host_model import to_checkpoint

    save_checkpoint(path, to_checkpoint(*parts))


def assert_same(a: dict, b: dict):
    """Bit for bit: keys, dtypes, values."""
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(models, tmp_path, unet, dtype):
    """File -> host -> file; the host computes in float32 on the CPU whatever the file's precision."""
    before = checkpoint_of(unet, dtype, whole=True, prediction="v", zero_snr=True)
    save_checkpoint(tmp_path / "a.safetensors", before)
    model, clip, vae, info = load(tmp_path / "a.safetensors")
    assert list(info.known) == NAMES and info.dtype == dtype
    save(tmp_path / "b.safetensors", model, clip, vae)
    after = load_checkpoint(tmp_path / "b.safetensors")
    assert_same(before.unet, after.unet)
    assert_same(before.vae, after.vae)
    assert_same({k: v.half() for k, v in before.text.items()}, after.text)  # how the host loads every text encoder
    assert (after.styles, after.recipe, after.prediction, after.zero_snr) == (before.styles, {"steps": 7}, "v", True)
    assert after.metadata["modelspec.title"] == "a test"


@pytest.mark.parametrize("family", ["sd15", "sd20", "sdxl"])
def test_round_trip_of_every_family(models, tmp_path, family):
    before = checkpoint_of(random_unet(FAMILIES[family]), torch.float16)
    save_checkpoint(tmp_path / "a.safetensors", before)
    model, clip, vae, _ = load(tmp_path / "a.safetensors")
    assert clip is None
    save(tmp_path / "b.safetensors", model, None, vae)  # the empty VAE is no VAE
    after = load_checkpoint(tmp_path / "b.safetensors")
    assert_same(before.unet, after.unet)
    assert not after.text and not after.vae


def test_lora_is_folded_in(models, tmp_path, unet):
    """Against W + strength * up @ down, exactly: the sum of two float32 numbers has one result."""
    import comfy.sd

    save_checkpoint(tmp_path / "a.safetensors", checkpoint_of(unet))
    model = load(tmp_path / "a.safetensors")[0]
    key = "middle_block.0.emb_layers.1.weight"
    weight = unet.get_parameter(key)
    up, down = torch.randn(weight.shape[0], 1), torch.randn(1, weight.shape[1])
    layer = f"diffusion_model.{key.removesuffix('.weight')}"
    names = {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
    with torch.inference_mode():
        patched, _ = comfy.sd.load_lora_for_models(model, None, names, 0.25, 0)
    save(tmp_path / "b.safetensors", patched)
    comfy.model_management.load_models_gpu([patched])
    save(tmp_path / "c.safetensors", model)  # though its weights in memory are now the other one's
    after, plain = (load_checkpoint(tmp_path / f"{n}.safetensors").unet for n in "bc")
    assert_same(plain, dict(unet.state_dict()))
    torch.testing.assert_close(after.pop(key), weight + 0.25 * up @ down, rtol=0, atol=1e-6)
    assert_same(after, {k: v for k, v in plain.items() if k != key})


def test_the_hosts_own_saver_keeps_the_styles(models, tmp_path, unet):
    """It writes the weights, but knows of no names."""
    import comfy.sd

    before = checkpoint_of(unet, whole=True)
    save_checkpoint(tmp_path / "a.safetensors", before)
    model, clip, vae, _ = load(tmp_path / "a.safetensors")
    path = tmp_path / "b.safetensors"
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(path), model, clip, vae)
    assert_same(load_checkpoint(path).unet, before.unet)
    assert list(load(path)[3].known) == ["style 0", "style 1", "style 2", "style 3"]


@pytest.mark.parametrize("merge", ["simple", "subtract"])
def test_merging_nodes_reach_the_styles(models, tmp_path, unet, merge):
    """ModelMergeSimple and ModelMergeSubtract of the host between two DMM models, against the same sums by hand."""
    import comfy_extras.nodes_model_merging as merging

    other = random_unet(DEMO, seed=5)
    for name, one in (("a", unet), ("b", other)):
        save_checkpoint(tmp_path / f"{name}.safetensors", checkpoint_of(one))
    a, b = (load(tmp_path / f"{name}.safetensors")[0] for name in "ab")
    with torch.inference_mode():
        if merge == "simple":
            (merged,) = merging.ModelMergeSimple().merge(a, b, ratio=0.25)
        else:
            (merged,) = merging.ModelSubtract().merge(a, b, multiplier=0.5)
    save(tmp_path / "c.safetensors", merged)
    after = load_checkpoint(tmp_path / "c.safetensors")
    assert [style.name for style in after.styles] == NAMES
    for key, weight in unet.state_dict().items():
        theirs = other.state_dict()[key]
        expected = 0.25 * weight + 0.75 * theirs if merge == "simple" else 0.5 * (weight - theirs)
        torch.testing.assert_close(after.unet[key], expected, rtol=0, atol=1e-5)


def test_what_cannot_be_saved(models, tmp_path, unet):
    import comfy.sd
    import comfy.sdxl_clip
    from comfy.supported_models_base import ClipTarget
    from comfyui_dmm.nodes.host_model import to_checkpoint

    plain = checkpoint_of(unet, styles=[], recipe={})
    plain.unet = {k: v for k, v in plain.unet.items() if not k.startswith(STYLE_KEYS)}
    save_checkpoint(tmp_path / "plain.safetensors", plain)
    model = load(tmp_path / "plain.safetensors")[0]
    with pytest.raises(ValueError, match="no styles.*Save Checkpoint"):
        to_checkpoint(model)
    save_checkpoint(tmp_path / "a.safetensors", checkpoint_of(unet))
    model = load(tmp_path / "a.safetensors")[0]
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}
    options = {"clip_l_model_config": small, "clip_g_model_config": small}
    target = ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    with pytest.raises(ValueError, match="another kind of model"):
        to_checkpoint(model, comfy.sd.CLIP(target, model_options=options))
    model.remove_attachments("dmm")
    with pytest.raises(ValueError, match="Load DMM Model"):
        to_checkpoint(model)


def test_an_unknown_size_with_pooled_text_is_refused(models, tmp_path):
    odd = replace(DEMO, linear_proj=True, adm_channels=64, style_mlp="add_embedding2")
    save_checkpoint(tmp_path / "odd.safetensors", checkpoint_of(random_unet(odd)))
    with pytest.raises(ValueError, match="no model of these sizes.*pooled conditioning 64"):
        load(tmp_path / "odd.safetensors")


def test_folders(models, tmp_path, monkeypatch):
    """models/dmm, output/dmm, the pack's own models and the checkpoints; safetensors only; nothing outside of them."""
    import folder_paths
    from comfyui_dmm.nodes import paths

    paths.register()  # twice is as once
    assert len(folder_paths.get_folder_paths("dmm")) == len(set(folder_paths.get_folder_paths("dmm"))) == 3
    output = Path(folder_paths.get_output_directory(), "dmm", "sub")
    output.mkdir(parents=True)
    (output / "two.safetensors").write_bytes(b"")
    for name in ("dmm/one.safetensors", "dmm/x.ckpt", "checkpoints/one.safetensors", "checkpoints/three.safetensors"):
        (models / name).write_bytes(b"")
    (models / "checkpoints" / "y.ckpt").write_bytes(b"")
    folder_paths.filename_list_cache.clear()
    names = paths.model_files()
    assert {"one.safetensors", "sub/two.safetensors", "three.safetensors"} <= set(names)
    assert names.count("one.safetensors") == 1 and not {"x.ckpt", "y.ckpt"} & set(names)
    assert paths.model_path("one.safetensors") == str(models / "dmm" / "one.safetensors")
    assert paths.model_path("sub/two.safetensors") == str(output / "two.safetensors")
    assert str(paths.PACK_MODELS / "controlnet") in folder_paths.get_folder_paths("controlnet")
    assert str(paths.PACK_MODELS / "loras") in folder_paths.get_folder_paths("loras")
    (models / "secret.safetensors").write_bytes(b"")
    for outside in ("../secret.safetensors", str(models / "secret.safetensors"), "missing.safetensors"):
        with pytest.raises(ValueError, match="not found"):
            paths.model_path(outside)


def test_metadata_of_a_saved_file():
    """The workflow goes where the host's own savers put it."""
    from comfyui_dmm.nodes.save import workflow_metadata

    metadata = workflow_metadata({"1": {}}, {"workflow": {"nodes": []}})
    assert metadata == {"prompt": '{"1": {}}', "workflow": '{"nodes": []}'}
    assert workflow_metadata(None, None) == {}


def test_a_unet_with_a_weight_missing_is_refused(models, tmp_path):
    """The host would log it and paint with what lies in memory."""
    whole = checkpoint_of(random_unet(DEMO))
    del whole.unet["middle_block.0.out_layers.3.weight"]
    save_checkpoint(tmp_path / "less.safetensors", whole)
    with pytest.raises(ValueError, match=r"1 of its UNet's weights missing \(middle_block\.0\.out_layers\.3\.weight\)"):
        load(tmp_path / "less.safetensors")
