"""The training step, ours against the published loop, rebuilt from its description: samples a second, side by side in one process.

    python -m comfyui_dmm.tests.benches.training_step                                  (tiny, a minute of one CPU core)
    python -m comfyui_dmm.tests.benches.training_step --size sd15 --seconds 600        (CPU: 13 GB of RAM, fp32, 256x256)
    python -m comfyui_dmm.tests.benches.training_step --size sd15 --device cuda

Sides:

- ours: ``Trainer.train_step`` on cached latents and text states, one teacher a step, as the published loop has it;
- theirs (arXiv:2504.12364 and what its authors released; own code): in every step the VAE encodes the pictures, the base's text encoder and
  the teacher's read the captions; fp16 autocast with a GradScaler; one teacher a step; AdamW that is not fused; the loss is read after
  every step. On a CPU, which computes fp16 slowly, both sides compute in fp32;
- the others: ours, with that changed. compiled: the student's forward and backward, as ``train: {compile: true}`` has it; CUDA graphs are
  torch.compile's; attention: all of student and teacher by that one of PyTorch's kernels, which a GPU may not have for every size.

All sides train one student by the same losses (eq. 9 and 10). Before anything is timed, every side's loss and gradients of one and the same
batch are compared with those of ours; sides that disagree by more than ``TOLERANCE`` have no ratio. SD 1.5 on a CPU: AdamW steps on a tenth
of the weights, and the seconds for the rest are added to every side (its moments would take 7 GB); so says the result.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...dmm_core.schedule import NoiseSchedule
from ...dmm_core.unet import UNet, UNetConfig
from ...dmm_core.vae import SCALE_SD, AutoencoderKL, VAEConfig
from ...training.config import TrainConfig
from ...training.data.batches import Batch, CaptionedLatents
from ...training.loop.losses import feature_loss, score_loss
from ...training.loop.student import style_rows
from ...training.loop.trainer import Trainer
from ...training.teachers.teacher import Teacher
from ...training.text import ClipText, init_text
from .paired import Side, clock_of, in_turns, quartiles

SIDES = (
    "ours", "theirs", "channels last", "compiled", "channels last and compiled", "CUDA graphs", "math attention", "flash attention",
    "efficient attention", "checkpointing", "AdamW not fused",
)  # fmt: skip
ATTENTION = {
    "math attention": SDPBackend.MATH,
    "flash attention": SDPBackend.FLASH_ATTENTION,
    "efficient attention": SDPBackend.EFFICIENT_ATTENTION,
}
COMPILED = {"compiled": "default", "channels last and compiled": "default", "CUDA graphs": "reduce-overhead"}
"""Side -> mode of torch.compile."""
TOLERANCE = {"fp32": {"loss": 1e-4, "gradient": 1e-3}, "half": {"loss": 2e-2, "gradient": 1e-1}}
"""Of a side that agrees with ours: relative difference of the loss, and length of the gradients' difference over the gradients' length.
Half precision has 8 (bf16, ours) and 11 bits (fp16, theirs)."""


@dataclass(frozen=True)
class Size:
    """pixels: of the pictures; text: width and layers of the text encoders; part: share of the weights that AdamW steps on a CPU."""

    unet: UNetConfig
    vae: VAEConfig
    text: tuple[int, int]
    pixels: int
    batch: int
    part: float = 1.0


TINY = UNetConfig(
    model_channels=64, channel_mult=(1, 2), num_res_blocks=(1, 1), depth_input=(1, 1), depth_output=(1, 1, 1, 1), context_dim=64,
)  # fmt: skip
SIZES = {
    "tiny": Size(TINY, VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1), (64, 2), 128, 8),
    "sd15": Size(UNetConfig(), VAEConfig(), (768, 12), 256, 2, part=0.1),
}
CUDA_BATCH = {"tiny": 32, "sd15": 16}


@dataclass
class Rig:
    """Random models of one size, pictures with captions, and a student, which all sides train."""

    size: Size
    device: torch.device
    vae: AutoencoderKL
    texts: tuple[ClipText, ClipText]
    pictures: Tensor
    captions: list[str]
    teacher: UNet
    run: Trainer
    seconds_of_adamw: float = 0.0
    part: float = 1.0
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)

    @property
    def batch_size(self) -> int:
        return self.run.config.batch_size


def rig(device: torch.device, name: str, batch: int | None = None) -> Rig:
    size, cuda = SIZES[name], device.type == "cuda"
    torch.manual_seed(0)
    vae = AutoencoderKL(size.vae).to(device).eval().requires_grad_(False)
    del vae.decoder
    texts = tuple(ClipText(init_text(*size.text, seed)).to(device).requires_grad_(False) for seed in (1, 2))
    captions = [f"a picture of {i} things on a table beside a window" for i in range(8)]
    pictures = torch.rand(len(captions), 3, size.pixels, size.pixels) * 2 - 1
    latents = torch.cat([vae.encode(one[None].to(device)).cpu() * SCALE_SD for one in pictures])
    data = CaptionedLatents(latents, captions)
    contexts = [text.encode(data.prompts).cpu() for text in texts]
    frozen = UNet(size.unet)
    teacher = copy.deepcopy(frozen).half().to(device) if cuda else frozen
    config = TrainConfig(
        steps=10**6, batch_size=batch or (CUDA_BATCH[name] if cuda else size.batch), lambda_adv=0.0, base_share=0.0, teachers_per_step=1,
        residency="device", precision="bf16" if cuda else "fp32", validation=0, memory="off",
    )  # fmt: skip
    base, one = Teacher("base", frozen, contexts[0]), Teacher("a teacher", frozen, contexts[1])
    run = Trainer(base, [one], data, config, device=device)
    with torch.no_grad():
        for p in run.student.trained.values():
            if p.ndim > 1:
                p.mul_(1.02)  # else student and teacher would agree, and all losses be zero
    made = Rig(size, device, vae, texts, pictures, captions, teacher.requires_grad_(False), run)
    if not cuda and size.part < 1:
        few_weights(made)
    return made


def few_weights(made: Rig) -> None:
    """AdamW on the first so many weights only, and its seconds taken (in place)."""
    every = list(made.run.student.trained.values())
    some: list[Tensor] = []
    for p in every:
        if sum(q.numel() for q in some) < made.size.part * sum(q.numel() for q in every):
            some.append(p)
    made.part = sum(p.numel() for p in some) / sum(p.numel() for p in every)
    made.run.optimizer = torch.optim.AdamW([{"params": some, "scale": 1.0}], lr=1e-5, fused=True)
    timed_adamw(made, made.run.optimizer)


def timed_adamw(made: Rig, optimizer: torch.optim.Optimizer) -> None:
    started, clock = 0.0, clock_of(made.device)

    def begin(*_: object) -> None:
        nonlocal started
        started = clock()

    def end(*_: object) -> None:
        made.seconds_of_adamw += clock() - started

    optimizer.register_step_pre_hook(begin)
    optimizer.register_step_post_hook(end)


# --- the sides --------------------------------------------------------------------------------------------------------


@dataclass
class Loop:
    """``step`` trains on a batch of the side's own; ``loss`` is that of given rows, with gradients to the student. around: what is changed
    while the side is at work."""

    step: Callable[[], object]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext


def ours(made: Rig) -> Loop:
    run = made.run

    def loss(places: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        rows = run.data.rows[places]
        x_t = made.schedule.add_noise(run.data.buckets[0][places], eps, t)
        batch = Batch(x_t, t, torch.zeros_like(t), rows)
        return run.objective.total(run.losses(batch), batch, 0)

    return Loop(run.train_step, loss)


def theirs(made: Rig) -> Loop:
    run, device, cuda = made.run, made.device, made.device.type == "cuda"
    base_text, own_text = made.texts
    scaler = torch.amp.GradScaler(device.type, enabled=cuda)
    optimizer = run.optimizer  # on a CPU ours, not fused meanwhile: its moments have room once
    if cuda:
        optimizer = torch.optim.AdamW(run.student.trained.values(), lr=run.config.lr, fused=False)
    student = run.student.unet
    dropped = torch.tensor([0.1], device=device)

    def autocast() -> AbstractContextManager:
        return torch.autocast(device.type, torch.float16) if cuda else contextlib.nullcontext()

    def loss(places: Tensor, t: Tensor, eps: Tensor, drop: Sequence[bool] = ()) -> Tensor:
        images, t, eps = made.pictures[places].to(device), t.to(device), eps.to(device)
        captions = ["" if any(drop[i : i + 1]) else made.captions[p] for i, p in enumerate(places.tolist())]
        with torch.no_grad(), autocast():
            x0 = made.vae.encode(images).float() * SCALE_SD
            contexts = base_text.encode(captions), own_text.encode(captions)
            x_t = made.schedule.add_noise(x0, eps, t)
            target, target_blocks = made.teacher(
                x_t.to(made.teacher.dtype), t, contexts[1].to(made.teacher.dtype), features=True
            )
        with autocast():
            style = style_rows(torch.zeros_like(t), 1)
            out, blocks = student(x_t, t, contexts[0].float(), style=style, features=True)
        return score_loss(out, target).mean() + run.config.lambda_feat * feature_loss(blocks, target_blocks).mean()

    def step() -> None:
        places = torch.randint(len(made.captions), (made.batch_size,))
        t, drop = torch.randint(1000, (made.batch_size,)), torch.rand(made.batch_size, device=device) < dropped
        eps = torch.randn(made.batch_size, 4, made.size.pixels // 8, made.size.pixels // 8)
        optimizer.zero_grad(set_to_none=True)
        lost = loss(places, t, eps, drop.tolist())
        scaler.scale(lost).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(run.student.trained.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        lost.item()

    return Loop(step, loss, contextlib.nullcontext if cuda else lambda: not_fused(run.optimizer))


@contextlib.contextmanager
def not_fused(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, AdamW steps as it does by default."""
    before = [group["fused"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["fused"] = None
        yield
    finally:
        for group, fused in zip(optimizer.param_groups, before):
            group["fused"] = fused


def changed(made: Rig, name: str) -> Loop:
    side, unet = ours(made), made.run.student.unet

    if name == "AdamW not fused":
        return Loop(side.step, side.loss, lambda: not_fused(made.run.optimizer))
    if name in ATTENTION:
        return Loop(side.step, side.loss, lambda: sdpa_kernel(ATTENTION[name]))
    student = made.run.student
    # One compilation for each size: the rows of the comparison and those of a step.
    compiled = torch.compile(unet, mode=COMPILED[name], dynamic=False) if name in COMPILED else None

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        plain = student.forward
        try:
            if "channels last" in name:
                unet.to(memory_format=torch.channels_last)
            if name == "checkpointing":
                unet.gradient_checkpointing = True
            student.forward = plain if compiled is None else compiled
            yield
        finally:
            student.forward = plain
            unet.to(memory_format=torch.contiguous_format)
            unet.gradient_checkpointing = made.run.config.gradient_checkpointing

    return Loop(side.step, side.loss, around)


def side_named(made: Rig, name: str) -> Loop:
    return {"ours": ours, "theirs": theirs}[name](made) if name in ("ours", "theirs") else changed(made, name)


# --- equal first, then timed ------------------------------------------------------------------------------------------


def difference(made: Rig, one: Loop, other: Loop) -> dict[str, float]:
    """How far two sides are apart on the same two rows: their losses, relatively, and the gradients of every fourth weight (the length of
    the difference over the length)."""
    g = torch.Generator().manual_seed(1)
    places, t = torch.tensor([2, 5]), torch.tensor([120, 700])
    eps = torch.randn(2, 4, made.size.pixels // 8, made.size.pixels // 8, generator=g)
    weights = list(made.run.student.trained.values())
    lost, gradients = [], []
    for side in (one, other):
        for p in weights:
            p.grad = None
        with side.around(), torch.enable_grad():
            loss = side.loss(places, t, eps)
            loss.backward()
        lost.append(loss.item())
        # In one order of memory: channels last has another.
        gradients.append([p.grad.contiguous().clone() for p in weights[::4] if p.grad is not None])
    for p in weights:
        p.grad = None
    if len(gradients[0]) != len(gradients[1]):
        return {"loss": float("inf"), "gradient": float("inf")}
    apart = sum((a - b).double().square().sum().item() for a, b in zip(*gradients))
    length = sum(a.double().square().sum().item() for a in gradients[0])
    return {"loss": abs(lost[1] / lost[0] - 1), "gradient": (apart / length) ** 0.5}


def measure(
    device: torch.device | str,
    size: str = "tiny",
    seconds: float = 60.0,
    sides: Sequence[str] = ("ours", "theirs"),
    *,
    batch: int | None = None,
) -> dict:
    """Samples a second of the sides, in turns, for so many seconds after one turn to warm up (at least three turns).

    {"device", "size", "precision", "batch", "pixels", "turns", "adamw on": share of the weights, "sides": {name: {"samples/s": quartiles,
    "ours over it": quartiles of the ratio turn by turn, or None where the side disagrees, "apart": see ``difference``, "equal": bool}}}.
    """
    made = rig(torch.device(device), size, batch)
    try:
        return compared(made, size, seconds, sides)
    finally:
        made.run.targets.pool.close()


def each_beside_ours(
    device: torch.device | str, size: str, seconds: float, sides: Sequence[str], keep: Callable[[str, dict | str], None]
) -> None:
    """As ``measure``, of one set of models, one side after the other, each for so many seconds. keep: gets a side's name, and its result
    as soon as there is one, or why this machine cannot do it."""
    made = rig(torch.device(device), size)
    try:
        for name in sides:
            torch.compiler.reset()  # what was compiled for another format of memory is taken for this one's
            found: dict | str
            try:
                found = compared(made, size, seconds, [name])
            except Exception as error:  # no such kernel, no compiler, and whatever compilers say
                found = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            keep(name, found)
    finally:
        made.run.targets.pool.close()


def compared(made: Rig, size: str, seconds: float, sides: Sequence[str]) -> dict:
    """``measure`` of a rig that is there."""
    device = made.device
    named = {name: side_named(made, name) for name in dict.fromkeys(("ours", *sides))}
    precision = made.run.config.precision
    tolerance = TOLERANCE["fp32" if precision == "fp32" else "half"]
    apart = {name: difference(made, named["ours"], side) for name, side in named.items()}
    equal = {name: all(one[what] <= most for what, most in tolerance.items()) for name, one in apart.items()}
    clock = clock_of(device)

    def counted() -> float:
        """Seconds, as if AdamW stepped on all of the weights."""
        return clock() + made.seconds_of_adamw * (1 / made.part - 1)

    def steps_of(loop: Loop, steps: int) -> Side:
        def work() -> None:
            for _ in range(steps):
                loop.step()

        return Side(work, around=loop.around)

    for loop in named.values():  # what is made once: moments, compiled code
        steps_of(loop, 1).turn(counted)
    first = max(steps_of(loop, 1).turn(counted)[0] for loop in named.values())
    steps = max(1, round(min(2.0, seconds / 10) / first))
    turns = {name: steps_of(loop, steps) for name, loop in named.items()}
    found = in_turns(turns, 3, clock=counted, until=time.monotonic() + seconds)
    took = {name: [one / steps for one in times] for name, times in found.items()}
    out = {}
    for name, times in took.items():
        ratios = [theirs / ours for theirs, ours in zip(times, took["ours"])]
        out[name] = {
            "samples/s": quartiles([made.batch_size / t for t in times]),
            "ours over it": quartiles(ratios) if equal[name] else None,
            "apart": apart[name],
            "equal": equal[name],
        }
    about = {"device": str(device), "size": size, "precision": precision, "batch": made.batch_size}
    return {**about, "pixels": made.size.pixels, "turns": len(took["ours"]), "adamw on": made.part, "sides": out}


def table(result: dict) -> str:
    lines = ["| | samples/s | ours over it | loss, gradients apart |", "| --- | --- | --- | --- |"]
    for name, one in result["sides"].items():
        low, middle, high = one["samples/s"]
        ratio = one["ours over it"]
        shown = "sides disagree" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"
        apart = f"{one['apart']['loss']:.1e}, {one['apart']['gradient']:.1e}"
        lines.append(f"| {name} | {middle:.4g} ({low:.4g} to {high:.4g}) | {shown} | {apart} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring")
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument("--sides", default="ours,theirs", help=f"of: {', '.join(SIDES)}")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, too")
    args = parser.parse_args()
    sides = args.sides.split(",")
    several = [side for side in sides if side in COMPILED]
    if len(several) > 1:
        raise SystemExit(
            f"{' and '.join(several)}: compiled sides one at a time, as code of the one is taken for the other's"
        )
    if unknown := [side for side in sides if side not in SIDES]:
        raise SystemExit(f"unknown sides {', '.join(unknown)}: choose from {', '.join(SIDES)}")
    if args.device == "cpu":
        torch.set_num_threads(1)
    result = measure(args.device, args.size, args.seconds, sides, batch=args.batch)
    if args.json:
        print(json.dumps(result))
    about = f"{result['size']}, {result['pixels']}x{result['pixels']}, batch {result['batch']}, {result['precision']}"
    print(f"\n{about}, {result['device']}, {result['turns']} turns, medians (quartiles)\n\n{table(result)}")
    if result["adamw on"] < 1:
        print(
            f"\nAdamW on {100 * result['adamw on']:.0f}% of the weights; the seconds for the rest are added to every side."
        )


if __name__ == "__main__":
    main()
