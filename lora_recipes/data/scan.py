"""One pass over the rows of a split: chunks are worked on in parallel, results come back in file order."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import Any

from lora_recipes.data.files import Source, local_files
from lora_recipes.data.readers import Chunk, read_split
from lora_recipes.errors import MachineError

SMALL = 4 << 20  # bytes: less than this is read faster than processes start
AHEAD = 3  # chunks a process that are read ahead; bounds memory
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Work = Callable[[Chunk], Any]
_work: Work | None = None


def scan(source: Source, split: str, work: Work, processes: int | None) -> Iterator[tuple[Chunk, Any]]:
    """(chunk without its rows, what `work` made of it), in file order.

    Args:
        work: called with a chunk, in another process where the split is large.
        processes: how many; None for one a core.

    Raises:
        DataError, MachineError: the files cannot be read, or a process was killed.
    """
    count = processes or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else processes or 1
    chunks = read_split(source, split)
    if count == 1 or _size(source, split) < SMALL:
        for chunk in chunks:
            yield _emptied(chunk), work(chunk)
        return
    # Forked where that is safe: the tokenizer is inherited instead of being sent, and nothing is imported again.
    context = multiprocessing.get_context("fork" if os.uname().sysname == "Linux" else "spawn")
    pending: deque[tuple[Chunk, Future]] = deque()
    initial = (work, os.getpid())
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=initial) as pool:
        try:
            for chunk in chunks:
                pending.append((_emptied(chunk), pool.submit(_run, chunk)))
                if len(pending) > AHEAD * count:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise MachineError(
                "a process that prepared the data was killed, most likely for memory; set training.dataset_num_proc=1"
            ) from None
        finally:
            for _, future in pending:
                future.cancel()


def _size(source: Source, split: str) -> int:
    if source.is_hub():
        return SMALL
    return sum(file.path.stat().st_size for file in local_files(source, split))


def _emptied(chunk: Chunk) -> Chunk:
    return Chunk(chunk.file, chunk.unit, chunk.first)


def _start(work: Work, parent: int) -> None:
    global _work
    _work = work
    _die_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _die_with(parent: int) -> None:
    """End this process with the one that started it, which may be killed without a chance to say so."""
    # The signal comes when the thread ends that forked: the one that reads the chunks, for as long as it does.
    if sys.platform == "linux" and not ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)):
        if os.getppid() != parent:  # it ended before it was asked for
            os._exit(1)
        return
    Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(chunk: Chunk) -> Any:
    assert _work is not None
    return _work(chunk)
