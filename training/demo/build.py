"""``dmm demo build``: make the whole demo family from nothing. Every weight in models/ comes out of here.

Stages write to a work folder and are skipped when their file is there, so an interrupted build goes on where it was.
"""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import os
import threading
from pathlib import Path

from ..data.demo.family import FIRST, Family
from .stages import Budget, run_stage, stages_of

log = logging.getLogger(__name__)


def _die_with_parent() -> None:
    """In a worker: end when the build ends, however that comes about."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def build_parts(work: Path, budget: Budget, jobs: int = 2, family: Family = FIRST) -> dict[str, float]:
    """Train every part of a family that is not in ``work`` yet; returns the seconds of each stage that ran."""
    work.mkdir(parents=True, exist_ok=True)
    stages = stages_of(family)
    done = {name for name in stages if (work / f"{name}.safetensors").exists()}
    waiting = [name for name in stages if name not in done]
    seconds: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _die_with_parent) as pool:
        running: dict[concurrent.futures.Future, str] = {}
        while waiting or running:
            ready = [n for n in waiting if done.issuperset(stages[n][1])]
            for name in ready[: jobs - len(running)]:
                waiting.remove(name)
                running[pool.submit(run_stage, name, work, budget, family.name)] = name
            try:
                finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            except BaseException:  # an interrupt, for which the pool would wait until its workers are done
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
            for future in finished:
                name = running.pop(future)
                seconds[name] = future.result()
                done.add(name)
                log.info("%s done in %.0f s", name, seconds[name])
    return seconds
