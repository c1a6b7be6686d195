"""Tokenizer, configs and base model, built from the recipe's sections by the classes that own them."""

import dataclasses
import pickle
import typing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.hub import cached_file

from lora_recipes import console
from lora_recipes.errors import LoraRecipesError, RecipeError, RefusedError, machine_fault
from lora_recipes.model.files import require_safe_weights
from lora_recipes.model.folder import require_intact
from lora_recipes.model.kinds import no_causal_model, require_causal
from lora_recipes.model.machine import Choices
from lora_recipes.model.precision import let_go_of_file
from lora_recipes.model.safe import require_safe_config, require_safe_folder, require_safe_tokenizer
from lora_recipes.model.sound import require_whole
from lora_recipes.model.source import Source
from lora_recipes.model.whole import not_shared_out
from lora_recipes.recipe import Recipe
from lora_recipes.recipe.vocabulary import OWNERS

# A field of a wrong kind in somebody's files is whatever the library stumbles over first. While a trainer is made, it is ours.
_STUMBLES = (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, StrictDataclassError)
_REFUSALS = (ValueError, ImportError, OSError, SafetensorError, *_STUMBLES)


@contextmanager
def refusals_of(recipe: Recipe, section: str) -> Iterator[None]:
    """What the section's owner refuses becomes one message with the recipe's line, instead of a traceback."""
    try:
        yield
    except LoraRecipesError:
        raise
    except pickle.UnpicklingError as error:
        raise RefusedError(
            f"{recipe.where(section)}: the weights are a pickle that holds more than tensors, and may be an attack; nothing of it "
            "was run"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            where = recipe.where("model.pretrained_model_name_or_path")
            raise RefusedError(
                f"{where}: the weights have other shapes than config.json says (listed above); get the model again"
            ) from error
        if "to be installed" not in str(error):  # a tracker of `report_to`; anything else is no refusal
            raise
        raise RecipeError(f"{recipe.where(section)}: `{section}`: {error}") from error
    except _REFUSALS as error:
        if section == "training" and isinstance(error, _STUMBLES) and not isinstance(error, ValueError | OSError):
            raise
        if fault := machine_fault(error):
            raise fault from error
        if "trust_remote_code" in str(error):
            raise RefusedError(
                f"{recipe.where(section)}: the model comes with code of its own, which is not run: {error}"
            ) from error
        said = f"{type(error).__name__}: {error}" if isinstance(error, _STUMBLES) else error
        raise RecipeError(f"{recipe.where(section)}: `{section}` is refused by {OWNERS[section]}: {said}") from error
    except Exception as error:  # the tokenizers library has no class of its own for a file that it cannot read
        if section != "model" or type(error) is not Exception:
            raise
        raise RecipeError(f"{recipe.where(section)}: `{section}` is refused by {OWNERS[section]}: {error}") from error


_HUB_KEYS = ("revision", "trust_remote_code", "cache_dir", "local_files_only", "subfolder")


def load_tokenizer(recipe: Recipe, source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the recipe's end token, and a pad token (else the end token).

    Raises:
        RecipeError: the end token is not in the vocabulary.
    """
    with refusals_of(recipe, "model"):
        _require_safe(recipe, source)
        if file := _tokenizer_file(recipe, source):
            require_safe_tokenizer(Path(file))
        tokenizer = AutoTokenizer.from_pretrained(source.location, **_hub_keywords(recipe))
    end = recipe.get("training.eos_token")
    if end:
        if end not in tokenizer.get_vocab():
            raise RecipeError(f"{recipe.where('training.eos_token')}: `eos_token` {end!r} is not in the vocabulary")
        tokenizer.eos_token = end
    where = recipe.where("model.pretrained_model_name_or_path")
    own = tokenizer.chat_template
    for template in own.values() if isinstance(own, dict) else [own]:
        if not isinstance(template, str | None):
            raise RecipeError(f"{where}: the chat template of this tokenizer is {str(template)[:40]!r}, no text")
    if not isinstance(tokenizer.model_max_length, int | float):
        told = str(tokenizer.model_max_length)[:40]
        raise RecipeError(f"{where}: tokenizer_config.json: `model_max_length` is {told!r}, no number")
    if not tokenizer.is_fast:
        raise RecipeError(f"{where}: this model has no fast tokenizer, which masking the prompt needs (tokenizer.json)")
    if tokenizer.eos_token is None:
        raise RecipeError(
            f"{where}: this tokenizer has no end token, so no model could learn to stop; set training.eos_token"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_file(recipe: Recipe, source: Source) -> str | None:
    """tokenizer.json of a folder, or of the hub, which is then in the cache; None for a model without."""
    keywords = {key: value for key, value in _hub_keywords(recipe).items() if key != "trust_remote_code"}
    found: str | None = cached_file(
        source.location,
        "tokenizer.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
        **keywords,
    )
    return found


def end_token_ids(recipe: Recipe, source: Source, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's first, then those of the model's generation config."""
    declared = base_generation_config(recipe, source).eos_token_id
    ids = [tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])]
    for token in ids:
        if not isinstance(token, int | None) or (token or 0) < 0:
            where = recipe.where("model.pretrained_model_name_or_path")
            raise RecipeError(
                f"{where}: generation_config.json: `eos_token_id` holds {str(token)[:40]!r}, no token's number"
            )
    return list(dict.fromkeys(token for token in ids if token is not None))


