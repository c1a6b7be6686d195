"""Memory that ran out is known by what is raised: by torch's allocator, by the driver, by a library on the GPU, or here."""

import pytest
import torch

from lora_recipes.errors import EXIT_MACHINE, MachineError, machine_fault, out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:30]}",
)
def test_memory_that_ran_out_says_what_helps(error: Exception) -> None:
    assert out_of_memory(error)
    told = machine_fault(error)
    assert told is not None and told.exit_code == EXIT_MACHINE and "per_device_train_batch_size=1" in str(told)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("It is possible that dataloader's workers are out of shared memory"),
        ValueError("a row about how a machine runs out of memory"),
        MachineError("out of memory: told already"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:30]}",
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not out_of_memory(error) and machine_fault(error) is None
