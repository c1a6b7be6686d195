"""Files past the page cache, where the system allows it: one that is written once, and one that is read back and proved."""

import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from lora_recipes.errors import RefusedError

SIZE = 8 * 2**20  # bytes that are written at a time, and read
ALIGNED = 4096  # bytes; what O_DIRECT wants of addresses, lengths and offsets
LENT = 2**16  # bytes; what is shorter is copied


class Sink:
    """Takes bytes in order. While some are on their way to the disk the next are gathered.

    Past the page cache nothing is left for fsync to wait for: a model of 13 GB is written at the speed of the disk. Where a
    file system knows no such writes (tmpfs), the same bytes go the usual way. Bytes that lie in memory as they will lie on
    the pages of the file (`congruent`) are written from where they are, the others are copied.

    The checksum (XXH3, 128 bits) is for `read_back`, which takes the sha256 too: that of bytes in memory would say nothing
    of the disk, and costs as much as all that is computed on them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.buffers = [mmap.mmap(-1, SIZE), mmap.mmap(-1, SIZE)]  # begin at a page
        self.filled = self.gathered = 0  # bytes of the first buffer, of which so many are in `pieces`
        self.pieces: list[memoryview] = []  # whole pages, to be written next
        self.size = 0  # bytes in them
        self.total = 0
        self.hasher = xxhash.xxh3_128()
        self.disk = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "Sink":
        return self

    def put(self, data: memoryview) -> None:
        """Take the next bytes, which must stay as they are."""
        if not len(data):
            return
        address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        lent = len(data) >= LENT and (address - self.total) % ALIGNED == 0
        self.total += len(data)
        if lent:
            first = -self.filled % ALIGNED  # bytes until the page that was begun is full
            last = len(data) - (len(data) - first) % ALIGNED
            self._copy(data[:first])
            self._gather()
            self.pieces.append(data[first:last])
            self.size += last - first
            data = data[last:]
        self._copy(data)
        if self.size >= SIZE:
            self._send()

    def _copy(self, data: memoryview) -> None:
        while len(data):
            room = data[: SIZE - self.filled]
            np.copyto(np.frombuffer(self.buffers[0], np.uint8, len(room), self.filled), room)  # lets other threads run
            self.filled += len(room)
            data = data[len(room) :]
            if self.filled == SIZE:
                self._send()

    def _gather(self) -> None:
        """What is in the buffer goes behind the other pieces, but for a page that is not full."""
        whole = self.filled - self.filled % ALIGNED
        if whole > self.gathered:
            self.pieces.append(memoryview(self.buffers[0])[self.gathered : whole])
            self.size += whole - self.gathered
            self.gathered = whole

    def _send(self) -> None:
        """Let the pieces go to the disk, and take the other buffer; a page that is not full moves there."""
        self._gather()
        if self.pending is not None:
            self.pending.result()
        begun = self.filled - self.gathered
        self.buffers[1][:begun] = self.buffers[0][self.gathered : self.filled]
        self.pending = self.disk.submit(self._write, self.pieces)
        self.buffers.reverse()
        self.pieces, self.size, self.filled, self.gathered = [], 0, begun, 0

    def _write(self, pieces: list[memoryview]) -> None:
        for piece in pieces:
            self.hasher.update(piece)
        self._to_disk(pieces)

    def _to_disk(self, pieces: list[memoryview]) -> None:
        while pieces:
            try:
                count = os.writev(self.descriptor, pieces)
            except OSError as error:
                if error.errno != errno.EINVAL or not _stop_direct(self.descriptor):
                    raise OSError(error.errno, error.strerror, str(self.path)) from None
                continue
            while pieces and count >= len(pieces[0]):
                count -= len(pieces.pop(0))
            if count:
                pieces[0] = pieces[0][count:]

    @property
    def checksum(self) -> str:
        """Of all bytes that were put."""
        return self.hasher.hexdigest()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._send()
                assert self.pending is not None
                self.pending.result()
                if self.filled:
                    self.hasher.update(memoryview(self.buffers[0])[: self.filled])
                    self._to_disk([memoryview(self.buffers[0])[:ALIGNED]])  # what is too much is cut off
                os.ftruncate(self.descriptor, self.total)
                os.fsync(self.descriptor)
        finally:
            self.disk.shutdown()
            os.close(self.descriptor)


def congruent(size: int, place: int) -> memoryview:
    """Memory for so many bytes that lies to the pages as the file's bytes from `place` on do, so that it need not be copied.

    Args:
        place: byte of the file that the first one becomes.
    """
    memory = np.empty(size + ALIGNED, np.uint8)
    start = (place - memory.__array_interface__["data"][0]) % ALIGNED
    return memory[start : start + size].data


def read_back(path: Path, checksum: str, *, cached: bool) -> str:
    """The sha256 of a file, which is held against the checksum of what was written.

    Args:
        cached: whether the pages are kept in memory, for who reads the file next; False: they come from the disk.

    Raises:
        RefusedError: it is gone, or it is not, bit for bit, what was written.
    """
    if not path.is_file():
        raise RefusedError(f"{path}: is gone")
    hasher, checking = hashlib.sha256(), xxhash.xxh3_128()
    _feed(path, [hasher, checking], cached)
    if checking.hexdigest() != checksum:
        raise RefusedError(f"{path}: its content is not what was written; the disk or somebody changed it")
    return hasher.hexdigest()


def checksum_of(path: Path) -> str:
    """The checksum of a file as the disk has it."""
    checking = xxhash.xxh3_128()
    _feed(path, [checking], cached=False)
    return checking.hexdigest()


def _feed(path: Path, hashers: list[Any], cached: bool) -> None:
    """A file's bytes to each of these; while one block is hashed the next is read."""
    buffers = [mmap.mmap(-1, SIZE), mmap.mmap(-1, SIZE)]
    descriptor = os.open(path, os.O_RDONLY) if cached else _open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(1) as disk:
            pending = disk.submit(_read, descriptor, buffers[0])
            while read := pending.result():
                full = buffers[0]
                buffers.reverse()
                pending = disk.submit(_read, descriptor, buffers[0])
                for hasher in hashers:
                    hasher.update(memoryview(full)[:read])
    finally:
        os.close(descriptor)


def _read(descriptor: int, buffer: mmap.mmap) -> int:
    try:
        return os.readv(descriptor, [buffer])
    except OSError as error:
        if error.errno != errno.EINVAL or not _stop_direct(descriptor):
            raise
        return os.readv(descriptor, [buffer])


def _open(path: Path, flags: int) -> int:
    with suppress(AttributeError, OSError):  # not every system, and not every file system, has it
        return os.open(path, flags | os.O_DIRECT, 0o644)
    return os.open(path, flags, 0o644)


def _stop_direct(descriptor: int) -> bool:
    """Whether a file went past the page cache until now: some file systems open one so, and then refuse to write or read."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)
