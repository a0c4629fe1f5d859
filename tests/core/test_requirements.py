"""What the pack asks for: requirements.txt, which ComfyUI's users install, and pyproject.toml say the same, in lower bounds only."""

import re
import sys
from pathlib import Path

import pytest

# tomli is what pytest itself brings where Python has no tomllib.
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

PACK = Path(__file__).parents[2]
PROJECT = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def bounds(lines) -> dict[str, str]:
    """Lower-case package name -> the lowest version. Fails for a line with no lower bound, or with any other."""
    found = [re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", line.split(";")[0].strip()) for line in lines]
    assert all(found), f"not of the form name>=version: {[line for line, match in zip(lines, found) if not match]}"
    return {match[1].lower(): match[2] for match in found}


def required() -> dict[str, str]:
    lines = (PACK / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return bounds([line for line in lines if line and not line.startswith("#")])


def test_both_files_say_the_same():
    """open_clip_torch is the one thing that only machines without ComfyUI need: its copy of CLIP's vocabulary."""
    headless = bounds(EXTRAS["headless"])
    assert headless.pop("open_clip_torch")
    assert required() == bounds(PROJECT["dependencies"]) | headless


@pytest.mark.parametrize("extra", ["headless", "test"])  # dev pins what checks the code
def test_extras_have_lower_bounds_and_no_others(extra):
    assert bounds(EXTRAS[extra])


@pytest.mark.parametrize("line", ["torch", "torch==2.4", "torch>=2.4,<3", "torch~=2.4"])
def test_any_other_bound_is_noticed(line):
    with pytest.raises(AssertionError, match="name>=version"):
        bounds(["einops>=0.4", line])
