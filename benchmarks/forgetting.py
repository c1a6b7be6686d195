"""What trainings of the demo forget: its own, a gentle one, one with general rows mixed in, and a brutal one.

    make bench-forgetting

Each trains in full (about five minutes on two cores) in a temporary folder and is measured by `evaluate` on the general rows.
Prints Markdown.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEMO = "recipes/smollm2-135m-lora.yaml"
DEFAULTS = ["checks.forgetting.max_loss_increase=0.2", "checks.forgetting.max_kl=0.3"]
SETTINGS: dict[str, list[str]] = {
    "demo": [],
    "gentle": ["training.learning_rate=3.0e-4"],
    "mixed": ["--mix"],
    "brutal": ["training.learning_rate=5.0e-2"],  # 50 x the demo's
}


def lora_recipes(folder: Path, *words: str) -> dict[str, Any]:
    """One command; what it prints as JSON, whatever its exit code."""
    command = [sys.executable, "-m", "lora_recipes", *words, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(ended.stdout)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "data").symlink_to(ROOT / "data")
        subprocess.run(["cp", "-r", str(ROOT / "recipes"), str(folder)], check=True)
        print("| training | held-out loss | general loss before | after | KL(base ‖ trained) | within 0.2 and 0.3 |")
        print("|---|---|---|---|---|---|")
        for name, words in SETTINGS.items():
            recipe = DEMO
            if words == ["--mix"]:
                recipe = lora_recipes(folder, "evaluate", DEMO, "--mix", name, "checks.forgetting.max_rows=1")["mixed"]
            elif words:
                recipe = lora_recipes(folder, "new", DEMO, name, *words)["recipe"]
            told = lora_recipes(folder, "train", recipe)
            if "error" in told:
                print(f"| {name} | {told['error']['message'].splitlines()[0]} | | | | no |")
                continue
            found = lora_recipes(folder, "evaluate", recipe, *DEFAULTS)
            general = found["forgetting"]
            print(
                f"| {name} | {found['eval_loss']['adapter']:.4f} | {general['loss_before']:.3f} | "
                f"{general['loss_after']:.3f} | {general['kl']:.3f} | {'yes' if general['passed'] else 'no'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
