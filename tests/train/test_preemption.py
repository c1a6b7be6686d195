"""A signal ends a run at a step that all ranks agree on: saved, 143, nothing runs on, and the same command goes on."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.errors import EXIT_PREEMPTED, Preempted
from lora_recipes.run_dir import RunDir, read_json
from lora_recipes.train import launch, saving, session
from lora_recipes.train.checkpoints import numbered
from lora_recipes.train.preemption import ONE_EVENT, Stop
from lora_recipes.train.trainer import RecipeTrainer
from tests.conftest import ROOT
from tests.train.launched import ACCELERATE, ENVIRONMENT, LONG, TORCHRUN, VERB, Launched
from tests.train.runs import digest, metrics

EVALUATED = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # so that the best is not the last
}


@pytest.fixture
def signal_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends this process a signal, once, the first time that something is called at a step."""

    def arm(owner: Any, name: str, *, step: int = -1, number: int = signal.SIGTERM) -> None:
        real, sent = getattr(owner, name), []

        def told(*args: Any, **named: Any) -> Any:
            at = args[0].state.global_step if step >= 0 and hasattr(args[0], "state") else step
            if at == step and not sent:
                sent.append(number)
                os.kill(os.getpid(), number)
            return real(*args, **named)

        monkeypatch.setattr(owner, name, told)

    return arm


WHERE: dict[str, tuple[Any, str, int, int]] = {
    # where the signal comes: called what, after which step; the step that is saved
    "step": (RecipeTrainer, "training_step", 2, 3),
    "step before an evaluation": (RecipeTrainer, "training_step", 3, 4),
    "evaluation": (RecipeTrainer, "prediction_step", 2, 2),
    "evaluation before a save": (RecipeTrainer, "prediction_step", 4, 4),
    "save": (saving, "publish_checkpoint", -1, 4),
    "last step": (RecipeTrainer, "training_step", 5, 6),
}


@pytest.mark.promise("F1", "F4")
def test_a_run_that_was_stopped_anywhere_goes_on_to_what_it_would_have_been(
    write_recipe: Callable[..., Path], signal_in: Callable[..., None], capsys: pytest.CaptureFixture
):
    keys: dict[str, Any] = {"lora": {"lora_dropout": 0.2}, "training": EVALUATED}
    assert launch(str(write_recipe("whole", **keys)), []) == 0
    whole = RunDir.of("whole")
    for number, (owner, name, step, reached) in enumerate(WHERE.values()):
        path, run_dir = write_recipe(f"cut-{number}", **keys), RunDir.of(f"cut-{number}")
        signal_in(owner, name, step=step)
        assert launch(str(path), []) == EXIT_PREEMPTED == 143
        status = read_json(run_dir.status)
        assert (status["state"], status["exit_code"], status["step"]) == ("preempted", 143, reached)
        assert status["last_good_checkpoint"] == f"outputs/cut-{number}/checkpoints/checkpoint-{reached}"
        assert f"stopped by SIGTERM after step {reached} of 6, which is saved" in capsys.readouterr().err
        assert not run_dir.adapter.exists() and metrics(run_dir) == metrics(whole)[: len(metrics(run_dir))]
        assert launch(str(path), []) == 0
        assert metrics(run_dir) == metrics(whole)
        cut, unbroken = (digest(each.checkpoints / "checkpoint-6") for each in (run_dir, whole))
        after = ("log", "rng_state.pth") if reached == 6 else ()  # saved before the evaluation that is made up for
        assert {key for key in unbroken if cut[key] != unbroken[key]} <= {*after}
        weights = [each.adapter / "adapter_model.safetensors" for each in (run_dir, whole)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.promise("F4")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2], ids=lambda number: number.name)
