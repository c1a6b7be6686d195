"""What a run leaves behind while it runs: metrics, status and the manifest."""

import json
import math
import platform
import sys
import time
from contextlib import suppress
from typing import Any
from uuid import uuid4

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_recipes import __version__
from lora_recipes.errors import RefusedError
from lora_recipes.model.identity import base_of
from lora_recipes.model.machine import Choices
from lora_recipes.model.source import Source
from lora_recipes.recipe import Recipe
from lora_recipes.records import fault
from lora_recipes.run_dir import RunDir, read_json, text_sha256, write_json, write_jsonl
from lora_recipes.train.changes import library_versions
from lora_recipes.train.repeat import CHANGED, Repeated, launch_record, machine_record


def write_status(run_dir: RunDir, **changes: Any) -> None:
    """Update status.json; keys that are not given keep their value."""
    write_json(run_dir.status, read_json(run_dir.status) | changes)


class RecordCallback(TrainerCallback):
    """One line a log event in metrics.jsonl, and the step and last good checkpoint in status.json."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.monotonic()
        if state.is_world_process_zero:
            write_status(self.run_dir, state="running", step=state.global_step, max_steps=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if state.is_world_process_zero:
            line = {"step": state.global_step, "seconds": round(time.monotonic() - self.started, 2), **logs}
            with self.run_dir.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")
            write_status(self.run_dir, step=state.global_step)
        for name, value in logs.items():  # of training steps `GuardedTrainer` sees more, and earlier
            if name.startswith("eval_") and isinstance(value, float) and not math.isfinite(value):
                raise RefusedError(
                    f"step {state.global_step}: {name} is {value}; the run has diverged and is stopped, no adapter is published "
                    "and the last good checkpoint is whole. Lower training.learning_rate"
                )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_status(
                self.run_dir,
                last_good_checkpoint=str(self.run_dir.checkpoints / f"checkpoint-{state.global_step}"),
            )


def keep_metrics_until(run_dir: RunDir, step: int) -> None:
    """A run that goes on from a step logs the later ones again."""
    kept = []
    with suppress(FileNotFoundError, ValueError):  # a kill can cut the last line off
        for text in run_dir.metrics.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if fault(run_dir.metrics.name, line):
                break
            kept.append(line)
    write_jsonl(run_dir.metrics, [line for line in kept if line["step"] <= step])


def _finite(value: Any) -> Any:
    """JSON has no NaN: written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_manifest(
    run_dir: RunDir,
    recipe: Recipe,
    source: Source,
    template: str | None,
    data: dict[str, str],
    tokens: dict[str, str],
    audited: dict[str, Any],
    choices: Choices,
    args: TrainingArguments,
    accepted: dict[str, str] | None = None,
    repeats: Repeated | None = None,
) -> None:
    """manifest.json: what it takes to repeat this run. Of the environment only what `launch_record` names, so no secrets.

    Args:
        accepted: None begins a new run; else this one goes on, with these changes.
        repeats: the run that this one repeats.
    """
    known = {} if accepted is None else read_json(run_dir.manifest)
    resolved = json.dumps(recipe.plain(), sort_keys=True)
    write_json(
        run_dir.manifest,
        {
            "run": known.get("run") or uuid4().hex,
            "recipe": {"file": str(recipe.path), "sha256": text_sha256(resolved)},
            "base": {
                "source": source.kind,
                "name": source.named,
                "revision": recipe.get("model.revision"),
                "sha256": source.sha256,
                "weights_sha256": base_of(recipe, source).weights_sha256,
            },
            "data": data,
            "tokens": tokens,
            "audit": {key: value for key, value in audited.items() if key not in ("worst", "lengths")},
            "chat_template_sha256": text_sha256(template) if template else None,
            "seed": args.seed,
            "world_size": args.world_size,
            "accepted_changes": [*known.get("accepted_changes", []), *(accepted or {}).values()],
            "chosen": choices.named(),
            "versions": {
                "lora-recipes": __version__,
                "python": platform.python_version(),
                **library_versions(),
            },
            "machine": machine_record(choices),
            "launch": launch_record(choices),
            "argv": sys.argv,
            **({CHANGED: known[CHANGED]} if CHANGED in known else {}),
            **({"repeats": repeats.as_json()} if repeats else {}),
        },
    )
