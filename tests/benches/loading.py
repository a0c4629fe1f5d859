"""A DMM file against a plain one in the host's own loader, and N looks of one file against N checkpoints: time, memory, disk.

    python -m comfyui_dmm.tests.benches.loading --family demo                            (a minute on a CPU)
    python -m comfyui_dmm.tests.benches.loading --family sd15 --folder out/bench-loading (4 GB of disk, 5 GB of memory; looks are left out)

Both files have the same UNet, text encoder and VAE, random and in half precision. The host's loader refuses the demo family's sizes: there
its own steps are taken one by one (``host_model.build_small_model``). The parts are equal to the bit, by their sums, or there is no ratio.
A look is a style of the DMM file, and a plain file of its own with that style in its weights; all are painted in. Needs a ComfyUI.
"""

from __future__ import annotations

import argparse
import gc
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...dmm_core.bank import bank_masses, folded_bank
from ...dmm_core.checkpoint import STYLE_KEYS, Checkpoint, load_checkpoint, save_checkpoint
from ...dmm_core.metadata import default_styles
from ...dmm_core.style import CODEBOOK, MLP_NAMES, style_delta, style_row
from ...dmm_core.unet import UNet, UNetConfig
from ...dmm_core.vae import AutoencoderKL, VAEConfig
from ...training.text import init_text
from .paired import Line, PeakMemory, Side, paired, printed
from .styles import STYLES, sizes, start_host


def parts_of(family: str) -> tuple[VAEConfig, tuple[int, int]]:
    """The sizes of VAE and text encoder (width, layers)."""
    if family == "sd15":
        return VAEConfig(), (768, 12)
    return VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1), (64, 2)


def make_files(folder: Path, family: str, bank: str, dtype: torch.dtype) -> tuple[Path, Path]:
    """A DMM file and the same without styles, made where they are missing."""
    config, _ = sizes(family, bank)
    dmm, plain = folder / "dmm.safetensors", folder / "plain.safetensors"
    if dmm.exists() and plain.exists():
        return dmm, plain
    vae, text = parts_of(family)
    weights = random_weights(config, dtype)
    parts = {
        "text": {key: weight.to(dtype) for key, weight in init_text(*text).items()},
        "vae": {key: weight.detach().to(dtype) for key, weight in AutoencoderKL(vae).state_dict().items()},
    }
    save_checkpoint(dmm, Checkpoint(unet=weights, styles=default_styles(STYLES), **parts))
    bare = {key: weight for key, weight in weights.items() if not key.startswith(STYLE_KEYS)}
    save_checkpoint(plain, Checkpoint(unet=bare, **parts))
    return dmm, plain


