"""Teachers in RAM against teachers on the device, in samples/s of the same run."""

from __future__ import annotations

import statistics

from .setup import Setup
from .step import run_of, seconds_of_steps

TEACHERS = {"tiny": 3, "sd15": 8}


def measure(setup: Setup) -> None:
    """The device twice, before and after: how far these two are apart is the noise of the measurement."""
    rates: list[float] = []
    for residency in ("device", "offload", "device"):
        run = run_of(setup, teachers=TEACHERS[setup.size], residency=residency)
        try:
            least = 3 if setup.tiny else 6
            taken = seconds_of_steps(run, min(20.0, setup.left / 12) if setup.cuda else 1.0, least)
            rates.append(run.config.batch_size / statistics.median(taken))
            copies = run.targets.pool.copies / (len(taken) + 2)
        finally:
            run.targets.pool.close()
            del run
        setup.line("teachers", {"where": residency, "samples/s": rates[-1], "copies a step": copies})
    on_device = statistics.mean(rates[::2])
    setup.note(**{"teachers": TEACHERS[setup.size], "RAM over device": rates[1] / on_device})
    setup.note(**{"device over itself": rates[2] / rates[0]})
