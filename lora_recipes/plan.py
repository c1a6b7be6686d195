"""Parameters and the memory that is certain, before any weight is loaded: arithmetic on a model without weights."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PreTrainedConfig

from lora_recipes.errors import MachineError
from lora_recipes.model.build import meta_model, model_config
from lora_recipes.model.machine import UNPAGED
from lora_recipes.model.source import Source, locate, materialise
from lora_recipes.model.targets import find_targets
from lora_recipes.recipe import Recipe

CONFIGS = Path(__file__).parent / "model" / "configs"

BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
# bitsandbytes 4-bit: half a byte a weight, and a float32 scale for each block of 64 weights. Double quantization stores
# the scales in 8 bits, with a float32 scale for each 256 of them (QLoRA, arXiv 2305.14314, section 3).
FOUR_BIT = 0.5 + 4 / 64
FOUR_BIT_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAM_BYTES = {"adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "lion_32bit": 4.0, "lion_8bit": 1.0, "adafactor": 0.5}


def plan(recipe: Recipe) -> dict[str, Any]:
    """What the recipe trains, and the memory its weights, gradients and optimizer states take for certain.

    Returns:
        {"trainable", "all", "trainable_percent", "hits": {module: count}, "memory": {"low", "parts"} in bytes}.
        "low" leaves out activations, logits and the GPU's own context, which depend on the rows.

    Raises:
        RecipeError: a LoRA target matches nothing.
        MachineError: the architecture is neither here, nor in the cache, nor known to this package.
    """
    config = _config(recipe)
    targets = find_targets(recipe, config)
    parts = _parts(recipe, config, targets.trainable)
    return {
        "trainable": targets.trainable,
        "all": targets.total,
        "trainable_percent": round(targets.percent, 4),
        "hits": targets.hits,
        "memory": {"low": sum(parts.values()), "parts": parts},
    }


def _config(recipe: Recipe) -> PreTrainedConfig:
    named = recipe.get("model.pretrained_model_name_or_path")
    if named.startswith("package:") or Path(named).is_dir():
        return model_config(recipe, materialise(locate(recipe)))
    if isinstance(try_to_load_from_cache(named, "config.json", revision=recipe.get("model.revision")), str):
        return model_config(recipe, Source("hub", named, named))
    known = CONFIGS / f"{named.replace('/', '--')}.json"
    if not known.is_file():
        where = recipe.where("model.pretrained_model_name_or_path")
        raise MachineError(
            f"{where}: the architecture of {named} is not here; get its numbers with: hf download {named} config.json"
        )
    values = json.loads(known.read_text(encoding="utf-8"))["config"]
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _parts(recipe: Recipe, config: PreTrainedConfig, trainable: int) -> dict[str, int]:
    model = meta_model(config, recipe)
    head = model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head  # bitsandbytes leaves the head as it is
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    dtype = recipe.get("model.dtype", "auto")
    dtype = str(config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype
    quantization = recipe.section("quantization")
    a_weight = BYTES.get(dtype, 4.0)
    if quantization.get("load_in_4bit"):
        a_weight = FOUR_BIT_DOUBLE if quantization.get("bnb_4bit_use_double_quant") else FOUR_BIT
    elif quantization.get("load_in_8bit"):
        a_weight = 1.0
    optimizer = recipe.get("training.optim", "adamw_torch")
    a_state = ADAM_BYTES.get(optimizer, ADAM_BYTES.get(UNPAGED.get(optimizer, ""), 8.0))
    # PEFT keeps the adapters of 16-bit weights in float32; TRL casts those of quantized weights to bfloat16.
    a_trained = 2.0 if quantization and recipe.get("training.bf16") else 4.0
    return {
        "base_weights": int(linear * a_weight + (total - linear) * BYTES.get(dtype, 4.0)),
        "adapter": int(trainable * a_trained),
        "gradients": int(trainable * a_trained),
        "optimizer_states": int(trainable * a_state),
    }
