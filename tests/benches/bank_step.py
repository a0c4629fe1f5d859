"""What a style bank costs in training: forward and backward of a student with it, against the same weights without it, side by side.

    python -m comfyui_dmm.tests.benches.bank_step                              (the size of SD 1.5, random weights: about 10 GB)
    python -m comfyui_dmm.tests.benches.bank_step --family demo --pixels 128 --batch 32
    python -m comfyui_dmm.tests.benches.bank_step --device cuda --pixels 512

The teachers' forward and the optimiser are not in it. The first is the same on both sides; the second grows by the bank's share of the
numbers. Rows of the batch have different styles. Seconds are of this process, on a GPU of the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import torch

from ...dmm_core.style import style_row
from ...dmm_core.unet import UNet, init_style
from .styles import STYLES, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["demo", "sd15"], default="sd15")
    parser.add_argument("--bank", default="10%", help="its size (default: 10%%)")
    parser.add_argument("--pixels", type=int, default=256, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    with device:
        config, _ = sizes(args.family, args.bank)
        banked = UNet(config)
        with torch.device("meta"):
            plain = UNet(dataclasses.replace(config, bank=None))
        init_style(banked, torch.Generator().manual_seed(0))
        plain.load_state_dict(banked.state_dict(keep_vars=True), strict=False, assign=True)  # the same parameters
        side = args.pixels // 8
        x, t = torch.randn(args.batch, 4, side, side), torch.randint(0, 1000, (args.batch,))
        context = torch.randn(args.batch, 77, config.context_dim)
        style = torch.cat([style_row(STYLES, i % STYLES) for i in range(args.batch)]).to(device)

    def now() -> float:
        if device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(unet: UNet) -> float:
        started = now()
        unet(x, t, context, style=style).square().mean().backward()
        taken = now() - started
        for p in banked.parameters():
            p.grad = None
        return taken

    ratios, base = [], []
    seconds(plain), seconds(banked)  # warm
    for i in range(args.rounds):
        first, second = (plain, banked) if i % 2 == 0 else (banked, plain)
        took = {first: seconds(first)}
        took[second] = seconds(second)
        ratios.append(took[banked] / took[plain])
        base.append(took[plain])
    low, middle, high = statistics.quantiles(ratios, n=4)
    what = f"{args.family}, bank {args.bank}, {args.batch} x {args.pixels} pixels, {device}"
    print(f"{what}: {middle:.3f} ({low:.3f} to {high:.3f}) of {statistics.median(base):.2f} s")


if __name__ == "__main__":
    main()
