"""Weights on disk, as their headers describe them: where each tensor of a checkpoint begins, without reading any."""

import json
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import torch

from lora_recipes.errors import RefusedError, RunError
from lora_recipes.model.files import model_folder
from lora_recipes.model.source import Source
from lora_recipes.model.weights import CONVERT, read_entries, titles, weight_map
from lora_recipes.recipe import Recipe

# Names of safetensors' types (https://github.com/huggingface/safetensors, README "Format") and of torch's.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
PART = 2**21  # elements that are compared at a time


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `start` is the byte where its values begin."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a model, each with its tensors in the order they lie in."""

    folder: Path
    shards: dict[str, list[Stored]]  # file name → tensors

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        return {stored.name: stored for shard in self.shards.values() for stored in shard}


def checkpoint_of(recipe: Recipe, source: Source) -> Checkpoint:
    """The base's weight files. Those of a hub model are downloaded, or found in the cache.

    Raises:
        RunError: its weights are no safetensors.
        MachineError: they are not in the cache, and the hub cannot be asked.
        RefusedError: a header is broken, a file is shorter than its header says, or the index names a missing file.
    """
    return read_checkpoint(model_folder(recipe, source), recipe.get("model.variant"))


def read_checkpoint(folder: Path, variant: str | None = None) -> Checkpoint:
    """The weight files in `folder`, as transformers would choose them: one file, else those of the index."""
    single, index = (folder / title for title in titles(variant))
    if single.is_file():
        return Checkpoint(folder, {single.name: read_header(single)})
    if not index.is_file():
        raise RunError(
            f"{folder}: no {single.name} and no {index.name}; merging reads safetensors only. Convert the weights first: "
            + CONVERT
        )
    files = weight_map(index)
    shards = {}
    for name in sorted(set(files.values())):
        if not (folder / name).is_file():
            raise RefusedError(f"{index}: names {name}, which is not there")
        # A tensor that the index gives to another file is not what from_pretrained would load.
        shards[name] = [stored for stored in read_header(folder / name) if files.get(stored.name) == name]
    lost = files.keys() - {stored.name for shard in shards.values() for stored in shard}
    if lost:
        raise RefusedError(f"{index}: {min(lost)} is in none of its files")
    return Checkpoint(folder, shards)


def read_header(file: Path) -> list[Stored]:
    """The tensors of one safetensors file, in the order they lie in.

    Raises:
        RefusedError: the header is broken, or the file is not as long as it says.
    """
    try:
        begin, entries = read_entries(file)
        found = [
            (Stored(name, file, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin + first), begin + end)
            for name, entry in entries.items()
            for first, end in [entry["data_offsets"]]
        ]
        found.sort(key=lambda pair: (pair[0].start, pair[1]))
        for stored, end in found:  # each begins where the one before it ends, so none overlap and nothing lies between
            if stored.start != begin or stored.start + stored.bytes != end:
                raise ValueError(f"{stored.name} does not lie where it should")
            begin = end
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise RefusedError(f"{file}: no safetensors file that can be merged: {error}") from None
    if file.stat().st_size != begin:
        raise RefusedError(f"{file}: {file.stat().st_size} bytes long, where its header says {begin}; it was cut off")
    return [stored for stored, _ in found]


def header_bytes(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The head of a safetensors file whose tensors lie in this order. Values begin at a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Files:
    """Files that are read at a place, each opened once. May be used by several threads."""

    def __init__(self) -> None:
        self.descriptors: dict[Path, int] = {}
        self.opening = Lock()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def read_into(self, stored: Stored, first: int, buffer: torch.Tensor) -> None:
        """Fill `buffer` (1-D, of the stored type) with the tensor's values from number `first` on."""
        descriptor = self._descriptor(stored.file)
        view = memoryview(buffer.view(torch.uint8).numpy())
        at, read = stored.start + first * stored.dtype.itemsize, 0
        while read < len(view):
            count = os.preadv(descriptor, [view[read:]], at + read)
            if not count:
                raise RefusedError(f"{stored.file}: {stored.name} was cut off while it was read")
            read += count

    def announce(self, stored: Stored, first: int, count: int) -> None:
        """Let the system begin to read what will be asked for soon: `count` values from number `first` on."""
        size = stored.dtype.itemsize
        if not count:
            return  # a length of 0 would be the whole file
        with suppress(AttributeError, OSError):  # a hint, which not every system takes
            os.posix_fadvise(
                self._descriptor(stored.file), stored.start + first * size, count * size, os.POSIX_FADV_WILLNEED
            )

    def _descriptor(self, file: Path) -> int:
        with self.opening:
            if file not in self.descriptors:
                self.descriptors[file] = descriptor = os.open(file, os.O_RDONLY)
                with suppress(AttributeError, OSError):  # a hint, which not every system takes
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return self.descriptors[file]

    def read(self, stored: Stored) -> torch.Tensor:
        """The whole tensor."""
        return self._part(stored, 0, stored.numel).view(stored.shape)

    def equal(self, one: Stored, other: Stored, loaded: torch.dtype) -> bool:
        """Whether two tensors are the same once they are loaded in a type. Embeddings: they are read part by part."""
        if one.shape != other.shape:
            return False
        for first in range(0, one.numel, PART):
            count = min(PART, one.numel - first)
            parts = [self._part(stored, first, count).to(loaded) for stored in (one, other)]
            if not torch.equal(*parts):
                return False
        return True

    def _part(self, stored: Stored, first: int, count: int) -> torch.Tensor:
        flat = torch.empty(count, dtype=stored.dtype)
        self.read_into(stored, first, flat)
        return flat
