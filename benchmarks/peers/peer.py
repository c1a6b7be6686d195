"""What a comparison knows of one tool: how it is installed, how it does the job, and what it leaves behind."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.lab import Lab

TORCH = "torch==2.13.0"
SEED = 42
QV = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS: Mapping[str, tuple[str, ...]] = {"qv": QV, "all-linear": ALL_LINEAR}


@dataclass(frozen=True)
class Job:
    """LoRA training of the base: the same for every tool, as far as it can be asked for."""

    name: str  # one of TARGETS
    steps: int
    schedule: str = "constant"  # or "linear"
    checkpointing: bool | None = None  # of activations; unset: as the tool's `Peer` says
    rank: int = 16
    alpha: int = 32
    max_length: int = 512
    batch: int = 4
    learning_rate: float = 2e-4
    device: str = "cpu"  # or "gpu"
    dtype: str = "float32"  # or "bfloat16": what another tool is asked for; ours go by name, and by device

    @property
    def bf16(self) -> bool:
        return self.dtype == "bfloat16"

    @property
    def targets(self) -> tuple[str, ...]:
        return TARGETS[self.name]


@dataclass(frozen=True)
class Command:
    """Words, and the environment variables that they need beside the common ones."""

    words: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None  # made where it is not there; unset: beside the log


class CannotError(Exception):
    """The tool has no way to do what is asked: a row says so, and why."""


@dataclass(frozen=True)
class Peer:
    """One tool."""

    name: str
    distribution: str  # whose version its row names
    pip: tuple[tuple[str, ...], ...]  # the words of one `pip install` after another
    help: Callable[[Lab], Command]
    train: Callable[[Lab, Job], Command]
    adapter: Callable[[Lab, str], Path]  # a folder in PEFT's format; raises CannotError
    merge: Callable[[Lab, str], list[Command]] = lambda lab, job: []
    merged: Callable[[Lab, str], Path] | None = None  # the folder that a merge writes; unset: it has no such command
    prepare: Callable[[Lab], list[Command]] = lambda lab: []  # once, after it was installed
    checkpointing: bool = False  # of activations, where the job leaves it open
    differs: str = ""  # what of the job it does another way
    gpu: bool = False  # whether its command can be asked to train on one
    own: bool = False  # run by the interpreter that measures, instead of in an environment of its own


def write_config(path: Path, config: Mapping[str, Any]) -> str:
    """A YAML file, written as JSON, which is YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return str(path)


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint-N with the largest N."""
    return max(folder.glob("checkpoint-*"), key=lambda found: int(found.name.rpartition("-")[2]), default=folder)
