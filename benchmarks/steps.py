"""Training steps of a recipe, in this process, each with what it took."""

import sys
import time
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any


def timed(path: Path, words: list[str]) -> dict[str, Any]:
    """Train a recipe with overrides.

    Returns:
        {"cpu", "wall"}: seconds of each step but the first; {"first_cpu"}: of that; {"parameters"}: of its base.
    """
    from transformers import TrainerCallback

    from lora_recipes.data.load import load_data
    from lora_recipes.model.build import end_token_ids, load_base, load_tokenizer
    from lora_recipes.model.machine import choose
    from lora_recipes.model.source import locate, materialise
    from lora_recipes.recipe import load_recipe
    from lora_recipes.run_dir import RunDir
    from lora_recipes.train.trainer import build_trainer, training_arguments

    clocks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clocks.append((time.process_time(), time.perf_counter()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clocks.append((time.process_time(), time.perf_counter()))

    recipe = load_recipe(path, words)
    choices, source = choose(recipe), materialise(locate(recipe))
    tokenizer = load_tokenizer(recipe, source)
    data = load_data(recipe, tokenizer, set(end_token_ids(recipe, source, tokenizer)))
    args = training_arguments(choices.training, RunDir.of(recipe.name))
    args.disable_tqdm = True
    base = load_base(recipe, source, choices)
    trainer = build_trainer(recipe, args, choices, base, tokenizer, data, [Clock()])
    with redirect_stdout(sys.stderr):  # what is printed to the end is the caller's
        trainer.train()
    parameters = sum(one.numel() for one in trainer.model.parameters() if not one.requires_grad)
    first, *steps = pairwise(clocks)
    return {
        "first_cpu": first[1][0] - first[0][0],
        "cpu": [after[0] - before[0] for before, after in steps],
        "wall": [after[1] - before[1] for before, after in steps],
        "parameters": parameters,
    }
