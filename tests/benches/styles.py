"""What styles cost while painting: ratios measured side by side, against the host's own UNet without this pack's patches.

    python -m comfyui_dmm.tests.benches.styles --family demo       (half a minute on a CPU)
    python -m comfyui_dmm.tests.benches.styles --family sd15       (the real size, random weights: for a GPU)
    python -m comfyui_dmm.tests.benches.styles --family sd15 --cpu --steps 1 --rounds 5 --only "one pass" "one style /"
    python -m comfyui_dmm.tests.benches.styles --family sd15 --cpu --bank 10% --pixels 256 --steps 1 --only "one style" "2 styles"

Every line alternates its two sides and gives the median of the ratios, with the quartiles (``paired``). Before it is timed, its code paints
what another way of the host's gives too (a style in the weights, areas and masks, one style everywhere), and a line whose pictures differ
has no ratio. Seconds are of this process, on a GPU of the clock. Needs a ComfyUI (COMFYUI_PATH).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...dmm_core.bank_size import bank_of, layout_of
from ...dmm_core.checkpoint import Checkpoint, save_checkpoint
from ...dmm_core.metadata import default_styles
from ...dmm_core.unet import UNet, UNetConfig, init_style
from ...training.host_path import find_host
from ...training.loop.new_student import plain_shapes
from .paired import Line, Side, clock_of, paired, printed

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


def in_weights(model, name: str):
    """The host's own UNet with a style in its weights: its offset in the time embedding's bias, what the bank adds in the others."""
    from ...dmm_core.style import CODEBOOK, MLP_NAMES, style_delta
    from ...dmm_core.style_value import parse_style, style_rows
    from ...nodes import style_patch
    from ...nodes.fold_style import FoldStyle
    from ...nodes.host_model import styled

    unet, style = model.model.diffusion_model, parse_style(name)
    one = styled(model, style)
    folded = without_pack(FoldStyle.execute(one).args[0] if hasattr(unet, "style_bank") else one)
    mlp = next(getattr(unet, each) for each in MLP_NAMES if hasattr(unet, each))
    weight = next(mlp.parameters())
    rows = style_rows(style, style_patch.known_styles(model)).to(weight.device)
    delta = style_delta(getattr(unet, CODEBOOK), mlp, rows)[0].float().cpu()
    folded.add_patches({"diffusion_model.time_embed.2.bias": (delta,)})
    return folded


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


@dataclasses.dataclass
class Bench:
    """Paintings as sides of a measurement. keep: gets each line as it is measured; only: parts of the names of the lines that are
    wanted."""

    config: UNetConfig
    side: int
    steps: int
    rounds: int
    only: Sequence[str]
    keep: Callable[[Line], None]

    def __post_init__(self):
        generator = torch.Generator().manual_seed(1)
        self.prompts = [[[torch.randn(1, 77, self.config.context_dim, generator=generator), {}]] for _ in range(10)]
        self.clock = clock_of("cuda" if torch.cuda.is_available() else "cpu")

    def paint(self, model, prompts, batch: int = 1, *, steps: int = 0, cfg: float = 4.0) -> torch.Tensor:
        """Latents (batch, 4, side, side). steps: 0 for those of the bench."""
        import comfy.sample

        latent = torch.zeros(batch, 4, self.side, self.side)
        noise = comfy.sample.prepare_noise(latent, 0)
        euler = (model, noise, steps or self.steps, cfg, "euler", "normal", *prompts, latent)
        return comfy.sample.sample(*euler, disable_pbar=True, seed=0)

    def asked(self, model, prompts, **how) -> int:
        """Rows that the UNet is asked about in a painting."""
        rows: list[int] = []
        hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        try:
            self.paint(model, prompts, **how)
        finally:
            hook.remove()
        return sum(rows)

    def painting(self, model, prompts, batch: int = 1, settled: bool = False, **how) -> Side:
        """settled: the second painting after the weights came is timed, not the first; how: of ``paint``."""
        import comfy.model_management

        def prepare():
            comfy.model_management.load_models_gpu([model])  # not part of it: a folded style goes into the weights here
            if settled:
                self.paint(model, prompts, batch, **how)

        return Side(lambda: self.paint(model, prompts, batch, **how), prepare)

    def line(self, name: str, one: Side, other: Side, tolerance: float, **options) -> None:
        """Measure a line, if it is wanted; options: of ``paired``."""
        if any(part in name for part in self.only):
            self.keep(paired(name, one, other, tolerance=tolerance, rounds=self.rounds, clock=self.clock, **options))

    def hosts_areas(self, prompts) -> list:
        """The prompts of a Style Mix as the host's own areas and masks, without styles."""
        from ...nodes import region_patch, style_patch

        def bare(entries: dict) -> dict:
            return {key: value for key, value in entries.items() if key != style_patch.STYLE}

        return [
            [
                [context, bare(placed)]
                for context, entries in conditioning
                for placed in region_patch.place(entries, self.side, self.side, region_patch.CroppedHints())
            ]
            for conditioning in prompts
        ]


