"""Folders of pictures as people have them: every kind of picture is read or named, and every way to write captions is."""

import json
import unicodedata

import pytest
from comfyui_dmm.training.data.cache import build_image_cache
from comfyui_dmm.training.data.image_folder import (
    FORMATS,
    captions_alone,
    decode,
    find_pictures,
    read_captions,
    readable_formats,
    survey,
)
from PIL import Image

from .test_cache import base  # noqa: F401 (a fixture)

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def paint(path, kind="PNG", colour=(200, 40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (96, 64), colour).save(path, format=kind)
    return path


def pairs(folder):
    """name -> caption of what would be used, and all that is wrong."""
    pictures, problems = survey(folder, workers=1)
    return {picture.name: picture.caption for picture in pictures}, [str(problem) for problem in problems]


@pytest.mark.parametrize("ending", sorted(e for e, kind in FORMATS.items() if kind != "HEIF"))
@pytest.mark.parametrize("change", [str.lower, str.upper])
def test_every_ending_is_read_in_any_case(tmp_path, ending, change):
    if FORMATS[ending] not in readable_formats():
        pytest.skip(f"this Pillow does not read {ending}")
    path = paint(tmp_path / f"a{change(ending)}", FORMATS[ending])
    (tmp_path / "a.txt").write_text("a red field")
    assert pairs(tmp_path) == ({path.name: "a red field"}, [])
    assert all(abs(a - b) < 9 for a, b in zip(decode(path.read_bytes()).getpixel((40, 30)), (200, 40, 40)))


def test_heic_is_read_where_pillow_can_and_named_where_not(tmp_path):
    paint(tmp_path / "a.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
        paint(tmp_path / "b.HEIC", "HEIF")
    except ImportError:
        (tmp_path / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    found, problems = pairs(tmp_path)
    assert found["a.png"] == "a" and captions_alone(tmp_path) == []
    if "HEIF" in readable_formats():
        assert found["b.HEIC"] == "b" and not problems
    else:
        assert problems == [
            "'b.HEIC': Pillow cannot read .heic on this machine (the package pillow-heif can): save it as .png or .jpg"
        ]


def test_kinds_that_are_not_read_are_named(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    for name in ("b.jxl", "sub/c.PSD", "d.tga"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    assert pairs(tmp_path) == ({"a.png": "a"}, [])  # nothing says that they are for training: the report names them
    for name in ("b.txt", "sub/c.caption", "d.tga.txt"):
        (tmp_path / name).write_text("words")
    (tmp_path / "a.psd").write_bytes(b"what a.png was made from")
    found, problems = pairs(tmp_path)
    assert list(found) == ["a.png"]
    assert [line.split(":")[0] for line in problems] == ["'b.jxl'", "'d.tga'", "'sub/c.PSD'"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.psd", "text": "listed"}))
    assert "'a.psd': pictures that end in .psd are not read: save it as .png or .jpg" in pairs(tmp_path)[1]
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="no pictures in .*there are 4 that cannot be read, as 'a.psd': "):
        find_pictures(tmp_path)


def test_every_way_to_write_a_caption_beside_a_picture(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.JPG", "sub/e.png", "f.tar.png", "g.png", "g.jpg"):
        paint(tmp_path / name, "JPEG" if name.lower().endswith("jpg") else "PNG")
    texts = {
        "a.TXT": "1", "b.caption": "2", "c.png.txt": "3", "d.JPG.Caption": "4", "sub/e.txt": "5", "f.tar.txt": "6", "g.txt": "both",
        "g.png.txt": "7",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    expected = {
        "a.png": "1", "b.png": "2", "c.png": "3", "d.JPG": "4", "f.tar.png": "6", "g.jpg": "both", "g.png": "7", "sub/e.png": "5",
    }  # fmt: skip
    assert pairs(tmp_path) == (expected, []) and captions_alone(tmp_path) == []


def test_two_captions_must_say_the_same(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a star")
    (tmp_path / "a.caption").write_text(" a  star\n")
    assert pairs(tmp_path) == ({"a.png": "a star"}, [])
    (tmp_path / "a.caption").write_text("a moon")
    assert pairs(tmp_path) == ({}, ["'a.png': it has two captions, in 'a.caption' and 'a.txt': keep one of them"])


@pytest.mark.parametrize("on_disk, written", [(NFC, NFD), (NFD, NFC)])
def test_names_match_in_any_unicode_normal_form(tmp_path, on_disk, written):
    paint(tmp_path / f"{on_disk}.png")
    (tmp_path / f"{written}.txt").write_text("beside")
    assert pairs(tmp_path) == ({f"{on_disk}.png": "beside"}, []) and captions_alone(tmp_path) == []
    line = {"file_name": f"{written}.png", "text": "listed"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    assert pairs(tmp_path) == ({f"{on_disk}.png": "listed"}, [])


def test_names_that_differ_only_in_their_normal_form_stay_two(tmp_path):
    """On a file system that tells them apart, each has its own caption; a third spelling would be a guess."""
    angstrom = [unicodedata.normalize(form, "Å") for form in ("NFC", "NFD")] + ["\N{ANGSTROM SIGN}"]
    for name, text in zip(angstrom[:2], ("one", "two")):
        paint(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    if len(find_pictures(tmp_path)) < 2:
        pytest.skip("this file system has one normal form")
    assert pairs(tmp_path) == ({f"{angstrom[0]}.png": "one", f"{angstrom[1]}.png": "two"}, [])
    lines = [json.dumps({"file_name": f"{name}.png", "text": f"listed {i}"}) for i, name in enumerate(angstrom)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    captions, problems = read_captions(tmp_path, find_pictures(tmp_path))
    assert captions == {f"{angstrom[0]}.png": "listed 0", f"{angstrom[1]}.png": "listed 1"}
    assert len(problems) == 1 and "line 3" in str(problems[0])


@pytest.mark.parametrize("name", ["sub/a.png", "./sub/a.png", "sub\\a.png", ".\\sub\\a.png"])
def test_slashes_in_either_direction(tmp_path, name):
    paint(tmp_path / "sub" / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "listed"}))
    assert pairs(tmp_path) == ({"sub/a.png": "listed"}, [])


@pytest.mark.parametrize("name", ["../a.png", "..\\a.png", "sub\\..\\a.png", "A.png"])
def test_other_names_match_nothing(tmp_path, name):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "listed"}))
    found, problems = pairs(tmp_path)
    assert not found and any("there is no picture" in line for line in problems)


def test_a_caption_without_its_picture_is_in_the_report(tmp_path, base):  # noqa: F811
    paint(tmp_path / "in" / "a.png")
    for name in ("a.txt", "b.txt", "sub/c.CAPTION", "d.png.txt"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("words")
    (tmp_path / "in" / "e.jxl").write_bytes(b"?")
    report = build_image_cache(tmp_path / "out", tmp_path / "in", base, resolution=64, workers=1)
    assert report.pictures == 1 and report.alone == ["b.txt", "d.png.txt", "sub/c.CAPTION"]
    assert "3 captions without a picture: 'b.txt'; 'd.png.txt'; 'sub/c.CAPTION'" in str(report)
    assert report.unread == ["e.jxl"] and "1 pictures of kinds that are not read: 'e.jxl'" in str(report)
