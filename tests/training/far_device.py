"""A device that is not there: tensors that say they are on "meta" and compute on the CPU, so that every wait for a device can be counted.

What a GPU has to be waited for is seen where torch dispatches it: a value that Python reads, a copy to the CPU, sizes that follow from
values (nonzero, boolean masks), and a copy from the CPU that is not non_blocking.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

FAR = torch.device("meta")
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
}
FROM_CPU = {aten._to_copy.default, aten.copy_.default}


class FarTensor(torch.Tensor):
    """``here``: the same values on the CPU."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=FAR, requires_grad=False
        )
        made.here = here
        return made

    def __repr__(self):
        return f"FarTensor({self.here})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of FarDevice")


class FarDevice(TorchDispatchMode):
    """Inside, "meta" is such a device. ``waits``: the operations for which it was waited, in order, while ``counting``."""

    def __init__(self):
        super().__init__()
        self.counting, self.waits = False, []

    def wait(self, what: str) -> None:
        if self.counting:
            self.waits.append(what)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_far = any(isinstance(x, FarTensor) for x in flat)
        asked = kwargs.get("device")
        to_far = asked is not None and torch.device(asked) == FAR
        to_cpu = asked is not None and torch.device(asked).type == "cpu"
        if to_far:
            kwargs["device"] = torch.device("cpu")
        if not is_far and not to_far:
            return func(*args, **kwargs)
        near = [x for x in flat if not isinstance(x, FarTensor)]
        if func in READS or (to_cpu and func is aten._to_copy.default):
            self.wait(str(func))
        elif func in FROM_CPU and near and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            if func is aten.copy_.default and not isinstance(args[0], FarTensor):
                self.wait("copy_ to the CPU")
            elif any(x.ndim for x in near):
                self.wait("a blocking copy from the CPU")
        elif func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            places = [x for x in args[1] if x is not None]
            if any(x.dtype == torch.bool for x in places):
                self.wait("a boolean mask")
            elif any(not isinstance(x, FarTensor) for x in places):
                self.wait("indices on the CPU")
        elif func not in FROM_CPU and any(x.ndim for x in near):
            raise RuntimeError(f"{func} of tensors on two devices")
        plain_args, plain_kwargs = tree_map_only(FarTensor, lambda x: x.here, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if func is aten._local_scalar_dense.default or (to_cpu and func is aten._to_copy.default):
            return out
        given = {id(x.here): x for x in flat if isinstance(x, FarTensor)}
        if func is aten.copy_.default and not isinstance(args[0], FarTensor):
            return args[0]
        return tree_map_only(torch.Tensor, lambda x: given.get(id(x)) if id(x) in given else FarTensor(x), out)
