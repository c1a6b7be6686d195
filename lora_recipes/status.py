"""Reads a run folder and says how the run stands: state, gates, scores, where everything lies, what to type next."""

from typing import Any

from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, read_json, read_jsonl
from lora_recipes.score import summary


def status(recipe: Recipe) -> dict[str, Any]:
    """What is known of a run: the keys of status.json, "gates", "scores", "verdict", "folder", "next".

    A gate is true (held), false (failed) or null (not tried yet). The verdict is "passed" when training is complete
    and every gate holds, "failed" when one does not, else "incomplete".
    """
    run_dir = RunDir.of(recipe.name)
    recorded = read_json(run_dir.status)
    parity = read_json(run_dir.parity)
    answers = summary(read_jsonl(run_dir.generations))
    gates: dict[str, bool | None] = {
        "trained": recorded.get("state") == "complete" if recorded else None,
        "stops": not answers["failed"] if answers["scores"] else None,
        "merge_parity": parity.get("passed"),
    }
    if recipe.get("lora") and not (recipe.get("quantization") and parity.get("base") == "original"):
        # Merged into the original weights, a model answers like the 4-bit one only nearly: parity.json says how nearly.
        needed = parity.get("tolerance", {}).get("greedy_agreement", 1.0)
        both = "merged" in answers["scores"]
        gates["merged_equals_adapter"] = answers["merged_equals_adapter"] >= needed if both else None
    held = list(gates.values())
    verdict = "failed" if False in held else "passed" if all(held) else "incomplete"
    known = {key: recorded.get(key) for key in ("step", "max_steps", "exit_code", "reason", "last_good_checkpoint")}
    return {
        "state": recorded.get("state", "not started"),
        **known,
        "gates": gates,
        "scores": answers["scores"],
        "verdict": verdict,
        "folder": str(run_dir.root),
        "next": _next(recipe, run_dir, gates),
    }


def _next(recipe: Recipe, run_dir: RunDir, gates: dict[str, bool | None]) -> list[str]:
    """Commands that make sense now."""
    path = recipe.path
    if not (run_dir.adapter if recipe.get("lora") else run_dir.merged).is_dir():
        resume = " --resume" if run_dir.checkpoints.is_dir() else ""
        return [f"accelerate launch run.py {path}{resume}"]
    commands = []
    if not run_dir.merged.is_dir():
        commands.append(f"lora-recipes merge {path}")
    if gates["stops"] is None or (run_dir.merged.is_dir() and gates.get("merged_equals_adapter", True) is None):
        commands.append(f"lora-recipes generate {path}")
    return commands or [f"lora-recipes new {path} my-recipe dataset.data_files.train=my.jsonl"]
