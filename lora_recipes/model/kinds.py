"""Which models recipes fine-tune: causal language models of text alone. All others are told apart by their config."""

import json
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lora_recipes.errors import RecipeError
from lora_recipes.recipe import Recipe

CONFIGS = Path(__file__).parent / "configs"  # of models that this package knows by heart, a file each


def require_causal(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raises RecipeError for encoders, encoders with a decoder, and models with a part for images or sound."""
    if config.is_encoder_decoder or not hasattr(config, "get_text_config"):
        raise no_causal_model(recipe, config)
    reads_both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    if reads_both_ways or config.get_text_config() is not config:
        raise no_causal_model(recipe, config)


def no_causal_model(recipe: Recipe, config: PreTrainedConfig) -> RecipeError:
    """What is said of such a model, with the types that are known to work."""
    where = recipe.where("model.pretrained_model_name_or_path")
    known = {json.loads(file.read_text(encoding="utf-8"))["config"]["model_type"] for file in CONFIGS.glob("*.json")}
    return RecipeError(
        f"{where}: {config.model_type} is no causal language model of text alone, which recipes fine-tune. Known to work: "
        f"{', '.join(sorted(known))}"
    )
