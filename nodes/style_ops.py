"""The layers of a style side in the host: its own, which it can cast, offload and patch, and plain ones while a LoRA is trained.

Train LoRA makes an adapter for every layer of the host's kind in a copy of the MODEL, and in its bypass mode one that an embedding cannot
have (comfy_extras/nodes_train.py). The styles are what a LoRA is trained beside, and no part of it: it gets the keys that it has on a plain
model. The node says so to the copy by ``train()``, before it looks for layers.
"""

from __future__ import annotations

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor

_OF_HOST = ("comfy_cast_weights", "prev_comfy_cast_weights", "weight_function", "bias_function")
"""What the host keeps in a layer of its own."""


class Linear(comfy.ops.manual_cast.Linear):
    def train(self, mode: bool = True):
        return _train(self, PlainLinear if mode else Linear, mode)


class Embedding(comfy.ops.manual_cast.Embedding):
    def train(self, mode: bool = True):
        return _train(self, PlainEmbedding if mode else Embedding, mode)


class Conv2d(comfy.ops.manual_cast.Conv2d):
    def train(self, mode: bool = True):
        return _train(self, PlainConv2d if mode else Conv2d, mode)


class PlainLinear(torch.nn.Linear):
    train = Linear.train

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *_cast(self, x))


class PlainEmbedding(torch.nn.Embedding):
    train = Embedding.train

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight.to(x.device))


class PlainConv2d(torch.nn.Conv2d):
    train = Conv2d.train

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *_cast(self, x))


def _train(layer: torch.nn.Module, kind: type[torch.nn.Module], mode: bool) -> torch.nn.Module:
    if type(layer) is not kind:
        for name in _OF_HOST:
            layer.__dict__.pop(name, None)
        layer.__class__ = kind
    return torch.nn.Module.train(layer, mode)


def _cast(layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return layer.weight.to(x), None if layer.bias is None else layer.bias.to(x)
