"""Does *Match style* find a blend again? The shipped demo model paints pictures in a blend of its styles, and is asked which one it is.

    python -m comfyui_dmm.tests.benches.match_style --output rows.jsonl [--counts 5 20 --blends 10 --styles 1 2 3]

Of each blend: the share that was found in the wrong place (half the sum of |true - found| over the styles and none: 0 is the blend itself,
1 has nothing of it), the same for the best single style, and whether the style with the largest share is found. Every row is written when
it is done; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from ...dmm_core.checkpoint import load_checkpoint
from ...dmm_core.sampling import host_noise
from ...dmm_core.vae import load_vae
from ...training.data.demo.family import FIRST
from ...training.data.text_states import TextStates
from ...training.learn.match import masses_row, match_blend
from ...training.learn.pictures import encoder_of, make_examples
from ...training.paint.images import decode_to_pil
from ...training.paint.paint_rows import paint_rows
from ...training.teachers.teacher import Teacher, styled_unet

MODEL = Path(__file__).parents[2] / "models" / "dmm" / "demo-dmm.safetensors"
LEAST = 0.1
"""Of a share that is drawn: smaller ones are hardly to be seen."""
SEED = 97_000_000


def drawn_blend(names: int, styles: int, number: int) -> torch.Tensor:
    """Shares (names,) of ``styles`` of them, each at least LEAST, that sum to 1."""
    rng = np.random.default_rng((SEED, styles, number))
    shares = torch.zeros(names, dtype=torch.float64)
    chosen = rng.permutation(names)[:styles]
    shares[torch.from_numpy(chosen)] = torch.from_numpy(LEAST + (1 - LEAST * styles) * rng.dirichlet(np.ones(styles)))
    return shares


class Bench:
    def __init__(self) -> None:
        self.model = load_checkpoint(MODEL)
        self.names = [style.name for style in self.model.styles]
        self.vae, self.unet = load_vae(self.model.vae).eval(), styled_unet(self.model.unet, "m")
        self.encode = encoder_of(self.model, torch.device("cpu"))

    @torch.no_grad()
    def row(self, styles: int, number: int, count: int) -> dict:
        shares = drawn_blend(len(self.names), styles, number)
        rng = np.random.default_rng((SEED, number))
        captions = [FIRST.sample_scene(rng).caption for _ in range(count)]
        prompts = ["", *sorted(set(captions))]
        text = Teacher("m", self.unet, *TextStates(prompts).of(self.model.text))
        rows = torch.tensor([prompts.index(caption) for caption in captions])
        noise = torch.cat([host_noise((1, 4, 16, 16), SEED + 1000 * number + k) for k in range(count)])
        latents = paint_rows(
            text.unet, text, rows, noise,
            steps=25, cfg=4.0, style=masses_row(shares), sampler="euler", scheduler="sgm_uniform",
        )  # fmt: skip
        pictures = decode_to_pil(self.vae, latents)
        examples = make_examples(pictures, captions, [], config=self.model.config, prediction="eps", encode=self.encode)
        began = time.perf_counter()
        match = match_blend(text, self.names, examples, rows, seed=number)
        seconds = time.perf_counter() - began
        true = torch.cat([shares, shares.new_zeros(1)])
        found = torch.tensor(match.shares, dtype=torch.float64)
        single = torch.zeros_like(true)
        single[int(np.argmin(match.errors))] = 1
        return {
            "true": {name: round(share, 3) for name, share in zip(self.names, shares.tolist()) if share},
            "found": match.text,
            "wrong": (true - found).abs().sum().item() / 2,
            "wrong of the best style": (true - single).abs().sum().item() / 2,
            "largest found": bool(found.argmax() == true.argmax()),
            "seconds": seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--styles", nargs="+", type=int, default=[1, 2, 3], help="of a blend")
    parser.add_argument("--blends", type=int, default=10, help="of each number of styles")
    parser.add_argument("--counts", nargs="+", type=int, default=[5, 20], help="pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench()
    rows = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    for count in args.counts:
        for styles in args.styles:
            for number in range(args.blends):
                key = {"count": count, "styles": styles, "number": number}
                if any(key.items() <= row.items() for row in rows):
                    continue
                rows.append(key | bench.row(styles, number, count))
                with args.output.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(
        "| pictures | styles | in the wrong place | of the best style alone | largest found | seconds |\n"
        + "| --- " * 6
        + "|"
    )
    for count in args.counts:
        for styles in args.styles:
            mine = [row for row in rows if row["count"] == count and row["styles"] == styles][: args.blends]
            wrong, single, seconds = (
                [row[what] for row in mine] for what in ("wrong", "wrong of the best style", "seconds")
            )
            spread = f"{statistics.mean(wrong):.2f} ± {statistics.stdev(wrong) if len(wrong) > 1 else 0:.2f}"
            hits = f"{sum(row['largest found'] for row in mine)} of {len(mine)}"
            cells = [count, styles, spread, f"{statistics.mean(single):.2f}", hits, f"{statistics.mean(seconds):.0f}"]
            print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
