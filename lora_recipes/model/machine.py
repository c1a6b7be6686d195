"""What this machine has, and what it makes a run choose: dtype, device, optimizer, threads, each with its reason."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_recipes import process
from lora_recipes.errors import MachineError
from lora_recipes.recipe import Recipe

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP_THRESHOLD, LEAN_MMAP_THRESHOLD, TRIM_THRESHOLD = 4 << 20, 1 << 20, 64 << 20  # bytes
MOST_MAPPED, NEVER = 32 << 20, 1 << 30  # bytes; older versions of glibc take no larger threshold of mapping
# (limit, in use, statistics, their key for idle file cache) of a container's memory, version 2 and version 1.
CONTROL_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)

# bitsandbytes pages optimizer states between GPU and CPU memory; without a GPU there is nothing to page.
UNPAGED = {
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw": "adamw_torch",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit",
}

BITSANDBYTES = ("8bit", "paged", "bnb")  # in the names of its optimizers, whose states cannot be shared out by FSDP
SHARDABLE = "adamw_torch_fused"

USE_CPU = "ACCELERATE_USE_CPU"  # how `accelerate launch` hands `use_cpu` on


@dataclass(frozen=True)
class Choice:
    """One thing the machine decided: what, its value, and why."""

    what: str
    value: str
    why: str


@dataclass(frozen=True)
class Gpu:
    """A CUDA device, the one that is here or another that a run is planned for."""

    name: str
    bf16: bool


@dataclass
class Choices:
    """What the recipe asks for, as this machine can do it. `made` is printed before training."""

    training: dict[str, Any]
    quantization: dict[str, Any]
    device: str
    made: list[Choice] = field(default_factory=list)

    def named(self) -> dict[str, str]:
        """What was chosen → the choice."""
        return {choice.what: choice.value for choice in self.made}


def of_bitsandbytes(optimizer: str) -> bool:
    """Whether an optimizer, by its name in `training.optim`, is one of bitsandbytes'."""
    return any(part in optimizer for part in BITSANDBYTES)


def has_gpu() -> bool:
    """Whether a CUDA (or ROCm) device is visible."""
    return torch.cuda.is_available()


def this_gpu() -> Gpu:
    """The CUDA device of this machine."""
    return Gpu(torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False))


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies matrices of bf16 faster than of float32: with AMX, or from AMD with AVX512-BF16 (Zen 4, Zen 5).

    Intel's AVX512-BF16 without AMX is half as fast as its float32, and AMD's several times as fast: `make bench` measures both
    types (docs/performance.md). It is a rule and not a measurement, so that a run that goes on never finds another type.
    """
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or (has.get("avx512_bf16") and str(has.get("cpu_name")).startswith("AMD")))


def launched_on_cpu() -> bool:
    """Whether `accelerate launch` was told to use the CPU (`use_cpu: true` in its config), which the Trainer obeys."""
    return process.is_set(os.environ, USE_CPU)


def why_cpu(recipe: Recipe) -> str | None:
    """Why a run of this recipe computes on the CPU; None where it computes on a GPU."""
    if recipe.get("training.use_cpu"):
        return "training.use_cpu is true"
    if not has_gpu():
        return "no GPU is visible"
    return f"{USE_CPU} is set, as `use_cpu: true` of an accelerate config does" if launched_on_cpu() else None


def memory_available() -> int:
    """Bytes of memory that a new process could take, the file cache included: of the machine, and of the container it is
    in; physical memory elsewhere than on Linux."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024  # the kernel writes kB and means KiB
                return min(free, _left_in_container(Path("/sys/fs/cgroup"), free))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_container(folder: Path, otherwise: int) -> int:
    """Bytes below the limit of a control group, whose file cache that nobody uses can be taken; `otherwise` without one."""
    for limit, used, statistics, cache in CONTROL_GROUPS:
        with suppress(OSError, ValueError):  # ValueError: the limit is "max"
            kept = dict(line.split() for line in (folder / statistics).read_text(encoding="ascii").splitlines())
            most, now = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
            return max(0, most - now + int(kept.get(cache, 0)))
    return otherwise