def run(args, keep: Callable[[Line], None] = lambda line: None) -> None:
    """Measure and print. keep: gets each line as it is printed."""
    config, side = sizes(args.family, args.bank)
    side = args.pixels // 8 or side
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        start_host(args.cpu or not torch.cuda.is_available(), Path(folder))
        dtype = torch.float32 if args.cpu or not torch.cuda.is_available() else torch.float16
        device = torch.cuda.get_device_name() if dtype == torch.float16 else "CPU"
        print(
            f"{args.family}, bank {args.bank or 'none'}, {8 * side} x {8 * side} pixels, {dtype}, {device}, paintings of "
            f"{args.steps} steps, {args.rounds} rounds\n"
        )

        def shown(line: Line) -> None:
            print(printed([line]).splitlines()[-1], flush=True)
            keep(line)

        print(printed([]))
        bench = Bench(config, side, args.steps, args.rounds, args.only, shown)
        measure(bench, load(config, Path(folder), dtype), 1e-4 if dtype == torch.float32 else 5e-2)


def measure(bench: Bench, model, tolerance: float) -> None:
    """All lines of one MODEL with ``STYLES`` styles. tolerance: of pictures that must come out equal."""
    from ...dmm_core.style_value import PerItem, parse_style
    from ...nodes.fold_style import FoldStyle
    from ...nodes.host_model import styled

    plain, names, banked = without_pack(model), [f"style {i}" for i in range(STYLES)], bench.config.bank is not None
    pair = bench.prompts[:2]
    one, alone = styled(model, parse_style(names[0])), in_weights(model, names[0])
    host, ours = bench.painting(plain, pair), bench.painting(one, pair)

    def is_the_style(other=one, batch: int = 1):
        """In the weights of the host's own UNet; a folded style is painted last, as what is in the weights changes for each side."""
        return lambda: (
            bench.painting(alone, pair, batch).turn(bench.clock)[1],
            bench.painting(other, pair, batch).turn(bench.clock)[1],
        )

    bench.line("host's UNet / itself (noise of the measurement)", host, host, 0.0)
    # A bank is for folding; unfolded it costs what it computes.
    bench.line("one style / host's UNet", host, ours, tolerance, same=is_the_style(), aim="" if banked else "< 1.01")
    if banked:
        folded = FoldStyle.execute(one).args[0]
        idle = with_idle_lora(plain, folded)
        own = bench.painting(folded, pair, settled=True)
        for name, less in (("host's UNet", plain), ("a LoRA of the host's on the same weights", idle)):
            other = bench.painting(less, pair, settled=True)
            bench.line(f"one style, folded / {name}", other, own, tolerance, same=is_the_style(folded), aim="< 1.01")
    few, many = {"steps": 4, "cfg": 1.0}, {"steps": 25, "cfg": 4.0}
    bench.line(
        "four steps at cfg 1 (a few-step model) / 25 at cfg 4",
        bench.painting(one, pair, **many),
        bench.painting(one, pair, **few),
        0.0,
        # Other pictures by their nature: what is compared is that each side asks the UNet as often as is said.
        same=lambda: ([50, 4], [bench.asked(one, pair, **how) for how in (many, few)]),
        aim="" if banked else "< 0.125",
    )
    changing = styled(model, parse_style(f"{names[0]}; 20%-80%: {names[1]}"))
    unchanging = bench.painting(styled(model, parse_style(f"{names[0]}; 20%-80%: {names[0]}")), pair)

    def same_schedule():
        return ours.turn(bench.clock)[1], unchanging.turn(bench.clock)[1]

    bench.line("schedule / one style", ours, bench.painting(changing, pair), tolerance, same=same_schedule)
    for count in (2, STYLES):
        sheet = styled(model, PerItem(tuple(map(parse_style, names[:count]))))

        def rows_are_styles(count=count, sheet=sheet):
            alone = [
                bench.painting(in_weights(model, names[i]), pair, count).turn(bench.clock)[1][i] for i in (0, count - 1)
            ]
            painted = bench.painting(sheet, pair, count).turn(bench.clock)[1]
            return alone, [painted[0], painted[count - 1]]

        bench.line(
            f"{count} styles in a batch / host's UNet, batch {count}",
            bench.painting(plain, pair, count),
            bench.painting(sheet, pair, count),
            tolerance,
            same=rows_are_styles,
            aim="" if banked else "< 1.02",
        )

    def mixed(count: int, mode: str, paint_on: str = "own crop", styles: Sequence[str] = names):
        return regions(model, bench, count, mode, paint_on, styles)

    everywhere = mixed(4, "one pass", styles=STYLES * names[:1])

    def same_everywhere():
        return ours.turn(bench.clock)[1], bench.painting(model, everywhere).turn(bench.clock)[1]

    bench.line(
        "one pass, 4 styles / one style",
        ours,
        bench.painting(model, mixed(4, "one pass")),
        2 * tolerance,  # the normalisation is computed by two points
        same=same_everywhere,
        aim="" if banked else "< 1.10",
    )

    def as_areas(count: int, paint_on: str):
        """Regions that all have one style, against the host's areas on its own UNet with that style in its weights."""

        def both():
            prompts = mixed(count, "own prompts", paint_on, STYLES * names[:1])
            areas = bench.painting(alone, bench.hosts_areas(prompts)).turn(bench.clock)[1]
            return areas, bench.painting(model, prompts).turn(bench.clock)[1]

        return both

    crops = mixed(4, "own prompts")
    areas = bench.painting(plain, bench.hosts_areas(crops))
    own = bench.painting(model, crops)
    bench.line("4 regions / the host's own 4 areas", areas, own, tolerance, same=as_areas(4, "own crop"), aim="< 1.05")
    for name, counts, paint_on in (
        ("{} regions that fill the canvas, own crops / one style", range(1, 9), "own crop"),
        ("{} regions on the whole canvas / one style", (2, 4, 8), "whole canvas"),
    ):
        for count in counts:
            side = bench.painting(model, mixed(count, "own prompts", paint_on))
            bench.line(name.format(count), ours, side, tolerance, same=as_areas(count, paint_on))


def regions(model, bench: Bench, count: int, mode: str, paint_on: str, styles: Sequence[str]):
    """The prompts of a Style Mix of columns, each in the next of the styles over a background in the first."""
    from ...nodes.regions import DMMRegion, StyleMix

    parts = {}
    for i in range(count):
        own = bench.prompts[2 + i] if mode == "own prompts" else None
        box = (i / count, 0.0, 1 / count, 1.0)
        parts[f"r{i}"] = DMMRegion.execute(styles[i], *box, "feather", 0, 1.0, paint_on, own)[0]
    return StyleMix.execute(model, *bench.prompts[:2], styles[0], mode, parts).args


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
