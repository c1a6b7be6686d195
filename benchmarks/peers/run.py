"""One command, measured: wall and CPU seconds, peak memory, and with the hook what each optimizer step did."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.lab import Lab
from benchmarks.peers.trace import figures

HERE = Path(__file__).parent
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "WANDB_DISABLED": "true",
    "DO_NOT_TRACK": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
NOT_INHERITED = ("HF_TOKEN", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
TAIL = 12  # lines of the log that a failure's row holds


def measured(
    words: Sequence[str],
    lab: Lab,
    name: str,
    *,
    threads: int,
    cores: int | None = None,
    environment: Mapping[str, str] | None = None,
    trace: bool = False,
    timeout: float = 3600,
    cwd: Path | None = None,
) -> dict[str, Any]:
    """Run one command with the lab's log under a name, on so many of the machine's cores; unset: all.

    Returns `rc` ("timeout" where it was killed for that), `wall` and `cpu` seconds, `rss_mb` of its largest process, the
    machine's load before and after; traced, also what `figures` makes of the steps; after a failure, `error`: the log's
    last lines.
    """
    log, result, steps = (lab.log(name, kind) for kind in ("log", "json", "trace"))
    for path in (log, result, steps):
        path.unlink(missing_ok=True)
    inherited = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    given = inherited | OFFLINE | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if Path(words[0]).is_absolute():
        given["PATH"] = f"{Path(words[0]).parent}{os.pathsep}{given['PATH']}"  # tools start their own programs by name
    given |= environment or {}
    if trace:
        own = [given["PYTHONPATH"]] if given.get("PYTHONPATH") else []
        given |= {"BENCH_TRACE": str(steps), "PYTHONPATH": os.pathsep.join([str(HERE / "hook"), *own])}
    row: dict[str, Any] = {"load_before": os.getloadavg()[0]}
    clock = [sys.executable, "-I", "-S", str(HERE / "clock.py"), str(result), str(cores or 0)]
    row |= _clocked([*clock, *words], given, log, timeout, cwd)
    if result.is_file():
        row |= json.loads(result.read_text(encoding="utf-8"))
    row["load_after"] = os.getloadavg()[0]
    if trace and steps.is_file():
        row |= figures(steps, row.get("started"))
    row.pop("started", None)
    if row["rc"] != 0:
        row["error"] = "\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-TAIL:])
    return row


def _clocked(
    words: list[str], environment: dict[str, str], log: Path, timeout: float, cwd: Path | None
) -> dict[str, Any]:
    """Run in a session of its own, and leave none of its processes behind."""
    with log.open("wb") as stream:
        running = subprocess.Popen(
            words,
            env=environment,
            cwd=cwd or log.parent,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return {"rc": running.wait(timeout)}
        except subprocess.TimeoutExpired:
            return {"rc": "timeout"}
        finally:
            _end(running.pid)
            running.wait()


def _end(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
