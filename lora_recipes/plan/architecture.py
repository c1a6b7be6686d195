"""The model as meta tensors: every module and shape of the recipe's base and adapter, no memory, no weights."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_recipes.errors import MachineError
from lora_recipes.model import build
from lora_recipes.model.build import lora_config, meta_model, model_config
from lora_recipes.model.source import Source, locate, materialise
from lora_recipes.recipe import Recipe

CONFIGS = Path(build.__file__).parent / "configs"
# Initialisations that compute on real weights; the shapes are those of the plain one.
PLAIN_INIT = {"init_lora_weights": True, "eva_config": None}


def facts_file(named: str) -> Path:
    """Where this package keeps the numbers of a hub id."""
    return CONFIGS / f"{named.replace('/', '--')}.json"


def facts_of(named: str) -> dict[str, Any] | None:
    """What this package knows of a hub id: config, licence, gating, where from. None for any other model."""
    file = facts_file(named)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def config_of(recipe: Recipe) -> PreTrainedConfig:
    """The architecture's numbers: from the folder or package, else the hub's cache, else this package's own facts.

    Raises:
        MachineError: it is in none of them.
    """
    named = recipe.get("model.pretrained_model_name_or_path")
    if named.startswith("package:") or Path(named).is_dir():
        return model_config(recipe, materialise(locate(recipe)))
    if isinstance(try_to_load_from_cache(named, "config.json", revision=recipe.get("model.revision")), str):
        return model_config(recipe, Source("hub", named, named))
    facts = facts_of(named)
    if facts is None:
        where = recipe.where("model.pretrained_model_name_or_path")
        raise MachineError(
            f"{where}: the architecture of {named} is not here; get its numbers with: hf download {named} config.json"
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
    section = recipe.section("lora")
    if not section:
        return base
    with warnings.catch_warnings():  # what PEFT warns of here, `find_targets` has refused before
        warnings.simplefilter("ignore")
        return get_peft_model(base, lora_config(section | PLAIN_INIT))


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
