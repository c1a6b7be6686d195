"""The type that frozen weights are kept in while a CPU computes in bf16."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def computing_in(autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast of a CPU; None computes in the weights' own type."""
    return torch.autocast("cpu", dtype=autocast) if autocast else nullcontext()


def cast_frozen(model: torch.nn.Module) -> int:
    """Cast to bf16 what autocast would cast anew in every forward, as it does with frozen weights: the same numbers.

    Only where nothing but LoRA's own matrices is trained: other layers of PEFT compute with the base's weights themselves. A
    head that is tied to the embedding gets a copy, for embeddings are not cast.

    Returns:
        bytes that the weights take less than before; 0 where nothing was cast.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not all(".lora_A." in name or ".lora_B." in name for name in trained):
        return 0
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    saved, cast = 0, set()
    for module in model.modules():
        if type(module) is not torch.nn.Linear or module.weight.requires_grad or module.weight.dtype != torch.float32:
            continue
        size = module.weight.numel()
        if id(module.weight) in embedded:
            module.weight = torch.nn.Parameter(module.weight.bfloat16(), requires_grad=False)
            saved -= 2 * size
        else:
            module.weight.data = module.weight.data.bfloat16()
            saved += 2 * size
        cast.add(id(module.weight))
    if cast:
        let_go_of_file(parameter for parameter in model.parameters() if id(parameter) not in cast)
    return saved


def let_go_of_file(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Copy the weights that are still as they were loaded: as views they keep the whole mapped file in memory."""
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
