"""What cannot be stored is refused before a run begins, in words, and nothing is written."""

import os
from pathlib import Path

import pytest
import yaml
from comfyui_dmm.dmm_core.checkpoint import load_checkpoint
from comfyui_dmm.dmm_core.metadata import StyleInfo, check_new_text, unstorable
from comfyui_dmm.training.config import check_names
from comfyui_dmm.training.files.outputs import check_folder, check_output, name_limit
from comfyui_dmm.training.run.state import check_room, identity, save_state, state_bytes, states
from comfyui_dmm.training.run.train import train

from .families import small_run
from .test_cli import SHORT, dmm, folder, write_config  # noqa: F401, folder is a fixture


def teacher(**changes):
    return [{"name": "one", "file": "one.safetensors", **changes}, {"name": "two", "file": "two.safetensors"}]


REFUSED = {
    "a long name": ({"teachers": teacher(name="n" * 101)}, "a style's name has 101 characters, at most 100 are allowed"),
    "a bell in a name": ({"teachers": teacher(name="one\x07")}, r"a style's name holds the control character '\x07'"),
    "a line break in a name": ({"teachers": teacher(name="one\ntwo")}, r"a style's name holds the control character '\n'"),
    "a name that turns around": ({"teachers": teacher(name="one\u202etxt")}, r"a style's name holds the control character '\u202e'"),
    "a long description": ({"teachers": teacher(description="d" * 4001)}, "description has 4001 characters, at most 4000"),
    "a description that turns": ({"teachers": teacher(description="a\u2066b")}, "a style's description holds the control character"),
    "a long licence": ({"teachers": teacher(licence="l" * 20_001)}, "licence has 20001 characters, at most 20000"),
    "an escape in the title": ({"title": "a\x1b[31m"}, "a model's title holds the control character"),
    "a long file name": ({"output": "out/" + "o" * 250 + ".safetensors"}, "a file name of 262 bytes, at most"),
    "a long file name in two bytes": ({"output": "out/" + "ü" * 125 + ".safetensors"}, "a file name of 262 bytes, at most"),
    "a file name of 250 bytes": ({"output": "out/" + "o" * 238 + ".safetensors"}, "a file name of 254 bytes, at most"),
    "a file name that turns": ({"output": "out/\u202ea.safetensors"}, "the control character '\\u202e' in its file name"),
    "a folder as output": ({"output": "there.safetensors"}, "a folder: give a file name"),
    "a file as the output's folder": ({"output": "data.safetensors/a.safetensors"}, "data.safetensors' is a file"),
    "a file as the run folder": ({"run_dir": "data.safetensors"}, "cannot be made"),
    "a teacher's own file": ({"output": "two.safetensors"}, "which belongs to '"),
    "the base": ({"output": "base.safetensors"}, "one of the inputs: give another name"),
    "the base by a link": ({"output": "link.safetensors"}, "one of the inputs: give another name"),
    "the base by the raw weights' name": ({"base": "a-raw.safetensors", "output": "a.safetensors"}, "one of the inputs"),
    "the data": ({"output": "data.safetensors"}, "one of the inputs"),
    "more states than the disk holds": (
        {"train": {**SHORT, "steps": 10**12, "save_every": 1, "keep": 10**11}}, "too little disk for the states of this run in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(folder, name, capsys):  # noqa: F811
    changes, message = REFUSED[name]
    (folder / "there.safetensors").mkdir()
    (folder / "link.safetensors").symlink_to("base.safetensors")
    (folder / "a-raw.safetensors").write_bytes((folder / "base.safetensors").read_bytes())
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    write_config(folder, **changes)
    assert dmm("distill", "--config", folder / "run.yaml") == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    before[folder / "run.yaml"] = (folder / "run.yaml").read_bytes()
    left = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    left.pop(folder / "out" / "run" / "config.json", None)  # of the last one, which knows its states when all is loaded
    assert left == before


def test_an_old_output_is_overwritten_as_before(folder):  # noqa: F811
    """It is no input; and right-to-left names, accents and emojis are names."""
    names = ["\u062d\u0628\u0631 \u200f1", "émile 🎨"]
    config = yaml.safe_load((folder / "run.yaml").read_text())
    for one, name in zip(config["teachers"], names):
        one["name"] = name
    write_config(folder, teachers=config["teachers"], output="out/ü 🎨.safetensors")
    assert dmm("distill", "--config", folder / "run.yaml") == 0
    assert dmm("distill", "--config", folder / "run.yaml") == 0
    assert [s.name for s in load_checkpoint(folder / "out" / "ü 🎨.safetensors").styles] == names


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="cannot be written: Permission denied"):
        check_output(tmp_path / "closed" / "new" / "a.safetensors")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, which nobody can write to")
def test_a_folder_that_nobody_can_write_to():
    with pytest.raises(ValueError, match="the folder of output '/proc/self/a.safetensors' cannot be written"):
        check_output("/proc/self/a.safetensors")
    with pytest.raises(ValueError, match="the run folder cannot be written"):
        check_folder(Path("/proc/self/run/1"), "the run folder")


def test_a_file_of_an_input_folder_is_an_input(tmp_path):
    """A pipeline folder of diffusers, say; what is new in such a folder overwrites nothing."""
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    weights = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.touch()
    with pytest.raises(ValueError, match="one of the inputs"):
        check_output(weights, [tmp_path / "pipeline"])
    check_output(tmp_path / "pipeline" / "new.safetensors", [tmp_path / "pipeline"])


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "--teacher", "one=one.safetensors", "--teacher", "two=two.safetensors", "--output", "two.safetensors"),
        ("add-teacher", "--instant", "--model", "base.safetensors", "--teacher", "b=two.safetensors", "--output", "two.safetensors"),
        ("forget", "--instant", "--model", "base.safetensors", "--style", "one", "--output", "base.safetensors"),
        ("convert", "base.safetensors", "base.safetensors", "--to", "single", "--half"),
        ("sample", "base.safetensors", "--prompt", "a", "--output", "base.safetensors"),
        ("merge", "--teacher", "one=one.safetensors", "--teacher", "two=two.safetensors", "--output", "h" * 300 + ".safetensors"),
    ],
)  # fmt: skip
def test_other_commands_overwrite_no_input(folder, command, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert dmm(*command) == 1
    said = capsys.readouterr().err
    assert "one of the inputs" in said or "file name of" in said
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_names_and_what_files_hold_already():
    for bad in ("a\x00", "\ud800", "\u202a", "\u2069", "\x9f"):
        assert unstorable(f"x{bad}y") in bad
        with pytest.raises(ValueError, match="control character"):
            check_names([f"x{bad}y"])
    assert unstorable("a\nb\tc", breaks=True) is None and unstorable("a\nb") == "\n"
    check_new_text("description", "one\ntwo")
    assert StyleInfo("of an old file \u202e").name  # is read


def test_the_name_of_a_file_may_be_as_long_as_the_file_system_says(tmp_path):
    longest = name_limit(tmp_path) - 4
    check_output(tmp_path / ("n" * longest))
    with pytest.raises(ValueError, match=f"{longest + 1} bytes, at most {longest}"):
        check_output(tmp_path / ("n" * (longest + 1)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema_gamma": None},
        {"lambda_adv": 0.1},
        {"optimizer": "adafactor"},
        {"optimizer": "muon"},
        {"trainable": "lora", "lora_rank": 4},
        {"trainable": "style"},
    ],
)
def test_the_size_of_a_state_is_known_before_there_is_one(tmp_path, settings):
    run = small_run(steps=1, **settings)
    guess = state_bytes(run)
    list(run.run())
    real = save_state(run, tmp_path, {}).stat().st_size
    header = 60_000 + 400 * len(run.student.trained)
    assert guess <= real <= guess * 1.02 + header


def test_states_that_are_there_count(tmp_path):
    """A run that has its states already needs room for one more; the figures are said."""
    train(small_run(save_every=1, keep=2), tmp_path)
    run = small_run(steps=10**12, save_every=1, keep=10**11)
    with pytest.raises(
        ValueError, match=r"up to 100000000002 of \d+\.\d MB each .*keep: 100000000000.* are there, and .* GB are free"
    ):
        check_room(run, tmp_path)
    check_room(small_run(steps=8, save_every=1, keep=2), tmp_path)
    assert len(states(tmp_path)) == 2 and identity(run)
