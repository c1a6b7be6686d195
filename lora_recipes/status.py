"""Reads a run folder and says how the run stands: state, gates, scores, where everything lies, what to type next."""

from typing import Any

from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, read_json
from lora_recipes.verdict import SHIP, verdict


def status(recipe: Recipe) -> dict[str, Any]:
    """What is known of a run: the keys of status.json, "gates", "scores", "verdict" (see `verdict`), "folder", "next"."""
    run_dir = RunDir.of(recipe.name)
    recorded = read_json(run_dir.status)
    told = verdict(recipe, run_dir)
    known = {
        key: recorded.get(key)
        for key in ("step", "max_steps", "exit_code", "reason", "last_good_checkpoint", "diagnosis")
    }
    return {
        "state": _state(run_dir, recorded),
        **known,
        **told,
        "folder": str(run_dir.root),
        "next": _next(recipe, run_dir, told),
    }


def _state(run_dir: RunDir, recorded: dict[str, Any]) -> str:
    """As recorded; a run that was killed had no time to record it, but holds no lock."""
    state = recorded.get("state", "not started")
    return "cut off" if state == "running" and not run_dir.in_use() else state


def _next(recipe: Recipe, run_dir: RunDir, told: dict[str, Any]) -> list[str]:
    """Commands that make sense now."""
    path, gates = recipe.path, told["gates"]
    if not (run_dir.adapter if recipe.get("lora") else run_dir.merged).is_dir():
        return [f"accelerate launch run.py {path}"]
    commands = []
    if not run_dir.merged.is_dir():
        commands.append(f"lora-recipes merge {path}")
    elif (
        recipe.get("lora") and gates["merge_parity"] is None
    ):  # of an adapter that is no longer there, or merged without a proof of behaviour
        commands.append(f"mv {run_dir.merged} {run_dir.merged}.old && lora-recipes merge {path}")
    if gates["answers"] is None or gates["merged_answers"] is None:
        commands.append(f"lora-recipes generate {path}")
    if gates["not_forgotten"] is None:
        commands.append(f"lora-recipes evaluate {path}")
    if told["verdict"] == SHIP:
        commands += [] if run_dir.exports.is_dir() else [f"lora-recipes export {path}"]
        commands += [f"lora-recipes push {path} --dry_run"] if recipe.get("hub.repo_id") else []
    return commands or [f"lora-recipes new {path} my-recipe dataset.data_files.train=my.jsonl"]