def base_generation_config(recipe: Recipe, source: Source) -> GenerationConfig:
    """How the base answers unless it is told otherwise."""
    with refusals_of(recipe, "model"):
        return generation_config_in(source.location, **_hub_keywords(recipe))


def generation_config_in(location: str | Path, **keywords: Any) -> GenerationConfig:
    """The generation config beside a model; an empty one for a model without generation_config.json."""
    try:
        return GenerationConfig.from_pretrained(location, **keywords)
    except OSError:
        return GenerationConfig()


def model_config(recipe: Recipe, source: Source) -> PreTrainedConfig:
    """The architecture's numbers; no weights are read."""
    with refusals_of(recipe, "model"):
        _require_safe(recipe, source)
        config = AutoConfig.from_pretrained(source.location, **_hub_keywords(recipe))
        _require_known_quantization(recipe, config)
    return config


def _require_known_quantization(recipe: Recipe, config: PreTrainedConfig) -> None:
    """What transformers cannot open it would load as if it were not quantized, and only log so."""
    own = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if own is not None and not AutoHfQuantizer.supports_quant_method(own if isinstance(own, dict) else own.to_dict()):
        where, method = recipe.where("model.pretrained_model_name_or_path"), str(own.get("quant_method"))[:40]
        raise RecipeError(
            f"{where}: config.json: `quantization_config.quant_method` is {method!r}, which transformers does not know; name the "
            "16- or 32-bit model it was made from"
        )


def _require_safe(recipe: Recipe, source: Source) -> None:
    """What `locate` has looked for in a folder, for a model whose config comes from the hub."""
    if source.kind == "hub":
        keywords = _hub_keywords(recipe)
        values, _ = PreTrainedConfig.get_config_dict(source.location, **keywords)
        require_safe_config(values, f"config.json of {source.named}", trusted=keywords["trust_remote_code"])


