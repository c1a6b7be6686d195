"""bitsandbytes, for those runs alone that need it: PEFT would import it, and torch's compiler with it, into every one."""

import copy
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_recipes import process
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import read_json

NAME = "bitsandbytes"
# Values of `training.optim` that are not bitsandbytes'; unset is one of them.
OTHER_OPTIMIZERS = (None, "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


def leave_out_unless_needed(recipe: Recipe) -> None:
    """Before PEFT is imported: a run that provably needs no bitsandbytes goes without, as if it were not installed.

    What PEFT and transformers have once asked they remember, so this is for a process that works on this recipe and no
    other. `None` in `sys.modules` is Python's own way to say that a module cannot be imported.
    """
    if not is_needed(recipe):
        sys.modules.setdefault(NAME, None)  # type: ignore[arg-type]


def begin_without(recipe: Recipe) -> None:
    """Begin a process of its own for a step of this recipe. It is here since a process imports a function's module to call
    it, and most others import PEFT."""
    process.prepare()
    leave_out_unless_needed(recipe)


def is_needed(recipe: Recipe) -> bool:
    """Whether a step may use bitsandbytes; True where it cannot be told before the model is there."""
    if recipe.get("quantization") or recipe.get("training.optim") not in OTHER_OPTIMIZERS:
        return True
    if recipe.get("model.trust_remote_code"):  # which may import whatever it likes
        return True
    named = recipe.get("model.pretrained_model_name_or_path")
    return not named.startswith("package:") and _may_be_quantized(recipe, named)  # a package is unpacked to float32


def bitsandbytes() -> ModuleType:
    """The module, even where this process goes without: a plan that says what to do about missing memory tries 4 bits."""
    if sys.modules.get(NAME, sys) is None:
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available
        from transformers.utils import is_bitsandbytes_available

        del sys.modules[NAME]
        for remembered in (is_bnb_available, is_bnb_4bit_available, is_bitsandbytes_available):
            remembered.cache_clear()
    return importlib.import_module(NAME)


def opens(layer: Any) -> bool:
    """Whether it is bitsandbytes' 4-bit linear layer, with a weight that `open_weight` can open."""
    loaded = sys.modules.get(NAME)
    if loaded is None or type(layer) is not loaded.nn.Linear4bit:
        return False
    state = _quant_state(layer)
    usual = state is not None and tuple(state.shape) == (layer.out_features, layer.in_features)
    return usual and not getattr(state, "packing_format_for_cpu", False)


def open_weight(layer: Any, dtype: Any) -> Any:
    """The weight of bitsandbytes' 4-bit layer in this type of torch, [out, in]."""
    state = copy.copy(_quant_state(layer))
    state.dtype = dtype
    return bitsandbytes().functional.dequantize_4bit(layer.weight.data.view(-1, 1), state)


def _quant_state(layer: Any) -> Any:
    """A weight may have lost it, as FSDP's do; bitsandbytes then takes the layer's."""
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _may_be_quantized(recipe: Recipe, named: str) -> bool:
    """False where the model's config.json is on this machine and names no quantization."""
    from huggingface_hub import try_to_load_from_cache

    keywords = {"cache_dir": recipe.get("model.cache_dir"), "revision": recipe.get("model.revision")}
    try:
        config = Path(named, "config.json")
        if not Path(named).is_dir():
            config = Path(str(try_to_load_from_cache(named, "config.json", **keywords)))
        return not config.is_file() or "quantization_config" in read_json(config)
    except ValueError:  # no hub id, or no JSON: refused where the model is located or loaded
        return True
