"""Attention heads in the host: Load DMM Model's UNet computes what diffusers' and our own with that number compute."""

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import GUESS, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.training.config import ModelSettings
from comfyui_dmm.training.files.model_files import load_any
from safetensors.torch import load_file, save_file

from ..training.test_heads import INPUTS, by_diffusers, wanted
from .families import FAMILIES, checkpoint_of, random_unet


@torch.inference_mode()
def painted(model):
    model.patch_model()
    try:
        return model.model.diffusion_model(INPUTS[0], INPUTS[1], context=INPUTS[2])
    finally:
        model.unpatch_model()


@pytest.fixture
def folder(tmp_path):
    by_diffusers(4).save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def test_a_foreign_unet_is_diffusers_unet(models, folder, tmp_path):
    """As a folder with its config.json, and as a single file with a setting, a yaml, or neither."""
    from comfyui_dmm.nodes import host_model

    expected = wanted(by_diffusers(4))
    single = tmp_path / "tiny.safetensors"
    save_file({f"model.diffusion_model.{k}": v for k, v in load_any(folder).unet.items()}, single)
    model, _, _, info = host_model.load(str(folder))
    torch.testing.assert_close(painted(model), expected, rtol=0, atol=2e-5)
    assert info.remark == "" and host_model.model_heads(model) == (4, 4)
    guessed, _, _, info = host_model.load(str(single))
    assert (painted(guessed) - expected).abs().max() > 1e-3 and host_model.model_heads(guessed) == ()
    assert "no file says how many attention heads" in info.remark and "num_heads" in info.remark
    told, _, _, info = host_model.load(str(single), ModelSettings(num_heads=4))
    torch.testing.assert_close(painted(told), expected, rtol=0, atol=2e-5)
    assert info.remark == ""
    again = told.clone(force_deepcopy=True)  # the host reads the file once more
    torch.testing.assert_close(painted(again), expected, rtol=0, atol=2e-5)
    single.with_suffix(".yaml").write_text("model: {params: {unet_config: {params: {num_heads: 4}}}}\n")
    torch.testing.assert_close(painted(host_model.load(str(single))[0]), expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="num_heads is 3: 3 attention heads do not divide the 64 channels"):
        host_model.load(str(single), ModelSettings(num_heads=3))


def test_heads_that_the_host_has_no_words_for(models, tmp_path):
    from comfyui_dmm.nodes import host_model

    by_diffusers([8, 4]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="8, 4 attention heads at its levels: ComfyUI"):
        host_model.load(str(tmp_path))


def test_the_node_shows_a_guess(models):
    from comfyui_dmm.nodes.loader import LoadDMMModel

    save_checkpoint(models / "dmm" / "heads.safetensors", checkpoint_of(random_unet(FAMILIES["demo"]), torch.float32))
    ours = LoadDMMModel.execute("heads.safetensors")
    assert "attention heads" not in ours.ui["text"][0]
    save_file(load_file(models / "dmm" / "heads.safetensors"), models / "dmm" / "foreign.safetensors")
    assert load_checkpoint(models / "dmm" / "foreign.safetensors").heads_from == GUESS
    assert "attention heads" in LoadDMMModel.execute("foreign.safetensors").ui["text"][0]
    said = LoadDMMModel.execute("foreign.safetensors", num_heads=8)
    assert "attention heads" not in said.ui["text"][0]
    with pytest.raises(ValueError, match="both given"):
        LoadDMMModel.execute("foreign.safetensors", num_heads=8, num_head_channels=8)
    stamps = {LoadDMMModel.fingerprint_inputs("foreign.safetensors", n) for n in (0, 4, 8)}
    assert len(stamps) == 3


@torch.inference_mode()
@pytest.mark.parametrize("family", ["demo", "sd15", "sd20", "small sd20", "small sdxl"])
def test_every_kind_of_unet_with_other_heads(models, tmp_path, family):
    """Styles included, sizes that the host's own loader knows too: host and headless are the same, and what is saved says it."""
    from comfyui_dmm.nodes import host_model

    config = FAMILIES[family]
    checkpoint = checkpoint_of(random_unet(config), torch.float32)
    plain, _, _, _ = _loaded(checkpoint, tmp_path / "usual.safetensors")
    checkpoint.heads = (16,) * len(config.channel_mult)
    model, clip, vae, _ = _loaded(checkpoint, tmp_path / "ours.safetensors")
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([300]), torch.randn(1, 77, config.context_dim)
    y = torch.randn(1, config.adm_channels) if config.adm_channels else None
    outs = []
    for one in (model, plain):
        one.patch_model()
        outs.append(one.model.diffusion_model(x, t, context=context, **({"y": y} if y is not None else {})))
        one.unpatch_model()
    expected = load_unet(checkpoint.unet, heads=checkpoint.heads).eval()(x, t, context, y=y)
    usual = load_unet(checkpoint.unet).eval()(x, t, context, y=y)
    scale = usual.abs().max()
    torch.testing.assert_close(outs[0] / scale, expected / scale, rtol=0, atol=2e-5)
    torch.testing.assert_close(outs[1] / scale, usual / scale, rtol=0, atol=2e-5)
    assert (expected - usual).abs().max() > 1e-4 * scale
    saved = host_model.to_checkpoint(model, clip, vae if vae.first_stage_model is not None else None)
    assert saved.config == checkpoint.config and saved.config.num_heads


def _loaded(checkpoint, path):
    from comfyui_dmm.nodes import host_model

    save_checkpoint(path, checkpoint)
    return host_model.load(str(path))
