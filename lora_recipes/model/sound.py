"""Whether a base that was loaded is the whole model that its config describes: every weight from a file, every one finite."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_recipes.errors import RecipeError, RefusedError
from lora_recipes.recipe import Recipe

LONGEST = 10**9  # positions; a number beyond has no float
MOST_AHEAD = 4  # layers that predict tokens further ahead; models known have one to three
SHOWN = 3  # names of weights in a message
LAYER = re.compile(r".*?\.\d+(?=\.)")  # the part of a weight's name that names its layer


def require_whole(model: PreTrainedModel, loading: dict[str, Any], named: str) -> None:
    """Hold a model against what was loaded into it.

    Args:
        loading: what `from_pretrained(output_loading_info=True)` says.

    Raises:
        RefusedError: a weight was in no file, so it is random; or one holds NaN or infinity.
    """
    if missing := sorted(loading["missing_keys"]):
        raise RefusedError(
            f"{named}: {len(missing)} weights of its architecture are in none of its files ({', '.join(missing[:SHOWN])}), and "
            "would be random numbers; get the model again, or see whether `model_type` in config.json is right"
        )
    if left := _left_out(model, loading["unexpected_keys"]):
        raise RefusedError(
            f"{named}: its files hold {len(left)} more layers than config.json says ({', '.join(left[:SHOWN])}), and without "
            "them it is another model; get the model again, or see whether `num_hidden_layers` in config.json is right"
        )
    broken = [name for name, parameter in model.named_parameters() if not _finite(parameter)]
    if broken:
        raise RefusedError(
            f"{named}: {len(broken)} weights hold NaN or infinity ({', '.join(broken[:SHOWN])}); get the model again"
        )
    if dead := _all_zero(model):
        raise RefusedError(
            f"{named}: every matrix of {len(dead)} of its layers is zero ({', '.join(dead[:SHOWN])}), so nothing can be learnt "
            "there; get the model again, or see in which type its weights were saved"
        )


def _left_out(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Layers of the network that the files have and the model does not. What stands elsewhere in the files, such as a part
    that sees images, is not its own; nor are the last layers that only predict tokens further ahead (GLM, DeepSeek)."""
    said = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None)
    ahead = min(said, MOST_AHEAD) if isinstance(said, int) else 0
    layers = {within.group() for name, _ in model.named_parameters() if (within := LAYER.match(name))}
    own = {".".join(layer.split(".")[start:]) for layer in layers for start in range(layer.count("."))}
    places = {layer.rpartition(".")[0] for layer in own}  # in files, what stands before may be missing
    found = {within.group() for name in unexpected if (within := LAYER.match(name))} - own
    more = sorted((layer for layer in found if layer.rpartition(".")[0] in places), key=_number)
    return more if len(more) > ahead else []


def _number(layer: str) -> int:
    return int(layer.rpartition(".")[2])


def _all_zero(model: PreTrainedModel) -> list[str]:
    """Layers of the network that hold nothing but zeros, and the embedding if it does. A head may begin so, and learns."""
    alive: dict[str, bool] = {}
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        values = parameter.data
        if type(values) is not torch.Tensor or values.is_meta or not values.is_floating_point() or values.dim() < 2:
            continue
        within = LAYER.match(name)
        if within or parameter is embedding:
            place = within.group() if within else name
            alive[place] = alive.get(place, False) or bool(values.any())
    return [place for place, found in alive.items() if not found]


def _finite(parameter: torch.Tensor) -> bool:
    if type(parameter.data) is not torch.Tensor or parameter.is_meta or not parameter.is_floating_point():
        return True  # sharded, elsewhere, or quantized
    if getattr(parameter, "quant_state", None) is not None:
        return True  # quantized too, its bits kept as floats (`bnb_4bit_quant_storage`)
    return bool(finite(parameter.data))


def finite(values: torch.Tensor) -> torch.Tensor:
    """Whether all values are finite, where they lie: their largest and smallest tell, and take no memory."""
    if values.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=values.device)
    least, most = torch.aminmax(values.detach())
    return least.isfinite() & most.isfinite()


def positions(recipe: Recipe, config: PreTrainedConfig) -> int | None:
    """Tokens that a model has positions for; None where its config does not say so. Raises RecipeError for no number."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    scaled = (getattr(text, "rope_parameters", None) or {}).get("factor") if most else None
    if not isinstance(most, int | None):
        raise RecipeError(
            f"{recipe.where('model.pretrained_model_name_or_path')}: config.json: `max_position_embeddings` is {str(most)[:40]!r}"
        )
    return (
        int(min(most, LONGEST) * max(1.0, min(scaled, LONGEST))) if most and isinstance(scaled, int | float) else most
    )


def require_positions(recipe: Recipe, config: PreTrainedConfig, longest: int, limit: int | None) -> None:
    """Raises RecipeError where a row is longer than the model has positions for.

    Args:
        longest: tokens of the longest row, before it is cut.
        limit: tokens that rows are cut at.
    """
    most = positions(recipe, config)
    length = longest if limit is None else min(longest, limit)
    if most and length > most:
        raise RecipeError(
            f"{recipe.where('training.max_length')}: a row has {length} tokens with this `training.max_length`, and `model` has "
            f"{most} positions (max_position_embeddings); set training.max_length={most}, or name a model with more"
        )


def require_positions_to_answer(
    recipe: Recipe, config: PreTrainedConfig, prompts: list[list[int]], limits: list[int]
) -> None:
    """Raises RecipeError where a prompt (token ids) and the new tokens that it allows are more than the model has positions."""
    most = positions(recipe, config)
    length, limit = max(((len(prompt), limit) for prompt, limit in zip(prompts, limits, strict=True)), key=sum)
    if most and length + limit > most:
        way_out = (
            f"at most {most - length} new tokens fit (max_new_tokens)"
            if length < most
            else "ask less, or ask no held-out rows (generation.max_rows=0)"
        )
        raise RecipeError(
            f"{recipe.where('generation.max_new_tokens')}: a prompt of {length} tokens and {limit} new ones are more than the "
            f"{most} positions of `model` (max_position_embeddings); {way_out}"
        )


def require_vocabulary(recipe: Recipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RecipeError where a tokenizer makes numbers that the model has no embedding for.

    Tokens that were added and never occur in a row may lie beyond it: some models on the hub have such.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    special = [token for token in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) if token]
    largest = max([tokenizer.vocab_size - 1, *special])
    if rows is not None and largest >= rows:
        raise RecipeError(
            f"{recipe.where('model.pretrained_model_name_or_path')}: the tokenizer makes tokens up to {largest}, the model has "
            f"{rows} embeddings; tokenizer and model are not of one make. Resize the embeddings and save the model first "
            "(model.resize_token_embeddings(len(tokenizer))), or name the model that the tokenizer belongs to"
        )
