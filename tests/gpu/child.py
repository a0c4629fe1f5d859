"""The process of one stage; ``runner`` starts it. With --where it prints the device's name and the versions as JSON and ends."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .rows import FAILED, NOT_HERE, OK
from .setup import NotPossible, Setup
from .stages import stages

PACKAGES = ("transformers", "triton")


def where(device: str) -> dict:
    """{"device": its name, "versions": {...}}. Raises NotPossible without a CUDA device where one is wanted."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    if device != "cuda":
        return {"device": "CPU", "versions": versions}
    if not torch.cuda.is_available():
        raise NotPossible("torch sees no CUDA device here: rehearse with DEVICE=cpu SIZE=tiny")
    versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"device": torch.cuda.get_device_name(), "versions": versions}


def run_stage(name: str, setup: Setup) -> None:
    """Do one stage and write how it ended."""
    (stage,) = [one for one in stages(setup.size) if one.name == name]
    try:
        module = importlib.import_module(f".{stage.module}", __package__)
        module.measure(setup, **stage.options)
    except NotPossible as error:
        setup.write(status=NOT_HERE, words=str(error))
    except Exception as error:
        traceback.print_exc()
        setup.write(status=FAILED, words=f"{type(error).__name__}: {str(error).strip()[-600:]}")
    else:
        setup.write(status=OK, words="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", nargs="?")
    parser.add_argument("--where", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    if args.where:
        try:
            print(json.dumps(where(args.device)))
        except NotPossible as error:
            raise SystemExit(str(error)) from None
        return
    started = time.monotonic()
    torch.manual_seed(0)
    device = torch.device(args.device)
    run_stage(args.stage, Setup(device, args.size, args.seconds, args.folder, args.result, started=started))


if __name__ == "__main__":
    main()
