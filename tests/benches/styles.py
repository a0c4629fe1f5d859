"""What styles cost while painting: ratios measured side by side, against the host's own UNet without this pack's patches.

    python -m comfyui_dmm.tests.benches.styles --family demo       (half a minute on a CPU)
    python -m comfyui_dmm.tests.benches.styles --family sd15       (the real size, random weights: for a GPU)
    python -m comfyui_dmm.tests.benches.styles --family sd15 --cpu --steps 1 --rounds 5 --only "one pass" "one style /"
    python -m comfyui_dmm.tests.benches.styles --family sd15 --cpu --bank 10% --pixels 256 --steps 1 --only "one style" "2 styles"

Every line alternates its two sides and gives the median of the ratios, with the quartiles. Needs a ComfyUI (COMFYUI_PATH).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ...dmm_core.bank_size import bank_of, layout_of
from ...dmm_core.checkpoint import Checkpoint, save_checkpoint
from ...dmm_core.metadata import default_styles
from ...dmm_core.unet import UNet, UNetConfig, init_style
from ...training.host_path import find_host
from ...training.loop.new_student import plain_shapes

STYLES = 8


def sizes(family: str, bank: str = "") -> tuple[UNetConfig, int]:
    """The UNet, with a style bank of the size ``bank`` if that is said, and the side of its native canvas in latents."""
    config, side = UNetConfig(), 64
    if family != "sd15":
        from ...training.demo.stages import DEMO_UNET

        config, side = DEMO_UNET, 16
    layout = None
    if bank:
        shapes = plain_shapes(config)
        layout = layout_of(shapes, bank_of(bank, shapes, STYLES + 1, 2), STYLES + 1)
    return dataclasses.replace(config, num_styles=STYLES, bank=layout), side


def start_host(cpu: bool, folder: Path):
    host = find_host()
    if host is None:
        sys.exit("no ComfyUI found: set COMFYUI_PATH to its folder")
    sys.path.insert(0, str(host))
    from comfy.cli_args import args

    args.cpu, args.base_directory = cpu, str(folder)
    import comfy.sd  # noqa: F401  (reads the arguments)


def load(config: UNetConfig, folder: Path, dtype: torch.dtype):
    from ...nodes import host_model

    torch.manual_seed(0)
    unet = UNet(config)
    init_style(unet, torch.Generator().manual_seed(0))
    path = folder / "bench.safetensors"
    weights = {key: value.to(dtype) for key, value in unet.state_dict().items()}
    save_checkpoint(path, Checkpoint(unet=weights, styles=default_styles(STYLES)))
    return host_model.load(str(path))[0]


def without_pack(model):
    """The same weights with nothing of this pack between them and the sampler."""
    from ...nodes import region_patch, style_patch

    plain = model.clone()
    for kind in list(plain.wrappers):
        for key in (style_patch.KEY, region_patch.KEY):
            plain.remove_wrappers_with_key(kind, key)
    plain.model_options["transformer_options"]["patches"].pop("emb_patch")
    return plain


def with_idle_lora(plain, folded):
    """A LoRA of zeros on each weight that holds a folded style: what the host's patching itself costs."""
    from comfy.weight_adapter import LoRAAdapter

    model = plain.clone()
    patches = {}
    for key, ((_, adapter, *_),) in folded.patches.items():
        up, down = (torch.zeros_like(part) for part in adapter.weights[:2])
        patches[key] = LoRAAdapter(set(), (up, down, None, None, None, None))
    model.add_patches(patches)
    return model


class Bench:
    def __init__(self, config: UNetConfig, side: int, args, keep: Callable[[dict], None]):
        self.keep = keep
        self.side, self.steps, self.rounds, self.only = side, args.steps, args.rounds, args.only
        generator = torch.Generator().manual_seed(1)
        self.prompts = [[[torch.randn(1, 77, config.context_dim, generator=generator), {}]] for _ in range(10)]

    def paint(self, model, prompts, batch: int = 1, settled: bool = False) -> float:
        """Seconds of one painting: by the clock, or on a CPU of computing. settled: of the second one after the weights came."""
        import comfy.model_management
        import comfy.sample

        comfy.model_management.load_models_gpu([model])  # not part of it: a folded style goes into the weights here
        latent = torch.zeros(batch, 4, self.side, self.side)
        noise = comfy.sample.prepare_noise(latent, 0)
        # On a CPU the seconds of this process: other processes on the machine would drown differences of some per cent.
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        for _ in range(1 + settled):
            started = clock()
            comfy.sample.sample(
                *(model, noise, self.steps, 4.0, "euler", "normal", *prompts, latent), disable_pbar=True, seed=0
            )
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        return clock() - started

    def line(self, name: str, one, other, goal: str = "") -> None:
        """Print and keep other's seconds over one's, if this line is wanted."""
        if not any(part in name for part in self.only):
            return
        one(), other()  # warm
        ratios, base = [], []
        for i in range(self.rounds):
            first, second = (one, other) if i % 2 == 0 else (other, one)
            a, b = first(), second()
            a, b = (a, b) if i % 2 == 0 else (b, a)
            ratios.append(b / a)
            base.append(a)
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = 1000 * statistics.median(base) / self.steps
        line = {"other / one": name, "median ratio": middle, "quartiles": f"{low:.3f} to {high:.3f}"}
        self.keep(line | {"one, ms a step": milliseconds, "aim": goal})
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {milliseconds:.1f} | {goal} |", flush=True)


