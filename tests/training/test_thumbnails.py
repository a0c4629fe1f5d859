"""Thumbnails of styles: painted into a file whose weights stay as they are, and left by a run that was watched."""

import base64
import io
import json

import pytest
import torch
from comfyui_dmm.dmm_core.checkpoint import Checkpoint, load_checkpoint, read_info
from comfyui_dmm.dmm_core.metadata import StyleInfo
from comfyui_dmm.dmm_core.weights_file import read_weights
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.commands import thumbnails as commands
from comfyui_dmm.training.files.write_thumbnails import write_thumbnails
from comfyui_dmm.training.loop.kinds import PICTURES
from comfyui_dmm.training.merge import files as merge_files
from comfyui_dmm.training.merge.merge import merge
from comfyui_dmm.training.paint.thumbnails import thumbnail_uri
from comfyui_dmm.training.run.student_file import save_student, with_pictures
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.watch.watch import Watch
from PIL import Image
from safetensors.torch import save_file

from ..host.families import DEMO, checkpoint_of, random_unet
from ..host.server import PACK
from .families import small_run
from .test_pictures import Eye


def picture_of(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def weights_of(path) -> bytes:
    """The bytes behind a file's header."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.fixture
def model(tmp_path):
    """The demo's DMM without thumbnails, with an entry that a later version wrote, and metadata of others."""
    tensors, metadata = read_weights(PACK / "models" / "dmm" / "demo-dmm.safetensors")
    entries = [{k: v for k, v in e.items() if k != "thumbnail"} for e in json.loads(metadata["dmm.styles"])]
    entries[0]["palette"] = ["black"]
    metadata |= {"dmm.styles": json.dumps(entries), "workflow": "{}"}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata)
    return path


def test_the_command_paints_every_style(model, capsys):
    before, metadata = weights_of(model), read_weights(model)[1]
    main(["--threads", "1", "thumbnails", str(model), "--prompt", "an orange cat", "--steps", "3", "--device", "cpu"])
    assert "7 thumbnails in" in capsys.readouterr().out
    assert weights_of(model) == before
    after = read_weights(model)[1]
    assert {k: v for k, v in after.items() if k != "dmm.styles"} == {
        k: v for k, v in metadata.items() if k != "dmm.styles"
    }
    entries = json.loads(after["dmm.styles"])
    assert [{k: v for k, v in e.items() if k != "thumbnail"} for e in entries] == json.loads(metadata["dmm.styles"])
    pictures = [picture_of(style.thumbnail) for style in load_checkpoint(model).styles]
    assert len({picture.tobytes() for picture in pictures}) == 7 and {picture.size for picture in pictures} == {
        (128, 128)
    }


def test_only_the_styles_that_are_named(model):
    main(
        [
            "thumbnails",
            str(model),
            "--prompt",
            "a red star",
            "--style",
            "pop",
            "--steps",
            "1",
            "--size",
            "64",
            "--device",
            "cpu",
        ]
    )
    assert [style.name for style in read_info(model).styles if style.thumbnail] == ["pop"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--style", "nobody"], "no style 'nobody'"),
        (["--style", "Ink"], "no style 'Ink'"),
    ],
)
def test_what_cannot_be_painted_leaves_the_file(model, arguments, words, capsys):
    before = model.read_bytes()
    assert main(["thumbnails", str(model), "--prompt", "x", *arguments]) == 1
    assert words in capsys.readouterr().err and model.read_bytes() == before


def test_a_merge_paints_them_if_asked(tmp_path, capsys):
    files = [PACK / "models" / "dmm" / f"demo-teacher-{name}.safetensors" for name in ("ink", "pop")]
    teachers = [word for file in files for word in ("--teacher", f"{file.stem}={file}")]
    parts = ["--parts-from", str(PACK / "models" / "dmm" / "demo-dmm.safetensors")]
    output = tmp_path / "merged.safetensors"
    command = ["merge", *teachers, *parts, "--budget", "80%", "--device", "cpu", "--output", str(output)]
    assert main([*command, "--thumbnails", "a red star"]) == 0
    assert "2 thumbnails in" in capsys.readouterr().out
    assert all(style.thumbnail for style in read_info(output).styles)


