"""Our training step beside the published recipe's loop, and beside variants of itself, by tests/benches/training_step.py."""

from __future__ import annotations

from collections.abc import Sequence

from ..benches import training_step
from .setup import Setup


def measure(setup: Setup, sides: Sequence[str] = (), one_by_one: bool = False) -> None:
    """sides: beside ours. one_by_one: each as soon as it is measured, and what a machine cannot do is no error: compiling takes minutes."""
    if one_by_one:
        seconds = setup.left / 6 / len(sides) if setup.cuda else 3.0  # the rest is for building and compiling
        training_step.each_beside_ours(
            setup.device, setup.size, seconds, sides, lambda name, found: keep(setup, name, found)
        )
        return
    seconds = setup.left / 3 if setup.cuda else 10.0  # the rest is for building both sides
    found = training_step.measure(setup.device, setup.size, seconds, sides)
    for name in found["sides"]:
        keep(setup, name, found)


def keep(setup: Setup, name: str, found: dict | str) -> None:
    if isinstance(found, str):
        setup.line("sides", {"side": name, "samples/s": "", "ours over it": "not possible here", "quartiles": found})
        return
    setup.note(precision=found["precision"], batch=found["batch"], pixels=found["pixels"])
    side = found["sides"][name]
    ratio = side["ours over it"]
    setup.line(
        "sides",
        {
            "side": name,
            "samples/s": side["samples/s"][1],
            "ours over it": "the two disagree" if ratio is None else ratio[1],
            "quartiles": "" if ratio is None else f"{ratio[0]:.2f} to {ratio[2]:.2f}",
        },
    )
