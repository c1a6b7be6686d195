"""A run trained again from its folder is the same to the bit; what is not the same is named, and never passes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lora_recipes import reproduce as room
from lora_recipes.cli import main
from lora_recipes.errors import RefusedError, RunError
from lora_recipes.model.folder import write_sums
from lora_recipes.recipe import Recipe
from lora_recipes.reproduce import reproduce
from lora_recipes.run_dir import RunDir, read_json, read_jsonl, write_json, write_jsonl
from lora_recipes.train import launch


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are repeated in this process: a fresh one takes seconds to import what is imported here already."""

    def launched(recipe: Recipe, words: list[str], flags: list[str], config: str | None) -> dict[str, Any]:
        code = launch(str(recipe.path), words, fresh="--fresh" in flags)
        return {"exit_code": code, "message": "see above"}

    monkeypatch.setattr(room, "launched", launched)


@pytest.fixture
def run(write_recipe: Callable[..., Path], here: None) -> Path:
    keys = {"max_steps": 4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    assert launch(str(write_recipe(training=keys, lora={"lora_dropout": 0.1})), []) == 0
    return RunDir.of("tiny").root


def test_a_run_is_repeated_to_the_bit_and_itself_only_read(run: Path):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    report = reproduce(run)
    assert report["passed"] and report["to_the_bit"] and report["steps"] == 4
    assert report["tensors"] == len(load_file(run / "adapter" / "adapter_model.safetensors")) > 0
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    again = Path(report["again"])
    assert again != run and read_json(again / "reproduction.json") == report
    published = [read_json(folder / "manifest.json")["published"] for folder in (run, again)]
    assert published[0]["adapter_model.safetensors"] == published[1]["adapter_model.safetensors"]


def test_another_result_is_told_by_its_first_loss_and_its_tensors(run: Path, capsys: pytest.CaptureFixture):
    """As if the run had been trained by other code: one loss and one tensor of the record are another."""
    logged = read_jsonl(run / "metrics.jsonl")
    logged[1]["loss"] += 1e-6
    write_jsonl(run / "metrics.jsonl", logged)
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 0.5
    save_file(weights, file, {"format": "pt"})
    write_sums(run / "adapter")
    report = reproduce(run)
    assert not report["passed"] and not report["to_the_bit"]
    assert report["first_difference"]["step"] == 2 and report["different_tensors"] == [name]
    assert report["largest_difference"] == pytest.approx(0.5)
    assert "NOT reproduced: 1 of" in capsys.readouterr().err
    assert main(["reproduce", str(run)]) == 4


def test_other_versions_are_refused_unless_accepted_and_then_held_within_limits(run: Path):
    manifest = read_json(run / "manifest.json")
    manifest["versions"]["torch"] = "1.0"
    write_json(run / "manifest.json", manifest)
    with pytest.raises(RunError, match=r"versions.torch: 1.0 then.*\n.*--accept-changes versions.torch"):
        reproduce(run)
    report = reproduce(run, accepted=["versions.torch"])
    assert report["passed"] and list(report["accepted"]) == ["versions.torch"]
    logged = read_jsonl(run / "metrics.jsonl")
    write_jsonl(
        run / "metrics.jsonl", [line | ({"loss": 1.5 * line["loss"]} if "loss" in line else {}) for line in logged]
    )
    assert not reproduce(run, accepted=["versions.torch"])["passed"]


def test_other_data_or_another_base_is_another_run_whatever_is_accepted(
    run: Path, tiny_data: dict[str, str], workdir: Path
):
    manifest = read_json(run / "manifest.json")
    for change, said in (
        ({"data": dict.fromkeys(manifest["data"], "0")}, "the file has changed"),
        ({"base": manifest["base"] | {"weights_sha256": "0" * 64}}, "base: other weights"),
    ):
        write_json(run / "manifest.json", manifest | change)
        with pytest.raises(RunError, match=said):
            reproduce(run, accepted=["data", "base"])
    assert not RunDir.of("tiny-reproduced").root.exists()


def test_what_cannot_be_repeated_says_why(run: Path, workdir: Path):
    status, manifest = read_json(run / "status.json"), read_json(run / "manifest.json")
    write_json(run / "manifest.json", manifest | {"accepted_changes": ["training.learning_rate: 1 then, 2 now"]})
    with pytest.raises(RunError, match="changed on the way"):
        reproduce(run)
    write_json(run / "manifest.json", manifest)
    write_json(run / "status.json", status | {"state": "preempted"})
    with pytest.raises(RunError, match="the run is preempted"):
        reproduce(run)
    write_json(run / "status.json", status)
    (workdir / "empty").mkdir()
    with pytest.raises(RunError, match="no run folder"):
        reproduce(workdir / "empty")
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RefusedError, match=r"adapter_model\.safetensors"):
        reproduce(run)


def test_a_repetition_that_was_cut_off_goes_on(run: Path):
    assert reproduce(run)["to_the_bit"]
    again = RunDir.of("tiny-reproduced")
    shutil.rmtree(again.adapter)
    shutil.rmtree(again.checkpoints / "checkpoint-4")
    report = reproduce(run)
    assert report["to_the_bit"] and report["steps"] == 4


def test_the_command_takes_a_folder(run: Path, capsys: pytest.CaptureFixture):
    assert main(["reproduce", "tiny.yaml"]) == 2
    assert "takes the folder of a run" in capsys.readouterr().err
    assert main(["reproduce", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["to_the_bit"]
