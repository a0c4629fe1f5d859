"""Merged teachers against the host's own merging node."""

from pathlib import Path

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.dmm_core.unet import load_unet
from comfyui_dmm.training.evaluation.mixing.mixers import merged
from comfyui_dmm.training.teachers.teacher import Teacher

MODELS = Path(__file__).parents[2] / "models" / "dmm"


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_merged_weights_are_those_of_model_merge_simple(host, ratio):
    """ModelMergeSimple(first, second, 1 - w) of two demo teachers, the weights that it puts on the device: 1e-5 of the largest."""
    import comfy.model_management
    from comfy_extras.nodes_model_merging import ModelMergeSimple
    from comfyui_dmm.nodes import host_model

    files = [str(MODELS / f"demo-teacher-{name}.safetensors") for name in ("candy", "pixel")]
    with torch.inference_mode():
        models = [host_model.load(file)[0] for file in files]
        (theirs,) = ModelMergeSimple().merge(*models, 1 - ratio)
        comfy.model_management.load_models_gpu([theirs], force_full_load=True)
        weights = {key: value.clone().float() for key, value in theirs.model.diffusion_model.state_dict().items()}
    teachers = [
        Teacher(Path(file).stem, load_unet(load_checkpoint(file).unet), torch.randn(1, 7, 64)) for file in files
    ]
    ours = merged(*teachers, ratio, 1).unet.state_dict()
    assert weights.keys() == ours.keys()
    for key, value in ours.items():
        torch.testing.assert_close(weights[key], value, atol=1e-5 * value.abs().max().item(), rtol=0)
    apart = max((a - b).abs().max() for a, b in zip(*(t.unet.state_dict().values() for t in teachers)))
    assert apart > 0.05, "the teachers differ by much more than that"
