"""All ratios of speed in one table: ``make bench`` (about five minutes of one quiet core; BENCH="--rounds 25" for narrower quartiles).

    python -m comfyui_dmm.tests.benches.all --only training loading

Each line alternates its two sides in this process and has no ratio where they differ in their result by more than the tolerance that stands
with it (``paired``). Seconds are those of the process, not of the clock. Without a ComfyUI (COMFYUI_PATH) only the lines of training are
there. Sizes are those of the demo family; the benches themselves have SD1.5's too (``--family sd15``, ``--size sd15``).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ...training.host_path import find_host
from . import bank_step, few_teachers_step, loading, styles, training_step
from .paired import Line, one_thread, printed

CPU = torch.device("cpu")
WITHOUT_BANK = (
    "itself", "one style / host", "four steps", "schedule / one", "8 styles in a batch", "one pass", "own 4 areas", "4 regions that fill",
)  # fmt: skip
WITH_BANK = ("one style / host", "one style, folded", "2 styles in a batch", "one pass")


def sampling(rounds: int, keep: Callable[[Line], None]) -> None:
    for bank, only in (("", WITHOUT_BANK), ("10%", WITH_BANK)):
        config, side = styles.sizes("demo", bank)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            # Short paintings: the sides take turns often.
            prefix = f"bank {bank}: " if bank else ""
            bench = styles.Bench(config, side, 10, rounds, only, lambda line, p=prefix: keep(line.named(p + line.name)))
            styles.measure(bench, styles.load(config, Path(folder), torch.float32), 1e-4)


def load(rounds: int, keep: Callable[[Line], None]) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        files, looks = Path(folder, "files"), Path(folder, "looks")
        files.mkdir(), looks.mkdir()
        for line in loading.load_lines(*loading.make_files(files, "demo", "", torch.float16), rounds, "demo"):
            keep(line)
        for line in loading.look_lines(looks, "demo", "10%", min(rounds, 5)):
            keep(line)


def training(rounds: int, keep: Callable[[Line], None]) -> None:
    found = training_step.measure(CPU, "tiny", 2.0 * rounds)
    keep(against_ours(found, "theirs", "a step of the published loop / of ours", "> 2"))
    for line in few_teachers_step.lines(rounds):
        keep(line)
    keep(bank_step.measure("demo", "10%", pixels=128, batch=16, rounds=rounds, device=CPU))


def against_ours(found: dict, side: str, name: str, aim: str = "") -> Line:
    """A side of ``training_step.measure`` as a line. apart: of the gradients."""
    one, ours = found["sides"][side], found["sides"]["ours"]
    most = training_step.TOLERANCE["fp32" if found["precision"] == "fp32" else "half"]["gradient"]
    return Line(name, one["ours over it"], found["batch"] / ours["samples/s"][1], one["apart"]["gradient"], most, aim)


PARTS = {"training": (training, False), "sampling": (sampling, True), "loading": (load, True)}
"""Name -> (what measures it, whether it needs a ComfyUI)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    host = find_host()
    names = [name for name in args.only if host is not None or not PARTS[name][1]]
    print(f"demo sizes, CPU, float32, one thread, {args.rounds} rounds, torch {torch.__version__}\n")
    if len(names) < len(args.only):
        print("No ComfyUI found (COMFYUI_PATH): no lines of sampling and loading.\n")
    with tempfile.TemporaryDirectory() as folder, one_thread():
        if any(PARTS[name][1] for name in names):
            styles.start_host(True, Path(folder))
        print(printed([]), flush=True)
        for name in names:
            PARTS[name][0](args.rounds, lambda line: print(printed([line]).splitlines()[-1], flush=True))


if __name__ == "__main__":
    main()
