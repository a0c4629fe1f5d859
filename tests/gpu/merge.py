"""bench-merge on this device, arm by arm, as long as the time lasts."""

from __future__ import annotations

import time

from ..benches import merge
from .setup import Setup

ARMS = {"tiny": ("plain", "standard"), "sd15": ("plain", "standard", "release", "B adaptive")}
STEPS = {"tiny": 4, "sd15": 3000}
SEEDS = {"tiny": "0", "sd15": "0,1,2"}
SHOWN = ("eps error", "worst", "at equal seconds", "samples to plain's end", "PAIR", "EXCESS", "LEAK", "s")


def measure(setup: Setup) -> None:
    """The demo family at both sizes. What is finished lies in the folder: a later call goes on from there."""
    folder, longest, done = setup.folder / f"merge-{setup.size}-{setup.device.type}", 0.0, 0
    for arm in ARMS[setup.size]:
        if done and setup.left < 1.2 * longest:
            break
        started = time.monotonic()
        rows = merge.main(
            [
                *("--arms", arm, "--steps", str(STEPS[setup.size]), "--seeds", SEEDS[setup.size]),
                *("--device", setup.device.type, "--folder", str(folder), "--early", "", "--judged", arm),
                *("--count", "0" if setup.tiny else "48", "--jobs", "3" if setup.cuda else "1"),
            ]
        )
        longest = max(longest, time.monotonic() - started)
        done += 1
        for seed, figures in enumerate(rows[arm]):
            setup.line("arms", {"arm": arm, "seed": seed, **{k: figures[k] for k in SHOWN if k in figures}})
    setup.note(steps=STEPS[setup.size], arms=done, **{"of arms": len(ARMS[setup.size])})
