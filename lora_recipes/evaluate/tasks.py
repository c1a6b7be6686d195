"""Benchmarks of lm-eval, before and after: an extra, on task files that are here."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_recipes.errors import MachineError, RunError

EXTRA = "pip install 'lora-recipes[eval]'"


def run_tasks(
    pair: Any, tokenizer: PreTrainedTokenizerBase, tasks: list[str], include_path: str | None
) -> dict[str, dict[str, Any]]:
    """Run lm-eval's tasks on both models.

    Args:
        pair: what has `trained`, and `before()`, a block with the untrained model.
        tasks: names that lm-eval knows, or that a file in `include_path` defines.
        include_path: folder of task files (YAML).

    Returns:
        task → {"base": {metric: value}, "adapter": {metric: value}}

    Raises:
        MachineError: lm-eval is not installed.
        RunError: no such folder or task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MachineError(f"--tasks needs lm-eval ({error}): {EXTRA}") from None
    if include_path is not None and not Path(include_path).is_dir():
        raise RunError(f"--include_path {include_path}: no such folder")
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise RunError(
            f"--tasks {','.join(unknown)}: lm-eval knows no such task; --include_path DIR adds local task files"
        )

    def scores(model: Any) -> dict[str, dict[str, Any]]:
        ready = HFLM(pretrained=model, tokenizer=tokenizer)
        return simple_evaluate(model=ready, tasks=tasks, task_manager=manager)["results"]

    after = scores(pair.trained)
    with pair.before() as base:
        before = scores(base)
    return {task: {"base": _numbers(before[task]), "adapter": _numbers(after[task])} for task in after}


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in results.items() if isinstance(value, float)}
