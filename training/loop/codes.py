"""Style codes learnt with everything else frozen: the warm start of a new style, and the attack that looks for a forgotten one.

A code is one vector (D,) of the codebook; an attack on a model with a style bank looks for a core and a bias of every layer beside it,
and a "code" is all of these numbers in a row. Textual inversion (arXiv:2208.01618) is the same idea for a word; here the target is what
another model predicts, so no picture is needed that this model painted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call

from ...dmm_core.bank_drop import has_style_rows
from ...dmm_core.style import CODEBOOK
from ...dmm_core.unet import UNet
from ..data.batches import Batch, Draw
from ..progress import ProgressCallback
from ..seeds import hash_seed
from .losses import score_loss

if TYPE_CHECKING:
    from .trainer import Trainer

REMEMBERED = 8
"""So many batches and their targets are kept in memory."""
LR = 0.03
"""Of Adam; codes are drawn from N(0, 1), so this is a share of their size."""


@dataclass(frozen=True)
class Table:
    """A weight of a UNet with a row for each style. scale: the size of its numbers, by which a search divides them."""

    key: str
    weight: Tensor
    scale: float

    def rows(self, which: Sequence[int]) -> Tensor:
        """(k, n) of these styles, as a search has them."""
        return self.weight.detach()[list(which)].float() / self.scale

    @torch.no_grad()
    def put(self, which: Sequence[int], rows: Tensor) -> None:
        """Write rows (k, n) back (in place)."""
        self.weight[list(which)] = (rows * self.scale).to(self.weight)


def tables(unet: UNet, cores: bool = False) -> list[Table]:
    """What a style is in a UNet: its code, and with ``cores`` what it has in the bank."""
    found = [Table(f"{CODEBOOK}.weight", unet.model_embedding.weight, 1.0)]  # codes are drawn from N(0, 1)
    for key, weight in unet.named_parameters() if cores else ():
        if has_style_rows(key) and key != found[0].key:
            found.append(Table(key, weight, max(weight.detach().float().square().mean().sqrt().item(), 1e-6)))
    return found


@dataclass
class Search:
    """What a search for codes asks: ``unet``'s rows ``code_rows``, of which (B,) ``which`` each sample of a batch uses, should predict
    ``target`` (B, C, h, w) on the samples of the batch. ``run`` gives captions, schedule and precision. cores: codes are those of all
    ``tables``, side by side."""

    run: Trainer
    unet: UNet
    code_rows: Sequence[int]
    sample: Callable[[int], tuple[Batch, Tensor, Tensor]]
    """number -> (batch, which, target)"""
    cores: bool = False

    def __post_init__(self) -> None:
        # Several codes are tried on the same few batches, and a target costs another model's forward.
        self.sample = functools.lru_cache(maxsize=REMEMBERED)(self.sample)
        self.tables = tables(self.unet, self.cores)

    def errors(self, codes: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """(eq. 9 loss (B,), which (B,)) of batch ``number`` with these codes (K, D) in the place of ``code_rows``."""
        batch, which, target = self.sample(number)
        out = self._predict(codes, batch, which)
        return score_loss(out, target), which

    def _predict(self, codes: Tensor, batch: Batch, which: Tensor) -> Tensor:
        run, unet = self.run, self.unet
        x_t, t = batch.x_t.to(run.device), batch.t.to(run.device)
        rows = torch.tensor(self.code_rows, device=codes.device)
        mine, start = {}, 0
        for table in self.tables:
            width = table.weight.shape[1]
            part = codes[:, start : start + width].float() * table.scale
            mine[table.key] = table.weight.detach().float().index_copy(0, rows, part).to(table.weight.dtype)
            start += width
        style = torch.zeros(len(which), unet.config.num_styles + 1)
        style[torch.arange(len(which)), rows.cpu()[which]] = 1.0
        style[:, -1] = 1.0
        with run.autocast():
            context, y = run.base.conditioning(batch.caption, x_t.shape[2:], run.device)
            given = {"y": y, "style": style.to(run.device)}
            out = functional_call(unet, mine, (x_t, t, context), given)
        return out.float()


def fit_codes(
    search: Search, start: Tensor, steps: int, *, lr: float = LR, tick: Callable[[int], None] | None = None
) -> Tensor:
    """Adam on the codes (K, D) alone, with a rate that falls to zero as a cosine; returns the last ones, detached."""
    codes = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([codes], lr=lr, betas=(0.9, 0.99))
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * number / steps))
        with torch.enable_grad():
            loss, _ = search.errors(codes, number)
            # Of the codes only: nothing may gather in the network's own gradients.
            codes.grad = torch.autograd.grad(loss.mean(), codes)[0]
        optimizer.step()
        if tick:
            tick(number + 1)
    return codes.detach()


@torch.no_grad()
def mean_errors(search: Search, codes: Tensor, numbers: Sequence[int]) -> Tensor:
    """(K,) mean eq. 9 loss of each code over the samples of these batches that use it."""
    total, count = torch.zeros(len(codes)), torch.zeros(len(codes))
    for number in numbers:
        loss, which = search.errors(codes, number)
        total.index_add_(0, which, loss.float().cpu())
        count.index_add_(0, which, torch.ones(len(which)))
    return total / count


def best_start(search: Search, candidates: Tensor, number: int = 0) -> Tensor:
    """(K, D): of ``candidates`` (M, D), for each code the one with the lowest error on one batch."""
    count = len(search.code_rows)
    errors = [mean_errors(search, one.expand(count, -1), [number]) for one in candidates]
    return candidates[torch.stack(errors).argmin(0)]


def warm_start(run: Trainer, known: Sequence[int], tick: ProgressCallback | None = None) -> None:
    """Give every new style of a growing model the code that explains its teacher best while all else is frozen (in place). known: the
    teacher indices of the styles that it has already.

    It begins at the nearest of: the known codes, their mean, the random code that is there. ``config.warm_start`` steps.
    """
    new = [i for i in range(run.num_styles) if i not in known]
    c, device = run.config, run.device
    shares = tuple(0.0 if i in known else 1 / len(new) for i in range(run.num_styles))
    draw = Draw(
        hash_seed(c.seed, "warm start"), c.batch_size, run.num_styles, 0.0, c.caption_dropout, run.schedule, shares
    )
    place = {style: k for k, style in enumerate(new)}

    def sample(number: int) -> tuple[Batch, Tensor, Tensor]:
        batch = run.data.batch(number, draw)
        target = run.targets(batch, batch.x_t.to(device), batch.t.to(device))
        return batch, torch.tensor([place[i] for i in batch.teacher.tolist()]), target.out

    search = Search(run, run.student.unet, new, sample)
    book = run.student.unet.model_embedding.weight.detach().float()
    candidates = torch.cat([book[list(known)], book[list(known)].mean(0, keepdim=True), book[new]])
    start = best_start(search, candidates)
    what = "looking for the new styles' codes"
    codes = fit_codes(search, start, c.warm_start, tick=tick and (lambda done: tick(done, c.warm_start, what)))
    with torch.no_grad():
        run.student.unet.model_embedding.weight[new] = codes.to(run.student.unet.model_embedding.weight)
    run.ranks.align(run.student.unet.model_embedding.weight.detach())


@dataclass
class Recovery:
    """What an attack found. error: mean eq. 9 loss of its best code on samples it did not learn from; start: of the best code it
    began with; untouched: of painting without a style, which is what someone gets who knows nothing."""

    error: float
    start: float
    untouched: float


def recover(
    run: Trainer,
    unet: UNet,
    truth: Callable[[Batch], Tensor],
    steps: int,
    *,
    cores: bool = False,
    tries: int = 4,
    batches: int = 8,
    tick: Callable[[int], None] | None = None,
) -> Recovery:
    """Look for a code with which ``unet``, frozen, predicts what ``truth`` does: ``tries`` codes at once, from random beginnings and the
    known codes' mean, on the run's pictures. cores: for cores and biases of its bank too (``hostile_start``). batches: of the run's size,
    for the final figures."""
    device, c = run.device, run.config
    attacked = with_more_codes(unet, tries).to(device)

    def sample(seed_of: str) -> Callable[[int], tuple[Batch, Tensor, Tensor]]:
        draw = Draw(hash_seed(c.seed, seed_of), c.batch_size, 1, 0.0, 0.0, run.schedule)

        def one(number: int) -> tuple[Batch, Tensor, Tensor]:
            batch = run.data.batch(number, draw)
            return batch, (number * c.batch_size + torch.arange(c.batch_size)) % tries, truth(batch)

        return one

    rows = list(range(unet.config.num_styles, unet.config.num_styles + tries))
    learn, test = (Search(run, attacked, rows, sample(seed), cores) for seed in ("attack", "attack test"))
    g = torch.Generator().manual_seed(hash_seed(c.seed, "attack codes"))
    start = torch.randn(tries, unet.config.embed_dim, generator=g).to(device)
    if unet.config.num_styles:
        start[0] = unet.model_embedding.weight.detach().float().mean(0).to(device)
    if cores:
        start = torch.cat([start, hostile_start(learn.tables, unet.config.num_styles, tries, g)], 1)
    codes = fit_codes(learn, start, steps, tick=tick)
    numbers = range(batches)
    nothing = []
    for number in numbers:
        batch, _, target = test.sample(number)
        with torch.no_grad(), run.autocast():
            context, y = run.base.conditioning(batch.caption, batch.x_t.shape[2:], device)
            out = attacked(batch.x_t.to(device), batch.t.to(device), context, y=y)
        nothing.append(score_loss(out.float(), target).mean())
    return Recovery(
        mean_errors(test, codes, numbers).min().item(),
        mean_errors(test, start, numbers).min().item(),
        torch.stack(nothing).mean().item(),
    )


def hostile_start(found: Sequence[Table], styles: int, tries: int, g: torch.Generator) -> Tensor:
    """(tries, P) of the tables behind the first: what is known of cores and biases to begin with. The mean of the N ``styles`` that are
    there; minus their sum, which in a merge is the style that was taken away; then random mixes of them."""
    weights = torch.rand(tries, styles, generator=g)
    weights /= weights.sum(1, keepdim=True)
    weights[:1] = 1 / styles
    weights[1:2] = -1
    return torch.cat([weights.to(table.weight.device) @ table.rows(range(styles)) for table in found[1:]], 1)


def with_more_codes(unet: UNet, count: int) -> UNet:
    """A frozen copy of a DMM UNet with ``count`` more styles (of zeros) at the end of its codebook, and of its bank if it has one."""
    styles = unet.config.num_styles
    weights = {
        # in a bank the row of "no style" stays the last
        k: torch.cat([v[:styles], v.new_zeros(count, v.shape[1]), v[styles:]]) if has_style_rows(k) else v.clone()
        for k, v in ((k, v.detach()) for k, v in unet.state_dict().items())
    }
    bank = unet.config.bank
    bank = bank and dataclasses.replace(bank, cores=bank.cores + count)
    with torch.device("meta"):
        more = UNet(dataclasses.replace(unet.config, num_styles=styles + count, bank=bank))
    more.load_state_dict(weights, assign=True)
    return more.requires_grad_(False).eval()
