"""How long a distillation at SD1.5's size takes until its first step, and how much memory, on random weights in files of half precision.

    python -m comfyui_dmm.tests.benches.start --folder out/bench-start                   (2 teachers, start from the mean)
    python -m comfyui_dmm.tests.benches.start --folder out/bench-start --teachers 8 --init bank --trainable bank --steps 1

The files are made once (1.9 GB for the base and 1.7 GB a teacher). Seconds are of one process on whatever the machine does besides.
Memory is what the process alone has (RssAnon, Linux), sampled; pages of the mapped files come on top as long as nobody else wants the
memory. Counted: the student in float32, what is trained of it three times more (gradients and AdamW's two moments) once a step was made,
the average, and the models that stay on the device (with a discriminator, the base) or have a slot there.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...dmm_core.checkpoint import Checkpoint, save_checkpoint
from ...dmm_core.unet import UNet, UNetConfig
from ...training.config_file import load_config
from ...training.run.load import load_run
from ...training.text import init_text

GB = 2**30


class Memory:
    """The most anonymous memory of this process, in bytes, while it is open."""

    def __init__(self) -> None:
        self.peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            (anonymous,) = (int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, 1024 * anonymous)


def make_files(folder: Path, teachers: int, side: int) -> None:
    """A base with text encoder, teachers a little apart from it, and latents; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "latents.safetensors").exists():
        captions = [f"caption {i}" for i in range(8)]
        save_file(
            {"latents": torch.randn(8, 4, side, side)},
            folder / "latents.safetensors",
            {"captions": json.dumps(captions)},
        )
    missing = [i for i in range(teachers + 1) if not (folder / f"{i}.safetensors").exists()]
    if not missing:
        return
    torch.manual_seed(0)
    unet = UNet(UNetConfig())
    base = {key: weight.detach().half() for key, weight in unet.state_dict().items()}
    text = {key: weight.half() for key, weight in init_text(768, 12).items()}
    for i in missing:
        generator = torch.Generator().manual_seed(i)
        weights = {k: w + 0.002 * i * torch.randn(w.shape, generator=generator).half() for k, w in base.items()}
        save_checkpoint(folder / f"{i}.safetensors", Checkpoint(unet=weights, text=text if i == 0 else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--teachers", type=int, default=2)
    parser.add_argument("--init", default="soup")
    parser.add_argument("--trainable", default="all")
    parser.add_argument("--residency", default="auto")
    parser.add_argument("--steps", type=int, default=0, help="steps after the start, of one row")
    args = parser.parse_args()
    make_files(args.folder, args.teachers, 32)
    text = json.dumps(
        {
            "base": str(args.folder / "0.safetensors"),
            "teachers": [{"name": str(i), "file": str(args.folder / f"{i}.safetensors")} for i in range(1, args.teachers + 1)],
            "data": {"kind": "latents", "file": str(args.folder / "latents.safetensors")},
            "output": str(args.folder / "student.safetensors"),
            "run_dir": str(args.folder / "run"),
            "train": {
                "steps": 10, "batch_size": 1, "init": args.init, "trainable": args.trainable, "residency": args.residency,
                "gradient_checkpointing": True, "memory": "off",
            },
        }
    )  # fmt: skip
    path = args.folder / "config.yaml"
    path.write_text(text, encoding="utf-8")  # JSON is YAML
    config = load_config(path)
    began = time.perf_counter()
    with Memory() as memory:
        run = load_run(config, torch.device("cpu"))
        loaded = time.perf_counter()
        print(f"loaded and checked: {loaded - began:.1f} s, {memory.peak / GB:.2f} GB", flush=True)
        trainer = run.start()
        print(f"started: {time.perf_counter() - loaded:.1f} s more, {memory.peak / GB:.2f} GB", flush=True)
        steps = trainer.run()
        for _ in range(args.steps):
            step = time.perf_counter()
            next(steps)
            print(f"a step: {time.perf_counter() - step:.1f} s, {memory.peak / GB:.2f} GB", flush=True)
    parameters = list(trainer.student.unet.parameters())
    whole = sum(p.numel() * p.element_size() for p in parameters)
    learnt = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    average = learnt if trainer.student.ema is not None else 0
    pool = trainer.targets.pool
    kept = sum(p.numel() * 4 for i in pool.resident for p in pool.unets[i].parameters())  # in float32
    slots = sum(slot.flat.nbytes for slot in pool.slots)
    counted = whole + average + kept + slots + (3 * learnt if args.steps else 0)
    print(f"counted: {counted / GB:.2f} GB, measured {memory.peak / GB:.2f} GB, {memory.peak / counted:.2f} of it")
    trainer.targets.pool.close()


if __name__ == "__main__":
    main()
