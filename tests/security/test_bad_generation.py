"""Settings of `generation` that no answer can be made with: told before any weight is loaded, and the good ones pass."""

from typing import Any

import torch

from lora_recipes.errors import EXIT_USER
from lora_recipes.model.build import load_tokenizer, model_config
from lora_recipes.model.source import locate
from lora_recipes.model.trial import tried_generation
from lora_recipes.recipe import load_recipe
from tests.security.bad_inputs import Case, Run, parametrized, require_outcome
from tests.security.hostile import Maker


def answering(**generation: Any) -> Run:
    """As `train`, `generate` and `chat` try the section before they load any weight."""

    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", generation=generation))
        source, before = locate(read), torch.get_rng_state()
        try:
            tried_generation(read, model_config(read, source), [2], load_tokenizer(read, source))
        finally:
            assert torch.equal(torch.get_rng_state(), before)

    return run


SAMPLED = {"do_sample": True}
UNANSWERABLE: list[tuple[dict[str, Any], str]] = [
    ({"stop_strings": []}, "`generation.stop_strings` is '[]'"),
    ({"stop_strings": ""}, "`generation.stop_strings` is ''"),
    ({"stop_strings": [""]}, "none of them empty"),
    ({"stop_strings": [5]}, "`generation.stop_strings` is '[5]'"),
    ({"eos_token_id": ["x"]}, "must be an integer"),
    ({"eos_token_id": [None]}, "must be an integer"),
    ({"bad_words_ids": []}, "`bad_words_ids` has to be a non-empty list"),
    ({"bad_words_ids": [["x"]]}, "`bad_words_ids`"),
    ({"bad_words_ids": [[10**9]]}, "vocabulary size"),
    ({"sequence_bias": {}}, "`sequence_bias` has to be"),
    ({"suppress_tokens": ["x"]}, "`generation` is refused"),
    ({"cache_implementation": "nope"}, "Invalid `cache_implementation` (nope)"),
    ({"watermarking_config": {"x": 1}}, "WatermarkingConfig"),
    ({"early_stopping": "x"}, "`early_stopping` must be"),
    (SAMPLED | {"min_p": 2.0}, "`generation.min_p` must be at most 1"),
    (SAMPLED | {"top_h": 5.0}, "`generation.top_h` must be at most 1"),
    ({"forced_eos_token_id": 10**9}, "out of bounds"),
    ({"exponential_decay_length_penalty": 5}, "TypeError"),
    ({"exponential_decay_length_penalty": [1]}, "IndexError"),
    (SAMPLED | {"temperature": 1e-300}, "probability tensor"),
]
ANSWERABLE: list[dict[str, Any]] = [
    {},
    SAMPLED | {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05},
    SAMPLED | {"typical_p": 0.9, "top_h": 0.4},
    {"num_beams": 4, "early_stopping": True, "length_penalty": 0.8},
    {"stop_strings": ["\n\n", "Human:"], "max_time": 30.0},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 8},
    {"cache_implementation": "static"},
    {"guidance_scale": 1.5, "suppress_tokens": [5], "bad_words_ids": [[6, 7]], "eos_token_id": [2, 3]},
    {"renormalize_logits": True, "watermarking_config": {"greenlist_ratio": 0.25}},
]
GENERATION: list[Case] = [
    *(("R8", answering(**keys), EXIT_USER, said) for keys, said in UNANSWERABLE),
    *(("R8", answering(**keys), 0, "") for keys in ANSWERABLE),
]


@parametrized(GENERATION)
def test_settings_that_make_no_answer_end_with_their_code_and_say_what_is_wrong(
    maker: Maker, run: Run, code: int, said: str
):
    require_outcome(lambda: run(maker), code, said)
