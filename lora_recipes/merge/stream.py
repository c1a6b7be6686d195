"""Writes a merged model shard by shard: blocks are read and merged side by side; what was finished survives a kill."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock, local
from typing import Any

import torch

from lora_recipes import console
from lora_recipes.errors import RefusedError
from lora_recipes.merge.arithmetic import by_rows, convert_and_merge, merge_rows, require_finite, rounded_away
from lora_recipes.merge.checkpoint import INDEX, Files, Stored, header_bytes
from lora_recipes.merge.direct import Sink, checksum_of, congruent
from lora_recipes.merge.layout import Layer, Layout, Unit
from lora_recipes.merge.requantize import Requantizer
from lora_recipes.run_dir import read_json, write_json

BLOCK = 2**19  # elements that are read and merged at a time
ROWS = 64  # a block is a multiple of so many rows: matrix kernels then treat it as they treat the whole
AHEAD = 12  # blocks that are merged before the first of them is written
AHEAD_BYTES = 2**28  # of them, where weights have to be read whole
COPIES = 16  # of layers that a thread keeps
SAMPLE = 16  # rows of each adapted matrix on which the rounding of the change is measured
DONE = ".done.json"  # shards that are whole


@dataclass
class Streamed:
    """What was written: checksum of each file, files kept from an earlier try, and the change that rounding took."""

    checksums: dict[str, str] = field(default_factory=dict)
    kept: int = 0
    lost: float = 0.0
    changed: float = 0.0

    @property
    def rounded_away(self) -> float | None:
        """‖change lost to rounding‖ / ‖change‖ over the sampled rows; None where nothing was sampled."""
        return (self.lost / self.changed) ** 0.5 if self.changed else None


@dataclass(frozen=True)
class Block:
    """Rows of a unit's only parameter, from number `first` on, which are written from byte `place` of the file on.

    `rows` counts elements where it has one dimension.

    Attributes:
        alone: it has to be read and merged whole, or is converted: one such at a time, for the memory.
    """

    unit: Unit
    output: int
    first: int
    rows: int
    place: int
    alone: bool = False

    @property
    def bytes(self) -> int:
        output = self.unit.outputs[self.output]
        return output.bytes * self.rows // output.shape[0] if output.shape and output.shape[0] else output.bytes


@dataclass
class Merged:
    """A block as it is written, and what rounding took of the change that was sampled in it (`rounded_away`)."""

    tensor: torch.Tensor
    lost: float = 0.0
    changed: float = 0.0


class Merger:
    """Turns the units of a layout into bytes.

    Args:
        requantizer: quantizes and opens the weights that were trained on in 4 or 8 bits; None: merge into the originals.
        workers: threads that read and merge.
    """

    def __init__(self, layout: Layout, files: Files, requantizer: Requantizer | None, workers: int = 1) -> None:
        self.layout, self.files, self.requantizer, self.workers = layout, files, requantizer, workers
        self.result = Streamed()
        self.converted: dict[str, torch.Tensor] = {}  # computed, and not written yet
        self.alone = Lock()
        self.written: set[str] = set()  # in shards that were kept
        self.thread = local()  # .layers: a worker's copies of PEFT's

    def write(self, folder: Path, plan: str) -> Streamed:
        """Write every shard and the index into `folder`; shards that are there already and whole are kept.

        Args:
            plan: says what is merged into what; what is there of another plan is removed.

        Raises:
            RefusedError: NaN or infinity.
        """
        folder.mkdir(parents=True, exist_ok=True)
        finished = _finished(folder, plan)
        _remove_others(folder, finished)
        self.result.kept = len(finished)
        self.written = {unit.outputs[n].name for title in finished for unit, n in self.layout.shards[title]}
        for title in self.layout.shards:
            if title in finished:
                continue
            self.result.lost = self.result.changed = 0.0
            checksum = self._shard(folder, title)
            finished[title] = {"checksum": checksum, "lost": self.result.lost, "changed": self.result.changed}
            write_json(folder / DONE, {"plan": plan, "shards": finished})
        records = [finished[title] for title in self.layout.shards]  # added up in one order, whatever was kept
        self.result.checksums = {title: finished[title]["checksum"] for title in self.layout.shards}
        self.result.lost = sum(record["lost"] for record in records)
        self.result.changed = sum(record["changed"] for record in records)
        if len(self.layout.shards) > 1:
            self._index(folder)
        return self.result

    def _index(self, folder: Path) -> None:
        shards = self.layout.shards
        weight_map = {unit.outputs[number].name: title for title, shard in shards.items() for unit, number in shard}
        parameters = self.layout.model.num_parameters()
        metadata = {"total_parameters": parameters, "total_size": self.layout.bytes}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})

    def _shard(self, folder: Path, title: str) -> str:
        """Write one shard under another name, and give it its own when it is on disk. Returns its checksum."""
        shard = self.layout.shards[title]
        growing = folder / f".{title}.part"
        outputs = [unit.outputs[number] for unit, number in shard]
        head = header_bytes([(output.name, output.dtype, output.shape) for output in outputs])
        blocks: list[Block] = []
        place = len(head)
        for unit, number in shard:
            blocks += self._blocks(unit, number, place)
            place += unit.outputs[number].bytes
        with Sink(growing) as sink:
            sink.put(memoryview(head))
            self._pump(blocks, lambda tensor: sink.put(_bytes_of(tensor)))
        size = growing.stat().st_size
        if size != place:
            raise RefusedError(f"{growing}: {size} bytes were written, not what its header says")
        growing.replace(folder / title)
        console.say(f"{title}: {len(outputs)} tensors, {size / 2**20:,.0f} MiB")
        return sink.checksum

    def _blocks(self, unit: Unit, number: int, place: int) -> Iterator[Block]:
        shape = unit.outputs[number].shape
        rows = shape[0] if shape else 1
        requantized = self.requantizer is not None and self.requantizer.wants(unit.parameters[0])
        if unit.converter is not None or requantized or not shape or not all(by_rows(layer) for layer in unit.layers):
            yield Block(unit, number, 0, rows, place, alone=True)
            return
        width = max(1, unit.outputs[number].bytes // unit.outputs[number].dtype.itemsize // max(rows, 1))
        step = _rows_of(width)
        for first in range(0, rows, step):
            block = Block(unit, number, first, min(step, rows - first), place)
            yield block
            place += block.bytes

    def _pump(self, blocks: list[Block], put: Callable[[torch.Tensor], None]) -> None:
        """Every block is read and merged, and given to `put` in order; the next ones are merged meanwhile."""
        waiting: deque[tuple[Block, Future[Merged]]] = deque()
        ahead = 0  # bytes
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for block in blocks:
                    while waiting and (len(waiting) == AHEAD or ahead + block.bytes > AHEAD_BYTES):
                        ahead -= self._settle(*waiting.popleft(), put)
                    self._announce(block)
                    waiting.append((block, pool.submit(self._merged, block)))
                    ahead += block.bytes
                while waiting:
                    self._settle(*waiting.popleft(), put)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _settle(self, block: Block, merging: Future[Merged], put: Callable[[torch.Tensor], None]) -> int:
        """Write a block and add up what rounding took, in one order whoever was first. Returns its bytes."""
        merged = merging.result()
        put(merged.tensor)
        self.result.lost += merged.lost
        self.result.changed += merged.changed
        return block.bytes

    @torch.no_grad()
    def _merged(self, block: Block) -> Merged:
        """Read a block and merge it; in a worker's thread."""
        unit, output = block.unit, block.unit.outputs[block.output]
        with self.alone if block.alone else nullcontext():
            if unit.converter is not None:
                merged = Merged(self._converted(unit, output.name))
            else:
                tensor = self._read(block).to(unit.loaded)
                if self.requantizer:
                    tensor = self.requantizer.opened(unit.parameters[0], tensor)
                merged = Merged(tensor.to(output.dtype))
                for layer in self._own(unit.layers):
                    self._change(layer, unit, merged, block.first)
        if unit.layers:
            require_finite(merged.tensor, output.name)
        return merged

    def _own(self, layers: tuple[Layer, ...]) -> list[Layer]:
        """PEFT's layers are lent the weights they change: each thread has its own, with the adapter's tensors in common."""
        mine: dict[int, Layer] = self.thread.__dict__.setdefault("layers", {})
        if len(mine) > COPIES:  # blocks come in the order of their layers
            mine.clear()
        for layer in layers:
            if id(layer) not in mine:
                common = [*layer.parameters(), *layer.buffers()]
                mine[id(layer)] = deepcopy(layer, {id(tensor): tensor for tensor in common})
        return [mine[id(layer)] for layer in layers]

    def _announce(self, block: Block) -> None:
        if block.unit.whole is None and block.unit.converter is None:
            width = _width(block.unit.stored[0])
            self.files.announce(block.unit.stored[0], block.first * width, block.rows * width)

    def _read(self, block: Block) -> torch.Tensor:
        unit = block.unit
        if unit.whole is not None:
            rows = unit.whole.detach()[block.first : block.first + block.rows]
            return rows.clone() if unit.layers else rows  # merging may change them in place
        stored = unit.stored[0]
        width = _width(stored)
        size = block.rows * width * stored.dtype.itemsize
        if size and stored.dtype == unit.loaded == unit.outputs[block.output].dtype:  # written from there
            flat = torch.frombuffer(congruent(size, block.place), dtype=stored.dtype)
        else:
            flat = torch.empty(block.rows * width, dtype=stored.dtype)
        self.files.read_into(stored, block.first * width, flat)
        return flat.view(block.rows, *stored.shape[1:]) if stored.shape else flat.view(())

    def _converted(self, unit: Unit, name: str) -> torch.Tensor:
        """One of the tensors that are written of a unit; whoever asks for the first computes them all."""
        if name not in self.converted:
            own = replace(unit, layers=tuple(self._own(unit.layers)))
            found = convert_and_merge(own, self.layout.model, self.files, self.requantizer)
            self.converted |= {name: value for name, value in found.items() if name not in self.written}
        return self.converted.pop(name)

    def _change(self, layer: Layer, unit: Unit, merged: Merged, first: int) -> None:
        tensor = merged.tensor
        sampled = first == 0 and tensor.dim() == 2
        before = tensor[:SAMPLE].clone() if sampled else tensor
        parameter = self.layout.model.get_parameter_or_buffer(unit.parameters[0])
        step = _rows_of(max(1, tensor[0].numel())) if by_rows(layer) else len(tensor)
        if step >= len(tensor):
            merged.tensor = merge_rows(layer, parameter, tensor, first)
        else:  # a weight that had to be read whole: merged in runs of rows, for the memory
            for start in range(0, len(tensor), step):
                part = merge_rows(layer, parameter, tensor[start : start + step], first + start)
                if part.data_ptr() != tensor[start].data_ptr():
                    tensor[start : start + step] = part
        if sampled:
            lost, wanted = rounded_away(layer, before, merged.tensor[:SAMPLE])
            merged.lost += lost
            merged.changed += wanted


