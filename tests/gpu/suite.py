"""The tests that also run on a GPU, by pytest, in the environment of this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from .setup import NotPossible, Setup

ROOT = Path(__file__).parents[2]
CUDA_AWARE = ("tests/core/test_sampling.py", "tests/core/test_schedule.py", "tests/training/test_residency.py")
ALL = ("tests/core", "tests/training/test_loop.py", "tests/training/test_state.py", "tests/training/test_residency.py")


def measure(setup: Setup) -> None:
    """tiny: the files with tests of their own for CUDA. Tests that need a package which is not here are named by pytest and fail."""
    if importlib.util.find_spec("pytest") is None:
        raise NotPossible("pytest is not installed here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(CUDA_AWARE if setup.tiny else ALL)]
    if importlib.util.find_spec("xdist") and not setup.tiny:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:])
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    setup.note(**{name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)})
    if done.returncode:
        raise AssertionError(f"pytest ended with {done.returncode}: {last}")
