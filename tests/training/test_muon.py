"""Muon beside AdamW, against torch's own two."""

import math

import pytest
import torch
from comfyui_dmm.training.config import TrainConfig
from comfyui_dmm.training.loop.muon import RMS, MuonAdamW, is_matrix, orthogonal, split
from torch import nn

from .families import small_run


def parameters(seed=0) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"tall": (48, 16), "wide": (12, 40), "bias": (48,), "thin": (4, 64)}
    return {name: nn.Parameter(torch.randn(shape, generator=g)) for name, shape in shapes.items()}


def test_the_same_steps_as_torchs_own():
    """Five steps with other gradients, and decay: torch.optim.Muon (its rate set to arXiv:2502.16982's) and AdamW; to 1e-6."""
    reference = getattr(torch.optim, "Muon", None)
    if reference is None:
        pytest.skip("this torch has no Muon to compare with")
    mine, theirs = parameters(), parameters()
    settings = {"lr": 0.01, "weight_decay": 0.1}
    ours = MuonAdamW(split([{"params": list(mine.values())}]), betas=(0.9, 0.99), **settings)
    matrices = [theirs[name] for name in ("tall", "wide")]
    muon = reference(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)
    adam = torch.optim.AdamW([theirs["bias"], theirs["thin"]], betas=(0.9, 0.99), **settings)
    for step in range(5):
        for p, q in zip(mine.values(), theirs.values()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) * (step + 1)
            q.grad = p.grad.clone()
        for optimizer in (ours, muon, adam):
            optimizer.step()
        for name, p in mine.items():
            assert torch.allclose(p, theirs[name], atol=1e-6, rtol=0), (step, name)
            assert p.grad is not None


def test_a_convolution_is_a_matrix_of_its_patches():
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(16, 8, 3, 3, generator=g)
    conv, flat = nn.Parameter(torch.zeros(16, 8, 3, 3)), nn.Parameter(torch.zeros(16, 72))
    conv.grad, flat.grad = grad, grad.flatten(1)
    for p in (conv, flat):
        MuonAdamW(split([{"params": [p]}]), lr=0.1, weight_decay=0.0).step()
    assert torch.equal(conv.detach().flatten(1), flat.detach())
    rms = conv.detach().square().mean().sqrt().item()
    assert 0.6 < rms / (0.1 * RMS * math.sqrt(72) / math.sqrt(72)) < 1.4  # AdamW's size of an update: 0.2 lr


def test_all_directions_count_the_same():
    """Singular values from 1 to 1000 all come out near 1: between 0.6 and 1.3, as the quintic iteration leaves them."""
    g = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(n, 24, generator=g))[0] for n in (24, 60))
    x = u @ torch.diag(torch.logspace(0, 3, 24)).float() @ v.T
    for matrix in (x, x.T):
        values = torch.linalg.svdvals(orthogonal(matrix).float())
        assert orthogonal(matrix).shape == matrix.shape and values.max() < 1.3
        assert (values[:16] > 0.6).all()  # a thousandth of the largest needs more than five steps
    assert torch.isfinite(orthogonal(torch.zeros(8, 8))).all()


def test_who_learns_how():
    assert is_matrix((8, 8)) and is_matrix((64, 4, 3, 3)) and not is_matrix((4, 64, 3, 3)) and not is_matrix((64,))
    run = small_run(optimizer="muon")
    kinds = {id(p): group["muon"] for group in run.optimizer.param_groups for p in group["params"]}
    style = {id(p) for p in run.student.unet.style_parameters()}
    assert len(kinds) == len(run.student.trained)
    for name, p in run.student.trained.items():
        assert kinds[id(p)] == (is_matrix(p.shape) and id(p) not in style), name
    scales = {group["style"]: group["scale"] for group in run.optimizer.param_groups}
    assert scales == {False: 1.0, True: run.config.style_lr_scale}


def test_it_learns_and_needs_no_gradient_of_everything():
    run = small_run(optimizer="muon", steps=30, lr=3e-3, lr_schedule="linear")
    losses = [m.loss for m in run.run()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    frozen = small_run(optimizer="muon", trainable="style", steps=2)
    assert not any(group["muon"] for group in frozen.optimizer.param_groups) and len(list(frozen.run())) == 2
    TrainConfig(optimizer="muon").check()
