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

import numpy as np
import xxhash

from lora_recipes.errors import RefusedError

SIZE = 8 * 2**20  # bytes written at a time
ALIGNED = 4096  # bytes; what O_DIRECT wants of addresses, lengths and offsets


class Sink:
    """Takes bytes in order. While one buffer is on its way to the disk the next is filled and its checksum taken.

    Past the page cache nothing is copied twice, and nothing is left for fsync to wait for: a model of 13 GB is written at
    the speed of the disk. Where a file system knows no such writes (tmpfs), the same bytes go the usual way.

    The checksum (XXH3, 128 bits) is for `read_back`, which takes the sha256 too: that of bytes in memory would say nothing
    of the disk, and costs as much as all that is computed on them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.buffers = [mmap.mmap(-1, SIZE), mmap.mmap(-1, SIZE)]  # begin at a page
        self.filled = 0
        self.total = 0
        self.hasher = xxhash.xxh3_128()
        self.disk = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "Sink":
        return self

    def put(self, data: memoryview) -> None:
        """Take the next bytes."""
        self.total += len(data)
        while len(data):
            room = data[: SIZE - self.filled]
            np.copyto(np.frombuffer(self.buffers[0], np.uint8, len(room), self.filled), room)  # lets other threads run
            self.filled += len(room)
            data = data[len(room) :]
            if self.filled == SIZE:
                self._send(SIZE)

    def _send(self, length: int) -> None:
        """Let the full buffer go to the disk, and take the other one."""
        full = self.buffers[0]
        if self.pending is not None:
            self.pending.result()
        self.pending = self.disk.submit(self._write, memoryview(full)[:length])
        self.hasher.update(memoryview(full)[: self.filled])
        self.buffers.reverse()
        self.filled = 0

    def _write(self, data: memoryview) -> None:
        while len(data):
            try:
                data = data[os.write(self.descriptor, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not _stop_direct(self.descriptor):
                    raise OSError(error.errno, error.strerror, str(self.path)) from None

    @property
    def checksum(self) -> str:
        """Of all bytes that were put."""
        return self.hasher.hexdigest()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                if self.filled:
                    self._send(-(-self.filled // ALIGNED) * ALIGNED)  # a whole page; what is too much is cut off below
                if self.pending is not None:
                    self.pending.result()
                os.ftruncate(self.descriptor, self.total)
                os.fsync(self.descriptor)
        finally:
            self.disk.shutdown()
            os.close(self.descriptor)


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
    buffers = [mmap.mmap(-1, SIZE), mmap.mmap(-1, SIZE)]
    descriptor = os.open(path, os.O_RDONLY) if cached else _open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(1) as disk:
            pending = disk.submit(_read, descriptor, buffers[0])
            while read := pending.result():
                full = buffers[0]
                buffers.reverse()
                pending = disk.submit(_read, descriptor, buffers[0])
                hasher.update(memoryview(full)[:read])
                checking.update(memoryview(full)[:read])
    finally:
        os.close(descriptor)
    if checking.hexdigest() != checksum:
        raise RefusedError(f"{path}: its content is not what was written; the disk or somebody changed it")
    return hasher.hexdigest()


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
