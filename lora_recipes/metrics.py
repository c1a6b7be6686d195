"""The lines of metrics.jsonl that a run has in common with its repetition: what was computed, not what the clock said."""

import json
import re
from typing import Any

from lora_recipes.run_dir import RunDir, read_jsonl, text_sha256

COMPUTED = re.compile(r"(eval_(\w+_)?)?(loss|grad_norm|learning_rate|entropy|mean_token_accuracy)")


def computed(run_dir: RunDir) -> list[dict[str, Any]]:
    """{"step", and what was computed there} of each line that says any of it."""
    lines = [
        {key: value for key, value in line.items() if key == "step" or COMPUTED.fullmatch(key)}
        for line in read_jsonl(run_dir.metrics)
    ]
    return [line for line in lines if len(line) > 1]


def metrics_sha256(run_dir: RunDir) -> str:
    """Of what was computed in a run."""
    return text_sha256(json.dumps(computed(run_dir), sort_keys=True))
