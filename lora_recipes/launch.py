"""A training in processes of its own: how it is started, and how it ended, whatever a launcher makes of its exit code."""

import tempfile
from pathlib import Path
from typing import Any

from lora_recipes import process
from lora_recipes.errors import EXIT_PREEMPTED
from lora_recipes.run_dir import Locked, RunDir, read_json


def trained(command: list[str], run_dir: RunDir, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a training to its end, and hand every signal that asks to stop on to it.

    Args:
        command: what starts it.
        run_dir: the folder that it trains in.
        environment: variables beside those of this process.

    Returns:
        {"exit_code", "message"}.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "outcome.json"
        code, asked = process.run_to_the_end(command, (environment or {}) | {process.OUTCOME_FILE: str(told)})
        if asked and not told.exists() and run_dir.lock.exists():
            # `accelerate launch` is gone at once, while the trainer that it started still saves and holds its lock.
            lock = Locked(run_dir.lock)
            lock.acquire(wait=True)
            lock.release()
        failed = {"exit_code": code, "message": "training failed, see above"}
        stopped = {"exit_code": EXIT_PREEMPTED, "message": f"stopped by {asked} before the run began"}
        return read_json(told) or (stopped if asked else failed)