def run(args, keep: Callable[[dict], None] = lambda line: None) -> None:
    """Measure and print. keep: gets each line as it is printed, {column: value}."""
    config, side = sizes(args.family, args.bank)
    side = args.pixels // 8 or side
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        start_host(args.cpu or not torch.cuda.is_available(), Path(folder))
        from ...dmm_core.style_value import PerItem, parse_style
        from ...nodes.host_model import styled
        from ...nodes.regions import DMMRegion, StyleMix

        dtype = torch.float32 if args.cpu or not torch.cuda.is_available() else torch.float16
        model = load(config, Path(folder), dtype)
        bench = Bench(config, side, args, keep)
        plain, names = without_pack(model), [f"style {i}" for i in range(STYLES)]
        pair = bench.prompts[:2]
        device = torch.cuda.get_device_name() if dtype == torch.float16 else "CPU"
        print(
            f"{args.family}, bank {args.bank or 'none'}, {8 * side} x {8 * side} pixels, {dtype}, {device}, {args.steps} steps, "
            f"{args.rounds} rounds\n"
        )
        print("| other / one | median ratio | quartiles | one, ms a step | aim |\n| --- | --- | --- | --- | --- |")

        one = styled(model, parse_style(names[0]))
        bench.line("host's UNet / itself (noise of the measurement)", *2 * [lambda: bench.paint(plain, pair)])
        bench.line(
            "one style / host's UNet", lambda: bench.paint(plain, pair), lambda: bench.paint(one, pair), "< 1.01"
        )
        if args.bank:
            from ...nodes.fold_style import FoldStyle

            folded = FoldStyle.execute(one).args[0]
            bench.line(
                "one style, folded / host's UNet",
                lambda: bench.paint(plain, pair, settled=True),
                lambda: bench.paint(folded, pair, settled=True),
                "< 1.01",
            )
            idle = with_idle_lora(plain, folded)
            bench.line(
                "one style, folded / a LoRA of the host's on the same weights",
                lambda: bench.paint(idle, pair, settled=True),
                lambda: bench.paint(folded, pair, settled=True),
                "< 1.01",
            )
        changing = styled(model, parse_style(f"{names[0]}; 20%-80%: {names[1]}"))
        bench.line("schedule / one style", lambda: bench.paint(one, pair), lambda: bench.paint(changing, pair))
        for count in (2, STYLES):
            sheet = styled(model, PerItem(tuple(map(parse_style, names[:count]))))
            bench.line(
                f"{count} styles in a batch / host's UNet, batch {count}",
                lambda count=count: bench.paint(plain, pair, count),
                lambda count=count, sheet=sheet: bench.paint(sheet, pair, count),
                "< 1.02",
            )

        def regions(count: int, mode: str, paint_on: str = "own crop"):
            parts = {}
            for i in range(count):
                own = bench.prompts[2 + i] if mode == "own prompts" else None
                box = (i / count, 0.0, 1 / count, 1.0)
                parts[f"r{i}"] = DMMRegion.execute(names[i], *box, "feather", 0, 1.0, paint_on, own)[0]
            return StyleMix.execute(model, *pair, names[0], mode, parts).args

        mixed = regions(4, "one pass")
        bench.line(
            "one pass, 4 styles / one style",
            lambda: bench.paint(one, pair),
            lambda: bench.paint(model, mixed),
            "< 1.10",
        )
        for count in range(1, 9):
            prompts = regions(count, "own prompts")
            bench.line(
                f"{count} regions that fill the canvas, own crops / one style",
                lambda: bench.paint(one, pair),
                lambda p=prompts: bench.paint(model, p),
            )
        for count in (2, 4, 8):
            prompts = regions(count, "own prompts", "whole canvas")
            bench.line(
                f"{count} regions on the whole canvas / one style",
                lambda: bench.paint(one, pair),
                lambda p=prompts: bench.paint(model, p),
            )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["demo", "sd15"], default="demo")
    parser.add_argument("--bank", default="", help="size of a style bank, such as 10%%")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--pixels", type=int, default=0, help="side of the canvas; 0 is the model's own")
    parser.add_argument("--only", nargs="+", default=[""], help="lines with one of these texts in their names")
    return parser


if __name__ == "__main__":
    run(parser().parse_args())
