"""Rows of the comparison: a tool's training, its help, its merge, and the held-out loss of what it trained."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peers.install import version
from benchmarks.peers.lab import Lab, opened
from benchmarks.peers.peer import CannotError, Command, Job, Peer
from benchmarks.peers.run import measured
from benchmarks.peers.tools import axolotl, litgpt, llamafactory, ours, swift, torchtune, trl

ROOT = Path(__file__).parent.parent.parent
OURS: dict[str, Peer] = {peer.name: peer for peer in (ours.PEER, ours.FLOAT32, ours.FLASH_ATTENTION)}
OTHERS: dict[str, Peer] = {tool.PEER.name: tool.PEER for tool in (axolotl, torchtune, trl, llamafactory, litgpt, swift)}
PEERS = OURS | OTHERS
HELP_SECONDS, MERGE_SECONDS = 300, 900


def measure(
    peer: str,
    job: str,
    steps: int,
    lab: Path,
    threads: int = 1,
    *,
    cores: int | None = None,
    schedule: str = "constant",
    checkpointing: bool | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    timeout: float = 3600,
) -> dict[str, Any]:
    """Train with one tool, traced; its earlier result of this job is deleted first.

    `threads` is what OMP_NUM_THREADS asks for, `cores` how many the run is held to; a row has the `threads` it then took.
    Returns what was asked (`peer`, `version`, `job`, `threads` ...) with what `run.measured` and `trace.figures` give.
    A tool that failed has `rc` and `error`; one that cannot do this has `rc` None and `reason`. `dtype` is for the other
    tools: ours say by their name what they compute in.
    """
    tool, place = PEERS[peer], opened(lab)
    asked = Job(job, steps, schedule, checkpointing, device=device, dtype=dtype)
    row: dict[str, Any] = _named(tool, place, job, threads) | {
        "asked_steps": steps,
        "cores": cores,
        "schedule": schedule,
        "checkpointing": tool.checkpointing if checkpointing is None else checkpointing,
        "differs": tool.differs,
    }
    try:
        if device == "gpu" and not tool.gpu:
            raise CannotError("measured on CPUs only")
        command = tool.train(place, asked)
        shutil.rmtree(place.out(peer, job), ignore_errors=True)
        if device == "gpu":
            # The first of them: some tools would take all, and the table is of one.
            cards = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}
            command = replace(command, environment={**command.environment, **cards})
        took = _run(tool, place, f"{peer}-{job}", command, threads, timeout, cores, trace=True)
    except CannotError as reason:
        return row | {"rc": None, "reason": str(reason)}
    if took["rc"] == 0 and took.get("steps") != steps:
        took |= {"rc": "steps", "error": f"it made {took.get('steps', 0)} steps of {steps}"}
    return row | took


def measure_help(peer: str, lab: Path, threads: int = 1) -> dict[str, Any]:
    """What a tool takes to say how its training command is used."""
    tool, place = PEERS[peer], opened(lab)
    row = _named(tool, place, None, threads)
    try:
        return row | _run(tool, place, f"{peer}-help", tool.help(place), threads, HELP_SECONDS)
    except CannotError as reason:
        return row | {"rc": None, "reason": str(reason)}


def measure_merge(peer: str, job: str, lab: Path, threads: int = 1) -> dict[str, Any]:
    """Merge what `measure` trained, with the tool's own commands, one after another where it takes several.

    `loadable` says whether what it wrote has a config.json and safetensors. The merged model is deleted.
    """
    tool, place = PEERS[peer], opened(lab)
    row = _named(tool, place, job, threads)
    if tool.merged is None:
        return row | {"rc": None, "reason": "no command that merges"}
    merged = tool.merged(place, job)
    shutil.rmtree(merged, ignore_errors=True)
    row |= {"wall": 0.0, "cpu": 0.0, "rss_mb": 0.0, "commands": []}
    try:
        for number, command in enumerate(tool.merge(place, job)):
            took = _run(tool, place, f"{peer}-{job}-merge-{number}", command, threads, MERGE_SECONDS)
            row["commands"].append(took)
            if took["rc"] != 0:
                return row | {"rc": took["rc"], "error": took["error"]}
            row |= {key: row[key] + took[key] for key in ("wall", "cpu")}
            row["rss_mb"] = max(row["rss_mb"], took["rss_mb"])
    except CannotError as reason:
        return row | {"rc": None, "reason": str(reason)}
    loadable = (merged / "config.json").is_file() and any(merged.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in merged.rglob("*") if file.is_file())
    shutil.rmtree(merged)
    return row | {"rc": 0, "loadable": loadable, "bytes": size}


def adapter_of(peer: str, job: str, lab: Path) -> Path:
    """The folder of what `measure` trained, in PEFT's format.

    Raises:
        CannotError: the tool writes no such adapter, or has not trained.
    """
    folder = PEERS[peer].adapter(opened(lab), job)
    if not (folder / "adapter_config.json").is_file():
        raise CannotError(f"{folder}: no adapter there")
    return folder


def held_out_loss(adapter: Path | None, lab: Path, threads: int = 1) -> dict[str, Any]:
    """Mean loss per supervised token on the held-out rows, by one evaluator for all; without an adapter, the base's."""
    place = opened(lab)
    words = [sys.executable, "-m", "benchmarks.peers.held_out", str(place.base), str(place.held_out)]
    words += [str(adapter)] if adapter else []
    environment = {"PYTHONPATH": str(ROOT)}
    took = measured(words, place, "held-out", threads=threads, environment=environment)
    if took["rc"] != 0:
        return {"rc": took["rc"], "error": took["error"]}
    lines = place.log("held-out", "log").read_text(encoding="utf-8").splitlines()
    said = next(line for line in reversed(lines) if line.startswith("{"))  # a library may warn when the process ends
    return {"rc": 0} | json.loads(said)


