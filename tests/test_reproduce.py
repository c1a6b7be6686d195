"""A run repeats to the last bit from its own folder; what is not the same is told before, and what came out other after."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_recipes import process
from lora_recipes.cli import main
from lora_recipes.metrics import metrics_sha256
from lora_recipes.model.digest import gap, tensor_hashes
from lora_recipes.reproduce import compared
from lora_recipes.run_dir import RunDir, file_sha256, read_json, write_json, write_jsonl
from lora_recipes.train import launch
from lora_recipes.train import main as train_main
from tests.conftest import ROOT, publish_anew, tiny_recipe
from tests.train.launched import ENVIRONMENT, TORCHRUN
from tests.train.runs import EVERY_STEP, cut_off

DROPOUT = {"lora_dropout": 0.2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
LAYER = "model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetitions train in this process: a fresh one takes seconds to import what is imported here already."""

    def trained(command: list[str], run_dir: RunDir, environment: dict[str, str]) -> dict[str, Any]:
        assert command[1:3] == ["-m", "lora_recipes.train"]
        before, told = dict(os.environ), Path("outcome.json").absolute()
        os.environ.update(environment | {process.OUTCOME_FILE: str(told)})
        try:
            with redirect_stdout(sys.stderr):  # as `run_to_the_end` does
                train_main(command[3:])
        finally:
            os.environ.clear()
            os.environ.update(before)
        return read_json(told)

    monkeypatch.setattr("lora_recipes.reproduce.trained", trained)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: dict[str, str]) -> Path:
    """A working folder with a complete run, with dropout, evaluations and checkpoints; tests work on copies."""
    folder, before = tmp_path_factory.mktemp("finished"), Path.cwd()
    sections = tiny_recipe(str(tiny_model), tiny_data)
    sections["lora"] |= DROPOUT
    sections["training"] |= EVALUATED | EVERY_STEP
    (folder / "tiny.yaml").write_text(json.dumps(sections))
    os.chdir(folder)
    try:
        assert launch("tiny.yaml", []) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(finished: Path, here: None, workdir: Path) -> RunDir:
    """The complete run, in a working folder of its own."""
    shutil.copytree(finished, workdir, dirs_exist_ok=True)
    return RunDir.of("tiny")


