"""Launches as users make them, in processes of their own, that tests send signals to."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_recipes.run_dir import Locked, RunDir, read_json
from lora_recipes.train.checkpoints import numbered
from tests.conftest import ROOT

PATIENCE = 240.0  # seconds
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Launched:
    """A launch in a session of its own, on a run of thousands of steps."""

    def __init__(self, command: list[Any], recipe: Path, workdir: Path) -> None:
        self.recipe, self.run_dir = recipe, RunDir(workdir / "outputs" / recipe.stem)
        self.log = (workdir / f"{recipe.stem}.log").open("w+")
        self.process = subprocess.Popen(
            [str(word) for word in (*command, recipe)],
            cwd=workdir, env=ENVIRONMENT, start_new_session=True, stdout=self.log, stderr=self.log,
        )  # fmt: skip
        wait_until(lambda: self.step() >= 2 or self.process.poll() is not None)
        assert self.process.poll() is None, Path(self.log.name).read_text()

    def step(self) -> int:
        return read_json(self.run_dir.status).get("step") or 0

    def members(self) -> dict[int, str]:
        """pid → command line of the launcher and all that it started: torchrun's ranks have sessions of their own."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (folder / "cmdline").read_text().replace("\0", " ")
                if str(self.recipe) in line:  # a zombie has no command line
                    found[int(folder.name)] = line
        return found

    def require_stopped(self, code: int | None) -> None:
        """Saved, told, and nobody left."""
        ended = self.process.wait(PATIENCE)
        lock = Locked(self.run_dir.lock)
        lock.acquire(wait=True)  # the trainer may outlive its launcher until it has saved
        lock.release()
        wait_until(lambda: not self.members())
        status = read_json(self.run_dir.status)
        log = Path(self.log.name).read_text()
        assert (status["state"], status["exit_code"]) == ("preempted", 143), log
        assert numbered(self.run_dir.checkpoints)[0][0] == status["step"] and not self.run_dir.adapter.exists()
        assert code is None or ended == code, log


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)  # between two looks


LONG = {"max_steps": 20000, "learning_rate": 1e-5, "lr_scheduler_type": "constant", "use_cpu": True}
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs/cpu.yaml"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
VERB = [sys.executable, "-m", "lora_recipes", "train"]