def test_each_signal_that_a_scheduler_sends_stops_and_saves_a_run_that_would_never_save(
    number: signal.Signals, write_recipe: Callable[..., Path], signal_in: Callable[..., None]
):
    signal_in(RecipeTrainer, "training_step", step=1, number=number)
    before = signal.getsignal(number)
    assert launch(str(write_recipe()), []) == 143
    assert [step for step, _ in numbered(RunDir.of("tiny").checkpoints)] == [2]
    assert number.name in read_json(RunDir.of("tiny").status)["reason"]
    assert signal.getsignal(number) == before


@pytest.mark.promise("F4")
def test_a_signal_while_rows_are_read_ends_the_run_before_it_begins(
    write_recipe: Callable[..., Path], signal_in: Callable[..., None]
):
    signal_in(session, "load_data")
    assert launch(str(write_recipe()), []) == 143
    status = read_json(RunDir.of("tiny").status)
    assert status["state"] == "preempted" and "before the first step" in status["reason"]
    assert launch(str(write_recipe()), []) == 0


def test_a_signal_while_the_adapter_is_published_comes_too_late_to_matter(
    write_recipe: Callable[..., Path], signal_in: Callable[..., None]
):
    signal_in(session, "publish")
    assert launch(str(write_recipe()), []) == 0
    assert read_json(RunDir.of("tiny").status)["state"] == "complete"


@pytest.mark.promise("F4")
def test_an_echo_of_a_signal_changes_nothing_and_a_second_one_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    stop, ended, clock = Stop(), [], [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    stop.abandoned = lambda reason: ended.append(reason)
    stop.deferring = True
    with stop.listening(alone=False):
        for later in (0.0, ONE_EVENT / 2):
            clock[0] = 100.0 + later
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.by == "SIGTERM" and ended == []
        clock[0] = 100.0 + ONE_EVENT + 0.1
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == ["ended at once by a second signal (SIGINT)", 143]


def test_no_library_can_take_a_stop_for_a_failure():
    assert not issubclass(Preempted, Exception)


@pytest.mark.promise("F4")
def test_a_signal_to_accelerate_launch_stops_the_trainer_that_it_leaves_behind(
    write_recipe: Callable[..., Path], workdir: Path
):
    launched = Launched([*ACCELERATE, ROOT / "run.py"], write_recipe(training=LONG), workdir)
    launched.process.terminate()
    launched.require_stopped(None)


@pytest.mark.promise("F4")
def test_a_signal_to_the_whole_group_of_the_train_verb_with_data_workers_ends_with_143(
    write_recipe: Callable[..., Path], workdir: Path
):
    launched = Launched(VERB, write_recipe(training=LONG | {"dataloader_num_workers": 2}), workdir)
    os.killpg(launched.process.pid, signal.SIGINT)
    launched.require_stopped(143)


@pytest.mark.promise("F1", "F4")
def test_a_signal_to_one_rank_stops_both_at_one_step_and_the_same_command_goes_on_to_the_same_run(
    write_recipe: Callable[..., Path], workdir: Path
):
    keys: dict[str, Any] = {"lora": {"lora_dropout": 0.2}}
    path = write_recipe("two", **keys, training=LONG)
    launched = Launched([*TORCHRUN, ROOT / "run.py"], path, workdir)
    ranks = sorted(
        pid for pid, line in launched.members().items() if "run.py" in line and "torch.distributed" not in line
    )
    os.kill(ranks[1], signal.SIGTERM)
    launched.require_stopped(None)
    stopped = read_json(launched.run_dir.status)["step"]

    # Both to a step soon after; at a constant rate the steps before do not depend on where a run ends.
    end = stopped + 2
    words = [f"training.max_steps={end}", f"training.save_steps={end}", "training.save_strategy=steps"]
    whole = write_recipe("whole", **keys, training=LONG)
    for recipe, accepted in ((path, ["--accept-changes", "training.max_steps"]), (whole, [])):
        command = [str(word) for word in (*TORCHRUN, ROOT / "run.py", recipe, *words, *accepted)]
        told = subprocess.run(command, cwd=workdir, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
    one, other = (digest(RunDir.of(name).checkpoints / f"checkpoint-{end}") for name in ("two", "whole"))
    assert one == other and {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "log"} <= one.keys()
