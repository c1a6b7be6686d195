"""One small tree of errors, each with the exit code that a command ends with."""

import errno
import shutil
from pathlib import Path

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_MACHINE = 3
EXIT_REFUSED = 4
EXIT_PREEMPTED = 143  # what a shell says of a process that SIGTERM ended


class LoraRecipesError(Exception):
    """An error a user can act on: its text says what is wrong, where, and what to do."""

    exit_code = EXIT_BUG


class RecipeError(LoraRecipesError, ValueError):
    """The recipe cannot be run as written."""

    exit_code = EXIT_USER


class DataError(LoraRecipesError, ValueError):
    """A data file is missing, broken, or holds rows that cannot be trained on."""

    exit_code = EXIT_USER


class RunError(LoraRecipesError):
    """The run folder is not in the state that the command needs (merge before train, merge twice)."""

    exit_code = EXIT_USER


class MachineError(LoraRecipesError, OSError):
    """This machine lacks something: a GPU, memory, disk, network, a model's weights."""

    exit_code = EXIT_MACHINE


class RankLost(MachineError):
    """Another process of the run is gone, or hangs."""


class RefusedError(LoraRecipesError):
    """Refused for integrity or security: going on could produce a wrong or unsafe artefact."""

    exit_code = EXIT_REFUSED


class BrokenFile(RefusedError, ValueError):
    """A file that was written by this project is not what was written."""


class Preempted(BaseException):
    """Asked to end by a signal; what was reached is saved, and the same command goes on.

    Like KeyboardInterrupt no Exception: it rises out of whatever runs, and no library may take it for a failure.
    """


OUT_OF_MEMORY = (
    "What helps, cheapest first: training.per_device_train_batch_size=1 with a larger gradient_accumulation_steps; "
    "training.activation_checkpointing=true; a smaller training.max_length or generation.batch_size; a 4-bit base "
    "(recipes/base/qlora.yaml)"
)


# What a RuntimeError says where a GPU's memory ran out outside torch's allocator: in the driver ("CUDA error: out of memory"),
# in NCCL, or in cuBLAS, which allocates its workspace itself.
GPU_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or here."""
    by_name = type(error).__name__ == "OutOfMemoryError"  # torch's; it is not imported here
    if by_name or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in GPU_FULL)


LONGEST_SHOWN = 120  # characters of a name that is too long for a file


def _free(file: str | None) -> str:
    """What the disk of a file has left."""
    place = next((parent for parent in Path(file or ".").absolute().parents if parent.exists()), Path("/"))
    return f" ({shutil.disk_usage(place).free:,} bytes are free)"


def machine_fault(error: BaseException) -> MachineError | RunError | None:
    """The MachineError for a full or broken disk, a missing permission or memory that ran out; None for anything else.

    A name that can be no file's is no fault of the machine, and a RunError.
    """
    if out_of_memory(error):
        return MachineError(f"out of memory: {error}\n{OUT_OF_MEMORY}")
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        name = str(error.filename or "a file")
        shown = name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}... ({len(name):,} characters)"
        return RunError(f"{shown}: {error.strerror}; name a file or a folder that can be there")
    if isinstance(error, OSError) and error.errno == errno.EIO:
        return MachineError(
            f"{error.filename or 'a file'}: {error.strerror}: it cannot be read or written; look after its disk, or take "
            "another one"
        )
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
    ):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "make room" if full else "change the permission, or run from another folder"
        return MachineError(
            f"{error.filename or 'writing a file'}: {error.strerror}{_free(error.filename) if full else ''}; {way_out}. What was "
            "finished before is whole, and the same command goes on"
        )
    return None
