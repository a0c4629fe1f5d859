"""Where the time of a training step goes, kernel by kernel."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from .setup import Setup
from .step import run_of

STEPS = 3
KERNELS = 20


def measure(setup: Setup) -> None:
    run = run_of(setup)
    try:
        for _ in range(2):
            run.train_step()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if setup.cuda else [])
        with profile(activities=activities) as seen:
            seconds = sum(run.train_step().seconds for _ in range(STEPS))
    finally:
        run.targets.pool.close()
    which = "self_device_time_total" if setup.cuda else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: getattr(event, which), reverse=True)
    total = sum(getattr(event, which) for event in events)
    for event in events[:KERNELS]:
        own = getattr(event, which)
        setup.line(
            "top kernels" if setup.cuda else "top operators",
            {
                "name": event.key[:90],
                "ms a step": own / 1000 / STEPS,
                "share": own / total,
                "calls a step": event.count / STEPS,
            },
        )
    # Above one half is arithmetic or copies; what is missing to 1 is the device waiting for Python.
    setup.note(**{"s a step, profiled": seconds / STEPS, "share of the time that kernels fill": total / 1e6 / seconds})
