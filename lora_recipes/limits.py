"""Limits of time and memory on what a stranger wrote and we run: chat templates, regular expressions."""

import re
import resource
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TICK = 0.5  # seconds between two looks at a block that runs


class TooMuch(Exception):
    """What a file asked for took more time than it may."""


LONGEST_PATTERN = 4_000  # characters; those that tools write for models with images have some 500
PATTERN_SECONDS = 2.0  # to match all names of a model; a millisecond each is slow already


def pattern_fault(pattern: str, names: Iterable[str]) -> str | None:
    """Why a regular expression is no use for these names: it can take longer than the world lasts. None when it is."""
    shown = repr(pattern)[:100]
    if len(pattern) > LONGEST_PATTERN:
        return f"a pattern of {len(pattern):,} characters, more than {LONGEST_PATTERN:,}"
    try:
        with bounded(seconds=PATTERN_SECONDS):
            expression = re.compile(pattern)
            for name in names:
                expression.fullmatch(name)
    except TooMuch:
        return f"the pattern {shown} takes more than {PATTERN_SECONDS:.0f} s on the names of the layers"
    except (re.error, OverflowError, RecursionError) as error:
        return f"{shown} is no pattern: {error}"
    return None


class _Watch:
    """What `watched` and the blocks in it share: whether the clock ticks, and until when the block of now may take."""

    armed = False
    deadline: float | None = None


def _look(number: int, frame: Any) -> None:
    if _Watch.deadline is not None and time.monotonic() > _Watch.deadline:
        raise TooMuch


class bounded:
    """A block that is broken off after `seconds`. Only the main thread can be; in another there is no limit.

    Args:
        memory: bytes that the process may grow by meanwhile (Linux). Within `watched` that of the whole holds.

    Raises:
        TooMuch: after `seconds`.
        MemoryError: more than `memory`.
    """

    def __init__(self, *, seconds: float, memory: int | None = None) -> None:
        self.seconds, self.memory = seconds, memory

    def __enter__(self) -> None:
        self.clock = None if _Watch.armed else watched(memory=self.memory)
        if self.clock is not None:
            self.clock.__enter__()
        self.before, _Watch.deadline = _Watch.deadline, time.monotonic() + self.seconds

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        _Watch.deadline = self.before
        if self.clock is not None:
            self.clock.__exit__(kind, error, trace)


@contextmanager
def watched(*, memory: int | None = None) -> Iterator[None]:
    """Many `bounded` blocks, with a clock and a limit of memory that are set once: each then costs a microsecond."""
    main = threading.current_thread() is threading.main_thread()
    if not main or _Watch.armed or signal.getitimer(signal.ITIMER_REAL)[0]:  # somebody else's clock: a test runner's
        yield
        return
    before = signal.signal(signal.SIGALRM, _look)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    _Watch.armed = True
    try:
        if memory is not None:
            _limit_memory(memory, limits[1])
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        _Watch.armed = False


def _limit_memory(more: int, hard: int) -> None:
    with suppress(OSError, ValueError):  # no /proc, or a lower limit of its own
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
