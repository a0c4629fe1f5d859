"""Plain DMM against the options, on the demo family: equal samples, equal seconds, several seeds, one table.

    make bench-merge                                                              (24 minutes on two busy CPU cores, 2026-11-22)
    python -m comfyui_dmm.tests.benches.merge --arms all --judged all     (every option; several times as long)
    python -m comfyui_dmm.tests.benches.merge --arms all --steps 3000 --device cuda
    python -m comfyui_dmm.tests.benches.merge --tune plain,standard    (rates; put the best into merge_arms.RATES)

Every arm is plain DMM with the changes of ``merge_arms.ARMS``. Plain trains first; the others train on the same samples, and then on
until they have had its seconds too. All figures are of eps errors on 128 scenes that nothing was trained on, and of pictures painted
from the same prompts and noise (docs/evaluation.md says what EXCESS, LEAK and PAIR are). Spread: standard deviation over the seeds.
What is finished lies in --folder and is not made again.

    python -m comfyui_dmm.tests.benches.merge --family second --family-folder FOLDER

does the same on the second demo family (other looks, scenes and seeds), which `dmm demo build --family second --out FOLDER` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...dmm_core.files import atomic_write
from .family_files import ROOT, FamilyFiles, family_files
from .merge_arms import ARMS, SHARES, train_arm
from .merge_judge import judged

SHORT = ("plain", "release", "B adaptive", "standard")
RATES_TRIED = (5e-4, 1e-3, 2e-3, 4e-3)
TUNING_SEED = 1000
PROJECT = 40


def name_of(arm: str, steps: int, seed: int, rate: float | None) -> str:
    return f"{arm.replace(' ', '-')}-{steps}-{seed}" + (f"-{rate:g}" if rate else "")


def train_and_keep(
    folder: Path,
    arm: str,
    steps: int,
    seed: int,
    rate: float | None,
    *,
    device: torch.device,
    files: FamilyFiles,
) -> None:
    path = folder / f"{name_of(arm, steps, seed, rate)}.json"
    at_least = 0.0
    if arm != "plain" and not rate:
        plain = json.loads((folder / f"{name_of('plain', steps, seed, None)}.json").read_text())
        at_least = plain["at"][str(steps)]["seconds"]
    result, weights = train_arm(arm, steps, seed, device, rate, at_least, files=files)
    for step, state in weights.items():
        with atomic_write(path.with_name(f"{path.stem}-at-{step}.safetensors")) as temporary:
            save_file(state, temporary)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result))


def judge(folder: Path, stem: str, count: int, *, device: torch.device, files: FamilyFiles) -> dict:
    """The paper's figures of weights that an arm left."""
    path = folder / f"{stem}-judged-{count}.json"
    if not path.exists():
        weights = load_file(folder / f"{stem}.safetensors")
        result = judged(weights, folder / "parts", count, PROJECT, device=device, files=files)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(result))
    return json.loads(path.read_text())


def work(args, jobs: list[list[str]]) -> None:
    """Run jobs, ``args.jobs`` at a time, each in a process that computes on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    common = ["--folder", args.folder, "--steps", str(args.steps), "--count", str(args.count), "--device", args.device]
    common += ["--family", args.family] + (["--family-folder", args.family_folder] if args.family_folder else [])
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            job = waiting.pop(0)
            command = [sys.executable, "-m", "comfyui_dmm.tests.benches.merge", *common, *job]
            running.append((job, time.monotonic(), subprocess.Popen(command, env=environment)))
        time.sleep(0.2)
        for job, started, process in running:
            if process.poll() is not None:
                print(f"{' '.join(job)}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
                if process.returncode:
                    raise SystemExit(f"{' '.join(job)} failed")
        running = [one for one in running if one[2].poll() is None]


# --- the table --------------------------------------------------------------------------------------------------------


def at_seconds(curve: list, seconds: float, column: int = 2) -> float:
    """A curve's value (of its mean error) after so many seconds: between two looks on a line, after the last one the last."""
    before = curve[0]
    for point in curve:
        if point[1] >= seconds:
            share = (seconds - before[1]) / max(point[1] - before[1], 1e-9) if point is not before else 1.0
            return before[column] + share * (point[column] - before[column])
        before = point
    return curve[-1][column]


