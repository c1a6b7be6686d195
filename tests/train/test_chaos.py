"""`make chaos`: any signal to anybody, and a run that is killed at random until it is done. Minutes, with real processes."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.run_dir import RunDir, read_json
from lora_recipes.train import launch
from lora_recipes.train.checkpoints import numbered
from tests.conftest import ROOT
from tests.train.launched import ACCELERATE, ENVIRONMENT, LONG, TORCHRUN, VERB, Launched
from tests.train.runs import EVERY_STEP, digest, metrics

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
KILLS = 30


@pytest.mark.promise("F4")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("whom", ["launcher", "group", "rank"])
@pytest.mark.parametrize("command", [ACCELERATE, TORCHRUN, VERB], ids=["accelerate", "torchrun", "verb"])
def test_any_signal_to_anybody(
    command: list[Any], whom: str, number: signal.Signals, write_recipe: Callable[..., Path], workdir: Path
):
    words = command if command is VERB else [*command, ROOT / "run.py"]
    launched = Launched(words, write_recipe(training=LONG | EVERY_STEP | {"save_total_limit": 2}), workdir)
    if whom == "group":
        os.killpg(launched.process.pid, number)
    elif whom == "launcher":
        launched.process.send_signal(number)
    else:
        os.kill(max(launched.members()), number)
    launched.require_stopped(143 if command is VERB else None)


@pytest.mark.promise("F3")
def test_a_run_that_is_killed_at_random_ends_as_the_run_that_was_not(write_recipe: Callable[..., Path], workdir: Path):
    """From the first import to the last step, saving every tenth; the same command each time."""
    keys: dict[str, Any] = {
        "lora": {"lora_dropout": 0.2},
        "training": {
            "max_steps": 600,
            "save_strategy": "steps",
            "save_steps": 10,
            "save_total_limit": 2,
            "use_cpu": True,
        },
    }
    whole, path = write_recipe("whole", **keys), write_recipe("killed", **keys)
    assert launch(str(whole), []) == 0
    run_dir, drawn = RunDir.of("killed"), random.Random(0)
    command = [sys.executable, str(ROOT / "run.py"), str(path)]
    reached = []
    for _ in range(KILLS):
        process = subprocess.Popen(
            command, cwd=workdir, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            said = process.communicate(timeout=drawn.uniform(0, 9))[1]
            assert process.returncode == 0, said.decode()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        reached.append(read_json(run_dir.status).get("step", 0))
    ended = subprocess.run(command, cwd=workdir, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(set(reached)) > 2  # some of the kills came in training
    assert metrics(run_dir) == metrics(RunDir.of("whole"))
    one, other = (digest(RunDir.of(name).checkpoints / "checkpoint-600") for name in ("killed", "whole"))
    assert one == other
    one, other = (RunDir.of(name).adapter / "adapter_model.safetensors" for name in ("killed", "whole"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.promise("F9", "F15")
def test_a_loss_that_is_not_finite_on_one_rank_ends_both_with_the_rows_of_that_rank(
    write_recipe: Callable[..., Path], workdir: Path
):
    """The launch imports a module that spoils the loss of rank 1 alone."""
    (workdir / "sitecustomize.py").write_text(SPOILED)
    path = write_recipe(training=LONG | EVERY_STEP | {"save_total_limit": 2})
    environment = ENVIRONMENT | {"PYTHONPATH": f"{workdir}:{ENVIRONMENT['PYTHONPATH']}"}
    words = [str(word) for word in (*TORCHRUN, ROOT / "run.py", path)]
    told = subprocess.run(words, cwd=workdir, env=environment, capture_output=True, text=True, check=False)
    status = read_json(RunDir.of("tiny").status)
    assert told.returncode != 0 and (status["state"], status["exit_code"], status["step"]) == ("failed", 4, 3), (
        told.stderr
    )
    assert "step 4: loss is nan" in status["reason"] and "train.jsonl:" in status["reason"]
    assert [step for step, _ in numbered(RunDir.of("tiny").checkpoints)] == [3, 2]


SPOILED = """
import os, sys
if "run.py" in " ".join(sys.argv) or os.environ.get("RANK") == "1":
    import importlib.abc, importlib.util

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "lora_recipes.train.trainer" or os.environ.get("RANK") != "1":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                real = module.RecipeTrainer.compute_loss

                def compute_loss(self, *given, **named):
                    loss = real(self, *given, **named)
                    return loss * float("nan") if self.state.global_step == 3 else loss

                module.RecipeTrainer.compute_loss = compute_loss

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())
"""
