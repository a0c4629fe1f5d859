"""How many attention heads a UNet has: every place that says it, against diffusers' UNet with that number."""

import dataclasses
import json
import logging

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import GUESS, Checkpoint, load_checkpoint, save_checkpoint
from comfyui_dmm.dmm_core.heads import HEADS, METADATA, heads_by_level, is_released
from comfyui_dmm.dmm_core.unet import UNet, UNetConfig, load_unet, unet_config_from_state_dict, with_heads
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.files.convert import convert
from comfyui_dmm.training.files.describe import describe
from comfyui_dmm.training.files.model_files import change_stamp, load_any, load_any_info
from comfyui_dmm.training.teachers.models import as_checkpoint
from safetensors.torch import load_file, save_file

WIDTHS = (64, 128)
TINY = UNetConfig(
    model_channels=64, channel_mult=(1, 2), num_res_blocks=(1, 1), depth_input=(1, 1), depth_output=(1, 1, 1, 1), context_dim=32
)  # fmt: skip
SDXL = UNetConfig(
    channel_mult=(1, 2, 4), num_res_blocks=(2, 2, 2), depth_input=(0, 0, 2, 2, 10, 10), depth_middle=10,
    depth_output=(10, 10, 10, 2, 2, 2, 0, 0, 0), context_dim=2048, linear_proj=True, adm_channels=2816,
)  # fmt: skip


