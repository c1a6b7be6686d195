"""What will be learnt, seen before anything is: the audit of all rows and the preview of some. No weights, no GPU."""

from typing import Any

from lora_recipes import console
from lora_recipes.data.audit import audit as report_on
from lora_recipes.data.audit import write_evidence
from lora_recipes.data.load import LoadedData, load_data
from lora_recipes.model.build import end_token_ids, load_tokenizer
from lora_recipes.model.source import locate, materialise
from lora_recipes.recipe import Recipe
from lora_recipes.recipe.defaults import DEVICE_BATCH
from lora_recipes.run_dir import RunDir


def audit(recipe: Recipe) -> dict[str, Any]:
    """Look at every row and write audit.json, and rejected.jsonl where rows are left out.

    Returns:
        The report; its `problems` are what training is refused for.

    Raises:
        LoraRecipesError: the data or the tokenizer cannot be read at all.
    """
    run_dir = RunDir.of(recipe.name)
    run_dir.require_writable()
    data, report = audited(recipe)
    if run_dir.adapter.is_dir():
        console.say(f"{run_dir.root} is trained: its audit.json is left as it was.")
    else:
        write_evidence(run_dir, data, report)
    console.audit(recipe.name, report)
    return report


def audited(recipe: Recipe) -> tuple[LoadedData, dict[str, Any]]:
    """The recipe's data and the report on it."""
    source = materialise(locate(recipe, weights=False))
    tokenizer = load_tokenizer(recipe, source)
    data = load_data(recipe, tokenizer, set(end_token_ids(recipe, source, tokenizer)))
    batch = recipe.get("training.per_device_train_batch_size", DEVICE_BATCH)
    return data, report_on(data, batch, batch * recipe.get("training.gradient_accumulation_steps", 1))
