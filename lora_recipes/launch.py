"""A training in processes of its own: how it is started, and how it ended, whatever a launcher makes of its exit code."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_recipes import process
from lora_recipes.errors import EXIT_PREEMPTED, RefusedError
from lora_recipes.run_dir import Locked, RunDir, read_json

# How a launcher tells its processes what an accelerate config says, and what decides in which order numbers are added.
LAUNCH_VARIABLE = re.compile(
    r"(ACCELERATE|FSDP|PARALLELISM_CONFIG|FP8)_\w+|OMP_NUM_THREADS|MKL_(NUM_THREADS|CBWR|ENABLE_INSTRUCTIONS)"
    r"|ONEDNN_(MAX_CPU_ISA|DEFAULT_FPMATH_MODE)|ATEN_CPU_CAPABILITY|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE"
    r"|NCCL_(ALGO|PROTO)"
)

NONE, FSDP, ZERO3 = "whole weights", "FSDP", "DeepSpeed ZeRO-3"  # how processes share a model out


def sharding(environment: Mapping[str, str]) -> str:
    """How a launch with these variables shares a model out: NONE, FSDP, or DeepSpeed with its stage."""
    if process.is_set(environment, "ACCELERATE_USE_FSDP"):
        return FSDP
    if process.is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        return f"DeepSpeed ZeRO-{stage}" if stage else "DeepSpeed"
    return NONE


def environment_of(manifest: dict[str, Any], file: Path) -> dict[str, str]:
    """The variables that a run was launched with, as its manifest has them.

    Raises:
        RefusedError: one that no launch writes there. Others decide what code runs.
    """
    told, threads = manifest["launch"]["environment"], manifest["launch"]["threads"]
    for name, value in told.items():
        if not LAUNCH_VARIABLE.fullmatch(name) or not isinstance(value, str):
            raise RefusedError(
                f"{file}: `launch.environment` sets {name!r}, which no run of ours writes down and which could change what code "
                "runs; take it out if you trust the folder"
            )
    return told | ({process.THREADS: str(threads)} if threads else {})


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
