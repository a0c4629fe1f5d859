"""``dmm judge-mixing`` on the demo family: the command, its judges, and what it refuses."""

import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from comfyui_dmm.training.cli import main
from comfyui_dmm.training.commands.mixing import named_pairs, ratios

MODELS = Path(__file__).parents[2] / "models"


def command(output: Path, *more: str) -> list[str]:
    teachers = [
        f"--teacher={name}={MODELS / 'dmm' / f'demo-teacher-{name}.safetensors'}" for name in ("ink", "candy", "pop")
    ]
    return [
        "judge-mixing", str(MODELS / "dmm" / "demo-dmm.safetensors"), *teachers, "--count", "6", "--steps", "6", "--ratios", "3",
        "--resamples", "20", "--device", "cpu", "--output", str(output), *more,
    ]  # fmt: skip


def test_the_command_judges_and_goes_on(tmp_path, capsys):
    """On the demo models the looks turn into one another: most of the way from one to the other is seen, on both paths."""
    assert main(command(tmp_path, "--pairs", "ink:candy")) == 0
    said = capsys.readouterr().out
    assert "Style mixing of demo-dmm.safetensors" in said and "demo classifier" in said and "of 6." in said
    found = json.loads((tmp_path / "mixing.json").read_text(encoding="utf-8"))
    assert found["ratios"] == [0, 0.5, 1] and [(p["first"], p["second"]) for p in found["pairs"]] == [("ink", "candy")]
    for path in ("blend", "merge"):
        mean = found["mean"][path]
        assert mean["reach"]["value"] > 0.6 and mean["spearman"]["value"] > 0.5
        assert found["pairs"][0]["paths"][path]["curves"]["score"][0]["value"] < 0.3, "ink is not candy"
        assert mean["content"]["value"] > 0.4 and found["captioned"] == 6
    assert found["members"].keys() == {"student", "teacher ink", "teacher candy"}, "pop takes no part"
    parts = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    assert main(command(tmp_path, "--pairs", "candy:ink")) == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()} == parts
    assert (tmp_path / "strip-01-candy-ink.jpg").stat().st_size > 5000


def test_the_student_judges_where_no_classifier_does(tmp_path, capsys):
    """As its own classifier it sees the turn too."""
    more = ("--pairs", "ink:candy", "--features", "none", "--own-draws", "4", "--count", "2", "--paths", "blend")
    assert main(command(tmp_path, *more)) == 0
    found = json.loads((tmp_path / "mixing.json").read_text(encoding="utf-8"))
    assert (
        found["judge"] == {"name": "the student as its own classifier", "draws": 4}
        and "content" not in found["mean"]["blend"]
    )
    curve = [figure["value"] for figure in found["pairs"][0]["paths"]["blend"]["curves"]["score"]]
    assert curve[0] < 0.3 and curve[-1] > 0.7
    assert "own classifier, 4 draws" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--pairs", "ink:oil"), "'ink:oil' is no pair of two styles, written A:B: they are ink"),
        (("--pairs", "ink:echo"), "weight merging needs the teachers of echo"),
        (
            ("--teacher", f"oil={MODELS / 'dmm' / 'demo-teacher-pop.safetensors'}"),
            "no style of the student is called oil",
        ),
        (("--teacher", f"ink={MODELS / 'dmm' / 'demo-teacher-pop.safetensors'}"), "a teacher is named twice"),
        (("--teacher", f"pen={MODELS / 'dmm' / 'demo-dmm.safetensors'}"), "itself a DMM model with 7 styles"),
        (("--features", "nowhere.pth"), "there is no file 'nowhere.pth'"),
        (("--size", "100x128"), "width is 100"),
        (("--ratios", "0,0.5"), "both included"),
        (("--prompts", "nowhere.txt"), "cannot read the captions"),
    ],
)
def test_the_command_explains_what_does_not_fit(tmp_path, capsys, more, message):
    assert main(command(tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ratios_and_pairs_are_read():
    assert ratios("3") == (0, 0.5, 1) and ratios("0, 0.3,1") == (0, 0.3, 1) and ratios("1") == (1,)
    with pytest.raises(ArgumentTypeError, match="neither a list"):
        ratios("0,...,1")
    styles = ["a", "b:c", "a:b", "c", "d"]
    assert named_pairs(["d:a, b:c:d"], styles, styles) == [("d", "a"), ("b:c", "d")]
    assert named_pairs(None, styles, ["a", "c", "d"]) == [("a", "c"), ("a", "d"), ("c", "d")]
    for text in ("a:b:c", "a", "a:a"):  # two ways to read it, no pair, no two styles
        with pytest.raises(ValueError, match="is no pair of two styles"):
            named_pairs([text], styles, styles)