def peak_rss_bytes() -> int:
    """Most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


def choose(recipe: Recipe, *, training: bool = True, gpu: Gpu | None = None) -> Choices:
    """Turn the recipe's wishes into what this machine can do; every difference is in `made`.

    Args:
        training: False for the steps after it, which have no training precision to refuse.
        gpu: choose for this one, whatever this machine has.

    Raises:
        MachineError: fp16 training without a GPU, or bf16 on a GPU that lacks it: no fallback keeps what was asked.
    """
    why = why_cpu(recipe) if gpu is None else None
    choices = Choices(recipe.section("training"), recipe.section("quantization"), "cpu" if why else "cuda")
    if why:
        _choose_for_cpu(recipe, choices, training, why)
    else:
        _choose_for_gpu(recipe, choices, training, gpu or this_gpu())
    return choices


def _choose_for_cpu(recipe: Recipe, choices: Choices, to_train: bool, why: str) -> None:
    training, asked = choices.training, bool(recipe.get("training.use_cpu"))
    if to_train:
        give_memory_back(lean=training.get("activation_checkpointing", True))
    choices.made.append(Choice("device", f"cpu, {_use_all_cores()} threads", why))
    training["use_cpu"] = True
    if training.get("fp16") and to_train:
        raise MachineError(
            f"{recipe.where('training.fp16')}: fp16 training needs a GPU, and none is used here ({why}). "
            "Set training.fp16=false (float32), or run on a machine with a GPU"
        )
    if not training.get("bf16"):
        training["bf16"] = False  # SFTConfig's own default is true and needs a GPU
        choices.made.append(Choice("dtype", "float32", "the recipe does not ask for bf16"))
    elif multiplies_bf16():
        choices.made.append(Choice("dtype", "bf16 autocast", "training.bf16 is true, and this CPU is fast at it"))
    elif asked:
        choices.made.append(Choice("dtype", "bf16 autocast", "training.bf16 and training.use_cpu are both true"))
    else:
        training["bf16"] = False
        faster = "float32 is the faster type on this CPU (training.use_cpu=true keeps bf16)"
        choices.made.append(Choice("dtype", "float32 instead of bf16", faster))
    computed_in = "bfloat16" if training["bf16"] else "float32"
    if choices.quantization.get("bnb_4bit_compute_dtype") in {"bfloat16", "float16"} - {computed_in}:
        choices.quantization["bnb_4bit_compute_dtype"] = computed_in
        choices.made.append(Choice("4-bit compute dtype", computed_in, "it follows the training dtype"))
    if (paged := training.get("optim", "")) in UNPAGED:
        training["optim"] = UNPAGED[paged]
        choices.made.append(Choice("optimizer", f"{training['optim']} instead of {paged}", "paging needs a GPU"))
    for key in ("activation_offloading", "tf32"):
        if training.get(key) and to_train:
            raise MachineError(f"{recipe.where(f'training.{key}')}: `{key}` needs a GPU; set training.{key}=false")
    if recipe.get("model.device_map") is not None:
        choices.made.append(Choice("device_map", "not used", "the CPU is one device"))
    training.setdefault("dataloader_pin_memory", False)


def _choose_for_gpu(recipe: Recipe, choices: Choices, to_train: bool, gpu: Gpu) -> None:
    choices.made.append(Choice("device", f"cuda ({gpu.name})", "a GPU is visible"))
    training = choices.training
    if training.get("fp16"):
        training["bf16"] = False
        choices.made.append(Choice("dtype", "fp16 autocast", "training.fp16 is true"))
    elif training.get("bf16") is False:
        choices.made.append(Choice("dtype", "float32", "training.bf16 and training.fp16 are false"))
    elif gpu.bf16:  # unset and null mean true to SFTConfig
        choices.made.append(Choice("dtype", "bf16 autocast", "training.bf16 is true and the GPU has it"))
    elif to_train:
        words = " ".join(f"{key}={str(value).lower()}" for key, value in without_bf16(recipe).items())
        raise MachineError(f"{recipe.where('training.bf16')}: {gpu.name} has no bf16; set {words}")
    else:
        choices.made.append(
            Choice("dtype", "the weights' own", f"{gpu.name} has no bf16, and only training has an autocast")
        )
    if choices.quantization.get("bnb_4bit_compute_dtype") == "bfloat16" and (training.get("fp16") or not gpu.bf16):
        choices.quantization["bnb_4bit_compute_dtype"] = "float16"
        why = "it follows training.fp16" if training.get("fp16") else f"{gpu.name} has no bf16"
        choices.made.append(Choice("4-bit compute dtype", "float16 instead of bfloat16", why))


def without_bf16(recipe: Recipe) -> dict[str, Any]:
    """What a recipe must set for training on a GPU that has no bf16; {} where it asks for none."""
    asks = recipe.get("training.bf16") is not False and not recipe.get("training.fp16")
    found: dict[str, Any] = {"training.bf16": False, "training.fp16": True} if asks else {}
    if recipe.get("model.dtype") == "bfloat16":  # weights that are all trained stay float32: `recipe.rules.method.full`
        found["model.dtype"] = "float16" if recipe.get("lora") else "float32"
    return found


def give_memory_back(*, lean: bool = False) -> None:
    """Let the C library map large tensors one by one, so that a freed one is gone.

    By itself glibc raises the size from which it maps to 32 MiB as it sees such blocks freed, and keeps smaller ones in a
    heap full of holes: 1.4 x the live tensors (docs/plan.md). A size that is too low costs a fault for each page of what
    comes and goes in every layer.

    Args:
        lean: rather less memory than less time, as a run with activation checkpointing asks for.
    """
    _mallopt(LEAN_MMAP_THRESHOLD if lean else MMAP_THRESHOLD, TRIM_THRESHOLD)


def _mallopt(mmap_threshold: int, trim_threshold: int) -> None:
    """glibc's; other C libraries are left alone."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(M_TRIM_THRESHOLD, trim_threshold)


def release_memory() -> None:
    """After a model was let go of: give its memory back, before the next one is loaded.

    The layers of a 4-bit model are parts of reference cycles, which wait for a collection; and torch keeps what was freed on
    a GPU, where no other process (a server, the proof of a merge) can take it.
    """
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Meanwhile the C library keeps what is freed and gives it out again.

    For work on blocks of a few MiB that come and go: a block that is mapped anew costs a fault for each of its pages, three
    times what is computed on it. Afterwards what is freed is given back.
    """
    _mallopt(MOST_MAPPED, NEVER)
    try:
        yield
    finally:
        give_memory_back()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _use_all_cores() -> int:
    """Undo the launcher's single thread, and return the number of threads in use.

    `accelerate launch` on a CPU machine exports OMP_NUM_THREADS=1 when no config file says otherwise. Cores are
    shared between the processes of one machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if told := os.environ.get(process.THREADS):
        torch.set_num_threads(int(told))
    elif os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(threads)
    return torch.get_num_threads()
