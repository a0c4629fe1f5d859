"""A handful of processes that tests run pieces of a distributed training in: started once, connected anew for each piece.

Import it, and the pieces, as ``comfyui_dmm.tests.training``: the processes find them by the name that they were imported with, and
pytest's own name for this folder is not one that Python could find by itself.
"""

import importlib
import multiprocessing
import queue
import tempfile
import traceback
from pathlib import Path

SIZE = 3
PATIENCE = 120
"""Seconds for one piece."""


def worker(rank: int, tasks, answers) -> None:
    import torch
    from comfyui_dmm.training.parallel.ranks import Ranks, joined

    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        module, name, arguments, world, meeting = task
        try:
            with joined(Ranks(rank, world, rank), torch.device("cpu"), f"file://{meeting}") as ranks:
                answer = getattr(importlib.import_module(module), name)(ranks, **arguments)
            answers.put((rank, answer, None))
        except Exception as error:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            answers.put((rank, error, traceback.format_exc()))


class Farm:
    """``farm(3, function, **arguments)``: what ``function(ranks, **arguments)`` returns in each of 3 processes, by rank. Where one of
    them raises, that is raised here."""

    def __init__(self, size: int = SIZE):
        context = multiprocessing.get_context("spawn")
        self.answers = context.Queue()
        self.tasks = [context.Queue() for _ in range(size)]
        self.processes = [
            context.Process(target=worker, args=(rank, tasks, self.answers), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, world: int, function, **arguments) -> list:
        with tempfile.TemporaryDirectory() as folder:
            task = (function.__module__, function.__name__, arguments, world, str(Path(folder) / "meeting"))
            for tasks in self.tasks[:world]:
                tasks.put(task)
            answers = {}
            try:
                while len(answers) < world:
                    rank, answer, problem = self.answers.get(timeout=PATIENCE)
                    answers[rank] = answer
                    if problem:
                        print(f"process {rank}: {problem}")
            except queue.Empty:
                raise TimeoutError(f"only the processes {sorted(answers)} of {world} answered") from None
        for answer in answers.values():
            if isinstance(answer, Exception):
                raise answer
        return [answers[rank] for rank in range(world)]

    def close(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(10)
            process.kill()