def held_out_of(peer: str, job: str, lab: Path, threads: int = 1) -> dict[str, Any]:
    """`held_out_loss` of what a tool trained; `rc` None and `reason` where its adapter is not in PEFT's format."""
    row = _named(PEERS[peer], opened(lab), job, threads)
    try:
        return row | held_out_loss(adapter_of(peer, job, lab), lab, threads)
    except CannotError as reason:
        return row | {"rc": None, "reason": str(reason)}


def traced(
    words: list[str],
    lab: Path,
    name: str,
    threads: int = 1,
    *,
    cores: int | None = None,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 3600,
) -> dict[str, Any]:
    """Any command that trains, measured as the tools are; `name` is its log's in the lab.

    A run of this project takes all cores that it may run on where OMP_NUM_THREADS is 1: `cores` holds it to fewer.
    """
    return measured(
        words,
        opened(lab),
        name,
        threads=threads,
        cores=cores,
        environment=environment,
        trace=True,
        timeout=timeout,
        cwd=cwd,
    )


def _named(tool: Peer, lab: Lab, job: str | None, threads: int) -> dict[str, Any]:
    named = {"peer": tool.name, "version": version(tool, lab), "threads_asked": threads}
    return named | ({"job": job} if job else {})


def _run(
    tool: Peer,
    lab: Lab,
    name: str,
    command: Command,
    threads: int,
    timeout: float,
    cores: int | None = None,
    trace: bool = False,
) -> dict[str, Any]:
    if not tool.own and not (lab.venv(tool.name) / "installed.json").is_file():
        raise CannotError("not installed")
    if command.cwd is not None:
        command.cwd.mkdir(parents=True, exist_ok=True)
    return measured(
        command.words,
        lab,
        name,
        threads=threads,
        cores=cores,
        environment=command.environment,
        trace=trace,
        timeout=timeout,
        cwd=command.cwd,
    )
