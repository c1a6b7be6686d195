"""Asks base, adapter and merged model the same questions, side by side: answers, how they ended, and a score."""

from typing import Any

from lora_recipes import console
from lora_recipes.data.load import load_data
from lora_recipes.data.questions import Question, questions
from lora_recipes.errors import RunError
from lora_recipes.model.adapted import attach_adapter
from lora_recipes.model.answer import Answer, answer, generation_config
from lora_recipes.model.build import end_token_ids, load_base, load_merged, load_tokenizer
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate, materialise
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, write_jsonl
from lora_recipes.score import summary
from lora_recipes.trained import require_same_adapter, require_same_heldout

SHOWN_ROWS = 5
BATCH_SIZE = 16


def generate(recipe: Recipe) -> dict[str, Any]:
    """Answer the recipe's prompts and held-out rows with every model there is, and write generations.jsonl.

    Returns:
        `score.summary` of the answers.

    Raises:
        RunError: nothing trained yet, or nothing to ask.
    """
    run_dir = RunDir.of(recipe.name)
    _require_trained(recipe, run_dir)
    require_same_adapter(recipe, run_dir)
    run_dir.require_writable()
    choices = choose(recipe, training=False)
    source = materialise(locate(recipe))
    tokenizer = load_tokenizer(recipe, source)
    ends = end_token_ids(recipe, source, tokenizer)
    data = load_data(recipe, tokenizer, set(ends))
    require_same_heldout(recipe, run_dir, data.keys(), data.seed)
    asked = questions(data)
    if not asked:
        raise RunError(f"{recipe.path}: nothing to ask; set generation.prompts or dataset.eval_split")
    config = generation_config(recipe.section("generation"), ends, tokenizer)
    settings = (config, recipe.get("generation.batch_size", BATCH_SIZE), recipe.get("training.seed", 42))

    def answers(model: Any, who: str) -> list[Answer]:
        console.say(f"Asking the {who} model {len(asked)} questions …")
        return answer(model, tokenizer, [question.input_ids for question in asked], *settings)

    given: dict[str, list[Answer]] = {}
    model = load_base(recipe, source, choices)
    if recipe.get("lora"):
        model = attach_adapter(model, run_dir.adapter)
        with model.disable_adapter():
            given["base"] = answers(model, "base")
        given["adapter"] = answers(model, "adapter")
    else:  # full fine-tuning: the trained model is `merged/`
        given["base"] = answers(model.eval(), "base")
    del model
    if run_dir.merged.is_dir():
        given["merged"] = answers(load_merged(run_dir.merged, recipe, choices), "merged")
    rows = _rows(asked, given)
    write_jsonl(run_dir.generations, rows)
    _show(rows, given)
    return summary(rows)


def _require_trained(recipe: Recipe, run_dir: RunDir) -> None:
    if recipe.get("lora"):
        run_dir.require_adapter(recipe.path)
    elif not (run_dir.merged / "config.json").is_file():
        raise RunError(
            f"{run_dir.merged}: no trained model yet; train it first: accelerate launch run.py {recipe.path}"
        )


def _rows(asked: list[Question], given: dict[str, list[Answer]]) -> list[dict[str, Any]]:
    return [
        {"prompt": question.text, "expected": question.expected}
        | {who: {"text": answers[index].text, "stopped": answers[index].stopped} for who, answers in given.items()}
        for index, question in enumerate(asked)
    ]


def _show(rows: list[dict[str, Any]], given: dict[str, list[Answer]]) -> None:
    def cell(row: dict[str, Any], who: str) -> str:
        right = row["expected"] is not None and row[who]["text"] == row["expected"]
        return f"{row[who]['text']}\n[{row[who]['stopped']}]{' ✓' if right else ''}"

    shown = [[row["prompt"], *(cell(row, who) for who in given), row["expected"] or "—"] for row in rows[:SHOWN_ROWS]]
    console.table(f"First {len(shown)} of {len(rows)} questions", ["question", *given, "expected"], shown)
    console.scores(summary(rows)["scores"])
