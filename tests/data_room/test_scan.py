"""The processes that share a scan end with the one that started them, and hold none of its locks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_recipes.data import scan
from lora_recipes.run_dir import Locked

ROOT = Path(__file__).parent.parent.parent
SCAN = """
import os, sys, time
from pathlib import Path
from lora_recipes.data import readers, scan
from lora_recipes.data.files import sources
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import Locked

scan.SMALL, readers.CHUNK_BYTES = 0, 50
if sys.argv[2] == "without prctl":
    scan.PR_SET_PDEATHSIG = -1

def slow(chunk):
    Path(f"worker-{os.getpid()}").touch()
    time.sleep(120)

lock = Locked(Path("x.lock"))
lock.acquire(wait=False)
list(scan.scan(sources(load_recipe(sys.argv[1]))[0], "train", slow, 2))
"""


def until(what: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("way", ["with prctl", "without prctl"])
def test_workers_end_with_a_process_that_is_killed_and_let_its_locks_go(
    write_recipe: Callable[..., Path], workdir: Path, way: str
):
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(200)))
    path = write_recipe(dataset={"data_files": "a.jsonl", "eval_split": None})
    with subprocess.Popen(
        [sys.executable, "-c", SCAN, str(path), way], env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as parent:
        try:
            assert until(lambda: len(list(workdir.glob("worker-*"))) == 2)
        finally:
            parent.send_signal(signal.SIGKILL)
    workers = [int(file.name.removeprefix("worker-")) for file in workdir.glob("worker-*")]
    try:
        Locked(Path("x.lock")).acquire(wait=False)
        assert until(lambda: not any(map(runs, workers)), 5)
    finally:
        for worker in filter(runs, workers):
            os.kill(worker, signal.SIGKILL)


def test_a_worker_whose_parent_is_gone_already_does_not_start(workdir: Path):
    child = os.fork()
    if child == 0:
        scan._die_with(parent=os.getppid() + 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