def meta_model(config: PreTrainedConfig, recipe: Recipe, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device: every module and shape, no memory.

    Args:
        dtype: type of its parameters; unset: the config's.
    """
    require_causal(recipe, config)
    with torch.device("meta"), not_shared_out(), _stumbles_of(recipe, config):
        keywords: dict[str, Any] = {"trust_remote_code": bool(recipe.get("model.trust_remote_code"))}
        if dtype is not None:
            keywords["dtype"] = dtype
        return AutoModelForCausalLM.from_config(config, **keywords)


@contextmanager
def _stumbles_of(recipe: Recipe, config: PreTrainedConfig) -> Iterator[None]:
    """Sizes, types and names in a config.json that no model can have. Nothing lies in memory here that could run out."""
    try:
        yield
    except (ValueError, RuntimeError, ImportError, *_STUMBLES) as error:
        if "Unrecognized configuration class" in str(error):
            raise no_causal_model(recipe, config) from None
        where = recipe.where("model.pretrained_model_name_or_path")
        raise RecipeError(
            f"{where}: config.json: no model can be made of it: {type(error).__name__}: {error}; get the model again"
        ) from error


def _hub_keywords(recipe: Recipe) -> dict[str, Any]:
    section = recipe.section("model")
    # Said, not left out: unset, transformers would ask on the terminal whether to run a model's code.
    return {"trust_remote_code": False} | {key: section[key] for key in _HUB_KEYS if key in section}


def quantization_config(section: dict[str, Any]) -> BitsAndBytesConfig | None:
    """The `quantization` section as its class; None when the recipe does not quantize."""
    return BitsAndBytesConfig(**section) if section else None


def lora_config(section: dict[str, Any]) -> LoraConfig:
    """The `lora` section as peft.LoraConfig; nested sections become the config classes that PEFT expects."""
    if section.get("init_lora_weights") == "loftq":  # model.initialise does it: PEFT's own needs a GPU and scipy
        section = section | {"init_lora_weights": True}
    hints = typing.get_type_hints(LoraConfig)
    values = {key: _nested(hints[key], value) for key, value in section.items()}
    return LoraConfig(**{"task_type": "CAUSAL_LM", **values})


def adapted_on_meta(base: torch.nn.Module, recipe: Recipe) -> PeftModel:
    """The recipe's adapter on a model without weights, in its shapes: what PiSSA and the like compute needs real ones."""
    section = recipe.section("lora") | {"init_lora_weights": True, "eva_config": None}
    with warnings.catch_warnings():  # what PEFT warns of, `find_targets` turns into errors
        warnings.simplefilter("ignore")
        model = get_peft_model(base, lora_config(section))
    if recipe.get("training.lorafa"):
        freeze_first_matrices(model)
    return model


def freeze_first_matrices(model: PeftModel) -> None:
    """LoRA-FA trains every B and leaves A as it was drawn."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def _nested(hint: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    classes = [member for member in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(member)]
    return typing.cast(Any, classes[0])(**value) if classes else value


def load_base(
    recipe: Recipe,
    source: Source,
    choices: Choices,
    *,
    dtype: str | None = None,
    quantized: bool = True,
    trains: bool = False,
) -> PreTrainedModel:
    """The base model as the recipe wants it, on the device that was chosen.

    Args:
        dtype: overrides `model.dtype`.
        quantized: False loads the original weights even where the recipe quantizes.
        trains: training computes under autocast, where the recipe asks for bf16 or fp16; nothing else does.
    """
    keywords = {"trust_remote_code": False} | recipe.section("model")
    keywords.pop("pretrained_model_name_or_path")
    _require_safe(recipe, source)
    kind = require_safe_weights(recipe, source)
    keywords["use_safetensors"] = kind == "safetensors"
    if kind != "safetensors":
        console.say(
            f"WARNING: {source.named} is loaded from pickles (--allow-pickle). torch reads them as plain tensors, but a fault "
            "in that reader would let them run code. Convert the model to safetensors",
            "bold red",
        )
    if dtype is not None:
        keywords["dtype"] = dtype
    config = quantization_config(choices.quantization) if quantized else None
    if config is not None:  # unset it is left out: None would say that a base which is quantized on disk is not
        keywords["quantization_config"] = config
    if choices.device == "cpu":
        # One device, and `choose` has said so. bitsandbytes would otherwise pick a GPU where there is one.
        keywords["device_map"] = {"": "cpu"} if config is not None else None
        keywords.pop("max_memory", None)
    elif is_deepspeed_zero3_enabled():
        pass  # it takes no device_map: each process loads its part, to its own device
    elif config is not None or PartialState().distributed_type == DistributedType.NO:
        keywords.setdefault("device_map", {"": PartialState().local_process_index})
    with refusals_of(recipe, "model"):
        model, loading = AutoModelForCausalLM.from_pretrained(source.location, output_loading_info=True, **keywords)
    if PartialState().is_local_main_process:  # of a sharded model the others hold parts
        require_whole(model, loading, source.named)
    if plain := [name for name, module in model.named_modules() if _should_be_quantized(module)]:
        raise RecipeError(
            f"{recipe.where('model.pretrained_model_name_or_path')}: `quantization_config` in config.json says that the weights are "
            f"quantized, and they are not ({plain[0]}); remove it, and set `quantization` in the recipe"
        )
    if not (trains and (choices.training.get("bf16") is not False or choices.training.get("fp16"))):
        attend_in_its_type(model)
    keep_canonical_4bit(model)
    if config is not None and choices.device == "cpu":
        let_go_of_file(model.parameters())
    return model


def attend_in_its_type(model: PreTrainedModel) -> None:
    """Flash attention takes numbers of 16 bits alone, and autocast, which makes them, is for training."""
    if model.dtype == torch.float32 and "flash" in str(model.config._attn_implementation):
        model.set_attn_implementation("sdpa")
        console.say("attention: sdpa instead of flash attention, which takes no float32", "yellow")


def _should_be_quantized(module: torch.nn.Module) -> bool:
    """Whether a layer is bitsandbytes', and its weight is not."""
    if type(module).__name__ not in ("Linear4bit", "Linear8bitLt"):
        return False
    weight = typing.cast(torch.Tensor, module.weight)
    return weight.is_floating_point() and getattr(weight, "quant_state", None) is None


def load_merged(folder: Path, recipe: Recipe, choices: Choices) -> PreTrainedModel:
    """The plain model that `merge` wrote, loaded as its users would, in evaluation mode.

    Raises:
        RefusedError: a file is not, bit for bit, what was published.
    """
    require_intact(folder)
    section = recipe.section("model")
    keywords: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False} | {
        key: section[key] for key in ("attn_implementation", "trust_remote_code") if key in section
    }
    require_safe_folder(folder, trusted=keywords["trust_remote_code"])
    if choices.device != "cpu":
        keywords["device_map"] = section.get("device_map", {"": 0})
    with refusals_of(recipe, "merge"):
        model = AutoModelForCausalLM.from_pretrained(folder, **keywords).eval()
    attend_in_its_type(model)
    return model


def make_servable(model: PreTrainedModel, ends: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Training switches the cache off and may change the end token; neither is in the weights.

    Args:
        ends: tokens that end an answer.
    """
    model.config.use_cache = True
    model.generation_config = GenerationConfig.from_dict(
        model.generation_config.to_dict()
        | {"use_cache": True, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    )


def keep_canonical_4bit(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512_BF16.

    There the first forward without gradients rewrites the packed weights into another layout. After it, backward is
    cut at each 4-bit layer, and merging or dequantizing reads the wrong layout, both without an error
    (bitsandbytes 0.50: nn/modules.py, Linear4bit.forward). The attribute switches that path off.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    import bitsandbytes as bnb  # 3 s: only where something is 4-bit

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
