"""What the hook wrote of a training, as figures: tokens per second and CPU second, the first step, losses."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

KINDS = ("computed", "real", "supervised")


def figures(path: Path, started: float | None) -> dict[str, Any]:
    """The figures of the process that made the most steps.

    Rates are of step 2 to the last: tokens of those steps over the time from the end of step 1 to the end of the last.
    """
    steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pid, _ = Counter(step["pid"] for step in steps).most_common(1)[0]
    steps = [step for step in steps if step["pid"] == pid]
    first, later, last = steps[0], steps[1:], steps[-1]
    found: dict[str, Any] = {
        "steps": len(steps),
        "first_step_cpu": first["session_cpu"],  # of the launcher and of all else that was started for it, too
        "losses": [step["loss"] for step in steps],
        "learning_rates": [step["learning_rate"] for step in steps],
        "trainable": last["trainable"],
        "dtype": last["dtype"],
        "threads": last["threads"],
        "training_rss_mb": last["peak_mb"],  # of the training process, until the last step
    } | {f"{kind}_tokens": sum(step[kind] for step in steps) for kind in KINDS}
    if last.get("gpu_mb"):
        found["gpu_mb"] = last["gpu_mb"]
    if started is not None:
        found["first_step"] = first["time"] - started
    if later:
        wall, cpu = last["time"] - first["time"], last["cpu"] - first["cpu"]
        found |= {"seconds_per_step": wall / len(later), "cpu_per_step": cpu / len(later)}
        for kind in KINDS:
            tokens = sum(step[kind] for step in later)
            found |= {f"{kind}_per_second": tokens / wall, f"{kind}_per_cpu_second": tokens / cpu}
    return found
