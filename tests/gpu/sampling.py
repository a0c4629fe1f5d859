"""What styles cost while painting: the ratios of tests/benches/styles.py."""

from __future__ import annotations

from ...training.host_path import find_host
from ..benches import styles
from .setup import NotPossible, Setup

FEW = ("host's UNet / itself", "one style / host", "2 styles", "2 regions", "one pass")


def measure(setup: Setup, bank: str = "") -> None:
    if find_host() is None:
        raise NotPossible("no ComfyUI here: set COMFYUI_PATH, or carry the folder that make gpu-pack prepares")
    arguments = ["--family", "demo" if setup.tiny else "sd15"]
    arguments += ["--bank", bank] if bank else []
    arguments += ["--steps", "2", "--rounds", "2"] if setup.tiny else ["--rounds", "5"]
    arguments += ["--cpu"] if not setup.cuda else []
    if bank or setup.tiny:
        arguments += ["--only", *(("one style / host", "one style, folded") if bank else FEW)]
    styles.run(styles.parser().parse_args(arguments), lambda line: setup.line("ratios", line.cells))
    setup.note(lines=len(setup.tables["ratios"]))
