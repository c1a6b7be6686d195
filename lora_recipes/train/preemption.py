"""Signals that ask a run to end: it saves at the next step, on all ranks, and leaves with exit code 143."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from weakref import WeakSet

from lora_recipes.errors import EXIT_PREEMPTED, Preempted
from lora_recipes.process import STOPPING, follow_parent

# One event reaches a process several times: from its group, from a launcher that forwards it, from a launcher that died.
ONE_EVENT = 3.0  # seconds
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "LORA_RECIPES_OUTCOME_FILE")  # a launcher set it


class Stop:
    """Whether this process was asked to end.

    Attributes:
        by: name of the first signal.
        deferring: a signal is only noted, because what runs looks at `by` itself; else it ends what runs by `Preempted`.
        abandoned: called before a second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.by: str | None = None
        self.deferring = False
        self.abandoned: Callable[[str], None] = lambda reason: None
        self._first = 0.0

    @contextmanager
    def listening(self, *, alone: bool) -> Iterator[None]:
        """Take the signals over, as far as this is the main thread, and give them back at the end.

        Args:
            alone: the process ends afterwards; where it was asked to, no echo of the signal may change its exit code.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._told) for number in STOPPING}
        _listening.add(self)
        try:
            yield
        finally:
            _listening.discard(self)
            if alone:  # at its end Python would ask these with a SIGTERM, and wait for them
                for worker in multiprocessing.active_children():
                    worker.kill()
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if alone and self.by else handler)

    def _told(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.by is None:
            self.by, self._first = name, time.monotonic()
            if self.deferring:
                os.write(2, f"\n{name}: saving after this step, then ending; once more ends at once\n".encode())
            else:
                raise Preempted(f"stopped by {name} before the first step; the same command begins again")
        elif time.monotonic() - self._first > ONE_EVENT:
            self.abandoned(f"ended at once by a second signal ({name})")
            os._exit(EXIT_PREEMPTED)


def end_with_launcher() -> None:
    """Get a SIGTERM when the process that launched this one ends.

    `accelerate launch` ends at a signal without a word to the one process that it started, which would train on.
    """
    if any(name in os.environ for name in LAUNCHED):
        follow_parent()


# A forked process inherits handlers. While rows are prepared it is one of a pool, and ends by signals as it would have.
# In training it loads rows: a signal is for the trainer, which still needs them for its last step, so a worker has the
# signals blocked from its first instant, and ends with the trainer.
_listening: WeakSet[Stop] = WeakSet()
_mask: list[set[int]] = []


def _before_fork() -> None:
    if _listening:
        _mask.append(signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING))


def _after_fork_in_parent() -> None:
    if _mask:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.pop())


def _after_fork_in_child() -> None:
    if not _mask:
        return
    if any(stop.deferring for stop in _listening):
        follow_parent(signal.SIGKILL)
        return
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.pop())


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
