"""What a run can be planned for: graphics cards by name or by memory, this machine, and how several share a model."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from lora_recipes.errors import RunError
from lora_recipes.model.machine import Gpu, has_gpu, launched_on_cpu, this_gpu
from lora_recipes.recipe import Recipe

GIB = 2**30
MIB = 2**20
MOST_MEMORY = 2**50  # bytes of one device; a thousand times what any has


@dataclass(frozen=True)
class Target:
    """Where a run is planned to run.

    Attributes:
        memory: bytes of one device.
        gpu: None for a CPU.
        teraflops: the data sheet's dense 16-bit matrix rate; None where it is not known.
        gpus: devices that share the run.
        sharding: how: "none", "ddp", "fsdp2", "zero2", "zero3", or "layers" (`device_map: auto` in one process).
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


def target_for(
    recipe: Recipe, gpu: str | None = None, gpus: int | None = None, config_file: str | None = None
) -> Target:
    """What the words on the command line mean for a recipe, which may ask for the CPU or for layers spread over GPUs.

    Raises:
        RunError: as `target_of`; or the recipe computes on the CPU, and a GPU is named.
    """
    if recipe.get("training.use_cpu"):
        if gpu is not None:
            raise RunError(
                f"{recipe.where('training.use_cpu')}: `use_cpu: true` computes on the CPU, and --gpu {gpu} asks for a card; "
                "leave one out"
            )
        return _several(_cpu(), gpus, config_file)
    target = target_of(gpu, gpus, config_file)
    if (
        target.gpus > 1
        and target.sharding == "ddp"
        and config_file is None
        and recipe.get("model.device_map") == "auto"
    ):
        return replace(target, sharding="layers")
    return target


def target_of(gpu: str | None, gpus: int | None, config_file: str | None) -> Target:
    """What the words on the command line mean; without `gpu` this machine.

    Args:
        gpu: a name in CARDS, or its beginning, or memory such as 24GiB.
        config_file: an accelerate config.

    Raises:
        RunError: no such card or memory, or a config that cannot be planned.
    """
    if gpu is None:
        return _several(_this_machine(), gpus, config_file)
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB)", gpu.strip(), re.IGNORECASE):
        unit = {"g": GIB, "gib": GIB, "gb": GIB, "mib": MIB, "mb": MIB}[size[2].lower()]  # cards are sold in binary GB
        wanted = float(size[1]) * unit
        if not 1 <= wanted <= MOST_MEMORY:
            raise RunError(f"--gpu {gpu[:40]}: no card has that memory; write such as --gpu 24GiB")
        memory = int(wanted)
        return _several(Target(gpu, memory, Gpu(gpu, True)), gpus, config_file)
    key = gpu.lower().replace(" ", "").replace("_", "-")
    near = [card for card in CARDS if key in (card, card.split("-")[0], card.removeprefix("rtx"))]
    near = near or [card for card in CARDS if card.removeprefix("rtx").split("-")[0] == key]
    if len(near) != 1:
        which = f"which of {', '.join(near)}?" if near else f"known are {', '.join(CARDS)}"
        raise RunError(f"--gpu {gpu}: {which}; or say its memory, such as --gpu 24GiB")
    mib, rate, bf16 = CARDS[near[0]]
    return _several(Target(near[0], mib * MIB, Gpu(near[0], bf16), rate), gpus, config_file)


def _several(one: Target, gpus: int | None, config_file: str | None) -> Target:
    """The run of as many devices as the words or the config say."""
    processes, sharding = _launched(config_file)
    if gpus is not None and processes is not None and gpus != processes:
        raise RunError(f"--gpus {gpus}, but {config_file} says num_processes: {processes}; leave one out")
    count = gpus or processes or 1
    if sharding == "none" and count > 1:
        sharding = "ddp"
    if one.gpu is None:
        if sharding in SHARDED:
            raise RunError(f"{config_file}: {sharding} needs GPUs, and none is visible here; name one with --gpu")
        one = replace(one, memory=one.memory // count)  # the processes of a machine share its memory
    return replace(one, gpus=count, sharding=sharding)


def _cpu() -> Target:
    return Target("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None)


def _this_machine() -> Target:
    if not has_gpu() or launched_on_cpu():
        return _cpu()
    gpu = this_gpu()
    return Target(gpu.name, torch.cuda.get_device_properties(0).total_memory, gpu, teraflops_of(gpu.name))


def teraflops_of(name: str) -> float | None:
    """The rate in CARDS of a card by the name that its driver gives it; None where it is not known.

    Whole words: an A100 is no A10, and an L40 no L4.
    """
    words = re.split(r"[\s-]+", name.lower())
    rates = (rate for card, (_, rate, _) in CARDS.items() if card.split("-")[0].removeprefix("rtx") in words)
    return next(rates, None)


def _launched(config_file: str | None) -> tuple[int | None, str]:
    """(processes, sharding) of an accelerate config; (None, "none") without one.

    Raises:
        RunError: it cannot be read, or asks for what is not planned.
    """
    if config_file is None:
        return None, "none"
    try:
        values = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{config_file}: cannot be read as an accelerate config: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("num_processes", 1), int):
        raise RunError(f"{config_file}: is no accelerate config: a mapping with a number of num_processes")
    kind, count = values.get("distributed_type", "NO"), values.get("num_processes", 1)
    fsdp, deepspeed = values.get("fsdp_config") or {}, values.get("deepspeed_config") or {}
    unplanned = [key for key in ("fsdp_offload_params",) if fsdp.get(key)]
    unplanned += [key for key, value in deepspeed.items() if "offload" in key and value not in (None, "none", False)]
    unplanned += [key for key in ("deepspeed_config_file",) if deepspeed.get(key)]
    if unplanned:
        raise RunError(f"{config_file}: {', '.join(unplanned)} is not planned; leave it out to plan without")
    if kind == "FSDP":
        if str(fsdp.get("fsdp_version", 1)) != "2":
            raise RunError(f"{config_file}: FSDP 1 is not planned; set fsdp_version: 2")
        return count, "fsdp2"
    if kind == "DEEPSPEED":
        stage = deepspeed.get("zero_stage", 2)
        if stage not in (2, 3):
            raise RunError(f"{config_file}: ZeRO stage {stage} is not planned; stages 2 and 3 are")
        return count, f"zero{stage}"
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise RunError(f"{config_file}: distributed_type {kind} is not planned; NO, MULTI_GPU, FSDP and DEEPSPEED are")
    return count, "ddp" if count > 1 else "none"
