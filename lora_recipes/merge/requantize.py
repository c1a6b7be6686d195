"""The weights as a quantized run saw them: each is quantized again as it was for training, and opened."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from lora_recipes.plan.architecture import quantizable


class Requantizer:
    """Quantizes single weights with bitsandbytes as `from_pretrained` does with a whole model, and opens them.

    Args:
        model: the base, on the meta device, before an adapter is put on it.
        quantization: the recipe's section as it was used in training.
        device: where the run quantized: other kernels may round a value at the edge of two codes otherwise.
    """

    def __init__(self, model: PreTrainedModel, quantization: dict[str, Any], device: str) -> None:
        self.quantization, self.device = quantization, device
        skipped = quantization.get("llm_int8_skip_modules")
        self.names = {f"{name}.weight" for name in quantizable(model, skipped)}

    def wants(self, parameter: str) -> bool:
        """Whether this parameter was quantized."""
        return parameter in self.names

    def opened(self, parameter: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [out, in] after quantizing and opening it, in its own type; unchanged where it was not quantized."""
        if not self.wants(parameter):
            return weight
        import bitsandbytes as bnb

        section = self.quantization
        if section.get("load_in_4bit"):
            # The layer's defaults are the section's, so it is the layer that is asked, not the parameter.
            layer = bnb.nn.Linear4bit(
                weight.shape[1],
                weight.shape[0],
                bias=False,
                compress_statistics=section.get("bnb_4bit_use_double_quant", False),
                quant_type=section.get("bnb_4bit_quant_type", "fp4"),
                quant_storage=getattr(torch, section.get("bnb_4bit_quant_storage") or "uint8"),
                device="meta",
            )
            kept = bnb.nn.Params4bit(weight, requires_grad=False, **layer.weight.__dict__).to(self.device)
            return dequantize_bnb_weight(kept).to(weight.device, weight.dtype)
        layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(self.device)
        return dequantize_bnb_weight(layer.weight, layer.state).to(weight.device, weight.dtype)
