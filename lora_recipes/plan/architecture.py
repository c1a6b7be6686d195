"""The model as meta tensors: every module and shape of the recipe's base and adapter, no memory, no weights."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_recipes.errors import MachineError
from lora_recipes.model.build import adapted_on_meta, meta_model, model_config
from lora_recipes.model.kinds import CONFIGS
from lora_recipes.model.source import Source, locate, materialise
from lora_recipes.recipe import Recipe

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def facts_file(named: str) -> Path:
    """Where this package keeps the numbers of a hub id."""
    return CONFIGS / f"{named.replace('/', '--')}.json"


def facts_of(named: str) -> dict[str, Any] | None:
    """What this package knows of a hub id: config, licence, gating, where from. None for any other model."""
    file = facts_file(named)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def config_of(recipe: Recipe) -> PreTrainedConfig:
    """The architecture's numbers: from the folder or package, the hub's cache, this package's own facts, or the hub.

    Raises:
        MachineError: it is in none of them.
    """
    named = recipe.get("model.pretrained_model_name_or_path")
    if named.startswith("package:") or Path(named).exists() or not HUB_ID.fullmatch(named):
        return model_config(recipe, materialise(locate(recipe, weights=False)))
    keys = {"revision": recipe.get("model.revision"), "cache_dir": recipe.get("model.cache_dir")}
    if isinstance(try_to_load_from_cache(named, "config.json", **keys), str):
        return model_config(recipe, Source("hub", named, named))
    facts = facts_of(named)
    if facts is None:
        if not HF_HUB_OFFLINE:
            return model_config(recipe, Source("hub", named, named))
        where = recipe.where("model.pretrained_model_name_or_path")
        raise MachineError(
            f"{where}: the architecture of {named} is not here, and HF_HUB_OFFLINE is set; get its numbers with: "
            f"hf download {named} config.json"
        )
    values = dict(facts["config"])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def base_dtype(recipe: Recipe, config: PreTrainedConfig) -> torch.dtype:
    """The type of the weights that stay unquantized; "auto", transformers' default, is the checkpoint's own."""
    named = recipe.get("model.dtype", "auto")
    if named == "auto":
        named = str(config.dtype or torch.float32).removeprefix("torch.")
    return getattr(torch, named)


def as_planned(dtype: torch.dtype) -> torch.dtype:
    """The type that stands for another in a plan."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def base_on_meta(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    """The base model in the recipe's dtype. Buffers keep theirs, as `from_pretrained` leaves them.

    float16 is planned as bfloat16, which takes the same bytes: a rehearsal computes as a CPU would, whose autocast has no
    float16.
    """
    config = copy.deepcopy(config)
    if recipe.get("model.attn_implementation") == "eager":  # the others keep no attention matrix
        config._attn_implementation = "eager"
    model = meta_model(config, recipe)
    dtype = as_planned(base_dtype(recipe, config))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def adapt(recipe: Recipe, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """The base with the recipe's adapter; without a `lora` section the base itself, all of it trainable."""
    return adapted_on_meta(base, recipe) if recipe.get("lora") else base


def set_adapter_dtype(recipe: Recipe, model: torch.nn.Module, *, quantized: bool, bf16: bool) -> None:
    """The types that a run trains its adapter in.

    PEFT keeps the adapters of 16-bit weights in float32. Those of quantized weights are bfloat16 under bf16 compute (TRL
    casts them, except DoRA's magnitudes), else float32 (`lora_recipes.train.trainer`).
    """
    if not (quantized and recipe.section("lora")):
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not ("lora_magnitude_vector" in name and bf16):
            parameter.data = parameter.data.to(torch.bfloat16 if bf16 else torch.float32)


def quantizable(model: PreTrainedModel, skipped: list[str] | None) -> list[str]:
    """Names of the linear layers that bitsandbytes replaces.

    Head and tied weights stay unless `llm_int8_skip_modules` names what stays instead; expert weights that are one 3-D
    parameter are no linear layers and stay (transformers.quantizers.base, integrations.bitsandbytes).
    """
    keep = (get_keys_to_not_convert(model) if skipped is None else list(skipped)) + list(
        model._keep_in_fp32_modules or []
    )
    return [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(name, keep)
    ]


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder layers: the longest list of modules, the outermost of equals."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    return max(found, key=lambda entry: (len(entry[1]), -entry[0].count(".")))[1]