def samples_to(curve: list, error: float, batch: int) -> float:
    """Samples until the mean error is ``error``: between two looks on a line; infinite where it never is."""
    before = None
    for point in curve:
        if point[2] <= error:
            if before is None:
                return point[0] * batch
            share = (before[2] - error) / (before[2] - point[2])
            return (before[0] + share * (point[0] - before[0])) * batch
        before = point
    return float("inf")


def row(result: dict, plain: dict, judged: dict | None, outlier: str) -> dict[str, float]:
    """The figures of one run, beside plain's of the same seed."""
    steps, names = result["steps"], result["names"]
    end = result["at"][str(steps)]
    own = [end["errors"][i][i] for i in range(len(names))]
    target = next(point for point in plain["curve"] if point[0] == steps)[2]
    needed = samples_to(result["curve"], target, result["batch"]) / (steps * result["batch"])
    figures = {
        "eps error": statistics.mean(own),
        "worst": max(own),
        "at equal seconds": at_seconds(result["curve"], plain["at"][str(steps)]["seconds"]),
        "samples to plain's end": needed,
        "twins apart": end["contrast"],
        "s": end["seconds"],
    }
    if judged:
        others = [i for i, name in enumerate(names) if name != outlier]
        j = names.index(outlier)
        figures |= {
            "PAIR": judged["pair"],
            "PAIR worst": judged["pair worst"],
            "EXCESS": judged["excess"],
            "LEAK": judged["leak"],
            "outlier's leak": statistics.mean(abs(judged["m"][i][j] - judged["floor"][i][j]) for i in others),
        }
    return figures


DIGITS = {"eps error": 4, "worst": 4, "at equal seconds": 4, "samples to plain's end": 2, "twins apart": 2, "s": 0,
          "PAIR": 3, "PAIR worst": 3, "EXCESS": 1, "LEAK": 1, "outlier's leak": 1}  # fmt: skip


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    columns = [name for name in DIGITS if any(name in one for many in rows.values() for one in many)]
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for arm, many in rows.items():
        cells = []
        for name in columns:
            values = [one[name] for one in many if name in one]
            cell = "" if not values else f"{statistics.mean(values):.{DIGITS[name]}f}".replace("inf", "never")
            if len(values) > 1 and cell != "never":
                cell += f" ± {statistics.stdev(values):.{DIGITS[name]}f}"
            cells.append(cell)
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Prints the table; -> {row of the table: figures of each seed}, empty for a job or where rates are tuned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(SHORT), help=f"all, or of: {', '.join(ARMS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100, help="of 32 samples")
    parser.add_argument(
        "--count", type=int, default=48, help="pictures a style for EXCESS, LEAK and PAIR; 0 leaves them out"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder", default=str(ROOT / "out" / "bench-merge"), help="results; of another family in a folder inside"
    )
    parser.add_argument("--family", default="first", help="the demo family: first, the shipped one, or second")
    parser.add_argument("--family-folder", help="where the second family was built (out/demo-second)")
    parser.add_argument("--tune", default="", help="arms whose learning rate is to be found")
    parser.add_argument("--judged", default="plain,standard", help="arms whose pictures are judged, or all")
    parser.add_argument("--early", default="standard", help=f"arms that have rows of their own for {', '.join(SHARES)}")
    parser.add_argument("--train", help=argparse.SUPPRESS)  # the jobs: arm:seed[:rate], and what to judge
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    folder, device = Path(args.folder), torch.device(args.device)
    try:
        files = family_files(args.family, args.family_folder)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if not files.family.shipped:
        folder = folder / args.family
    folder.mkdir(parents=True, exist_ok=True)
    if args.train or args.judge:
        torch.set_num_threads(1)
        if args.judge:
            judge(folder, args.judge, args.count, device=device, files=files)
        else:
            arm, seed, rate = (*args.train.split(":"), None)[:3]
            train_and_keep(folder, arm, args.steps, int(seed), rate and float(rate), device=device, files=files)
        return {}
    arms = list(ARMS) if args.arms == "all" else args.arms.split(",")
    if unknown := [arm for arm in arms + args.tune.split(",") if arm and arm not in ARMS]:
        raise SystemExit(f"unknown arms {', '.join(unknown)}: choose from {', '.join(ARMS)}")
    if args.tune:
        tune(args, folder)
        return {}
    return compare(args, folder, arms, files)


