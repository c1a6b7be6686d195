"""What a run can be planned for: graphics cards by name or by memory, this machine, and how several share a model."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from lora_recipes.errors import RunError
from lora_recipes.model.machine import Gpu, has_gpu, this_gpu

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Target:
    """Where a run is planned to run.

    Attributes:
        memory: bytes of one device.
        gpu: None for a CPU.
        teraflops: the data sheet's dense 16-bit matrix rate; None where it is not known.
        gpus: devices that share the run.
        sharding: how: "none", "ddp", "fsdp2", "zero2" or "zero3".
    """

    name: str
    memory: int
    gpu: Gpu | None
    teraflops: float | None = None
    gpus: int = 1
    sharding: str = "none"


# (memory in MiB as nvidia-smi shows it, dense 16-bit tensor TFLOP/s with float32 sums as in NVIDIA's data sheets, bf16)
CARDS: dict[str, tuple[int, float, bool]] = {
    "t4-16": (15360, 65, False),
    "v100-16": (16384, 125, False),
    "v100-32": (32768, 125, False),
    "l4-24": (23034, 121, True),
    "a10-24": (23028, 125, True),
    "rtx3090-24": (24576, 71, True),
    "rtx4090-24": (24564, 165, True),
    "rtx5090-32": (32607, 210, True),
    "a100-40": (40960, 312, True),
    "l40s-48": (46068, 362, True),
    "a6000-48": (49140, 155, True),
    "a100-80": (81920, 312, True),
    "h100-80": (81559, 989, True),
    "h200-141": (143771, 989, True),
    "b200-180": (183359, 2250, True),
}
SHARDED = ("fsdp2", "zero2", "zero3")


def target_of(gpu: str | None, gpus: int | None, config_file: str | None) -> Target:
    """What the words on the command line mean; without `gpu` this machine.

    Args:
        gpu: a name in CARDS, or its beginning, or memory such as 24GiB.
        config_file: an accelerate config.

    Raises:
        RunError: no such card or memory, or a config that cannot be planned.
    """
    processes, sharding = _launched(config_file)
    count = gpus or processes or 1
    if gpu is None:
        name, memory, found, rate = _this_machine()
    elif size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB)", gpu.strip(), re.IGNORECASE):
        unit = {"g": GIB, "gib": GIB, "gb": GIB, "mib": MIB, "mb": MIB}[size[2].lower()]  # cards are sold in binary GB
        name, memory, found, rate = gpu, int(float(size[1]) * unit), Gpu(gpu, True), None
    else:
        key = gpu.lower().replace(" ", "").replace("_", "-")
        near = [card for card in CARDS if card == key or card.split("-")[0] == key or card.replace("rtx", "") == key]
        near = near or [card for card in CARDS if card.removeprefix("rtx").split("-")[0] == key]
        if len(near) != 1:
            which = f"which of {', '.join(near)}?" if near else f"known are {', '.join(CARDS)}"
            raise RunError(f"--gpu {gpu}: {which}; or say its memory, such as --gpu 24GiB")
        mib, rate, bf16 = CARDS[near[0]]
        name, memory, found = near[0], mib * MIB, Gpu(near[0], bf16)
    if sharding == "none" and count > 1:
        sharding = "ddp"
    if found is None and sharding in SHARDED:
        raise RunError(f"{config_file}: {sharding} needs GPUs, and none is visible here; name one with --gpu")
    return Target(name, memory, found, rate, count, sharding)


def _this_machine() -> tuple[str, int, Gpu | None, float | None]:
    if not has_gpu():
        return "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None, None
    gpu = this_gpu()
    return gpu.name, torch.cuda.get_device_properties(0).total_memory, gpu, None


def _launched(config_file: str | None) -> tuple[int | None, str]:
    """(processes, sharding) of an accelerate config."""
    if config_file is None:
        return None, "none"
    try:
        values: dict[str, Any] = yaml.safe_load(Path(config_file).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise RunError(f"{config_file}: cannot be read as an accelerate config: {error}") from None
    kind, count = values.get("distributed_type", "NO"), values.get("num_processes")
    if kind == "FSDP":
        if str((values.get("fsdp_config") or {}).get("fsdp_version", 1)) != "2":
            raise RunError(f"{config_file}: FSDP 1 is not planned; set fsdp_version: 2")
        return count, "fsdp2"
    if kind == "DEEPSPEED":
        stage = (values.get("deepspeed_config") or {}).get("zero_stage", 2)
        if stage not in (2, 3):
            raise RunError(f"{config_file}: ZeRO stage {stage} is not planned; stages 2 and 3 are")
        return count, f"zero{stage}"
    return count, "ddp" if kind != "NO" and (count or 1) > 1 else "none"