def _width(stored: Stored) -> int:
    """Elements of a row."""
    return stored.numel // stored.shape[0] if stored.shape and stored.shape[0] else 1


def _rows_of(width: int) -> int:
    """Rows of a block whose rows have `width` elements."""
    return max(ROWS, BLOCK // width // ROWS * ROWS)


def _finished(folder: Path, plan: str) -> dict[str, Any]:
    """File name → record of each shard that an earlier try of the same plan has written, and that is whole."""
    try:
        done = read_json(folder / DONE)
    except ValueError:  # no record is no progress
        return {}
    if done.get("plan") != plan:
        return {}
    records: dict[str, Any] = done["shards"]
    return {
        title: record
        for title, record in records.items()
        # Records of older versions have no checksum.
        if "checksum" in record and (folder / title).is_file() and checksum_of(folder / title) == record["checksum"]
    }


def _remove_others(folder: Path, kept: dict[str, Any]) -> None:
    """Whatever else an earlier try has left: half-written shards, damaged ones, and those of another plan."""
    for file in [*folder.glob("*.safetensors"), *folder.glob(".*.part"), folder / INDEX]:
        if file.name not in kept:
            file.unlink(missing_ok=True)


def forget_progress(folder: Path) -> None:
    """Remove the record of what is whole. Until then a merge into `folder` goes on where it was."""
    (folder / DONE).unlink(missing_ok=True)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
