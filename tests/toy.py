"""Shrinks an architecture to two layers and a few hundred numbers a row, with all that makes it what it is."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from lora_recipes.plan import config_of, facts_file, facts_of
from lora_recipes.plan.method import method_of
from lora_recipes.recipe import load_recipe

HEAD = 16  # head_dim; every width is a multiple of 32, which 4-bit needs
SMALL = {  # by the name a config class gives it; only those it has
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": HEAD // 2,
    "v_head_dim": HEAD,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "block_multiple_of": 32,
}


def shrink(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The same config class: head ratios, one layer of each kind, experts and windows kept; everything else tiny."""
    values = dict(values)
    kind = values.pop("model_type")
    real = AutoConfig.for_model(kind, **values)
    small = {name: size for name, size in SMALL.items() if getattr(real, name, None) is not None}
    small |= _heads(real)
    small |= {name: min(2, experts) for name in ("num_experts_per_tok",) if (experts := getattr(real, name, None))}
    small |= {name: 128 for name in ("intermediate_size", "ffn_dim") if getattr(real, name, None)}
    if getattr(real, "word_embed_proj_dim", None):  # OPT: narrower than the model, or the same
        small["word_embed_proj_dim"] = small["hidden_size"] // (2 if real.word_embed_proj_dim < real.hidden_size else 1)
    if getattr(real, "sliding_window", None):
        small["sliding_window"] = 16  # shorter than a row, so that it is felt
    kinds = list(dict.fromkeys(getattr(real, "layer_types", None) or []))
    if len(kinds) > 1 or "layer_types" in values:
        small["layer_types"] = [kinds[0], kinds[-1]]
    if getattr(real, "no_rope_layers", None):
        small["no_rope_layers"] = [1, 0]
    small |= {
        "vocab_size": -len(tokenizer) // 64 * -64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    return AutoConfig.for_model(kind, **(values | small))


def _heads(real: PreTrainedConfig) -> dict[str, int]:
    queries = real.num_attention_heads
    groups = getattr(real, "num_key_value_heads", None) or queries
    ratio = queries // groups
    small_groups = 1 if groups == 1 or (ratio > 4 and ratio % 2 == 0) else 2
    width = ratio * small_groups * HEAD
    if getattr(real, "head_dim", None) and real.head_dim * queries != real.hidden_size:
        width = 2 * width  # as in the real one: heads times head_dim is not the width of the model
    heads = {"num_attention_heads": ratio * small_groups, "hidden_size": -width // 32 * -32}
    if getattr(real, "num_key_value_heads", None):
        heads["num_key_value_heads"] = small_groups
    if getattr(real, "head_dim", None) and not getattr(real, "kv_lora_rank", None):
        heads["head_dim"] = HEAD
    return heads


def make_toy(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, end: str | None, folder: Path) -> Path:
    """Write a toy of the architecture `values` to `folder`: random weights, and the tokenizer with `end` as end token."""
    if end and end != tokenizer.eos_token:  # the recipe's own end token, in the place of the demo tokenizer's
        tokenizer.add_special_tokens({"additional_special_tokens": [end]})
        tokenizer.chat_template = tokenizer.chat_template.replace(str(tokenizer.eos_token), end)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrink(values, tokenizer), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # large enough that every part of the model is felt in the logits
                parameter.normal_(std=0.08)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def facts(named: str, demo: Path) -> dict[str, Any]:
    """The numbers of a model that a recipe names."""
    if named.startswith("package:"):
        values = json.loads((demo / "config.json").read_text(encoding="utf-8"))
        return {key: value for key, value in values.items() if key not in ("architectures", "transformers_version")}
    known = facts_of(named)
    assert known, f"add {facts_file(named)}"
    return known["config"]


def slow_if_like_another(path: Path, *, of_a_type: bool = False) -> tuple[pytest.MarkDecorator, ...]:
    """Marks for a recipe that has no trait which an earlier one has not, and, since they take longest, for those on 4 bits that have
    none but another model type.

    Args:
        of_a_type: an earlier one of the same model type is enough.
    """
    first: dict[tuple[int, Any], str] = {}
    for name, traits in _traits(path.parent).items():
        on_four_bits = traits[-1]
        numbers = [0] if of_a_type else range(1 if on_four_bits else 0, len(traits))
        for number in numbers:
            first.setdefault((number, traits[number]), name)
    return () if path.stem in first.values() else (pytest.mark.slow,)


@cache
def _traits(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Recipe → what its toy is made of and how it is trained, the model's type first."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        recipe = load_recipe(path)
        config = config_of(recipe)
        found[path.stem] = (
            config.model_type,
            config.tie_word_embeddings,
            method_of(recipe),
            str(recipe.get("lora.target_modules")),
            bool(recipe.get("training.eos_token")),
            bool(recipe.get("quantization.load_in_4bit")),
        )
    return found
