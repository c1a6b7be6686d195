"""Ship or do not ship: what a run folder proves about the model in it, and what nobody has measured."""

from typing import Any

from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, read_json, read_jsonl
from lora_recipes.score import summary

SHIP, DO_NOT_SHIP = "ship", "do not ship"


def verdict(recipe: Recipe, run_dir: RunDir) -> dict[str, Any]:
    """Every gate of a run, and what follows from them.

    A gate is true (held), false (failed) or null (not measured, or measured with an adapter or a merged model that is no
    longer there). A model is shipped when all are held: what was not measured counts like what has failed.

    Returns:
        {"gates": {name: true, false or null}, "verdict": "ship" or "do not ship", "scores": {model: …}}
    """
    now = run_dir.evidence()
    trained = "adapter_sha256" if recipe.get("lora") else "merged_sha256"  # what training left
    recorded = read_json(run_dir.status)
    evaluation = _of(now, [trained], read_json(run_dir.evaluation))
    parity = _of(now, [trained, "merged_sha256"], read_json(run_dir.parity))
    rows = read_jsonl(run_dir.generations)
    rows = rows if all(_of(now, [trained, "merged_sha256"], row) for row in rows) else []
    answers = summary(rows, recipe.section("checks"))
    gates = {
        "trained": recorded.get("state") == "complete" if recorded else None,
        "improved": evaluation.get("improved"),
        "not_forgotten": evaluation.get("forgetting", {}).get("passed"),
        "answers": not answers["failed"] if rows else None,
        "merge_parity": parity.get("passed") if parity.get("proof", "behaviour") == "behaviour" else None,
        "merged_answers": _merged_answers(recipe, parity, answers),
    }
    ship = all(gates.values())
    return {"gates": gates, "verdict": SHIP if ship else DO_NOT_SHIP, "scores": answers["scores"]}


def _of(now: dict[str, str | None], keys: list[str], evidence: dict[str, Any]) -> dict[str, Any]:
    """Evidence of the models that are there now; {} where it was of others."""
    return evidence if all(evidence.get(key) == now[key] for key in keys) else {}


def _merged_answers(recipe: Recipe, parity: dict[str, Any], answers: dict[str, Any]) -> bool | None:
    """Whether the merged model was asked the recipe's questions, and answered them as the adapter did."""
    if "merged" not in answers["scores"]:
        return None
    share = answers["merged_equals_adapter"]
    if recipe.get("quantization") and parity.get("base") == "original":
        # In the original weights a model answers like the 4-bit one only nearly. Its own answers were held against `checks`.
        return True
    if share is None:  # there is no adapter beside it, or no answer that can be compared
        return None if "adapter" in answers["scores"] else True
    return share >= parity.get("answers_in_common", parity.get("tolerance", {}).get("greedy_agreement", 1.0))
