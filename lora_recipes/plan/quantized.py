"""bitsandbytes' layers without weights: they hold for a moment what the real ones open, and keep what those keep."""

from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lora_recipes.model.quantizer import bitsandbytes
from lora_recipes.plan.architecture import as_planned


def as_quantized(model: PreTrainedModel, names: list[str], quantization: dict[str, Any]) -> None:
    """Put bitsandbytes' layers, still without weights, in the place of the linear ones with these names.

    They open their weights for each multiplication, forward and backward, as the real ones do, and keep nothing.
    """
    bnb = bitsandbytes()
    four = bool(quantization.get("load_in_4bit"))
    compute = as_planned(getattr(torch, quantization.get("bnb_4bit_compute_dtype") or "float32"))
    for name in names:
        old = model.get_submodule(name)
        parent, _, last = name.rpartition(".")
        keywords: dict[str, Any] = {"bias": old.bias is not None, "device": "meta"}
        if four:
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=compute, **keywords)
            new.quant_state = bnb.functional.QuantState(absmax=None, shape=old.weight.shape)
        else:
            new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False, **keywords)
        if old.bias is not None:
            new.bias = torch.nn.Parameter(old.bias.data, requires_grad=False)
        new.weight.requires_grad_(False)
        new.forward = _Opened(new, compute if four else None)
        setattr(model.get_submodule(parent), last, new)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = four, not four
    model.is_quantized = True


def open_weight(layer: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """What stands for a 4-bit layer's weight where it is opened by a function of our own (`model.fused`)."""
    return torch.empty(layer.out_features, layer.in_features, dtype=dtype)


class _Opened:
    """Forward of a quantized layer. `compute` None: in the type of the input, which int8 layers keep."""

    def __init__(self, layer: torch.nn.Module, compute: torch.dtype | None) -> None:
        self.shape = (layer.out_features, layer.in_features)
        self.compute = compute

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        inside = hidden.to(self.compute) if self.compute else hidden
        return _OpenedFunction.apply(inside, self.shape, self.compute is None).to(hidden.dtype)


class _OpenedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, shape: tuple[int, int], keeps: bool) -> torch.Tensor:
        ctx.shape, ctx.kept = shape, hidden if keeps else None
        return linear(hidden, torch.empty(shape, dtype=hidden.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.matmul(grad, torch.empty(ctx.shape, dtype=grad.dtype)), None, None
