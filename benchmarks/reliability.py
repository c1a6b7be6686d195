"""What guards, hashed checkpoints and the record of a run cost: the demo's training with and without them, in pairs.

    make bench-reliability                 (BENCH="--steps 40 --pairs 3")

Without: transformers' own saving and logging, nothing looked at, hashed, synced or written down. Both as often as the recipe
says, and the result goes into the table of promises. Seconds are those from the first step's begin to the last one's end; models are loaded, and nothing is published yet.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import ROOT, table
from tests import promises

MOST = 1.05  # of the wall time without
DEMO = "recipes/smollm2-135m-lora.yaml"


def child(kind: str, steps: int) -> None:
    """Train here, and print {"cpu", "wall"} seconds of all steps."""
    from lora_recipes.train import launch, session

    if kind == "without":
        _leave_out()
    real = session._run

    def timed(*given: object) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        real(*given)  # type: ignore[arg-type]
        print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}), flush=True)

        os._exit(0)  # what follows publishes, and would refuse what was left out

    session._run = timed  # type: ignore[assignment]
    if launch(DEMO, [f"training.max_steps={steps}", "training.disable_tqdm=true"]):
        raise SystemExit("training failed")


def _leave_out() -> None:
    from transformers import TrainerCallback
    from trl import SFTTrainer

    from lora_recipes.train.diagnosis import Diagnosis
    from lora_recipes.train.guards import GuardedTrainer
    from lora_recipes.train.record import RecordCallback
    from lora_recipes.train.saving import SavingTrainer

    for owner, names in (
        (GuardedTrainer, ("training_step", "_get_grad_norm", "_save_checkpoint")),
        (
            SavingTrainer,
            ("_get_output_dir", "_save", "_save_checkpoint", "_maybe_log_save_evaluate", "prediction_step"),
        ),
    ):
        for name in names:
            setattr(owner, name, getattr(SFTTrainer, name))
    GuardedTrainer.require_finite = lambda self: None  # type: ignore[method-assign]
    for callback in (Diagnosis, RecordCallback):
        for name in ("on_train_begin", "on_log", "on_save", "on_train_end"):
            setattr(callback, name, getattr(TrainerCallback, name))


def measured(kind: str, steps: int) -> dict[str, float]:
    """`child` in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as place:
        for name in ("recipes", "data"):
            (Path(place) / name).symlink_to(ROOT / name)
        words = [sys.executable, "-m", "benchmarks.reliability", "--child", kind, "--steps", str(steps)]
        given = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, cwd=place, env=given, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"cpu"'))
    return found


def main() -> None:
    """Pairs in turned order, and the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--child", choices=("with", "without"))
    args = parser.parse_args()
    if args.child:
        child(args.child, args.steps)
        return
    rows, ratios = [], []
    for pair in range(args.pairs):
        order = ("with", "without") if pair % 2 == 0 else ("without", "with")
        found = {kind: measured(kind, args.steps) for kind in order}
        ratios.append([found["with"][what] / found["without"][what] for what in ("cpu", "wall")])
        rows.append(
            [str(pair + 1), *(f"{found[kind][what]:.1f}" for kind in ("with", "without") for what in ("cpu", "wall"))]
        )
    print("\n".join(table(["pair", "with: CPU s", "wall s", "without: CPU s", "wall s"], rows)))
    cpu, wall = (statistics.median(column) for column in zip(*ratios, strict=True))
    told = f"{cpu:.3f} x the CPU seconds and {wall:.3f} x the wall seconds of the demo without ({args.pairs} pairs)"
    print(f"\n{told}")
    held = wall <= MOST
    outcome = {"passed": int(held), "failed": int(not held), "skipped": 0, "figures": [told]}
    found_now = promises.merged(promises.read(), {"F20": {"benchmarks/reliability.py::main": outcome}})
    promises.RESULTS.write_text(json.dumps(found_now, indent=1) + "\n", encoding="utf-8")
    promises.publish(found_now)


if __name__ == "__main__":
    main()
