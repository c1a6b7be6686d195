"""Counts the bytes of live tensors while code runs: each storage once, from the operation that made it to its release."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Every storage that an operation returns within the block, and those given to `hold`, in bytes.

    Works on real, meta and fake tensors. What a kernel allocates and frees inside one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.events: list[tuple[int, int]] = []  # (number of the storage, bytes; negative when it is freed)
        self._held: dict[int, tuple[int, Any]] = {}  # address of the storage: its number, a weak reference

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that existed before."""
        for tensor in tensors:
            self._add(tensor)

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """The number of a live tensor's storage in `events`."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        return held[0] if held else None

    def peak_without(self, numbers: set[int]) -> int:
        """The peak in bytes as if the storages with these numbers took nothing."""
        live = peak = 0
        for number, size in self.events:
            live += 0 if number in numbers else size
            peak = max(peak, live)
        return peak

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
        number = len(self.events)

        def freed(_: Any) -> None:
            self.live -= size
            self.events.append((number, -size))
            self._held.pop(key, None)

        self._held[key] = (number, weakref.ref(storage, freed))
        self.events.append((number, size))
        self.live += size
        self.peak = max(self.peak, self.live)
