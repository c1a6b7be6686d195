"""Starts that are refused: one message and the right exit code, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.errors import MachineError
from lora_recipes.run_dir import Locked, RunDir, read_json
from lora_recipes.train import launch
from lora_recipes.train.record import write_status


@pytest.mark.promise("F14", "R11")
def test_two_runs_in_one_folder_are_refused_and_the_first_is_left_alone(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe()
    run_dir = RunDir.of("tiny")
    run_dir.root.mkdir(parents=True)
    write_status(run_dir, state="running", step=5)
    first = Locked(run_dir.lock)
    first.acquire(wait=False)
    assert launch(str(path), []) == 2
    assert "in use by another process (pid" in capsys.readouterr().err
    assert read_json(run_dir.status) == {"state": "running", "step": 5}
    first.release()
    assert launch(str(path), []) == 0


@pytest.mark.promise("R11")
def test_a_read_only_output_folder_is_refused_before_training(write_recipe: Callable[..., Path], workdir: Path):
    path = write_recipe()
    (workdir / "outputs").write_text("a file where the folder should be")
    with pytest.raises(MachineError, match="cannot write the run folder"):
        RunDir.of("tiny").require_writable()
    assert launch(str(path), []) == 3


def test_no_status_is_written_by_a_refused_start(write_recipe: Callable[..., Path]):
    path = write_recipe(lora={"target_modules": ["q_prj"]})
    assert launch(str(path), []) == 2
    assert not RunDir.of("tiny").status.exists()
    assert json.loads(path.read_text())["lora"]["target_modules"] == ["q_prj"]


@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        ("training", {"report_to": "wandb"}, "wandb"),
        ("training", {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"}, "strategy"),
        (
            "lora",
            {"use_rslora": True, "lora_bias": True, "init_lora_weights": "olora"},
            "`lora` is refused by peft.LoraConfig",
        ),
    ],
)
def test_what_an_owner_refuses_is_one_message_with_the_recipes_line(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture, section: str, keys: dict, said: str
):
    path = write_recipe(**{section: keys})
    assert launch(str(path), []) == 2
    shown = capsys.readouterr().err
    assert f"error: {path}:" in shown and said in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        ("generation", {"sequence_bias": {}}, "`sequence_bias` has to be"),
        ("training", {"optim_args": "a=b,c"}, "optim_args"),
        ("training", {"optim": "rmsprop", "optim_args": "momentum=x"}, "optim"),
        ("training", {"optim": "galore_adamw"}, "pip install git+https://github.com/jiaweizzhao/GaLore"),
        ("training", {"optim": "adalomo"}, "lomo"),
        ("training", {"optim": "adamw_anyprecision"}, "anyprecision"),
        ("training", {"optim": "adamw_torch_xla"}, "torch_xla"),
        ("training", {"torch_compile": True, "torch_compile_backend": "nope"}, "nope"),
        ("training", {"torch_compile": True, "torch_compile_mode": "nope"}, "nope"),
    ],
)
def test_what_would_be_refused_later_is_told_before_weights_are_loaded(
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    keys: dict[str, Any],
    said: str,
):
    monkeypatch.setattr("lora_recipes.train.session.load_base", lambda *_, **__: pytest.fail("the weights were loaded"))
    path = write_recipe(**{section: keys})
    assert launch(str(path), []) == 2
    shown = capsys.readouterr().err
    assert f"error: {path}:" in shown and said in shown and "Traceback" not in shown


def test_what_an_optimizer_refuses_while_it_is_made_is_one_message(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe(training={"optim": "sgd", "optim_args": "momentum=-5"})
    assert launch(str(path), []) == 2
    said = "no optimizer can be made of `optim: sgd` and `optim_args: momentum=-5`: Invalid momentum value: -5.0"
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_model_folder_without_weights_is_one_message(
    write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(tiny_model, workdir / "hollow")
    (workdir / "hollow" / "model.safetensors").write_bytes(b"torn")
    assert launch(str(write_recipe(model={"pretrained_model_name_or_path": "hollow"})), []) == 4
    assert "no safetensors file" in capsys.readouterr().err


def test_a_stream_with_accumulation_makes_one_pass_at_most(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    keys = {"max_steps": 4, "gradient_accumulation_steps": 2}  # 8 rows a step, of 24
    assert launch(str(write_recipe(dataset={"streaming": True}, training=keys)), []) == 2
    assert "training.max_steps=3" in capsys.readouterr().err