def results(folder: Path, arm: str, steps: int, seed: int, rate: float | None = None) -> dict | None:
    path = folder / f"{name_of(arm, steps, seed, rate)}.json"
    return json.loads(path.read_text()) if path.exists() else None


def tune(args, folder: Path) -> None:
    trials = [(arm, rate) for arm in args.tune.split(",") for rate in RATES_TRIED]
    missing = [(arm, rate) for arm, rate in trials if not results(folder, arm, args.steps, TUNING_SEED, rate)]
    work(args, [["--train", f"{arm}:{TUNING_SEED}:{rate}"] for arm, rate in missing])
    print(
        "| | " + " | ".join(f"lr {rate:g}" for rate in RATES_TRIED) + " |\n" + "| --- " * (len(RATES_TRIED) + 1) + "|"
    )
    for arm in args.tune.split(","):
        errors = []
        for rate in RATES_TRIED:
            end = results(folder, arm, args.steps, TUNING_SEED, rate)["at"][str(args.steps)]["errors"]
            errors.append(statistics.mean(end[i][i] for i in range(len(end))))
        print(f"| {arm} | " + " | ".join(f"{error:.4f}" for error in errors) + " |")


def compare(args, folder: Path, arms: list[str], files: FamilyFiles) -> dict[str, list[dict[str, float]]]:
    family, device = files.family, torch.device(args.device)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    arms = ["plain", *(arm for arm in arms if arm != "plain")]
    runs = [(arm, seed) for arm in arms for seed in seeds]
    for first in (True, False):  # the others need plain's seconds
        missing = [
            one for one in runs if (one[0] == "plain") == first and not results(folder, one[0], args.steps, one[1])
        ]
        work(args, [["--train", f"{arm}:{seed}"] for arm, seed in missing])
    shown = {(arm, seed, args.steps): f"{name_of(arm, args.steps, seed, None)}-at-{args.steps}" for arm, seed in runs}
    early = {round(share * args.steps): words for words, share in SHARES.items()}
    for arm in (arm for arm in args.early.split(",") if arm in arms):
        for at in early:
            shown |= {(arm, seed, at): f"{name_of(arm, args.steps, seed, None)}-at-{at}" for seed in seeds}
    chosen = arms if args.judged == "all" else args.judged.split(",")
    looked_at = {stem for (arm, *_), stem in shown.items() if args.count and arm in chosen}
    if looked_at:
        stems = [
            stem
            for stem in shown.values()
            if stem in looked_at and not (folder / f"{stem}-judged-{args.count}.json").exists()
        ]
        # The first one alone: it paints the teachers' pictures, which the others find.
        for some in (stems[:1], stems[1:]):
            work(args, [["--judge", stem] for stem in some])
    rows: dict[str, list[dict[str, float]]] = {}
    for (arm, seed, at), stem in shown.items():
        result, plain = (results(folder, name, args.steps, seed) for name in (arm, "plain"))
        judged = judge(folder, stem, args.count, device=device, files=files) if stem in looked_at else None
        if at != args.steps:
            result = {**result, "at": {str(args.steps): result["at"][str(at)]}}
        one = row(result, plain, judged, family.outlier)
        if at != args.steps:  # these are of the whole run
            del one["at equal seconds"], one["samples to plain's end"]
        rows.setdefault(arm if at == args.steps else f"{arm}, {early[at]}", []).append(one)
    told = f"{family.name} family, twins: {' and '.join(family.twins)}, outlier: {family.outlier}"
    print(f"\n{args.steps} steps of 32 samples, seeds {args.seeds}, {told}\n")
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
