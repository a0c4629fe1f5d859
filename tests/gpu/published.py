"""Our training step beside the published recipe's loop, by tests/benches/training_step.py."""

from __future__ import annotations

import importlib

from .setup import NotPossible, Setup

BENCH = "comfyui_dmm.tests.benches.training_step"


def measure(setup: Setup) -> None:
    try:
        bench = importlib.import_module(BENCH)
    except ModuleNotFoundError as error:
        if error.name != BENCH:
            raise
        raise NotPossible("tests/benches/training_step.py is not in this tree yet") from error
    sides = bench.SIDES if setup.cuda else ("ours", "theirs")
    seconds = setup.left / 3 if setup.cuda else 10.0  # the rest is for building both sides
    found = bench.measure(setup.device, setup.size, seconds, sides)
    setup.note(precision=found["precision"], batch=found["batch"], pixels=found["pixels"])
    for name, side in found["sides"].items():
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
