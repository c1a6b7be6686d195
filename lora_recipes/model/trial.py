"""The `generation` section tried on a model of a few numbers: what transformers refuses is told before any weight is loaded."""

import warnings
from copy import deepcopy

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from lora_recipes.errors import LoraRecipesError, RecipeError, machine_fault
from lora_recipes.model.answer import answer_batch, generation_config
from lora_recipes.recipe import Recipe
from lora_recipes.recipe.vocabulary import OWNERS

NEW_TOKENS = 2  # the second is the first that reads the cache
PROMPT = 4  # tokens; the second prompt of the batch is shorter, so that it is padded
SMALL = 8  # width of the model


def tried_generation(
    recipe: Recipe, config: PreTrainedConfig, ends: list[int], tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """The recipe's `generation` section as its class, after a tiny random model has answered by it.

    The class looks at few of its fields; others are refused only where an answer is made. Takes some 50 ms, and leaves the
    state of the random numbers as it was.

    Args:
        config: of the model that will be asked, for the size of its vocabulary.
        ends: tokens that end an answer.

    Raises:
        RecipeError: no answer can be made with these settings.
    """
    try:
        made = generation_config(recipe.section("generation"), ends, tokenizer)
        _require_stops(recipe, made.stop_strings)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of lengths that are not those of the recipe
            _answer(made, config, tokenizer)
    except LoraRecipesError:
        raise
    except Exception as error:  # whatever transformers stumbles over
        if fault := machine_fault(error):
            raise fault from error
        said = error if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: {error}"
        raise RecipeError(
            f"{recipe.where('generation')}: `generation` is refused by {OWNERS['generation']}: {said}"
        ) from error
    return made


def _require_stops(recipe: Recipe, stops: object) -> None:
    """Looked at by itself: to get a vocabulary ready for stop strings takes seconds, and an empty one is always there."""
    texts = [stops] if isinstance(stops, str) else stops
    if stops is not None and not (
        isinstance(texts, list) and texts and all(isinstance(one, str) and one for one in texts)
    ):
        raise RecipeError(
            f"{recipe.where('generation.stop_strings')}: `generation.stop_strings` is {str(stops)[:40]!r}, where texts that end "
            "an answer are wanted, none of them empty; write some, or drop the key"
        )


def _answer(made: GenerationConfig, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = getattr(config.get_text_config(), "vocab_size", None) or 0  # often more than the tokenizer has
    tried = deepcopy(made)
    tried.max_new_tokens, tried.max_length, tried.stop_strings = NEW_TOKENS, None, None
    if torch.accelerator.is_available() and "offloaded" in str(made.cache_implementation):
        tried.cache_implementation = None  # it moves keys and values from a device, where this model is not
    prompts = [list(range(PROMPT)), list(range(PROMPT // 2))]
    answer_batch(_tiny(max(len(tokenizer), rows)), tokenizer, prompts, tried)


def _tiny(vocabulary: int) -> LlamaForCausalLM:
    sizes = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=SMALL,
        intermediate_size=SMALL,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        attn_implementation="eager",  # it can give everything that may be asked for, such as attentions
    )
    return LlamaForCausalLM(sizes).eval()
