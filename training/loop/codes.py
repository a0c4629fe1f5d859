"""Style codes learnt with everything else frozen: the warm start of a new style, and the attack that looks for a forgotten one.

A code is one vector (D,) of the codebook. Textual inversion (arXiv:2208.01618) is the same idea for a word; here the target is what
another model predicts, so no picture is needed that this model painted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call

from ...dmm_core.style import CODEBOOK
from ...dmm_core.unet import UNet, UNetConfig
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


@dataclass
class Search:
    """What a search for codes asks: ``unet``'s rows ``code_rows``, of which (B,) ``which`` each sample of a batch uses, should predict
    ``target`` (B, C, h, w) on the samples of the batch. ``run`` gives captions, schedule and precision."""

    run: Trainer
    unet: UNet
    code_rows: Sequence[int]
    sample: Callable[[int], tuple[Batch, Tensor, Tensor]]
    """number -> (batch, which, target)"""

    def __post_init__(self) -> None:
        # Several codes are tried on the same few batches, and a target costs another model's forward.
        self.sample = functools.lru_cache(maxsize=REMEMBERED)(self.sample)

    def errors(self, codes: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """(eq. 9 loss (B,), which (B,)) of batch ``number`` with these codes (K, D) in the place of ``code_rows``."""
        batch, which, target = self.sample(number)
        out = self._predict(codes, batch, which)
        return score_loss(out, target), which

    def _predict(self, codes: Tensor, batch: Batch, which: Tensor) -> Tensor:
        run, unet = self.run, self.unet
        x_t, t = batch.x_t.to(run.device), batch.t.to(run.device)
        weight = unet.model_embedding.weight.detach().float()
        rows = torch.tensor(self.code_rows, device=weight.device)
        book = weight.index_copy(0, rows, codes.float()).to(unet.model_embedding.weight.dtype)
        style = torch.zeros(len(which), len(weight) + 1)
        style[torch.arange(len(which)), rows.cpu()[which]] = 1.0
        style[:, -1] = 1.0
        with run.autocast():
            context, y = run.base.conditioning(batch.caption, x_t.shape[2:], run.device)
            given = {"y": y, "style": style.to(run.device)}
            out = functional_call(unet, {f"{CODEBOOK}.weight": book}, (x_t, t, context), given)
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
    tries: int = 4,
    batches: int = 8,
    tick: Callable[[int], None] | None = None,
) -> Recovery:
    """Look for a code with which ``unet``, frozen, predicts what ``truth`` does: ``tries`` codes at once, from random beginnings and the
    known codes' mean, on the run's pictures. batches: of the run's size, for the final figures."""
    device, c = run.device, run.config
    attacked = with_more_codes(unet, tries).to(device)

    def sample(seed_of: str) -> Callable[[int], tuple[Batch, Tensor, Tensor]]:
        draw = Draw(hash_seed(c.seed, seed_of), c.batch_size, 1, 0.0, 0.0, run.schedule)

        def one(number: int) -> tuple[Batch, Tensor, Tensor]:
            batch = run.data.batch(number, draw)
            return batch, (number * c.batch_size + torch.arange(c.batch_size)) % tries, truth(batch)

        return one

    rows = list(range(unet.config.num_styles, unet.config.num_styles + tries))
    learn, test = (Search(run, attacked, rows, sample(seed)) for seed in ("attack", "attack test"))
    g = torch.Generator().manual_seed(hash_seed(c.seed, "attack codes"))
    start = torch.randn(tries, unet.config.embed_dim, generator=g).to(device)
    if unet.config.num_styles:
        start[0] = unet.model_embedding.weight.detach().float().mean(0).to(device)
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


def with_more_codes(unet: UNet, count: int) -> UNet:
    """A frozen copy of a DMM UNet with ``count`` more codes (of zeros) at the end of its codebook."""
    with torch.device("meta"):
        grown = UNet(UNetConfig(**{**vars(unet.config), "num_styles": unet.config.num_styles + count}))
    weights = {k: v.detach().clone() for k, v in unet.state_dict().items()}
    book = weights[f"{CODEBOOK}.weight"]
    weights[f"{CODEBOOK}.weight"] = torch.cat([book, book.new_zeros(count, book.shape[1])])
    grown.load_state_dict(weights, assign=True)
    return grown.requires_grad_(False).eval()