def contents(folder: Path) -> dict[Path, tuple[str, int]]:
    return {file: (file_sha256(file), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def reproduce(*words: str, capsys: pytest.CaptureFixture) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = main(["reproduce", *words, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), " ".join(err.split())  # lines are broken at the width of a terminal


def edit(file: Path, **changes: Any) -> None:
    write_json(file, read_json(file) | changes)


@pytest.mark.promise("F21")
def test_a_run_repeats_to_the_last_bit_and_is_not_touched(run: RunDir, capsys: pytest.CaptureFixture):
    Path("tiny.yaml").unlink()  # all it takes is in the run folder
    before = contents(run.root)
    code, found, said = reproduce("outputs/tiny", capsys=capsys)
    assert code == 0 and found["exact"] and found["reproduced"], said
    assert found["losses"] == 3 and found["tensors"] == len(read_json(run.manifest)["published"]["tensors"]) > 10
    assert "REPRODUCED to the bit" in said
    other = RunDir.of("tiny.reproduced")
    assert read_json(other.manifest)["repeats"] == {"run": read_json(run.manifest)["run"], "accepted": {}}
    trained = contents(other.adapter) | contents(other.checkpoints)
    code, found, said = reproduce("outputs/tiny", capsys=capsys)  # complete: compared once more, nothing is trained
    assert (code, found["exact"]) == (0, True) and "0 steps to train" in said
    assert contents(other.adapter) | contents(other.checkpoints) == trained
    assert contents(run.root) == before


@pytest.mark.promise("F21")
def test_a_whole_model_with_overrides_repeats_to_the_last_bit(
    here: None, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe(lora=None, model={"dtype": "float32"})
    assert launch(str(path), ["training.learning_rate=1e-3", "training.max_steps=2"]) == 0
    code, found, said = reproduce("outputs/tiny", capsys=capsys)
    assert code == 0 and found["exact"] and found["steps"] == 2, said
    assert read_json(RunDir.of("tiny").manifest)["published"]["folder"] == "merged"


def test_a_repetition_that_was_cut_off_goes_on_and_a_strangers_folder_is_left_alone(
    run: RunDir, capsys: pytest.CaptureFixture
):
    assert reproduce("outputs/tiny", capsys=capsys)[0] == 0
    other = RunDir.of("tiny.reproduced")
    cut_off(other, after=1)
    edit(other.status, state="failed")
    code, found, said = reproduce("tiny.yaml", capsys=capsys)  # by the recipe whose run it is
    assert (code, found["exact"]) == (0, True) and "Going on from" in said and "checkpoint-1" in said
    edit(other.manifest, repeats={"run": "another", "accepted": {}})
    before = contents(other.root)
    code, found, _ = reproduce("outputs/tiny", capsys=capsys)
    assert code == 2 and "holds no repetition of this run" in found["error"]["message"]
    assert contents(other.root) == before
    assert reproduce("outputs/tiny", "--fresh", capsys=capsys)[0] == 0
    assert RunDir.of("tiny.reproduced.old-1").root.is_dir()


def test_what_came_out_other_is_told_where_it_began(run: RunDir, capsys: pytest.CaptureFixture):
    assert reproduce("outputs/tiny", capsys=capsys)[0] == 0
    other = RunDir.of("tiny.reproduced")
    whole = other.metrics.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    next(line for line in lines if line["step"] == 2 and "loss" in line)["loss"] += 0.5
    write_jsonl(other.metrics, lines)
    code, found, said = reproduce("outputs/tiny", capsys=capsys)
    differs = found["differs"]
    assert code == 4 and not found["reproduced"] and "NOT REPRODUCED" in said and "first at step 2: loss was" in said
    assert (differs["loss"]["step"], differs["loss"]["name"], differs["tensors"]) == (2, "loss", None)
    assert differs["loss"]["now"] == pytest.approx(differs["loss"]["then"] + 0.5)
    other.metrics.write_text(whole)
    tensors = load_file(other.adapter / WEIGHTS)
    name = next(name for name in sorted(tensors) if LAYER in name)
    tensors[name].view(-1)[0] += 0.25
    save_file(tensors, other.adapter / WEIGHTS)
    publish_anew(other.adapter)
    published = read_json(other.manifest)["published"]
    edit(other.manifest, published=published | {"tensors": tensor_hashes(other.adapter)})
    code, found, said = reproduce("outputs/tiny", capsys=capsys)
    told = found["differs"]["tensors"]
    assert code == 4 and found["differs"]["loss"] is None and told["names"] == [name] and name in said
    assert told["largest"] == pytest.approx(0.25) and told["largest_in"] == name
    shutil.rmtree(run.adapter)  # its hashes are enough to know that, though not by how much
    code, found, _ = reproduce("outputs/tiny", capsys=capsys)
    assert code == 4 and found["differs"]["tensors"]["count"] == 1 and found["differs"]["tensors"]["largest"] is None


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str | None]] = {
    # an edit of the manifest, what is said, and the name by which it may be accepted
    "data": (lambda found: found.update(data=dict.fromkeys(found["data"], "0")), "the file has changed", None),
    "base": (lambda found: found["base"].update(weights_sha256="0" * 64), "base: its weights had sha256 0000", None),
    "template": (lambda found: found.update(chat_template_sha256="0"), "the chat template has changed", None),
    "tokens": (lambda found: found["tokens"].update(dataset="0"), "tokens: other tokens in dataset", None),
    "recipe": (lambda found: found["recipe"].update(sha256="0"), "is not the recipe that the run was begun with", None),
    "versions": (lambda found: found["versions"].update(torch="1.0"), "versions.torch: 1.0 then", "versions.torch"),
    "machine": (lambda found: found["machine"].update(cpu="486"), "cpu: 486 then", "machine"),
    "dtype": (lambda found: found["chosen"].update(dtype="bf16"), "dtype: bf16 then, float32", "machine"),
}


@pytest.mark.promise("F21")
@pytest.mark.parametrize("name", MANIFESTS)
def test_what_is_not_as_it_was_is_refused_before_a_step_and_only_rounding_can_be_accepted(
    name: str, run: RunDir, capsys: pytest.CaptureFixture
):
    change, said, acceptable = MANIFESTS[name]
    manifest = read_json(run.manifest)
    change(manifest)
    write_json(run.manifest, manifest)
    code, found, _ = reproduce("outputs/tiny", capsys=capsys)
    assert code == 2 and said in found["error"]["message"]
    other = RunDir.of("tiny.reproduced")
    assert not other.metrics.exists() and not other.adapter.exists()
    code, found, err = reproduce("outputs/tiny", "--accept-changes", acceptable or name, capsys=capsys)
    assert code == (0 if acceptable else 2), err
    if acceptable:
        assert found["exact"] and list(found["accepted"]) == [acceptable]


def test_with_an_accepted_difference_what_is_near_counts_and_what_is_far_does_not(
    run: RunDir, capsys: pytest.CaptureFixture
):
    manifest = read_json(run.manifest)
    manifest["versions"]["torch"] = "1.0"
    write_json(run.manifest, manifest)
    words = ("outputs/tiny", "--accept-changes", "versions.torch")
    assert reproduce(*words, capsys=capsys)[0] == 0
    other = RunDir.of("tiny.reproduced")
    lines = [json.loads(line) for line in other.metrics.read_text().splitlines()]
    for factor, code in ((1.001, 0), (1.1, 4)):
        moved = [line | ({"loss": line["loss"] * factor} if "loss" in line else {}) for line in lines]
        write_jsonl(other.metrics, moved)
        ended, found, said = reproduce(*words, capsys=capsys)
        assert ended == code and not found["exact"]
        assert ("within the tolerance (versions.torch accepted)" in said) == (code == 0)


def test_on_a_gpu_what_is_near_counts_unless_the_run_was_to_be_deterministic(
    run: RunDir, capsys: pytest.CaptureFixture
):
    assert reproduce("outputs/tiny", capsys=capsys)[0] == 0
    other = RunDir.of("tiny.reproduced")
    lines = [json.loads(line) for line in other.metrics.read_text().splitlines()]
    write_jsonl(other.metrics, [line | ({"loss": line["loss"] * 1.001} if "loss" in line else {}) for line in lines])
    assert not compared(run, other)["reproduced"]
    edit(run.manifest, machine=read_json(run.manifest)["machine"] | {"device": "cuda"})
    found = compared(run, other)
    assert found["reproduced"] and not found["exact"] and list(found["accepted"]) == ["sums on a GPU"]
    recipe = json.loads(run.recipe.read_text())
    recipe["training"]["full_determinism"] = True
    run.recipe.write_text(json.dumps(recipe))
    assert not compared(run, other)["reproduced"]


def _other_weights(run: RunDir) -> None:
    file = run.adapter / WEIGHTS
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


REASONS: dict[str, tuple[Callable[[RunDir], Any], str, int]] = {
    "accepted": (lambda run: edit(run.manifest, accepted_changes=["training.seed: 1 then"]), "training.seed", 2),
    "changed": (lambda run: edit(run.manifest, changed_on_the_way=["training.eval_steps"]), "was changed while", 2),
    "state": (lambda run: edit(run.status, state="preempted"), "this one is preempted", 2),
    "old": (lambda run: write_json(run.manifest, {"run": "x"}), "an earlier version", 2),
    "none": (lambda run: run.manifest.unlink(), "no run folder", 2),
    "nodes": (lambda run: edit(run.manifest, launch=read_json(run.manifest)["launch"] | {"machines": 2}), "on 2 ma", 2),
    "losses": (lambda run: run.metrics.write_text('{"step": 1, "loss": 0.5}\n'), "not those that the run wrote", 4),
    "tensors": (_other_weights, "are not what the run published", 4),
}


@pytest.mark.promise("F21")
@pytest.mark.parametrize("name", REASONS)
def test_a_run_that_no_single_run_repeats_is_refused_with_the_reason(
    name: str, run: RunDir, capsys: pytest.CaptureFixture
):
    change, said, wanted = REASONS[name]
    change(run)
    code, found, _ = reproduce("outputs/tiny", capsys=capsys)
    assert code == wanted and said in found["error"]["message"]
    assert not RunDir.of("tiny.reproduced").root.exists()


def test_a_run_that_goes_on_under_other_settings_writes_down_what_cannot_be_repeated(
    run: RunDir, capsys: pytest.CaptureFixture
):
    cut_off(run, after=1)
    assert launch("tiny.yaml", ["training.save_steps=2", "training.run_name=x"]) == 0  # nothing depends on these
    assert "changed_on_the_way" not in read_json(run.manifest)
    assert reproduce("outputs/tiny", capsys=capsys)[1]["exact"]
    cut_off(run, after=1)
    assert (
        launch("tiny.yaml", ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]) == 0
    )
    cut_off(run, after=1)
    assert launch("tiny.yaml", []) == 0
    changed = read_json(run.manifest)["changed_on_the_way"]
    assert changed == ["training.gradient_accumulation_steps", "training.per_device_train_batch_size"]
    code, found, _ = reproduce("outputs/tiny", capsys=capsys)
    assert code == 2 and all(key in found["error"]["message"] for key in changed)


def test_the_manifest_holds_the_hashes_of_what_was_published_and_no_secret(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_API_KEY", "canary-of-an-accelerate-variable")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert launch(str(write_recipe()), []) == 0
    run_dir = RunDir.of("tiny")
    manifest = read_json(run_dir.manifest)
    assert manifest["published"]["tensors"] == tensor_hashes(run_dir.adapter)
    assert manifest["published"]["files"][WEIGHTS] == run_dir.evidence()["adapter_sha256"]
    assert manifest["published"]["metrics_sha256"] == metrics_sha256(run_dir)
    assert manifest["launch"]["environment"]["FSDP_VERSION"] == "2"
    assert "canary" not in run_dir.manifest.read_text() and "API_KEY" not in run_dir.manifest.read_text()


def test_a_gap_is_the_largest_difference_and_its_share_of_all(tmp_path: Path):
    folders = [tmp_path / name for name in ("one", "two", "three")]
    one = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2, dtype=torch.bfloat16)}
    for folder, change in zip(folders, ({}, {"a": torch.tensor([3.0, 4.5])}, {"c": torch.zeros(1)}), strict=True):
        folder.mkdir()
        save_file(one | change, folder / "model.safetensors")
    found = gap(folders[0], folders[1])
    assert found is not None and (found.largest, found.name, found.relative) == (0.5, "a", 0.1)
    same = gap(folders[0], folders[0])
    assert same is not None and same.largest == same.relative == 0.0
    assert gap(folders[0], folders[2]) is None and gap(folders[2], folders[0]) is None


@pytest.mark.promise("F21")
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_in_processes_of_its_own_with_as_many_ranks_and_after_a_signal(
    ranks: int, write_recipe: Callable[..., Path], workdir: Path
):
    path = write_recipe(lora=DROPOUT, training={"max_steps": 200, "use_cpu": True} | EVERY_STEP)
    start = [sys.executable] if ranks == 1 else TORCHRUN
    subprocess.run([*start, ROOT / "run.py", path], cwd=workdir, env=ENVIRONMENT, check=True, capture_output=True)
    command = [sys.executable, "-m", "lora_recipes", "reproduce", "outputs/tiny", "--json"]
    other = RunDir(workdir / "outputs" / "tiny.reproduced")
    child = subprocess.Popen(command, cwd=workdir, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    while not list(other.checkpoints.glob("checkpoint-*")):
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    said = json.loads(child.communicate()[0])
    assert child.returncode == 143 and "to go on: lora-recipes reproduce" in said["error"]["message"]
    ended = subprocess.run(command, cwd=workdir, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and json.loads(ended.stdout)["exact"], ended.stderr
