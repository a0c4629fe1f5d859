"""Prediction, noise schedule and clip skip as a file or a yaml beside it says them, against the host's nodes for the same."""

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint, save_checkpoint
from comfyui_dmm.training.config import ModelSettings
from comfyui_dmm.training.files.model_settings import told
from comfyui_dmm.training.text import ClipText
from safetensors.torch import load_file, save_file

from .families import DEMO, checkpoint_of, random_unet

PROMPTS = ["", "a red star on hills"]
YAML = "model: {params: {parameterization: v, cond_stage_config: {params: {layer: hidden, layer_idx: -2}}}}\n"


@pytest.fixture
def files(tmp_path):
    """(a file that says nothing, the same with a yaml beside it)."""
    save_checkpoint(tmp_path / "ours.safetensors", checkpoint_of(random_unet(DEMO), torch.float32, whole=True))
    tensors = load_file(tmp_path / "ours.safetensors")
    for name in ("plain", "told"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "told.yaml").write_text(YAML)
    return tmp_path / "plain.safetensors", tmp_path / "told.safetensors"


@torch.inference_mode()
def test_a_yaml_is_what_the_hosts_nodes_set(models, files):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
    from comfyui_dmm.nodes import host_model

    import nodes as host_nodes

    plain, said = (host_model.load(str(file)) for file in files)
    (theirs,) = ModelSamplingDiscrete().patch(plain[0], "v_prediction", False)
    x, sigma = torch.randn(2, 4, 16, 16), torch.tensor([7.0, 0.5])
    context = torch.randn(2, 77, DEMO.context_dim)
    for model in (said[0], theirs, plain[0]):
        model.pre_run()
    (old, new) = (type(m.get_model_object("model_sampling")).__bases__ for m in (theirs, said[0]))
    assert old == new
    results = []
    for model in (said[0], theirs, plain[0]):
        model.patch_model()
        results.append(model.model.apply_model(x, sigma, c_crossattn=context))
        model.unpatch_model()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    assert (results[0] - results[2]).abs().max() > 0.1
    (clip,) = host_nodes.CLIPSetLastLayer().set_last_layer(plain[1], -2)
    for prompt in PROMPTS:
        ours, skipped, whole = (c.encode_from_tokens(c.tokenize(prompt)) for c in (said[1], clip, plain[1]))
        assert torch.equal(ours, skipped) and not torch.equal(ours, whole)
        headless = ClipText(load_checkpoint(files[1]).text, clip_skip=2).encode([prompt])
        torch.testing.assert_close(headless, ours, rtol=0, atol=2e-3)  # the host holds the encoder in float16
    saved = host_model.to_checkpoint(said[0], said[1], said[2])
    assert (saved.prediction, saved.zero_snr, saved.clip_skip) == ("v", False, 2)


@torch.inference_mode()
@pytest.mark.parametrize("zero_snr", [False, True])
def test_settings_are_what_model_sampling_discrete_sets(models, files, zero_snr):
    """The noise levels too: those of the schedule that ends in pure noise."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
    from comfyui_dmm.dmm_core.schedule import NoiseSchedule
    from comfyui_dmm.nodes import host_model

    plain = load_checkpoint(files[0])
    ours = host_model.build_model(told(plain, ModelSettings("v", zero_snr)))
    (theirs,) = ModelSamplingDiscrete().patch(host_model.build_model(plain), "v_prediction", zero_snr)
    mine, other = (model.get_model_object("model_sampling") for model in (ours, theirs))
    torch.testing.assert_close(mine.sigmas, other.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(NoiseSchedule(zero_snr).sigmas, mine.sigmas, rtol=1e-4, atol=0)


@torch.inference_mode()
def test_a_student_of_a_clip_at_another_layer_says_so(models, files):
    """What Distill Teachers and Merge Checkpoints keep of a CLIP behind CLIP Set Last Layer."""
    from comfyui_dmm.nodes import host_model
    from comfyui_dmm.nodes.training_inputs import clip_and_vae_parts

    import nodes as host_nodes

    model, clip, vae, _ = host_model.load(str(files[0]))
    assert clip_and_vae_parts(model, clip, vae).clip_skip is None
    (skipped,) = host_nodes.CLIPSetLastLayer().set_last_layer(clip, -2)
    assert clip_and_vae_parts(model, skipped, vae).clip_skip == 2
