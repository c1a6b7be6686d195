"""Processes that train together: how long they wait for each other, and who is missing when they waited in vain."""

import os
import re
import signal
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.distributed import DistError, TCPStore

from lora_recipes.errors import RankLost
from lora_recipes.process import STOPPING

ANSWER = timedelta(seconds=3)  # for a rank that is alive to say so: all that wait in one exchange give up together
OF_GLOO = re.compile(r"gloo|pair closure")  # its errors have no type of their own
# What is said of a connection to a process that is gone, or does not answer.
LOST = re.compile(r"closed|closure|reset|[Tt]imed out|[Tt]imeout|Broken pipe|remote process|peer", re.IGNORECASE)
KEYS = "lora-recipes/ranks"  # of keys in the launcher's store; attempt, rank and one of these follow
LOST_CONTACT, PROCESS = "lost-contact", "process"
ENDED, HALTED = ("Z", "X"), ("T", "t")  # states of a process, proc(5)


def meet(training: Mapping[str, Any]) -> None:
    """Connect the processes of a CPU run so that they wait no longer than `training.ddp_timeout` for each other.

    The Trainer, which connects them otherwise, hands that on for GPUs only: gloo would wait for half an hour.
    """
    if training.get("use_cpu") and training.get("ddp_timeout") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=True, backend=training.get("ddp_backend"), timeout=timedelta(seconds=training["ddp_timeout"]))


def introduce() -> None:
    """Leave word which process this rank is, for the others of this machine to look after. Only where a launcher keeps it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        with suppress(DistError):  # without it, whoever is silent is named
            _store().set(key(int(os.environ["RANK"]), PROCESS), f"{pid_space()} {os.getpid()}")


def key(rank: int, what: str) -> str:
    """In the store. A launcher that starts its processes again keeps its store."""
    return f"{KEYS}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}/{what}"


def _store() -> TCPStore:
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=ANSWER)


def lost_contact(error: BaseException) -> RankLost | None:
    """What an error in an exchange between processes means; None for any other error.

    Takes some seconds, in which signals are ignored: this process ends anyway, and its launcher, which sends one as soon
    as a rank is gone, shall not cut the explanation off.
    """
    if not (isinstance(error, DistError) or OF_GLOO.search(str(error))):
        return None
    if not LOST.search(str(error)):  # a GPU that is used twice, a port that is taken: told as what they are
        return None
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
    silent, world = silent_ranks(), os.environ.get("WORLD_SIZE", "1")
    who = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))} of {world}" if silent else "another process"
    hung = "imed out" in str(error) or "imeout" in str(error)
    what = (
        "did not answer in time (training.ddp_timeout): it hangs, was stopped, or works alone for longer than that"
        if hung
        else "is gone: it was killed, or its machine has no memory or no network left"
    )
    return RankLost(
        f"{who} {what}; see what it said, and the kernel's log. The last good checkpoint is whole, and the same command goes on. "
        f"Told by rank {os.environ.get('RANK', '0')}: {str(error).splitlines()[0]}"
    )


def silent_ranks() -> list[int]:
    """Ranks that do not say within seconds that they, too, have lost contact; [] where that cannot be known.

    Asked for in the store through which the launcher brought them together, which outlives all of them; where it lived
    in rank 0 and is gone, that is the answer. With three ranks or more a silent one may still wait for another: of those,
    the ones whose process has ended or was halted are the cause, where they are of this machine.
    """
    here, ranks = int(os.environ["RANK"]), range(int(os.environ["WORLD_SIZE"]))
    try:
        store = _store()
        store.set(key(here, LOST_CONTACT), "here")
    except DistError:
        return [0] if here else []
    try:
        store.wait([key(rank, LOST_CONTACT) for rank in ranks], ANSWER)
    except DistError:
        silent = list(ranks)
        with suppress(DistError):  # the launcher may go at any moment
            silent = [rank for rank in ranks if not store.check([key(rank, LOST_CONTACT)])]
            return [rank for rank in silent if _stands_still(store, rank)] or silent
        return silent
    return []


def _stands_still(store: TCPStore, rank: int) -> bool:
    """Whether a rank of this machine has ended or was halted."""
    name = key(rank, PROCESS)
    place, _, pid = store.get(name).decode().rpartition(" ") if store.check([name]) else ("", "", "")
    if place != pid_space():
        return False
    try:
        stat = Path("/proc", pid, "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in (*ENDED, *HALTED)


def pid_space() -> str:
    """Where a process has the number that it has: containers of one machine, and of one host name, count for themselves."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()
