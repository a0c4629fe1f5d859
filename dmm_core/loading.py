"""Strict loading of a network whose sizes were read from its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def load_strictly(
    build: Callable[[], Network], sd: Mapping[str, Tensor], what: str, *, dtype: torch.dtype | None, copy: bool = True
) -> Network:
    """``build()`` with copies of the weights, cast to ``dtype`` (None keeps the file's); ``sd`` is left alone. Without
    ``copy`` it has the very tensors, as they are, which may be views of a file.

    Raises ValueError, naming ``what``, with the sorted missing / unexpected / misshapen keys.
    """
    with torch.device("meta"):  # no memory is filled twice
        network = build()
    wanted = network.state_dict()
    missing, unexpected = sorted(wanted.keys() - sd.keys()), sorted(sd.keys() - wanted.keys())
    misshapen = sorted(k for k in wanted.keys() & sd.keys() if wanted[k].shape != sd[k].shape)
    if missing or unexpected or misshapen:
        raise ValueError(
            f"the {what}'s weights do not fit the sizes read from them: "
            f"missing {missing[:8]}, unexpected {unexpected[:8]}, wrong shape {misshapen[:8]}"
        )
    if copy:
        sd = {k: v.detach().clone().to(dtype or v.dtype) for k, v in sd.items()}
    network.load_state_dict(sd, strict=True, assign=True)
    return network
