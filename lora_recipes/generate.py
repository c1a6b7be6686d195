"""Asks base, adapter and merged model the same questions, side by side, and holds the answers against `checks`."""

from typing import Any

from lora_recipes import console
from lora_recipes.data.load import LoadedData
from lora_recipes.data.questions import Question, dialogue_form, questions
from lora_recipes.errors import RunError
from lora_recipes.judge import Signs, broken, fault
from lora_recipes.model.adapted import attach_adapter, check_adapter
from lora_recipes.model.answer import Answer, answer, stop_strings
from lora_recipes.model.build import load_base, load_merged, model_config
from lora_recipes.model.machine import choose, release_memory
from lora_recipes.model.sound import require_positions_to_answer
from lora_recipes.model.source import locate, materialise
from lora_recipes.model.trial import tried_generation
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, write_jsonl
from lora_recipes.score import expectation_of, summary, told
from lora_recipes.trained import as_trained, require_same_adapter, require_same_heldout

SHOWN_ROWS = 5
SHOWN_FAILURES = 20
BATCH_SIZE = 16

Answers = dict[str, list[Answer | None]]  # model → one answer a question; None where it could not be asked


def generate(recipe: Recipe, *, force: bool = False, served: bool = False) -> dict[str, Any]:
    """Answer the recipe's prompts and held-out rows with every model there is, and write generations.jsonl.

    Args:
        force: use the adapter even where it was trained on another base.
        served: ask the merged model through a server on this machine as well.

    Returns:
        `score.summary` of the answers; "failed" names every expectation that a trained model does not meet.

    Raises:
        RunError: nothing trained yet, nothing to ask, or nothing to serve.
        RecipeError: settings that no answer can be made with.
    """
    run_dir = RunDir.of(recipe.name)
    _require_trained(recipe, run_dir, served=served)
    run_dir.require_writable()
    choices = choose(recipe, training=False)
    source = materialise(locate(recipe))
    require_same_adapter(recipe, run_dir, source, force=force)
    if recipe.get("lora"):
        check_adapter(run_dir.adapter)
    opened = as_trained(recipe, run_dir, source)
    tokenizer, data = opened.tokenizer, opened.data
    require_same_heldout(recipe, run_dir, data.keys(), data.seed)
    asked = questions(data)
    if not asked:
        raise RunError(f"{recipe.path}: nothing to ask; set generation.prompts, checks.prompts or dataset.eval_split")
    architecture = model_config(recipe, source)
    config = tried_generation(recipe, architecture, opened.ends, tokenizer)
    limits = [(question.expectation or {}).get("max_new_tokens") for question in asked]
    bounds = [limit or config.max_new_tokens or 0 for limit in limits]
    prompts = [question.input_ids for question in asked]
    require_positions_to_answer(recipe, architecture, prompts, bounds)
    settings = (config, recipe.get("generation.batch_size", BATCH_SIZE), recipe.get("training.seed", 42), limits)

    def answers(model: Any, who: str) -> list[Answer | None]:
        console.say(f"Asking the {who} model {len(asked)} questions …")
        return list(answer(model, tokenizer, prompts, *settings))

    given: Answers = {}
    model = load_base(recipe, source, choices).eval()
    # Before the adapter is on it: switching one off leaves trained biases and embeddings in the base.
    given["base"] = answers(model, "base")
    if recipe.get("lora"):
        given["adapter"] = answers(attach_adapter(model, run_dir.adapter), "adapter")
    del model
    release_memory()
    if run_dir.merged.is_dir():
        given["merged"] = answers(load_merged(run_dir.merged, recipe, choices), "merged")
        release_memory()
    if served:
        if config.max_time is not None:
            console.say("note: a server is asked for no generation.max_time", "yellow")
        given["served"] = _served(run_dir, asked, bounds, given["merged"], tokenizer)
    rows = _rows(asked, given, _signs(data, stop_strings(config)), run_dir.evidence())
    write_jsonl(run_dir.generations, rows)
    found = summary(rows, recipe.section("checks"))
    _show(rows, list(given), found)
    return found


