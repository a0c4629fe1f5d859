"""A small judge for the demo family: which shape, colour, background and look does a picture show?

It is trained on renders only, softened and disturbed the way an f8 VAE and a tiny diffusion model disturb them, so that
its verdict carries over to generated pictures. It measures whether captions and styles are
obeyed; it is never a training signal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...dmm_core.files import atomic_write
from ..data.demo.family import FIRST, Family
from ..data.demo.scenes import SIZE, Scene, layers

_FORMAT = "1"
_WIDTHS = (24, 48, 96, 96, 112)  # 0.5 MB in half precision


def classes_of(family: Family = FIRST) -> dict[str, list[str]]:
    """The classifier's questions and their answers."""
    world = family.world
    return {
        "shape": list(world.objects),
        "colour": list(world.colours),
        "background": list(world.backgrounds),
        "look": list(family.looks),
    }


class Classifier(nn.Module):
    """Five convolutions and one linear head per question. `classes` maps a question to its answers."""

    def __init__(self, classes: dict[str, list[str]]):
        super().__init__()
        self.classes = {question: list(answers) for question, answers in classes.items()}
        body, width = [], 3
        for i, wider in enumerate(_WIDTHS):
            kernel, stride = 5 if i == 0 else 3, 2 if i < 4 else 1
            body += [nn.Conv2d(width, wider, kernel, stride, kernel // 2), nn.GroupNorm(8, wider), nn.SiLU()]
            width = wider
        self.body = nn.Sequential(*body)
        self.heads = nn.ModuleDict({question: nn.Linear(2 * width, len(a)) for question, a in self.classes.items()})

    @property
    def width(self) -> int:
        """Of the pooled features."""
        return next(iter(self.heads.values())).in_features

    def pooled(self, x: Tensor) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1] -> (B, 2C): what the heads see, and the feature network of the demo family's FID."""
        if tuple(x.shape[1:]) != (3, SIZE, SIZE):
            raise ValueError(f"expected pictures (B, 3, {SIZE}, {SIZE}), got {tuple(x.shape)}: resize them first")
        h = self.body(x)  # (B, C, 8, 8)
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)  # (B, C, 8, 8) -> (B, 2C)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, 128, 128) in [-1, 1] -> question: (B, answers) logits."""
        h = self.pooled(x)
        return {question: head(h) for question, head in self.heads.items()}


@torch.no_grad()
def classify(model: Classifier, images: Tensor) -> dict[str, Tensor]:
    """(B, 3, 128, 128) in [-1, 1], any device or dtype -> question: (B, answers) float32 logits on the CPU."""
    weight = next(model.parameters())
    parts = [model(part.to(weight)) for part in images.split(64)]
    return {question: torch.cat([part[question] for part in parts]).float().cpu() for question in model.classes}


def labels_of(scene: Scene, look: str, classes: dict[str, list[str]]) -> list[int]:
    """The right answers, in the order of ``classes``."""
    truth = {"shape": scene.shape, "colour": scene.colour, "background": scene.background, "look": look}
    return [answers.index(truth[question]) for question, answers in classes.items()]


def labelled_renders(
    rng: np.random.Generator, scenes: int, looks: Sequence[str] = (), family: Family = FIRST
) -> tuple[Tensor, Tensor]:
    """Random scenes, each in every look (all): pictures (M, 3, 128, 128) uint8 and labels (M, 4), M = scenes * len(looks)."""
    images, labels = [], []
    looks, classes = looks or tuple(family.looks), classes_of(family)
    for _ in range(scenes):
        scene = family.sample_scene(rng)
        drawn = layers(scene)
        images += [family.render_layers(drawn, look) for look in looks]
        labels += [labels_of(scene, look, classes) for look in looks]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def disturb(x: Tensor, generator: torch.Generator) -> Tensor:
    """What a VAE and a tiny diffusion model do to a picture, roughly: (B, 3, H, W) in [-1, 1], shape and range kept.

    Whole pixels of shift, lost resolution, 8-pixel blockiness, blotches, grain and a little contrast. Hue is left
    alone: it is one of the questions.
    """
    batch = len(x)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    dy, dx = torch.randint(-6, 7, (2,), generator=generator).tolist()
    x = F.pad(x, (6, 6, 6, 6), mode="replicate")[..., 6 + dy : 6 + dy + SIZE, 6 + dx : 6 + dx + SIZE]
    small = int(uniform(40, 128, 1))
    soft = F.interpolate(x, size=small, mode="bilinear", antialias=True, align_corners=False)
    soft = F.interpolate(soft, size=SIZE, mode="bilinear", align_corners=False)
    blocks = F.interpolate(F.avg_pool2d(soft, 8), scale_factor=8, mode="nearest")
    x = torch.lerp(x, soft, uniform(0, 1, batch, 1, 1, 1))
    x = torch.lerp(x, blocks, uniform(0, 0.25, batch, 1, 1, 1))
    blotches = torch.randn(batch, 3, SIZE // 8, SIZE // 8, generator=generator)
    blotches = F.interpolate(blotches, scale_factor=8, mode="bilinear", align_corners=False)
    x = x + uniform(0, 0.15, batch, 1, 1, 1) * blotches
    x = x + uniform(0, 0.15, batch, 1, 1, 1) * torch.randn(x.shape, generator=generator)
    return (x * uniform(0.85, 1.1, batch, 1, 1, 1) + uniform(-0.08, 0.08, batch, 1, 1, 1)).clamp(-1, 1)


def train_classifier(
    seed: int = 0,
    *,
    samples: int = 32_000,
    progress=None,
    batch: int = 64,
    lr: float = 3e-3,
    family: Family = FIRST,
) -> Classifier:
    """Train from scratch, about 3 minutes on one CPU thread; returns it in eval mode.

    `samples` counts disturbed pictures; each render is shown four times. `progress(step, steps, loss)` is called every
    step.
    """
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = Classifier(classes_of(family))
    steps = max(samples // batch, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            images, labels = labelled_renders(rng, 128, family=family)
            order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(4)])
        rows, order = order[:batch], order[batch:]
        x = disturb(images[rows].float() / 127.5 - 1, generator)
        with torch.autocast("cpu", torch.bfloat16):  # twice the speed, also without matrix units
            logits = model(x)
        loss = sum(
            F.cross_entropy(logits[question].float(), labels[rows, i]) for i, question in enumerate(model.classes)
        )
        if not torch.isfinite(loss):
            raise ValueError(f"classifier loss is {loss.item()} at step {step}: lower lr ({lr})")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, steps, loss.item())
    return model.eval()


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right answers per question; pictures (B, 3, 128, 128) in [-1, 1], labels (B, 4) as `labels_of`."""
    logits = classify(model, images)
    return {
        question: (logits[question].argmax(1) == labels[:, i]).float().mean().item()
        for i, question in enumerate(model.classes)
    }


def save_classifier(path, model: Classifier) -> None:
    """Half precision, written completely or not at all, with the vocabulary in the metadata."""
    weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"demo.classifier": _FORMAT, "demo.classes": json.dumps(model.classes)}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata)


def load_classifier(path) -> Classifier:
    """The model in float32 and eval mode. ValueError if the file is not a classifier of this format."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        found = metadata.get("demo.classifier")
        if found != _FORMAT:
            raise ValueError(f"{path}: demo.classifier is {found!r}, expected {_FORMAT!r}: train it again")
        weights = {name: file.get_tensor(name).float() for name in file.keys()}
    model = Classifier(json.loads(metadata["demo.classes"]))
    model.load_state_dict(weights)
    return model.eval()
