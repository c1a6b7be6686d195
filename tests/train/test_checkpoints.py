"""Checkpoints on disk: whole or not there, found by their hashes, deleted only when two good ones stay."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from lora_recipes.errors import MachineError, RefusedError
from lora_recipes.run_dir import RunDir, read_json, write_json
from lora_recipes.train import checkpoints, launch
from lora_recipes.train.checkpoints import newest_whole, numbered, publish_checkpoint, retain, why_broken
from lora_recipes.train.session import _require_state
from tests.conftest import ROOT
from tests.security.hostile import Evil
from tests.train.runs import EVERY_STEP, cut_off, reseal

FILES = {"trainer_state.json": "{}", "rng_state.pth": "random", "optimizer.pt": "moments", "scheduler.pt": "rate"}
RUN = {"run": "mine", "seed": 1}


def saved(folder: Path, step: int, manifest: dict[str, Any] = RUN, world_size: int = 1) -> Path:
    """A checkpoint of little files, published as a real one is."""
    return publish_checkpoint(written(folder, step), step, manifest, world_size)


def written(folder: Path, step: int) -> Path:
    staging = folder / checkpoints.STAGING / f"checkpoint-{step}"
    (staging / "global_step").mkdir(parents=True)
    for name, text in {**FILES, "global_step/shard.pt": "shard"}.items():
        (staging / name).write_text(f"{text} {step}")
    return staging


def newest(folder: Path, said: list[str] | None = None) -> Path | None:
    return newest_whole(folder, "mine", lambda path: None, [].append if said is None else said.append)


def steps(folder: Path) -> list[int]:
    return [step for step, _ in numbered(folder)]


def absent(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def swapped(file: Path) -> None:
    """For the same file of the older checkpoint."""
    name = file.relative_to(file.parents[1] if file.parent.name == "global_step" else file.parent)
    shutil.copy(file.parents[len(name.parts)] / "checkpoint-1" / name, file)


def linked(file: Path) -> None:
    target = file.parents[3] / "elsewhere"
    shutil.move(file, target)
    file.symlink_to(target)


@pytest.mark.promise("F7", "C1")
@pytest.mark.parametrize("fault", [absent, empty, half, flipped, swapped, linked], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", [*FILES, "global_step/shard.pt", "manifest.json"])
def test_a_fault_in_any_file_is_found_named_and_passed_over(tmp_path: Path, name: str, fault: Callable[[Path], None]):
    folder = tmp_path / "run" / "checkpoints"
    first, second = saved(folder, 1), saved(folder, 2)
    if (fault, name) in ((linked, "manifest.json"),):
        return  # a link to the very manifest says nothing else than the manifest
    fault(second / name)
    said: list[str] = []
    assert newest(folder, said) == first
    wanted = name if name != "manifest.json" or fault is not swapped else "saved at step 1"
    assert len(said) == 1 and str(second) in said[0] and (wanted in said[0] or name == "manifest.json")


def test_what_was_put_into_a_checkpoint_later_is_found(tmp_path: Path):
    checkpoint = saved(tmp_path, 1)
    (checkpoint / "pytorch_model.bin").write_text("a pickle")
    assert "pytorch_model.bin was put there later" in str(why_broken(checkpoint, "mine"))


@pytest.mark.promise("C1")
def test_a_checkpoint_of_another_run_is_passed_over(tmp_path: Path):
    saved(tmp_path, 1)
    saved(tmp_path, 2, RUN | {"run": "theirs"})
    said: list[str] = []
    assert newest(tmp_path, said) == tmp_path / "checkpoint-1" and "another run (theirs" in said[0]


@pytest.mark.promise("C1")
def test_a_run_without_any_whole_checkpoint_is_refused_and_one_without_any_begins(tmp_path: Path):
    assert newest(tmp_path) is None
    absent(saved(tmp_path, 1) / "optimizer.pt")
    with pytest.raises(RefusedError, match=r"none of 1 checkpoint is whole.*--fresh") as refused:
        newest(tmp_path)
    assert refused.value.exit_code == 4


DIES = """
import os, shutil, sys
from pathlib import Path
from lora_recipes.train.checkpoints import newest_whole, publish_checkpoint, retain

