"""Taking a style out of a DMM model without its teacher's file.

Deleting the style's code hides the look, but the network still holds it: whoever searches finds a code that brings it back
(``codes.recover``). So the network learns, beside the frozen old model that guards the styles which stay, to paint as without a style
wherever the look can be found: at the old code, and at codes that an attack finds anew every few steps. The idea is that of score
forgetting (arXiv:2409.11219), with the search as its adversary; the teacher is the old model itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dmm_core.bank_drop import Dropped, drop_styles, has_style_rows, without_rows
from ...dmm_core.metadata import StyleInfo
from ...dmm_core.style import CODEBOOK
from ...dmm_core.unet import UNet, load_unet
from ..config import AttackConfig, TrainConfig
from ..data.batches import Batch, Draw, TrainingData
from ..parallel.ranks import Ranks
from ..progress import ProgressCallback
from ..seeds import hash_seed
from ..teachers.teacher import Teacher
from .bank_start import base_around
from .codes import Search, Table, fit_codes, hostile_start, recover, tables
from .kinds import RunKind, guarded_shares
from .trainer import Trainer


@dataclass(frozen=True)
class Forgotten:
    """A style to forget: its place in the old model, and the rows of the student's codebook that stand for it."""

    teacher: Teacher
    code_rows: list[int]


