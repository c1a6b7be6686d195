"""Bytes that do not depend on the rows: weights as they are stored, adapter, gradients, optimizer states."""

from collections.abc import Container, Iterable
from math import ceil
from typing import Any

import torch
from transformers import PreTrainedModel

from lora_recipes.plan.architecture import quantizable

BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit types
NESTED_BLOCK = 256  # scales that share a scale under double quantization (QLoRA, arXiv 2305.14314, section 3)
CODE_4BIT, CODE_8BIT = 16 * 4, 256 * 4  # bytes of the float32 tables of values, one a layer
OPTIMIZER_BLOCK = 256  # states that share a scale in bitsandbytes' 8-bit optimizers
SMALLEST_8BIT = 4096  # below, they keep 32-bit states (bitsandbytes.optim.optimizer, min_8bit_size)
# States a parameter has: {optimizer: count}. Torch's have the parameter's own dtype, bitsandbytes' are float32.
TORCH_STATES = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd": 0,
    "schedule_free_adamw": 2,
    "schedule_free_radam": 2,
    "schedule_free_sgd": 1,
    "stable_adamw": 2,
}
BNB_STATES = {
    "paged_adamw_32bit": 2,
    "ademamix": 3,
    "paged_ademamix_32bit": 3,
    "lion_32bit": 1,
    "paged_lion_32bit": 1,
    "rmsprop_bnb": 1,
    "rmsprop_bnb_32bit": 1,
}
BNB_8BIT_STATES = {
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "ademamix_8bit": 3,
    "paged_ademamix_8bit": 3,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
}


def quantized_bytes(weights: int, rows: int, quantization: dict[str, Any]) -> int:
    """Bytes of one linear layer's weights with their scales.

    Args:
        weights: how many there are.
        rows: output features; 8-bit keeps one float32 scale for each.
    """
    if quantization.get("load_in_8bit"):
        return weights + 4 * rows
    scales = ceil(weights / BLOCK)
    packed = ceil(weights / 2) + CODE_4BIT
    if not quantization.get("bnb_4bit_use_double_quant"):
        return packed + 4 * scales
    return packed + scales + 4 * ceil(scales / NESTED_BLOCK) + CODE_8BIT + 4  # 4: the mean that was subtracted


def weight_bytes(model: PreTrainedModel, quantization: dict[str, Any]) -> dict[str, int]:
    """Bytes of the base as loaded: {"quantized", "kept", "buffers"}, tied weights once."""
    packed = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    closed = set(quantizable(model, quantization.get("llm_int8_skip_modules"))) if packed else set()
    found = {"quantized": 0, "kept": 0, "buffers": 0}
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        if module in closed and last == "weight":
            found["quantized"] += quantized_bytes(parameter.numel(), parameter.shape[0], quantization)
        else:
            found["kept"] += parameter.numel() * parameter.element_size()
    found["buffers"] = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return found


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(name: str, parameters: Iterable[torch.Tensor], wide: Container[int] = ()) -> tuple[int, bool]:
    """(bytes of the states after the first step, whether this optimizer is known); an unknown one counts as AdamW's.

    Args:
        wide: ids of parameters that keep 32-bit states in an 8-bit optimizer: embeddings (transformers.Trainer).
    """
    total = 0
    known = name in TORCH_STATES or name in BNB_STATES or name in BNB_8BIT_STATES or name == "adafactor"
    for parameter in parameters:
        count, size = parameter.numel(), parameter.element_size()
        if name == "adafactor":  # a row and a column of float32 second moments for a matrix
            shape = parameter.shape
            total += 4 * (count // shape[-1] + count // shape[-2]) if len(shape) >= 2 else 4 * count
        elif name in BNB_8BIT_STATES:
            states = BNB_8BIT_STATES[name]
            small = count < SMALLEST_8BIT or id(parameter) in wide
            total += states * (4 * count if small else count + 4 * ceil(count / OPTIMIZER_BLOCK))
        elif name in BNB_STATES:
            total += BNB_STATES[name] * 4 * count
        else:
            total += TORCH_STATES.get(name, 2) * size * count
    return total, known