template, left = Path(sys.argv[1]), -1

def event(name, arguments):
    global left
    if name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"):
        left -= 1
        if left == 0:
            os._exit(9)

sys.addaudithook(event)
for count in range(1, 1000):
    folder = template.parent / str(count)
    shutil.copytree(template, folder)
    child = os.fork()
    if child == 0:
        left = count
        publish_checkpoint(folder / ".saving" / "checkpoint-4", 4, {"run": "mine"}, 1)
        retain(folder, "mine", 2, None)
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    found = newest_whole(folder, "mine", lambda path: None, lambda line: None)
    names = sorted(path.name for path in folder.glob("checkpoint-*"))
    print(died, found.name, *names)
    if not died:
        break
"""


@pytest.mark.promise("F2", "F5")
@pytest.mark.parametrize("again", [False, True], ids=["new", "over a broken one"])
def test_a_kill_at_any_file_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, again: bool):
    """A process that really dies at each file it opens, changes, renames or deletes, in publishing and in deleting."""
    folder = tmp_path / "template"
    for step in (1, 2, 3):
        saved(folder, step, {"run": "mine"})
    if again:
        half(saved(folder, 4, {"run": "mine"}) / "optimizer.pt")
    written(folder, 4)
    command = [sys.executable, "-c", DIES, str(folder)]
    told = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in told.stdout.splitlines()]
    assert len(lines) > 30 and all(line[1] in ("checkpoint-3", "checkpoint-4") for line in lines)
    assert all(len(line) >= 4 for line in lines)  # never fewer than two
    assert lines[-1] == ["False", "checkpoint-4", "checkpoint-3", "checkpoint-4"]


@pytest.mark.promise("F8")
def test_every_byte_is_synced_before_the_manifest_names_it_and_before_the_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []
    real_fsync, real_rename, real_json = checkpoints.fsync, Path.rename, checkpoints.write_json
    monkeypatch.setattr(checkpoints, "fsync", lambda path: (seen.append(f"fsync {path.name}"), real_fsync(path)))
    monkeypatch.setattr(
        checkpoints, "write_json", lambda path, value: (seen.append(f"write {path.name}"), real_json(path, value))
    )
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (seen.append(f"rename {path.parent.name}"), real_rename(path, to))[1]
    )
    saved(tmp_path / "c", 1)
    names = sorted(f"fsync {name}" for name in [*FILES, "shard.pt"])
    assert sorted(seen[: len(names)]) == names
    tail = ["write manifest.json", "fsync global_step", "fsync checkpoint-1", "rename .saving", "fsync c", "fsync c"]
    assert seen[len(names) :] == tail
    assert (tmp_path / "c" / "latest").read_text() == "checkpoint-1\n"


def test_all_ranks_must_have_written_here(tmp_path: Path):
    with pytest.raises(MachineError, match=r"rng_state_0\.pth was not written here; all nodes must share") as refused:
        saved(tmp_path, 1, world_size=2)
    assert refused.value.exit_code == 3 and steps(tmp_path) == []


@pytest.mark.promise("F11")
@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, None, [5, 4, 3, 2, 1]), (3, None, [5, 4, 3]), (2, None, [5, 4]), (1, None, [5, 4]), (1, 2, [5, 2]), (3, 1, [5, 4, 1])],
)  # fmt: skip
def test_the_newest_and_the_best_stay_and_never_fewer_than_two(
    tmp_path: Path, limit: int | None, best: int | None, kept: list[int]
):
    for step in range(1, 6):
        saved(tmp_path, step)
        retain(tmp_path, "mine", limit, f"elsewhere/checkpoint-{best}" if best else None)
    assert steps(tmp_path) == kept and not list(tmp_path.glob(".checkpoint*"))


@pytest.mark.promise("F11")
def test_only_whole_checkpoints_of_this_run_are_counted_and_deleted(tmp_path: Path):
    for step, manifest in ((1, RUN), (2, RUN), (3, RUN), (900, RUN | {"run": "theirs"})):
        saved(tmp_path, step, manifest)
    half(tmp_path / "checkpoint-3" / "optimizer.pt")
    for decoy in ("checkpoint-best-keep", "checkpoint-7-final", "checkpoint-8"):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / decoy)
    (tmp_path / "checkpoint-9").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    retain(tmp_path, "mine", 1, None)
    assert {path.name for path in tmp_path.iterdir()} == before  # two whole ones: 2 and 1
    saved(tmp_path, 4)
    retain(tmp_path, "mine", 1, None)
    assert before - {path.name for path in tmp_path.iterdir()} == {"checkpoint-1"}


def test_a_step_that_is_saved_again_replaces_what_was_broken_and_moves_a_strangers_aside(tmp_path: Path):
    half(saved(tmp_path, 1) / "optimizer.pt")
    assert why_broken(saved(tmp_path, 1), "mine") is None
    saved(tmp_path, 2, RUN | {"run": "theirs"})
    assert why_broken(saved(tmp_path, 2), "mine") is None
    assert read_json(tmp_path / "checkpoint-2.old-1" / "manifest.json")["run"] == "theirs"


def test_a_checkpoint_says_whose_it_is_and_holds_no_pickle_of_objects(write_recipe: Callable[..., Path]):
    assert launch(str(write_recipe(training=EVERY_STEP | {"save_total_limit": 1})), []) == 0
    run_dir = RunDir.of("tiny")
    assert steps(run_dir.checkpoints) == [3, 2]
    checkpoint, run = run_dir.checkpoints / "checkpoint-3", read_json(run_dir.manifest)
    manifest = read_json(checkpoint / "manifest.json")
    assert all(manifest[key] == run[key] for key in checkpoints.IDENTITY) and manifest["world_size"] == 1
    assert len(manifest["base"]["weights_sha256"]) == 64
    assert set(manifest["files"]) == {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
    pickles = {name for name in manifest["files"] if name.endswith((".pt", ".pth", ".bin", ".pkl"))}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(checkpoint / name, weights_only=True)
    assert not list(run_dir.root.rglob("training_args.bin"))


def test_the_best_checkpoint_stays_is_named_where_it_lies_and_is_what_is_published(write_recipe: Callable[..., Path]):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    rising = {
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "max_steps": 4,
    }  # the worst is called the best
    path = write_recipe(training=EVERY_STEP | best | rising)
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    assert steps(run_dir.checkpoints) == [4, 1]
    state = read_json(run_dir.checkpoints / "checkpoint-4" / "trainer_state.json")
    assert state["best_model_checkpoint"] == "outputs/tiny/checkpoints/checkpoint-1"
    published, first = (
        folder / "adapter_model.safetensors" for folder in (run_dir.adapter, run_dir.checkpoints / "checkpoint-1")
    )
    assert published.read_bytes() == first.read_bytes()
    cut_off(run_dir)
    assert launch(str(path), []) == 0  # from the checkpoint of the last step
    assert published.read_bytes() == first.read_bytes()


@pytest.mark.promise("F6")
def test_a_full_disk_in_a_save_leaves_the_older_checkpoint_and_the_same_command_goes_on(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    path = write_recipe(training=EVERY_STEP)
    real = checkpoints.fsync

    def full(file: Path) -> None:
        if file.parent.name == "checkpoint-2":
            raise OSError(28, "No space left on device", str(file))
        real(file)

    monkeypatch.setattr(checkpoints, "fsync", full)
    assert launch(str(path), []) == 3
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(path.parent)
    assert read_json(RunDir.of("tiny").status)["last_good_checkpoint"].endswith("checkpoint-1")
    assert launch(str(path), []) == 0
    assert "Going on from outputs/tiny/checkpoints/checkpoint-1" in capsys.readouterr().err


def test_a_manifest_that_lies_about_weights_that_are_not_finite_does_not_help(write_recipe: Callable[..., Path]):
    path = write_recipe(training=EVERY_STEP | {"max_steps": 1})
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    cut_off(run_dir)
    weights = run_dir.checkpoints / "checkpoint-1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64] + b"\xff" * 64)
    reseal(weights.parent)
    assert launch(str(path), []) == 4
    assert not run_dir.adapter.exists()


@pytest.mark.promise("C3")
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_was_never_whole_is_passed_over_by_name(tmp_path: Path, name: str):
    """Its manifest names all that is there: transformers would begin anew with what is not."""
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    (second / name).unlink()
    shutil.rmtree(second / "global_step")
    manifest = read_json(second / "manifest.json")
    manifest["files"] = {file: known for file, known in manifest["files"].items() if file in FILES and file != name}
    write_json(second / "manifest.json", manifest)
    said: list[str] = []
    assert newest(tmp_path, said) == first and "was never in it" in said[0]


@pytest.mark.promise("C4")
def test_what_somebody_else_could_have_written_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    assert newest(tmp_path) == second
    second.chmod(0o777)
    said: list[str] = []
    assert newest(tmp_path, said) == first and "anybody may write" in said[0]
    tmp_path.chmod(0o777)  # a mount where everything is so
    assert newest(tmp_path) == second
    tmp_path.chmod(0o755)
    second.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(second / "optimizer.pt", 12345, -1)
        assert newest(tmp_path, said) == first and "optimizer.pt belongs to another user (uid 12345)" in said[1]
        os.chown(second / "optimizer.pt", 0, -1)
    shutil.move(second, tmp_path / "elsewhere")
    second.symlink_to(tmp_path / "elsewhere")
    assert newest(tmp_path, said) == first and "is a link" in said[-1]


@pytest.mark.promise("C4")
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_of_code_in_a_checkpoint_is_refused_and_not_run(
    name: str, write_recipe: Callable[..., Path], workdir: Path, capsys: pytest.CaptureFixture
):
    path = write_recipe(training=EVERY_STEP)
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    cut_off(run_dir, after=2)
    checkpoint = run_dir.checkpoints / "checkpoint-2"
    (checkpoint / name).write_bytes(pickle.dumps(Evil(str(workdir / "canary"))))
    reseal(checkpoint)
    assert launch(str(path), []) == 4
    assert "may be an attack; nothing of it was run" in " ".join(capsys.readouterr().err.split())
    assert not (workdir / "canary").exists()


@pytest.mark.promise("C5")
def test_a_last_step_that_was_brought_forward_is_not_passed_by_one(write_recipe: Callable[..., Path]):
    path = write_recipe(training=EVERY_STEP)
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    cut_off(run_dir, after=2)
    assert launch(str(path), ["training.max_steps=2"], accepted=("training.max_steps",)) == 0
    assert read_json(run_dir.status)["step"] == 2 and numbered(run_dir.checkpoints)[0][0] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"global_step": "x"}, "`global_step` is 'x'"),
        ({"global_step": 2}, "`global_step` is 2, so it is the state of another step"),
        ({"max_steps": "x"}, "`max_steps` is 'x'"),
        ({"log_history": 5}, "`log_history` is '5'"),
        ({"nobody": 1}, "holds what no transformers.TrainerState does"),
    ],
)
def test_a_state_that_is_not_the_checkpoints_is_refused(tmp_path: Path, change: dict[str, Any], said: str):
    """Its sums may be right: whoever changes a file can write them anew."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    TrainerState(global_step=3, max_steps=4).save_to_json(str(folder / "trainer_state.json"))
    _require_state(folder)
    state = read_json(folder / "trainer_state.json")
    write_json(folder / "trainer_state.json", state | change)
    with pytest.raises(RefusedError, match=re.escape(said)):
        _require_state(folder)
