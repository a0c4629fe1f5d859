"""A DMM model's own guided paths from noise to picture, in all of its styles: what a few-step student learns from beside noised pictures.

Noised pictures alone will not do: at timestep 999 the schedule leaves 7% of the picture in x_999, which no sampler's noise has.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import FewStepConfig
from ..files.hashing import repr_sha256
from ..files.outputs import free_bytes
from ..files.pieces import read_piece, write_piece
from ..parallel.devices import available_bytes, sent
from ..parallel.ranks import AgreedError
from ..progress import ProgressCallback
from ..seeds import hash_seed
from ..teachers.teacher import rows_fingerprint
from .phased import CLEAN, Phases, guided

if TYPE_CHECKING:
    from .trainer import Trainer


Shape = tuple[int, int, int]


@dataclass
class SizePaths:
    """P paths of S steps in one size, ``each`` for each of N styles and for none.

    states (P, S+1, C, h, w) float16, from noise to the picture; style (P, N+1) rows; caption (P,) rows of the run's prompts. Path i is of
    style i // each, N for none.
    """

    each: int
    states: Tensor
    style: Tensor
    caption: Tensor


@dataclass(frozen=True)
class Group:
    """The paths of one size that are to be painted, by their numbers from ``start`` on."""

    shape: Shape
    each: int
    start: int
    count: int

    def parts(self, size: int) -> list[range]:
        """At most ``size`` at a time."""
        end = self.start + self.count
        return [range(at, min(at + size, end)) for at in range(self.start, end, size)]


@dataclass
class OwnPaths:
    """The paths by the size of their states, (C, h, w), that of most pictures first; t (S+1,) the timesteps of all, the last CLEAN. Empty
    until ``paint``."""

    t: list[int] = field(default_factory=list)
    sizes: dict[Shape, SizePaths] = field(default_factory=dict)

    def paint(
        self,
        run: Trainer,
        phases: Phases,
        settings: FewStepConfig,
        *,
        folder: Path | None,
        tick: ProgressCallback | None,
        stopping: Callable[[], bool],
    ) -> bool:
        """Fill it (in place) in the sizes of the run's data; False where a stop came first. It follows from the run's seed, models and
        captions alone, and from what sizes there are.

        folder: where finished parts are kept, None for nowhere; parts that were made from anything else are made anew. Several processes
        with a folder share them out; so this is for all of them together. Raises ValueError when the model paints NaN, and where there is
        no room for all paths.
        """
        ranks, timesteps = run.ranks, path_timesteps(phases, settings.path_steps)
        groups = groups_of(settings.paths, run.data.shapes, run.num_styles + 1)
        digest = made_from(run, phases, settings, groups) if folder else ""
        with ranks.together():
            if ranks.is_main:
                numbers = sum(group.count * math.prod(group.shape) for group in groups)
                check_room(numbers * len(timesteps) * 2, settings.paths, folder)
        todo = [(group, part) for group in groups for part in group.parts(run.config.batch_size)]

        def finish(mine: Sequence[tuple[Group, range]]) -> Iterator[dict[str, Tensor]]:
            for done, (group, part) in enumerate(mine):

                def say(done: int = done) -> None:
                    if tick:
                        tick(done, len(mine), "the model paints in every style")

                path = folder / f"{part.start:06d}.safetensors" if folder else None
                found = read_piece(path, len(part), digest) if path else None
                if found is None or found.keys() != {"states", "style", "caption"}:
                    found = paint_part(run, phases, settings, group, paths=part, on_step=say)
                    if path:
                        write_piece(path, found, digest)
                say(done + 1)
                yield found

        if folder and ranks.world > 1:  # each process its share, and then all of them read all files
            with ranks.together():
                for _ in finish(todo[ranks.share(len(todo))]):
                    if stopping():
                        break
            if ranks.any([stopping()])[0]:
                return False
        whole: dict[Shape, dict[str, Tensor]] = {group.shape: {} for group in groups}
        # One part after the other: at SDXL's size all of them are gigabytes.
        for (group, part), found in zip(todo, finish(todo)):
            mine = whole[group.shape]
            for key, value in found.items():
                if key not in mine:
                    mine[key] = value.new_empty(group.count, *value.shape[1:])
                mine[key][part.start - group.start : part.stop - group.start] = value
        self.t = timesteps
        self.sizes = {group.shape: SizePaths(group.each, **whole[group.shape]) for group in groups}
        return True

    def like(self, x_t: Tensor, other: bool) -> SizePaths | None:
        """The paths of the size of ``x_t`` (B, C, h, w); where there are none, with ``other`` those of most pictures' size."""
        channels, height, width = x_t.shape[1:]
        found = self.sizes.get((channels, height, width))
        return next(iter(self.sizes.values()), None) if found is None and other else found