def by_diffusers(heads):
    """diffusers' own UNet of these widths; heads: its ``attention_head_dim``."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=WIDTHS, layers_per_block=1, cross_attention_dim=32, attention_head_dim=heads,
        down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2,
    ).eval()  # fmt: skip


INPUTS = (
    torch.linspace(-2, 2, 4 * 16 * 16).sin().reshape(1, 4, 16, 16) * 3,
    torch.tensor([500]),
    torch.ones(1, 7, 32).cumsum(1).sin(),
)


@torch.no_grad()
def painted(checkpoint):
    return load_unet(checkpoint.unet, heads=checkpoint.heads).eval()(*INPUTS)


@torch.no_grad()
def wanted(model):
    return model(*INPUTS).sample


@pytest.fixture
def four(tmp_path):
    """(diffusers' UNet with 4 heads, its folder, the same weights as a single file that says nothing)."""
    model = by_diffusers(4)
    model.save_pretrained(tmp_path / "unet")
    single = tmp_path / "tiny.safetensors"
    save_file({f"model.diffusion_model.{k}": v for k, v in load_any(tmp_path / "unet").unet.items()}, single)
    return model, tmp_path / "unet", single


@pytest.mark.parametrize("heads, ours", [(4, (4, 4)), (8, (8, 8)), ([2, 8], (2, 8)), (1, (1, 1))])
def test_a_folder_of_diffusers_has_the_heads_of_its_config(tmp_path, heads, ours):
    """``attention_head_dim`` is the number of heads there, one or one for each level."""
    model = by_diffusers(heads)
    model.save_pretrained(tmp_path)
    read = load_any(tmp_path)
    assert (read.heads, read.heads_from) == (ours, "config.json")
    torch.testing.assert_close(painted(read), wanted(model), rtol=0, atol=2e-5)
    weights = load_unet(read.unet).eval()
    with torch.no_grad():
        off = (weights(*INPUTS) - wanted(model)).abs().max()
    assert off > 1e-3  # with the usual number: 1 head at 64 channels, 2 at 128


def test_the_file_in_the_folder_is_read_with_its_config_too(four):
    model, folder, _ = four
    file = folder / "diffusion_pytorch_model.safetensors"
    torch.testing.assert_close(painted(load_any(file)), wanted(model), rtol=0, atol=2e-5)
    before = change_stamp(file)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": 2, "more": 1}))
    assert change_stamp(file) != before and load_any(file).heads == (2, 2)


LDM = "model: {{params: {{unet_config: {{params: {{model_channels: 64, context_dim: 32, {}}}}}}}}}\n"
SGM = LDM.replace("unet_config", "network_config")
SAID = [
    ({}, "", ",num_heads=4", "a setting"),
    ({}, LDM.format("num_heads: 8"), ",num_heads=4", "a setting"),
    ({}, LDM.format("num_heads: 4"), "", "tiny.yaml"),
    ({}, LDM.format("num_heads: 4, num_head_channels: -1"), "", "tiny.yaml"),
    ({}, SGM.format("num_heads: 4"), "", "tiny.yaml"),
    ({HEADS: "4"}, "", "", HEADS),
    ({HEADS: "4,4"}, LDM.format("num_heads: 8"), "", HEADS),
    ({"num_heads": "4"}, "", "", METADATA),
    ({"attention_head_dim": "[4, 4]"}, "", "", METADATA),
    ({"config": '{"num_attention_heads": 4}'}, "", "", METADATA),
    ({"num_heads": "8"}, LDM.format("num_heads: 4"), "", "tiny.yaml"),
]


@pytest.mark.parametrize("metadata, beside, behind, by", SAID)
def test_every_place_that_says_the_heads_of_a_single_file(four, metadata, beside, behind, by):
    model, _, file = four
    save_file(load_file(file), file, {"a": "b", **metadata})
    if beside:
        file.with_suffix(".yaml").write_text(beside)
    read = as_checkpoint(f"{file}{behind}")
    assert (read.heads, read.heads_from) == ((4, 4), by)
    torch.testing.assert_close(painted(read), wanted(model), rtol=0, atol=2e-5)
    if not behind:
        assert f"4 at every level (by {by})" in describe(file, digest=False)
        assert load_any_info(file).heads == (4, 4)


@pytest.mark.parametrize(
    "said, heads", [("num_head_channels=16", (4, 8)), ("num_head_channels=64", (1, 2)), ("num_heads=2", (2, 2))]
)
def test_channels_of_a_head(tmp_path, four, said, heads):
    """LDM's other way to say it."""
    name, value = said.split("=")
    model = by_diffusers(list(heads))
    four[2].with_suffix(".yaml").write_text(LDM.format(f"{name}: {value}"))
    for read in (as_checkpoint(f"{four[2]},{said}"), load_any(four[2])):
        assert read.heads == heads
        torch.testing.assert_close(painted(read), wanted(model), rtol=0, atol=2e-5)


def test_a_guess_is_said(four, caplog):
    _, _, file = four
    with caplog.at_level(logging.INFO):
        read = load_any(file)
    assert (read.heads, read.heads_from, read.config.all_heads) == ((), GUESS, (1, 2))
    assert "1, 2 by level (a guess: nothing in the file says it)" in describe(file, digest=False)
    (note,) = [
        line for line in convert(file, file.with_name("out.safetensors"), "single")[0].splitlines() if "heads" in line
    ]
    assert "tiny.safetensors" in note and "num_heads" in note


@pytest.mark.parametrize(
    "config, released",
    [
        (UNetConfig(), True),
        (UNetConfig(context_dim=1024, linear_proj=True), True),
        (SDXL, True),
        (TINY, False),
        (dataclasses.replace(SDXL, context_dim=1024), False),
        (UNetConfig(channel_mult=(1, 2, 4)), False),
    ],
)
def test_released_sizes_are_no_guess(config, released):
    assert is_released(config) == released


def test_released_sizes_have_the_heads_of_diffusers_own_configs():
    """8 in SD1.5's unet/config.json, [5, 10, 20, 20] in SD2.1's, [5, 10, 20] in SDXL's."""
    heads = {"sd1": UNetConfig(), "sd2": UNetConfig(context_dim=1024, linear_proj=True), "sdxl": SDXL}
    assert {k: c.all_heads for k, c in heads.items()} == {"sd1": (8,) * 4, "sd2": (5, 10, 20, 20), "sdxl": (5, 10, 20)}


def test_our_file_says_it_and_goes_round(four, tmp_path):
    """folder -> single file -> folder, by every command that writes a file; and an older version of the pack refuses it."""
    model, folder, _ = four
    assert not any("heads" in note for note in convert(folder, tmp_path / "ours.safetensors", "single"))
    ours = load_checkpoint(tmp_path / "ours.safetensors")
    assert (ours.heads, ours.heads_from) == ((4, 4), HEADS)
    convert(tmp_path / "ours.safetensors", tmp_path / "back", "diffusers")
    described = json.loads((tmp_path / "back" / "config.json").read_text())
    assert described["attention_head_dim"] == 4
    back = type(model).from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(wanted(back), wanted(model), rtol=0, atol=1e-5)
    torch.testing.assert_close(painted(load_any(tmp_path / "back")), wanted(model), rtol=0, atol=2e-5)
    from safetensors import safe_open

    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert (file.metadata()[HEADS], file.metadata()["dmm.format"]) == ("4", "3")
    described["attention_head_dim"] = 2
    (tmp_path / "back" / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"config.json says \(2, 2\) attention heads, and its metadata \(4, 4\)"):
        load_any(tmp_path / "back")


def test_usual_heads_change_no_file(tmp_path):
    """A file of a released size has no new entry; one of another size says the usual number, in a format that older versions read."""
    with torch.device("meta"):
        sizes = UNet(SDXL)
    assert unet_config_from_state_dict(sizes.state_dict(), (5, 10, 20)) == SDXL
    save_checkpoint(tmp_path / "ours.safetensors", Checkpoint(unet=UNet(TINY).state_dict()))
    ours = load_checkpoint(tmp_path / "ours.safetensors")
    assert (ours.heads, ours.config, ours.heads_from) == ((1, 2), TINY, HEADS)
    tensors = load_file(tmp_path / "ours.safetensors")
    save_file(tensors, tmp_path / "old.safetensors", {"dmm.format": "1", "dmm.prediction": "eps"})
    old = load_checkpoint(tmp_path / "old.safetensors")  # as the pack wrote it before
    assert (old.heads, old.config, old.heads_from) == ((), TINY, "")


WRONG = [
    (",num_heads=3", "num_heads is 3: 3 attention heads do not divide the 64 channels of a level"),
    (",num_head_channels=48", "num_head_channels is 48, which does not divide the 64 channels"),
    (",num_heads=4,num_head_channels=16", "num_heads 4 and num_head_channels 16 are both given: say one of them"),
    (",num_heads=0", "'num_heads=0' behind a model's file"),
    (",num_heads=four", "'num_heads=four' behind a model's file"),
]


@pytest.mark.parametrize("behind, message", WRONG)
def test_a_wrong_number_is_refused(four, behind, message, capsys):
    with pytest.raises(ValueError, match=message):
        as_checkpoint(f"{four[2]}{behind}")
    assert main(["convert", f"{four[2]}{behind}", str(four[2].with_name("o.safetensors")), "--to", "single"]) != 0
    assert message.split(":")[0] in capsys.readouterr().err


@pytest.mark.parametrize("value", [3, "4", True, [4], [4, 4, 4], [4, 0], 4.0, {"a": 1}, [4, [4]], 10**30, -2], ids=str)
def test_no_number_of_heads(tmp_path, value, four):
    """In a config.json and a yaml it is refused with the file's name; in foreign metadata it is left alone, and a guess is made."""
    _, folder, file = four
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": value}))
    with pytest.raises(
        ValueError, match="diffusion_pytorch_model.safetensors: its config.json does not fit the weights"
    ):
        load_any(folder)
    save_file(load_file(file), file, {"num_heads": json.dumps(value)})
    assert load_any(file).heads_from == GUESS
    file.with_suffix(".yaml").write_text(LDM.format(f"num_heads: {json.dumps(value)}"))
    with pytest.raises(ValueError, match=r"tiny.yaml: num_heads is"):
        load_any(file)


@pytest.mark.parametrize("said", ["", "0", "4,4,4", "4,,4", "-4", "four", "3", "9" * 5000])
def test_damaged_metadata_of_ours(four, said):
    save_file(load_file(four[2]), four[2], {HEADS: said})
    with pytest.raises(ValueError, match=f"metadata '{HEADS}' is .*: the file is damaged"):
        load_any(four[2])


def test_a_yaml_of_another_size_is_left_alone(four, caplog):
    """As SD2's, which people copy to say v-prediction."""
    four[2].with_suffix(".yaml").write_text(
        LDM.replace("context_dim: 32", "context_dim: 1024").format("num_head_channels: 16")
    )
    read = load_any(four[2])
    assert (read.heads, read.heads_from) == ((), GUESS)
    assert "the attention heads in tiny.yaml are not looked at" in caplog.text


def test_levels_without_attention_say_nothing():
    config = dataclasses.replace(TINY, depth_input=(0, 1), depth_output=(1, 1, 0, 0))
    assert config.attention_levels == (1,)
    assert with_heads(config, (7, 4)) == with_heads(config, (4, 4)) == dataclasses.replace(config, num_heads=(4, 4))
    assert with_heads(config, (7, 2)) == config  # the usual number
    assert heads_by_level(config, {"num_head_channels": 128}) == (1, 1)


def test_a_usual_number_that_does_not_divide_is_refused_in_words():
    """64 channels a head of 224 channels."""
    config = dataclasses.replace(TINY, model_channels=224)
    with pytest.raises(ValueError, match="3 attention heads do not divide the 224 channels .*: say num_heads"):
        UNet(config)
    UNet(dataclasses.replace(config, num_heads=(4, 4)))
