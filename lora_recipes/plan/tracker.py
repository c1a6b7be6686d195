"""Counts the bytes of live tensors while code runs: each storage once, from the operation that made it to its release."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Every storage that an operation returns within the block, in bytes; works on real, meta and fake tensors.

    What a kernel allocates and frees inside one operation is not seen.

    Attributes:
        live, peak: bytes now, and at most so far.
        events: one signed size for each storage that came or went, in order.
        marks: (label, number of events before it), set by `mark`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.events: list[int] = []
        self.marks: list[tuple[Any, int]] = []
        self._held: dict[int, Any] = {}  # address of a storage: a weak reference, None for those not counted

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that existed before."""
        for tensor in tensors:
            self._add(tensor)

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these, which must outlive the block, nor views of them."""
        for tensor in tensors:
            self._held[tensor.untyped_storage()._cdata] = None

    def mark(self, label: Any) -> None:
        """Remember that what comes now belongs to another part of the run."""
        self.marks.append((label, len(self.events)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return

        def freed(_: Any) -> None:
            self.live -= size
            self.events.append(-size)
            self._held.pop(key, None)

        self._held[key] = weakref.ref(storage, freed)
        self.events.append(size)
        self.live += size
        self.peak = max(self.peak, self.live)