def groups_of(paths: int, shapes: Mapping[Shape, int], styles: int) -> list[Group]:
    """Shares out the ``paths`` of each of ``styles`` between the sizes of the data by their numbers of pictures (``shapes``), the largest
    number first: one for each size, and the rest by the largest remainders. With fewer paths than sizes the last sizes have none."""
    shapes = dict(Counter(shapes).most_common(paths))
    total, rest = sum(shapes.values()), paths - len(shapes)
    each = [1 + rest * pictures // total for pictures in shapes.values()]
    remainders = [rest * pictures % total for pictures in shapes.values()]
    for k in sorted(range(len(each)), key=lambda k: -remainders[k])[: paths - sum(each)]:
        each[k] += 1
    ends = list(itertools.accumulate(each))
    return [Group(shape, n, (end - n) * styles, n * styles) for shape, n, end in zip(shapes, each, ends)]


def made_from(run: Trainer, phases: Phases, settings: FewStepConfig, groups: Sequence[Group]) -> str:
    """A digest of everything that the paths follow from, but their numbers."""
    c, base, f = run.config, run.base, settings
    return repr_sha256(
        (c.seed, c.precision, c.teacher_dtype, run.num_styles, *groups, base.unet.config.num_heads),
        (base.weights_sha256, base.prediction, base.zero_snr, rows_fingerprint(base.contexts)),
        (phases.edges, f.paths, f.path_steps, f.cfg, f.cfg_spread, f.blends),
    )


def check_room(needed: int, paths: int, folder: Path | None) -> None:
    """Raise ValueError where so many bytes of paths fit neither into memory nor on the disk of ``folder``."""
    rooms = {}
    with contextlib.suppress(ValueError):  # a machine that does not say
        rooms["of memory"] = available_bytes("cpu")
    if folder:
        written = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
        rooms[f"on the disk of '{folder}'"] = free_bytes(folder) + written
    for what, free in rooms.items():
        if needed > free:
            raise ValueError(
                f"few_steps.paths is {paths}: so many paintings in every style are {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
                f"{what}: lower paths or path_steps, or make room"
            )


def path_timesteps(phases: Phases, steps: int) -> list[int]:
    """``steps`` evenly spread timesteps of each phase from its upper edge on, and CLEAN. Raises ValueError for more than a phase has."""
    edges = phases.edges
    shortest = min(high - low for high, low in itertools.pairwise(edges))
    if steps > shortest:
        raise ValueError(
            f"few_steps.path_steps is {steps}, and the shortest phase has {shortest} timesteps: choose at most that"
        )
    inside = [high - round(j * (high - low) / steps) for high, low in itertools.pairwise(edges) for j in range(steps)]
    return [*inside, CLEAN]


def random_rows(primary: Tensor, styles: int, blends: float, g: torch.Generator) -> Tensor:
    """Style indices (B,), N for none -> style rows (B, N+1). A share of ``blends`` of all rows, on average, is a blend of the row's style
    and another one, in which its own has any share evenly; those without a style stay as they are. Draws the same for any ``primary``."""
    count = len(primary)
    share, second, turn = (
        torch.rand(count, generator=g),
        torch.randint(max(styles - 1, 1), (count,), generator=g),
        torch.rand(count, generator=g),
    )
    rows = torch.zeros(count, styles + 1)
    at = torch.arange(count)
    styled = primary < styles
    blended = styled & (turn < blends) & (styles > 1)
    own = primary.clamp(max=styles - 1)
    rows[at, own] = torch.where(blended, share, 1.0) * styled
    rows[at, (own + 1 + second) % styles] += (1 - share) * blended
    rows[:, -1] = styled.float()
    return rows


def draw_cfg(count: int, settings: FewStepConfig, g: torch.Generator) -> Tensor:
    """The guidance of each row, (B,)."""
    return settings.cfg + settings.cfg_spread * (2 * torch.rand(count, generator=g) - 1)


@torch.no_grad()
def paint_part(
    run: Trainer,
    phases: Phases,
    settings: FewStepConfig,
    group: Group,
    *,
    paths: range,
    on_step: Callable[[], object],
) -> dict[str, Tensor]:
    """Some of a group's paths, by number: ``states``, ``style`` and ``caption`` as in ``SizePaths``. on_step: called before every step."""
    known = len(run.data.prompts) - 1
    timesteps = path_timesteps(phases, settings.path_steps)
    noise, style, caption, cfg = [], [], [], []
    for path in paths:
        g = torch.Generator().manual_seed(hash_seed(run.config.seed, "own path", path))
        noise.append(torch.randn(group.shape, generator=g))
        primary = torch.tensor([(path - group.start) // group.each])
        style.append(random_rows(primary, run.num_styles, settings.blends, g))
        caption.append(1 + int(torch.randint(known, (), generator=g)) if known else 0)
        cfg.append(draw_cfg(1, settings, g))
    rows, captions, strength = torch.cat(style), torch.tensor(caption), torch.cat(cfg)
    x = torch.stack(noise).to(run.device)
    states = [x.half().cpu()]
    for now, after in itertools.pairwise(timesteps):
        on_step()
        t, s = torch.full((len(x),), now), torch.full((len(x),), after)
        x = phases.step(x, ask_guided(run, x, t, captions, rows, strength), t, s)
        states.append(x.half().cpu())
    if not torch.isfinite(x).all():
        raise AgreedError(
            "the model paints NaN or infinite numbers: use precision fp32 or bf16, a lower few_steps.cfg, or look at what it paints in "
            "ComfyUI"
        )
    return {"states": torch.stack(states, 1), "style": rows, "caption": captions}


@torch.no_grad()
def ask_guided(  # noqa: PLR0917, what a guided model is asked
    run: Trainer, x_t: Tensor, t: Tensor, caption: Tensor, style: Tensor, cfg: Tensor
) -> Tensor:
    """What the frozen model predicts under guidance, (B, C, h, w) float32, both halves in the row's style. x_t on the device; t, caption,
    cfg (B,) and style (B, N+1) on the CPU. One half after the other: together they would need more memory than the student's step."""
    unet, at = run.targets.pool.get(run.num_styles), sent(t, x_t.device)

    def said(rows: Tensor) -> Tensor:
        with run.autocast():
            return run.base.predict(x_t, at, rows, style, unet=unet).out

    return guided(said(caption), said(torch.zeros_like(caption)), cfg)