def random_weights(config: UNetConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a UNet that paints something; never all of them in float32 at once."""
    with torch.device("meta"):
        shapes = {key: weight.shape for key, weight in UNet(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes.items():
        scale = 1.0 if len(shape) == 1 or key.startswith(CODEBOOK) else math.prod(shape[1:]) ** -0.5
        values = torch.randn(shape, generator=generator) * scale
        if len(shape) == 1:  # norms about 1, biases about 0
            values = 0.02 * values + float(key.endswith("weight"))
        weights[key] = values.to(dtype)
    return weights


def hosts_loader(path: Path) -> tuple:
    """(MODEL, CLIP, VAE) of a plain file by the host's loader, or for small models by its steps."""
    import comfy.sd
    import comfy.utils

    from ...nodes import host_model

    sd = comfy.utils.load_torch_file(str(path))
    if sd["model.diffusion_model.input_blocks.0.0.weight"].shape[0] >= host_model.SD_WIDTH:
        del sd
        return comfy.sd.load_checkpoint_guess_config(str(path))[:3]
    unet = {key: sd[key] for key in sd if key.startswith(host_model.UNET_PREFIX)}
    checkpoint = Checkpoint(
        unet={key.removeprefix(host_model.UNET_PREFIX): value for key, value in unet.items()},
        text={key: value for key, value in sd.items() if key.startswith(host_model.TEXT_PREFIXES)},
        vae={key.removeprefix(host_model.VAE_PREFIX): sd[key] for key in sd if key.startswith(host_model.VAE_PREFIX)},
    )
    del sd
    config = host_model.model_config(unet, checkpoint.config)[0]
    dtype = comfy.utils.weight_dtype(unet, host_model.UNET_PREFIX)
    model = host_model.build_small_model(config, unet, dtype, disable_dynamic=False)
    return model, host_model.build_clip(checkpoint), host_model.build_vae(checkpoint)


def our_loader(path: Path) -> tuple:
    from ...nodes import host_model

    return host_model.load(str(path))[:3]


def loaded(load: Callable[[Path], tuple], path: Path) -> Side:
    """The result is let go before the next turn, and not within one."""
    kept: list[tuple] = []

    def clear() -> None:
        kept.clear()
        gc.collect()

    return Side(lambda: kept.append(load(path)), prepare=clear)


def sums(parts: tuple) -> dict[str, Tensor]:
    """Sum and sum of squares of every weight that is not of the styles, in MODEL, CLIP and VAE. Without the text encoder's projection,
    which SD1.x does not use: the files have none, and the host leaves there what lay in memory."""

    def weights() -> Iterator[tuple[str, Tensor]]:
        model, clip, vae = parts
        for name, module in (
            ("unet", model.model.diffusion_model),
            ("clip", clip.cond_stage_model),
            ("vae", vae.first_stage_model),
        ):
            for key, weight in module.state_dict().items():
                if not key.endswith("text_projection.weight") and not (name == "unet" and key.startswith(STYLE_KEYS)):
                    yield f"{name}.{key}", weight

    return {key: torch.stack((w.double().sum(), w.double().square().sum())) for key, w in weights()}


def load_lines(dmm: Path, plain: Path, rounds: int, family: str) -> Iterator[Line]:
    """Memory only at SD1.5's size: the demo's comes out of what the process has free."""

    def same() -> tuple[dict, dict]:
        first = sums(hosts_loader(plain))
        gc.collect()
        return first, sums(our_loader(dmm))

    one, other = loaded(hosts_loader, plain), loaded(our_loader, dmm)
    said: dict = {"tolerance": 0.0, "aim": "< 1.10"}
    share = dmm.stat().st_size / plain.stat().st_size
    name = f"a DMM file ({share:.2f} times as large) / a plain file in the host's loader"
    yield paired(f"{name}: time", one, other, rounds=rounds, same=same, **said)
    if family == "sd15":  # what is loaded was compared above
        said |= {"rounds": min(rounds, 3), "same": lambda: (0, 0), "clock": PeakMemory(), "unit": "B"}
        yield paired(f"{name}: peak memory", one, other, **said)
    one.prepare(), other.prepare()


# --- N looks, N checkpoints -------------------------------------------------------------------------------------------


def look_files(dmm: Path, folder: Path) -> list[Path]:
    """A plain file for each style of a DMM file, which has the style in its weights."""
    whole, files = load_checkpoint(dmm), []
    unet = UNet(whole.config)
    unet.load_state_dict(whole.unet)
    mlp = next(getattr(unet, name) for name in MLP_NAMES if hasattr(unet, name))
    for i in range(whole.num_styles):
        row = style_row(whole.num_styles, i)
        weights = whole.unet
        if unet.config.bank is not None:
            weights = folded_bank(weights, bank_masses(row, unet.config.bank.cores)[0])
        weights = {key: value for key, value in weights.items() if not key.startswith(STYLE_KEYS)}
        bias = weights["time_embed.2.bias"]
        delta = style_delta(getattr(unet, CODEBOOK), mlp, row)[0].detach()
        weights["time_embed.2.bias"] = (bias.float() + delta).to(bias.dtype)
        files.append(folder / f"look {i}.safetensors")
        save_checkpoint(files[-1], Checkpoint(unet=weights, text=whole.text, vae=whole.vae))
    return files


def look_lines(folder: Path, family: str, bank: str, rounds: int, steps: int = 4) -> Iterator[Line]:
    """In float32, so that the files of the looks hold the styles exactly."""
    from ...dmm_core.style_value import parse_style
    from ...nodes.host_model import styled
    from .styles import Bench

    config, side = sizes(family, bank)
    dmm, _ = make_files(folder, family, bank, torch.float32)
    files = look_files(dmm, folder)
    bench = Bench(config, side, steps, rounds, [""], lambda line: None)
    pair = bench.prompts[:2]

    def of_checkpoints() -> list[Tensor]:
        return [bench.painting(hosts_loader(file)[0], pair).turn(bench.clock)[1] for file in files]

    def of_styles(model) -> list[Tensor]:
        looks = (styled(model, parse_style(f"style {i}")) for i in range(len(files)))
        return [bench.painting(look, pair).turn(bench.clock)[1] for look in looks]

    kept = our_loader(dmm)[0]
    name = f"{len(files)} looks of one file / {len(files)} checkpoints"
    checkpoints = Side(of_checkpoints, prepare=gc.collect)
    whole = Side(lambda: of_styles(our_loader(dmm)[0]), prepare=gc.collect)
    yield paired(f"{name}: load, and paint {steps} steps in each", checkpoints, whole, tolerance=1e-4, rounds=rounds)
    switched = Side(lambda: of_styles(kept), prepare=gc.collect)
    yield paired(f"{name}: the same, the file loaded before", checkpoints, switched, tolerance=1e-4, rounds=rounds)
    bytes_of = [sum(file.stat().st_size for file in files), dmm.stat().st_size]
    yield Line(f"{name}: bytes on disk", [bytes_of[1] / bytes_of[0]] * 3, bytes_of[0], 0.0, 0.0, unit="B")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["demo", "sd15"], default="demo")
    parser.add_argument("--bank", default="10%")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="for the files, which stay there; else they go with the bench")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        start_host(True, Path(temporary))
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        lines = list(load_lines(*make_files(folder, args.family, args.bank, torch.float16), args.rounds, args.family))
        if args.family == "demo":
            inside = Path(temporary) / "looks"
            inside.mkdir()
            lines += look_lines(inside, args.family, args.bank, args.rounds)
    print(f"{args.family}, bank {args.bank}\n\n{printed(lines)}")


if __name__ == "__main__":
    main()