@dataclass(frozen=True)
class Forget(RunKind):
    """``base``, a DMM model, loses the styles of ``forgotten`` and keeps the first ``kept``.

    While it trains, codebook rows follow those of the styles that stay: for each forgotten style its old code and ``attack.codes``
    codes that are searched for every ``attack.every`` steps; the optimiser leaves them alone, and the finished student has none of
    them. at_base: the base's bank is centred at a base, where the student starts too.
    """

    kept: int
    forgotten: tuple[Forgotten, ...]
    attack: AttackConfig
    at_base: bool = False

    def shares(self, styles: int, guard: float) -> tuple[float, ...] | None:
        return guarded_shares(range(self.kept), styles, guard)

    def identity(self) -> dict[str, str]:
        attack = dataclasses.replace(self.attack, check=0)  # comes after training and changes nothing of it
        said = {"forgotten styles": repr([one.teacher.name for one in self.forgotten]), "attack": repr(attack)}
        return {**said, "bank's centre": "base"} if self.at_base else said

    def styles(self, teachers: Sequence[Teacher]) -> list[StyleInfo]:
        return super().styles(teachers[: self.kept])

    def finished(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        styles = weights[f"{CODEBOOK}.weight"].shape[0]
        hostile = range(self.kept, styles)
        return {
            key: without_rows(value, hostile, styles) if has_style_rows(key) else value
            for key, value in weights.items()
        }

    def recipe_changes(self, teachers: Sequence[Teacher]) -> dict[str, list[str]]:
        return {"forgotten": [one.teacher.name for one in self.forgotten]}

    def before_step(self, run: Trainer) -> None:
        if self.attack.codes and run.step % self.attack.every == 0:
            self.search(run)

    @contextlib.contextmanager
    def around_update(self, run: Trainer) -> Iterator[None]:
        hostile = slice(self.kept, run.num_styles)  # in a bank "no style" comes after them
        before = [(table.weight, table.weight.detach()[hostile].clone()) for table in self.tables(run.student.unet)]
        yield
        with torch.no_grad():
            for weight, rows in before:
                weight[hostile] = rows  # else the codes would step aside instead of the network

    @staticmethod
    def tables(unet: UNet) -> list[Table]:
        """What the attack looks for in a network: codes, and where there is a bank, cores and biases."""
        return tables(unet, cores=unet.config.bank is not None)

    def search(self, run: Trainer) -> None:
        """Find codes (and cores, where there is a bank) with which the student, as it is now, paints the forgotten styles (in place)."""
        unet = run.student.unet
        found, banked = self.tables(unet), unet.config.bank is not None
        for number, one in enumerate(self.forgotten):
            rows = one.code_rows[1:]
            start = torch.cat([table.rows(rows) for table in found], 1)
            # They go on from where they were, but one begins anew: the network must not learn these few only.
            fresh = (run.step // self.attack.every) % len(rows)
            g = torch.Generator().manual_seed(hash_seed(run.config.seed, "hostile code", number, run.step))
            width = unet.config.embed_dim
            start[fresh, :width] = torch.randn(width, generator=g).to(start)
            if banked:
                # The mean of what is there, minus its sum, a mix of it: in turn.
                turn = run.step // self.attack.every % 3
                start[fresh, width:] = hostile_start(found, self.kept, 3, g)[turn]
            search = Search(run, unet, rows, self.sample(run, one, len(rows)), banked)
            codes = fit_codes(search, start, self.attack.steps)
            for table, part in zip(found, codes.split([table.weight.shape[1] for table in found], 1)):
                table.put(rows, part)
        for table in found:
            run.ranks.align(table.weight.detach())

    def sample(self, run: Trainer, one: Forgotten, count: int) -> Callable[[int], tuple[Batch, Tensor, Tensor]]:
        """Batches by number whose targets are what the old model paints in the style, as ``Search`` takes them."""
        c = run.config
        draw = Draw(
            hash_seed(c.seed, "search", run.step, one.teacher.name),
            c.batch_size, run.num_styles, 0.0, c.caption_dropout, run.schedule,
            tuple(float(i == one.code_rows[0]) for i in range(run.num_styles)),
        )  # fmt: skip

        def batch_of(number: int) -> tuple[Batch, Tensor, Tensor]:
            batch = run.data.batch(number, draw)
            return batch, torch.arange(c.batch_size) % count, ask_old(run, one.teacher, batch)

        return batch_of

    def final_report(self, run: Trainer, tick: ProgressCallback | None = None) -> str:
        """What a search of ``attack.check`` steps for each forgotten style brings back, before and after, as a small table.

        eps errors against what the old model painted in that style. Deleting the code alone leaves the network as it was *before*; a
        network that knows nothing of the style comes out as *without a style*.
        """
        steps = self.attack.check
        if not steps:
            return ""
        if run.base.unet.config.bank:
            return self.bank_report(run, steps, tick)
        width = max(len("a search for"), *(len(one.teacher.name) for one in self.forgotten))
        num_heads, networks = run.base.unet.config.num_heads, [run.base.unet]  # a deleted code changes nothing else
        if run.step:
            networks.append(load_unet(run.student_weights(), heads=num_heads).to(run.device))
        now = "   found now" if run.step else ""
        lines = [f"{'a search for':<{width}}  found before{now}  without a style"]
        total = len(networks) * steps * len(self.forgotten)
        for place, one in enumerate(self.forgotten):
            found = []
            for half, unet in enumerate(networks):
                done, what = steps * (len(networks) * place + half), f"searching for '{one.teacher.name}'"
                report = later(tick, done, total, what) if tick else None
                found.append(recover(run, unet, functools.partial(ask_old, run, one.teacher), steps, tick=report))
            cells = "".join(f"{one.error:12.5f}" for one in found)
            lines.append(f"{one.teacher.name:<{width}}  {cells}{found[-1].untouched:17.5f}")
        return "\n".join(lines)

    def bank_report(self, run: Trainer, steps: int, tick: ProgressCallback | None) -> str:
        """The same for a model with a bank: found by a search for codes, and for codes and cores, in the file whose cores were only deleted
        and in the trained one (in a run without steps, in the former alone)."""
        places = [one.teacher.style for one in self.forgotten if isinstance(one.teacher.style, int)]
        dropped = drop_styles(run.base.unet.state_dict(), places, keep_centre=self.at_base)
        num_heads = run.base.unet.config.num_heads
        networks = {"deleted": load_unet(dropped.unet, heads=num_heads).to(run.device)}
        if run.step:
            networks["trained"] = load_unet(run.student_weights(), heads=num_heads).to(run.device)
        heads = [f"{name}: {what}" for name in networks for what in ("codes", "and cores")]
        width = max(len("a search in"), *(len(one.teacher.name) for one in self.forgotten))
        lines = [f"{'a search in':<{width}}{''.join(f'{head:>20}' for head in heads)}{'without a style':>20}"]
        total, done = len(heads) * steps * len(self.forgotten), 0
        for one in self.forgotten:
            found = []
            for unet in networks.values():
                for cores in (False, True):
                    report = later(tick, done, total, f"searching for '{one.teacher.name}'") if tick else None
                    ask = functools.partial(ask_old, run, one.teacher)
                    found.append(recover(run, unet, ask, steps, cores=cores, tick=report))
                    done += steps
            cells = [*(one.error for one in found), found[0].untouched]
            lines.append(f"{one.teacher.name:<{width}}{''.join(f'{cell:20.5f}' for cell in cells)}")
        lines += ["", *told_lines([one.teacher.name for one in self.forgotten], dropped)]
        return "\n".join(lines)


def told_lines(names: Sequence[str], dropped: Dropped) -> list[str]:
    """What deleting alone meant, in sentences."""
    out = [
        "eps errors against what the model painted in the style: 0 is that look again. 'codes' looks for a style vector, 'and cores' for "
        "the style's part of the bank too, which anyone can do who has the file and pictures of the look."
    ]
    for name, told in zip(names, dropped.told):
        if dropped.moved:
            out.append(
                f"The cores that stay told {100 * told.before:.0f}% of '{name}' before the mean was moved to that of the styles that stay, "
                f"{100 * told.around:.0f}% after it."
            )
        else:
            out.append(f"The cores that stay tell {100 * told.around:.0f}% of '{name}'.")
    return out


def later(tick: ProgressCallback, before: int, total: int, what: str) -> Callable[[int], None]:
    """A callback that counts from ``before`` on."""
    return lambda done: tick(before + done, total, what)


def forgetting(
    base: Teacher,
    styles: Sequence[Teacher],
    forget: Sequence[str],
    data: TrainingData,
    *,
    config: TrainConfig,
    device: torch.device,
    attack: AttackConfig | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """A run that takes the styles named in ``forget`` out of ``base``, a DMM model.

    styles: all of the base's, as ``Teacher.as_style`` gives them. Raises ValueError for a name that the model does not have, and when
    nothing would stay.
    """
    attack = attack or AttackConfig()
    attack.validate()
    gone = [named(styles, name) for name in forget]
    stay = [style for style in styles if style not in gone]
    if not gone:
        raise ValueError(f"no style to forget was named: choose from {', '.join(s.name for s in styles)}")
    if not stay:
        raise ValueError("all styles would be forgotten: a DMM model keeps at least one")
    ranks = ranks or Ranks()
    if ranks.world > 1 and config.parallel == "fsdp":
        raise ValueError(
            "parallel is 'fsdp', which cannot forget: its codes are looked for with the whole student; use ddp"
        )
    forgotten, places = [], list(stay)
    for old in gone:
        rows = list(range(len(places), len(places) + 1 + attack.codes))
        forgotten.append(Forgotten(old, rows))
        places += [as_without_style(old, i) for i in range(len(rows))]
    kind = Forget(len(stay), tuple(forgotten), attack, base.at_base)
    run = Trainer(base, places, data, dataclasses.replace(config, warm_start=0), device=device, kind=kind, ranks=ranks)
    sources = base_around(base.unet, stay) if base.unet.config.bank else base.unet.state_dict()
    for table in kind.tables(run.student.unet):
        for one, style in zip(kind.forgotten, (old.style for old in gone)):
            if isinstance(style, int):
                with torch.no_grad():
                    table.weight[one.code_rows[0]] = sources[table.key][style].to(table.weight)
    return run


@torch.no_grad()
def ask_old(run: Trainer, style: Teacher, batch: Batch) -> Tensor:
    """What the frozen old model predicts in one of its styles, (B, C, h, w)."""
    x_t, t = batch.x_t.to(run.device), batch.t.to(run.device)
    with run.autocast():
        # With the base's text states, which the old model's styles share.
        return run.base.predict(x_t, t, batch.caption, style.style_row, unet=run.targets.pool.get(run.num_styles)).out


def named(styles: Sequence[Teacher], name: str) -> Teacher:
    """The style of this name. Raises ValueError listing those that there are."""
    for style in styles:
        if style.name.strip() == name.strip():
            return style
    raise ValueError(f"the model has no style '{name}': it has {', '.join(style.name for style in styles)}")


def as_without_style(style: Teacher, number: int) -> Teacher:
    """The teacher of a forgotten style's rows: the old model painting without a style."""
    one = dataclasses.replace(style, name=f"{style.name} (forgotten, {number})", style=None, known=None)
    one.weights_sha256 = style.weights_sha256
    return one