def test_a_merge_whose_thumbnails_are_interrupted_is_found_again(tmp_path, capsys, monkeypatch):
    """The same command merges nothing and paints; another one, or a file that was changed since, is merged."""
    files = [PACK / "models" / "dmm" / f"demo-teacher-{name}.safetensors" for name in ("ink", "pop")]
    teachers = [word for file in files for word in ("--teacher", f"{file.stem}={file}")]
    parts = ["--parts-from", str(PACK / "models" / "dmm" / "demo-dmm.safetensors")]
    output = tmp_path / "merged.safetensors"
    command = ["merge", *teachers, *parts, "--budget", "80%", "--device", "cpu", "--output", str(output)]
    command += ["--thumbnails", "a red star"]
    merges = []
    monkeypatch.setattr(merge_files, "merge", lambda *a, **k: merges.append(a) or merge(*a, **k))

    def interrupted(*more):
        class Stop:
            def __call__(self, done, total, what):
                if done:
                    raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(commands, "ProgressBar", Stop)
            assert main([*command, *more]) == 130
        said = capsys.readouterr()
        assert "the same command goes on" in said.err and not any(s.thumbnail for s in read_info(output).styles)
        return said.out

    said = interrupted()
    before, folder = weights_of(output), tmp_path / ".merged-merge-parts"
    assert len(merges) == 1 and not list(folder.glob("*.safetensors"))
    assert interrupted() == said and len(merges) == 1
    interrupted("--title", "other")
    assert len(merges) == 2
    write_thumbnails(output, {"demo-teacher-ink": thumbnail_uri(Image.new("RGB", (8, 8), "red"))})
    assert interrupted("--title", "other") and len(merges) == 3
    (folder / "finished.json").write_text("{}")
    interrupted()
    assert len(merges) == 4
    assert main(command) == 0 and len(merges) == 4
    assert said in capsys.readouterr().out
    assert weights_of(output) == before and all(style.thumbnail for style in read_info(output).styles)
    assert not folder.exists()


def test_a_plain_checkpoint_has_none(tmp_path, capsys):
    path = PACK / "models" / "dmm" / "demo-base.safetensors"
    assert main(["thumbnails", str(path), "--prompt", "x"]) == 1
    assert "plain checkpoint" in capsys.readouterr().err


def test_writing_checks_what_it_is_given(model):
    uri = thumbnail_uri(Image.new("RGB", (8, 8), "red"))
    before = model.read_bytes()
    with pytest.raises(ValueError, match="no style 'x'"):
        write_thumbnails(model, {"ink": uri, "x": uri})
    with pytest.raises(ValueError, match="not a base64 data URI"):
        write_thumbnails(model, {"ink": "javascript:1"})
    assert model.read_bytes() == before


def test_a_file_without_a_list_of_styles_gets_one(tmp_path):
    """As the authors' own files: their styles are called by their numbers."""
    path = tmp_path / "authors.safetensors"
    save_file({k: v.contiguous() for k, v in checkpoint_of(random_unet(DEMO), torch.float16).unet.items()}, path)
    before, uri = weights_of(path), thumbnail_uri(Image.new("RGB", (8, 8), "red"))
    write_thumbnails(path, {"style 1": uri})
    styles = read_info(path).styles
    assert [(s.name, bool(s.thumbnail)) for s in styles] == [(f"style {i}", i == 1) for i in range(len(styles))]
    assert weights_of(path) == before


def test_a_watched_run_leaves_thumbnails_and_learns_the_same(tmp_path, monkeypatch):
    """The last sheet's student, one picture per style, in the file and in the raw one; without a sheet there are none."""
    monkeypatch.setitem(PICTURES, "steps", 2)
    files = {}
    for name, watch in (("plain", Watch()), ("watched", Watch(decode=Eye(), picture_every=2))):
        run = small_run(steps=3)
        train(run, None, watch)
        files[name] = tmp_path / f"{name}.safetensors"
        save_student(run, run_parts(run), files[name], "title", pictures=watch.student_pictures)
    for end in ("", "-raw"):
        plain, watched = (files[name].with_name(f"{name}{end}.safetensors") for name in ("plain", "watched"))
        assert weights_of(plain) == weights_of(watched)
        assert not any(style.thumbnail for style in read_info(plain).styles)
        thumbnails = [style.thumbnail for style in read_info(watched).styles]
        assert thumbnails == [thumbnail_uri(picture) for picture in watch.student_pictures] and all(thumbnails)


def test_the_sheet_before_the_first_step_leaves_none():
    class Enough(Exception):
        pass

    def stop(*_):
        raise Enough

    watch = Watch(on_step=stop, decode=Eye(), picture_every=5)
    with pytest.raises(Enough):
        train(small_run(steps=3), None, watch)
    assert not watch.student_pictures and len(watch.decode.seen) > 0


def test_a_style_that_has_a_thumbnail_keeps_it():
    own, new = (thumbnail_uri(Image.new("RGB", (8, 8), colour)) for colour in ("blue", "red"))
    styles = [StyleInfo("old", thumbnail=own), StyleInfo("new", "described"), StyleInfo("beyond the sheet")]
    got = with_pictures(styles, [Image.new("RGB", (8, 8), "red")] * 2)
    assert got == [styles[0], StyleInfo("new", "described", new), styles[2]]
    assert with_pictures(styles, []) == styles


def run_parts(run):
    """What a student inherits: nothing, here."""
    return Checkpoint(unet=run.base.unet.state_dict())
