"""Bytes that operations hold: those of every storage from the operation that makes it to its end."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What was there before is not counted.
        old = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in old | self._known:
                storage = leaf.untyped_storage()
                self._known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._end, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
