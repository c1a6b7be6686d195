"""The same command goes on: to the last bit where nothing changed, with a refusal where something did."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lora_recipes.cli import main
from lora_recipes.run_dir import RunDir, read_json, read_jsonl, write_json
from lora_recipes.train import launch
from tests.train.runs import EVERY_STEP, cut_off, digest, metrics, reseal

DROPOUT = {"lora": {"lora_dropout": 0.2}}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
SETUPS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    # what differs from the tiny recipe, in `training`, and the steps after which the run is cut off; 6 steps a pass
    "rows": ({}, {}, (3,)),
    "dropout": (DROPOUT, {}, (3,)),
    "edge of a pass": (DROPOUT, {"max_steps": 8}, (5, 6, 7)),
    "accumulation": (DROPOUT, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, (3, 4)),
    "packed": (DROPOUT, {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, (2,)),
    "workers": (DROPOUT, {"dataloader_num_workers": 2}, (3,)),
    "by length": (DROPOUT, {"train_sampling_strategy": "group_by_length"}, (4,)),
    "evaluations": (DROPOUT, EVALUATED, (2, 3)),
    "every third step logged": (DROPOUT, {"logging_steps": 3}, (2, 4)),
    "whole model": ({"lora": None, "model": {"dtype": "float32"}}, {"learning_rate": 1e-4}, (3,)),
    "stream": (DROPOUT | {"dataset": {"streaming": True}}, {"max_steps": 5}, (2,)),
}


@pytest.mark.promise("F1")
@pytest.mark.parametrize("name", SETUPS)
def test_a_run_that_was_cut_off_becomes_the_run_that_was_not(name: str, write_recipe: Callable[..., Path]):
    """Weights, optimizer, schedule, random state and losses, to the last bit."""
    sections, training, cuts = SETUPS[name]
    keys = {"max_steps": 6} | EVERY_STEP | training
    path = write_recipe(**sections, training=keys)
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    last = run_dir.checkpoints / f"checkpoint-{keys['max_steps']}"
    unbroken, lines = digest(last), metrics(run_dir)
    for step in cuts:
        cut_off(run_dir, after=step)
        assert launch(str(path), []) == 0
        assert digest(last) == unbroken and metrics(run_dir) == lines


def test_fresh_moves_the_old_run_aside_and_deletes_nothing(
    write_recipe: Callable[..., Path], workdir: Path, capsys: pytest.CaptureFixture
):
    path = write_recipe(training=EVERY_STEP)
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    before = read_json(run_dir.manifest)["run"]
    for number in (1, 2):
        kept = sorted(file.relative_to(run_dir.root) for file in run_dir.root.rglob("*"))
        assert launch(str(path), ["training.seed=7"], fresh=True) == 0
        aside = workdir / "outputs" / f"tiny.old-{number}"
        assert sorted(file.relative_to(aside) for file in aside.rglob("*")) == kept
        assert f"is now {aside.relative_to(workdir)}" in capsys.readouterr().err
    assert read_json(workdir / "outputs" / "tiny.old-1" / "manifest.json")["run"] == before
    assert len([line for line in read_jsonl(run_dir.metrics) if "loss" in line]) == 3
    assert launch(str(write_recipe("new")), [], fresh=True) == 0
    assert not (workdir / "outputs" / "new.old-1").exists()


def test_a_run_that_was_never_saved_begins_again_with_whatever_settings(write_recipe: Callable[..., Path]):
    assert launch(str(write_recipe()), []) == 0
    cut_off(RunDir.of("tiny"))
    assert launch(str(write_recipe(lora={"r": 2})), []) == 0
    assert len([line for line in read_jsonl(RunDir.of("tiny").metrics) if "loss" in line]) == 3
    assert read_json(RunDir.of("tiny").recipe)["lora"]["r"] == 2


def test_what_is_shown_kept_and_measured_may_change(write_recipe: Callable[..., Path]):
    path = write_recipe(training=EVERY_STEP)
    assert launch(str(path), []) == 0
    words = ["training.logging_steps=2", "training.save_steps=2", "training.save_total_limit=3", "training.run_name=x"]
    assert launch(str(path), words) == 0  # complete
    cut_off(RunDir.of("tiny"), after=1)
    words += ["training.eval_strategy=steps", "training.eval_steps=1", "training.per_device_eval_batch_size=2"]
    assert launch(str(path), words) == 0
    assert any("eval_loss" in line for line in read_jsonl(RunDir.of("tiny").metrics))


CHANGES = {
    "training.learning_rate": ("training.learning_rate=1e-3", True),
    "training.max_steps": ("training.max_steps=5", True),
    "training.gradient_accumulation_steps": ("training.gradient_accumulation_steps=2", True),
    "training.seed": ("training.seed=7", True),
    "dataset.split": ("dataset.split=train[:8]", True),
    "lora.r": ("lora.r=2", False),
    "model.dtype": ("model.dtype=float32", False),
}


@pytest.fixture
def cut(write_recipe: Callable[..., Path]) -> Path:
    """The recipe of a run that was cut off after its first step."""
    path = write_recipe(training=EVERY_STEP)
    assert launch(str(path), []) == 0
    cut_off(RunDir.of("tiny"), after=1)
    return path


@pytest.mark.promise("F13", "C2")
def test_another_setting_is_refused_with_the_difference_and_may_be_accepted_where_weights_still_fit(
    cut: Path, capsys: pytest.CaptureFixture
):
    kept = RunDir.of("tiny").recipe.read_text()
    for key, (word, acceptable) in CHANGES.items():
        assert launch(str(cut), [word]) == 2
        said = capsys.readouterr().err
        assert key in said and " then, " in said and "--fresh" in said
        assert (f"--accept-changes {key}" in said or "--accept-changes training.per_device" in said) == acceptable
        if not acceptable:
            assert launch(str(cut), [word], accepted=(key,)) == 2
            assert "can not change within a run" in capsys.readouterr().err
        assert RunDir.of("tiny").recipe.read_text() == kept
    words = [CHANGES[key][0] for key in ("training.learning_rate", "training.max_steps")]
    assert launch(str(cut), words, accepted=("training.learning_rate",)) == 2  # one of two
    both = ("training.learning_rate", "training.max_steps")
    assert launch(str(cut), words, accepted=both) == 0
    run_dir = RunDir.of("tiny")
    assert read_json(run_dir.status)["step"] == 5
    assert len(read_json(run_dir.manifest)["accepted_changes"]) == 2
    cut_off(run_dir, after=4)
    assert launch(str(cut), words) == 0  # accepted once, it is the run's own
    cut_off(run_dir, after=4)
    assert launch(str(cut), []) == 2  # and what it was is another


RECORDED = {
    "versions.torch": (lambda found: found["versions"].update(torch="1.0"), "versions.torch: 1.0 then, 2.", 2),
    "world_size": (lambda found: found.update(world_size=2), "world_size: 2 processes then, 1 now", 2),
    "dtype": (lambda found: found["chosen"].update(dtype="bf16 autocast"), "was bf16 autocast, float32 on this", 2),
    "template": (lambda found: found.update(chat_template_sha256="0" * 64), "the chat template has changed", 2),
    "tokens": (lambda found: found["tokens"].update(dataset="0"), "tokens: other tokens in dataset", 2),
    "base": (lambda found: found["base"].update(weights_sha256="0" * 64), "other weights of the base", 4),
}


@pytest.mark.promise("F13", "C2")
@pytest.mark.parametrize("name", RECORDED)
def test_another_machine_template_or_base_is_refused(name: str, cut: Path, capsys: pytest.CaptureFixture):
    change, said, code = RECORDED[name]
    manifest = read_json(RunDir.of("tiny").manifest)
    change(manifest)
    write_json(RunDir.of("tiny").manifest, manifest)
    assert launch(str(cut), []) == code
    assert said in capsys.readouterr().err
    assert launch(str(cut), [], accepted=(name,)) == (4 if code == 4 else 0)


@pytest.mark.promise("F13")
def test_changed_data_is_refused_and_may_be_accepted(write_recipe: Callable[..., Path], tiny_data: dict, workdir: Path):
    shutil.copy(tiny_data["train"], workdir / "mine.jsonl")
    dataset = {"data_files": {"train": "mine.jsonl"}, "eval_split": None}
    path = write_recipe(dataset=dataset, training=EVERY_STEP)
    assert launch(str(path), []) == 0
    cut_off(RunDir.of("tiny"), after=1)
    lines = (workdir / "mine.jsonl").read_text().splitlines()
    (workdir / "mine.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert launch(str(path), []) == 2
    assert launch(str(path), [], accepted=("data",)) == 0


def test_a_half_written_line_of_metrics_does_not_stop_a_run(cut: Path):
    run_dir = RunDir.of("tiny")
    with run_dir.metrics.open("a") as stream:
        stream.write('{"step": 3, "lo')
    assert launch(str(cut), []) == 0
    assert [line["step"] for line in read_jsonl(run_dir.metrics) if "loss" in line] == [1, 2, 3]


@pytest.mark.promise("F12", "C5")
def test_a_complete_run_says_so_and_is_left_alone(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    path = write_recipe()
    assert launch(str(path), []) == 0
    before = {file: file.stat().st_mtime_ns for file in RunDir.of("tiny").root.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert launch(str(path), []) == 0
    assert "is complete: 0 steps to train" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert launch(str(path), ["training.seed=9"]) == 2
    assert "training.seed: unset then, 9 now" in capsys.readouterr().err


def test_the_options_belong_to_train(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    for words in (["--fresh"], ["--accept-changes", "data"]):
        assert main(["check", str(write_recipe()), *words]) == 2
        assert f"`{words[0]}` belongs to `train`" in capsys.readouterr().err


def test_the_old_setting_names_what_happens_now(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    assert main(["check", str(write_recipe(training={"resume_from_checkpoint": True})), "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert "the same launch command goes on by itself" in problems[0]["message"] + str(problems[0]["hint"])


@pytest.mark.parametrize("streaming", [False, True], ids=["cached", "streamed"])
def test_a_run_that_died_in_a_save_publishes_the_adapter_of_the_run_that_did_not(
    write_recipe: Callable[..., Path], streaming: bool
):
    keys = {
        "dataset": {"streaming": streaming},
        "training": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    }
    whole = write_recipe("whole", **keys)
    assert launch(str(whole), []) == 0
    torn = write_recipe("torn", **keys)
    assert launch(str(torn), []) == 0
    run_dir = RunDir.of("torn")
    # As if killed in step 4, half way through writing its checkpoint.
    for file in run_dir.adapter.iterdir():
        file.unlink()
    run_dir.adapter.rmdir()
    (run_dir.checkpoints / "checkpoint-4" / "trainer_state.json").unlink()

    assert launch(str(torn), []) == 0
    weights = [RunDir.of(name).adapter / "adapter_model.safetensors" for name in ("whole", "torn")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_stream_is_not_resumed_in_its_second_pass(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    """The 24 rows are one pass of 6 steps; where a later pass stands is not in a checkpoint."""
    path = write_recipe(
        dataset={"streaming": True}, training={"max_steps": 10, "save_strategy": "steps", "save_steps": 8}
    )
    assert launch(str(path), []) == 0
    cut_off(RunDir.of("tiny"))
    shutil.rmtree(RunDir.of("tiny").checkpoints / "checkpoint-10")
    assert launch(str(path), []) == 2
    assert "second pass" in capsys.readouterr().err


@pytest.mark.promise("F12", "C5")
def test_a_last_step_that_was_saved_is_published_without_training_more(write_recipe: Callable[..., Path]):
    path = write_recipe(training={"save_strategy": "steps", "save_steps": 3})
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    weights = (run_dir.adapter / "adapter_model.safetensors").read_bytes()
    cut_off(run_dir)
    assert launch(str(path), []) == 0
    assert (run_dir.adapter / "adapter_model.safetensors").read_bytes() == weights
    assert read_json(run_dir.status)["step"] == 3


def test_resuming_with_another_file_under_a_pattern_is_refused(
    write_recipe: Callable[..., Path], tiny_data: dict, workdir: Path, capsys: pytest.CaptureFixture
):
    shutil.copy(tiny_data["train"], workdir / "part-1.jsonl")
    dataset = {"data_files": {"train": "part-*.jsonl"}, "eval_split": None}
    path = write_recipe(dataset=dataset, training=EVERY_STEP)
    assert launch(str(path), []) == 0
    cut_off(RunDir.of("tiny"))
    shutil.copy(tiny_data["heldout"], workdir / "part-2.jsonl")
    assert launch(str(path), []) == 2
    assert "part-2.jsonl: the file is new" in capsys.readouterr().err


def test_resuming_with_another_template_of_the_model_is_refused(
    write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(tiny_model, workdir / "m")
    keys = {"model": {"pretrained_model_name_or_path": "m"}, "training": EVERY_STEP}
    path = write_recipe(**keys)
    assert launch(str(path), []) == 0
    cut_off(RunDir.of("tiny"))
    template = workdir / "m" / "chat_template.jinja"
    template.write_text("{# changed #}" + template.read_text())
    assert launch(str(path), []) == 2
    assert "template: the chat template has changed" in capsys.readouterr().err


@pytest.mark.promise("C3")
def test_a_checkpoint_without_optimizer_or_with_nan_is_not_resumed(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe(training={"max_steps": 4, **EVERY_STEP})
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    expected = (run_dir.adapter / "adapter_model.safetensors").read_bytes()
    cut_off(run_dir)
    (run_dir.checkpoints / "checkpoint-4" / "optimizer.pt").unlink()
    weights = run_dir.checkpoints / "checkpoint-3" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[sorted(tensors)[0]][0, 0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    reseal(run_dir.checkpoints / "checkpoint-3")
    state = run_dir.checkpoints / "checkpoint-2" / "trainer_state.json"
    write_json(state, read_json(state) | {"global_step": 1})
    reseal(run_dir.checkpoints / "checkpoint-2")
    capsys.readouterr()
    assert launch(str(path), []) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "optimizer.pt is gone" in shown and "holds NaN or infinity" in shown
    assert "`global_step` is 1, so it is the state of another step" in shown
    assert "Going on from outputs/tiny/checkpoints/checkpoint-1" in shown
    assert (run_dir.adapter / "adapter_model.safetensors").read_bytes() == expected
