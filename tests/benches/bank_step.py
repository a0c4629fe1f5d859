"""What a style bank costs in training: forward and backward of a student with it, against the same weights without it, side by side.

    python -m comfyui_dmm.tests.benches.bank_step                              (the size of SD 1.5, random weights: about 10 GB)
    python -m comfyui_dmm.tests.benches.bank_step --family demo --pixels 128 --batch 32
    python -m comfyui_dmm.tests.benches.bank_step --device cuda --pixels 512

The teachers' forward and the optimiser are not in it. The first is the same on both sides; the second grows by the bank's share of the
numbers. Rows of the batch have different styles. Seconds are of this process, on a GPU of the clock. Measured only if one style with the
bank gives what the same weights with that style's change in them give.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

from ...dmm_core.bank import bank_masses, folded_bank
from ...dmm_core.style import style_row
from ...dmm_core.unet import UNet, init_style
from .paired import Line, Side, clock_of, paired, printed
from .styles import STYLES, sizes


def measure(family: str, bank: str, *, pixels: int, batch: int, rounds: int, device: torch.device) -> Line:
    """Seconds of forward and backward with the bank over those without it."""
    torch.manual_seed(0)
    with device:
        config, _ = sizes(family, bank)
        assert config.bank is not None, "a bank of a size was asked for"
        banked = UNet(config)
        with torch.device("meta"):
            plain = UNet(dataclasses.replace(config, bank=None))
        init_style(banked, torch.Generator().manual_seed(0))
        plain.load_state_dict(banked.state_dict(keep_vars=True), strict=False, assign=True)  # the same parameters
        side = pixels // 8
        x, t = torch.randn(batch, 4, side, side), torch.randint(0, 1000, (batch,))
        context = torch.randn(batch, 77, config.context_dim)
        style = torch.cat([style_row(STYLES, i % STYLES) for i in range(batch)]).to(device)

    def step(unet: UNet) -> Side:
        def work() -> torch.Tensor:
            out = unet(x, t, context, style=style)
            out.square().mean().backward()
            return out.detach()

        def clear() -> None:
            for p in banked.parameters():
                p.grad = None

        return Side(work, prepare=clear)

    @torch.no_grad()
    def one_style() -> tuple[torch.Tensor, torch.Tensor]:
        row = style_row(STYLES, 1).to(device)
        weights = folded_bank(banked.state_dict(), bank_masses(row, config.bank.cores)[0])
        rows = row.expand(batch, -1)
        alone = torch.func.functional_call(plain, weights, (x, t, context), {"style": rows})
        return alone, banked(x, t, context, style=rows)

    name = f"forward and backward with a bank of {bank} / without"
    clock = clock_of(device)
    return paired(name, step(plain), step(banked), tolerance=1e-3, rounds=rounds, same=one_style, clock=clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["demo", "sd15"], default="sd15")
    parser.add_argument("--bank", default="10%", help="its size (default: 10%%)")
    parser.add_argument("--pixels", type=int, default=256, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    sides = {"pixels": args.pixels, "batch": args.batch, "rounds": args.rounds, "device": torch.device(args.device)}
    print(f"{args.family}, {args.batch} x {args.pixels} pixels, {args.device}\n")
    print(printed([measure(args.family, args.bank, **sides)]))


if __name__ == "__main__":
    main()