def _require_trained(recipe: Recipe, run_dir: RunDir, *, served: bool) -> None:
    run_dir.require_trained(recipe.path, adapter=bool(recipe.get("lora")))
    if served and not (run_dir.merged / "config.json").is_file():
        raise RunError(f"{run_dir.merged}: nothing to serve yet; merge it first: lora-recipes merge {recipe.path}")
    if served and not recipe.get("generation.max_new_tokens"):
        raise RunError(f"{recipe.path}: a served answer needs a limit; set generation.max_new_tokens")


def _signs(data: LoadedData, stops: list[str]) -> Signs:
    form = dialogue_form(data)
    return Signs(form.controls, form.inside, form.turns, stops)


def _served(
    run_dir: RunDir, asked: list[Question], limits: list[int], merged: list[Answer | None], tokenizer: Any
) -> list[Answer | None]:
    """Answers of the merged model through a server. Literal text, and rows with tools, are not asked."""
    from lora_recipes.model.served import served_answers  # needs the extra `serve`

    found: list[Answer | None] = [None] * len(asked)
    for limit in dict.fromkeys(limits):
        chosen = {index: asked[index].messages or [] for index, own in enumerate(limits) if own == limit}
        chosen = {index: messages for index, messages in chosen.items() if messages}
        if not chosen:
            continue
        console.say(f"Asking the served model {len(chosen)} questions …")
        texts = served_answers(run_dir.merged, list(chosen.values()), limit)
        for index, text in zip(chosen, texts, strict=True):
            found[index] = _ended(text.strip(), limit, merged[index], tokenizer)
    if not any(found):
        raise RunError("no question can be put to a server: all are literal text, or rows with tools")
    return found


def _ended(text: str, limit: int, merged: Answer | None, tokenizer: Any) -> Answer:
    """A server gives the text alone: it ended as the same text did here, else by itself if there was room for more."""
    if merged is not None and merged.text == text:
        return merged
    used = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Answer(text, "eos" if used < limit else "length")


def _rows(asked: list[Question], given: Answers, signs: Signs, evidence: dict[str, str | None]) -> list[dict[str, Any]]:
    """The rows of generations.jsonl."""
    rows = []
    for index, question in enumerate(asked):
        row: dict[str, Any] = {"prompt": question.text, "expected": question.expected, **evidence}
        if question.expectation is not None:
            row["expectation"] = expectation_of(question.expectation)
        for who, answers in given.items():
            if (one := answers[index]) is not None:
                row[who] = _judged(one, signs, row)
        rows.append(row)
    return rows


def _judged(one: Answer, signs: Signs, row: dict[str, Any]) -> dict[str, Any]:
    """An answer with what is wrong with it. `row` has the base's answer before that of any other."""
    found: dict[str, Any] = {"text": one.text, "stopped": one.stopped}
    if why := fault(one.text, one.stopped, signs):
        found["fault"] = why
    if "expectation" in row:
        base = row.get("base", found)
        found["failed"] = broken(row["expectation"], found, base["text"])
    return found


def _show(rows: list[dict[str, Any]], models: list[str], found: dict[str, Any]) -> None:
    def cell(row: dict[str, Any], who: str) -> str:
        if who not in row:
            return "—"
        right = row["expected"] is not None and row[who]["text"] == row["expected"]
        ended = row[who].get("fault", "eos")
        missed = "".join(f"\n✗ {failed['check']}" for failed in row[who].get("failed", []))
        return f"{row[who]['text']}\n[{ended}]{' ✓' if right else ''}{missed}"

    def wanted(row: dict[str, Any]) -> str:
        if "expectation" not in row:
            return row["expected"] or "—"
        return "\n".join(f"{check}: {value}" for check, value in row["expectation"].items() if check != "prompt")

    shown = [[row["prompt"], *(cell(row, who) for who in models), wanted(row)] for row in rows[:SHOWN_ROWS]]
    console.table(f"First {len(shown)} of {len(rows)} questions", ["question", *models, "expected"], shown)
    console.scores(found["scores"])
    for failure in found["failed"][:SHOWN_FAILURES]:
        console.say(f"failed: {told(failure)}", "red")
    if len(found["failed"]) > SHOWN_FAILURES:
        console.say(f"… and {len(found['failed']) - SHOWN_FAILURES} more, in --json", "red")
