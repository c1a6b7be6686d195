"""A run folder that somebody else wrote in: nothing of it runs, nothing outside of it is touched, and one message says what is wrong."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lora_recipes.cli import main
from lora_recipes.errors import EXIT_DONE, EXIT_MACHINE, EXIT_REFUSED, EXIT_USER
from lora_recipes.records import SCHEMAS
from lora_recipes.run_dir import RunDir, file_sha256, read_json, read_jsonl, write_json
from lora_recipes.train import launch
from tests.security.hostile import CANARY


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def run_dir(
    write_recipe: Callable[..., Path], workdir: Path, trained: Path, quick_proof: None, tiny_data: dict[str, str]
) -> RunDir:
    """A complete run with two checkpoints: trained once, copied for each test."""
    path = write_recipe(training={"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2})
    if not (trained / "outputs").is_dir():
        assert launch(str(path), []) == 0
        shutil.copytree(workdir / "outputs", trained / "outputs", symlinks=True)
        shutil.copy(path, trained / path.name)
    shutil.rmtree(workdir / "outputs", ignore_errors=True)
    shutil.copytree(trained / "outputs", workdir / "outputs", symlinks=True)
    shutil.copy(trained / path.name, path)
    return RunDir.of("tiny")


def refused(capsys: pytest.CaptureFixture, words: list[str], said: str, code: int = EXIT_REFUSED) -> None:
    found, told = main(words), " ".join(capsys.readouterr().err.split())
    assert (found, said in told) == (code, True), told


# What a plain run on one machine has no reason to write: repetitions, accepted changes, a loss that is odd, tasks, a server.
ELSEWHERE = {"repeats", "changed_on_the_way", "diagnosis", "tasks", "served", "expectation", "answers_in_common"}
BROKEN: dict[str, bytes] = {
    "cut": b'{"state": "comp',
    "a list": b"[]",
    "no text": b"\xff\xfe{}",
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize(
    "name", ["status.json", "manifest.json", "parity.json", "evaluation.json", "generations.jsonl"]
)
def test_a_file_that_is_not_what_was_written_is_named(
    name: str, content: bytes, run_dir: RunDir, capsys: pytest.CaptureFixture
):
    (run_dir.root / name).write_bytes(content)
    verb = "merge" if name == "manifest.json" else "status"
    refused(capsys, [verb, "tiny.yaml"], f"{run_dir.root / name}: is not what was written there")
    assert main(["status", "tiny.yaml", "--json"]) in (EXIT_DONE, EXIT_REFUSED)
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("manifest.json", {"data": 5}),
        ("manifest.json", {"tokens": []}),
        ("manifest.json", {"world_size": "x"}),
        ("manifest.json", {"launch": 5}),
        ("manifest.json", {"published": []}),
        ("manifest.json", {"published": {}}),
        ("manifest.json", {"launch": {}}),
        ("manifest.json", {"launch": {"machines": "x", "threads": None, "environment": {}}}),
        ("manifest.json", {"launch": {"machines": 1, "threads": 10**9, "environment": {}}}),
        ("manifest.json", {"accepted_changes": 5}),
        ("manifest.json", {"recipe": {}}),
        ("manifest.json", {"base": {"name": "x", "weights_sha256": 5}}),
        ("status.json", {"diagnosis": "x"}),
        ("status.json", {"diagnosis": {"x": 1}}),
        ("evaluation.json", {"forgetting": 5}),
        ("evaluation.json", {"forgetting": {"passed": 5}}),
        ("evaluation.json", {"eval_loss": []}),
        ("parity.json", {"passed": "yes"}),
    ],
)
def test_a_value_of_another_kind_is_named(
    name: str, values: dict[str, Any], run_dir: RunDir, capsys: pytest.CaptureFixture
):
    write_json(run_dir.root / name, read_json(run_dir.root / name) | values)
    verb = ["reproduce", str(run_dir.root)] if name == "manifest.json" else ["status", "tiny.yaml"]
    refused(capsys, verb, f"{name}: is not what was written there (`{next(iter(values))}")


@pytest.mark.parametrize(
    "row", [{"adapter": 5}, {"adapter": {}}, {"expected": 5}, {"expectation": 5}, {"merged": {"failed": [{}]}}], ids=str
)
def test_a_transcript_of_another_kind_is_named(row: dict[str, Any], run_dir: RunDir, capsys: pytest.CaptureFixture):
    run_dir.generations.write_text(json.dumps({"prompt": "x", "expected": None} | run_dir.evidence() | row) + "\n")
    refused(capsys, ["status", "tiny.yaml"], "generations.jsonl: is not what was written there")


@pytest.mark.parametrize("lacking", ["chosen", "launch", "world_size", "published"])
def test_a_manifest_that_lacks_what_a_repetition_needs_is_named(
    lacking: str, run_dir: RunDir, capsys: pytest.CaptureFixture
):
    manifest = read_json(run_dir.manifest)
    write_json(run_dir.manifest, {key: value for key, value in manifest.items() if key != lacking})
    refused(capsys, ["reproduce", str(run_dir.root)], f"lacks {lacking}", EXIT_USER)
    write_json(run_dir.manifest, manifest | {"world_size": 60_000})
    refused(capsys, ["reproduce", str(run_dir.root)], "60000 processes", EXIT_MACHINE)


@pytest.mark.parametrize("line", ["5", "{}", '{"step": "x"}', '{"loss": 1'])
def test_a_run_goes_on_whatever_stands_at_the_end_of_its_log(line: str, run_dir: RunDir):
    newest = max(run_dir.checkpoints.glob("checkpoint-*"))
    shutil.rmtree(run_dir.adapter)
    shutil.rmtree(newest)
    before = read_jsonl(run_dir.metrics)
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in before[:-2]) + line + "\n")
    assert launch("tiny.yaml", []) == 0
    after = read_jsonl(run_dir.metrics)
    assert [row["step"] for row in after if "loss" in row] == [row["step"] for row in before if "loss" in row]


def test_every_kind_that_is_asked_for_is_really_written(run_dir: RunDir, workdir: Path):
    """Of a run that is merged, asked and evaluated: what `records` says stands in its files, stands there."""
    (workdir / "general.jsonl").write_text('{"text": "two pens and a lamp"}\n')
    for verb in ("merge", "generate", "evaluate"):
        assert main([verb, "tiny.yaml", "checks.forgetting.data_files=general.jsonl"]) in (EXIT_DONE, EXIT_REFUSED)
    written: dict[str, set[str]] = {}
    for file in [*run_dir.root.glob("*.json*"), *run_dir.adapter.glob("provenance.json")]:
        rows = read_jsonl(file) if file.suffix == ".jsonl" else [read_json(file)]
        written[file.name] = set().union(*rows)
    newest = max(run_dir.checkpoints.glob("checkpoint-*"))
    written["manifest.json"] |= set(read_json(newest / "manifest.json"))
    written["trainer_state.json"] = set(read_json(newest / "trainer_state.json"))
    for name, schema in SCHEMAS.items():
        assert set(schema["properties"]) - written[name] <= ELSEWHERE, name


@pytest.mark.promise("F21")
def test_a_repetition_takes_no_variable_that_could_run_code(
    run_dir: RunDir, workdir: Path, capsys: pytest.CaptureFixture
):
    (workdir / "evil").mkdir()
    (workdir / "evil" / "sitecustomize.py").write_text(f"open({str(workdir / CANARY)!r}, 'w').close()")
    manifest = read_json(run_dir.manifest)
    for name, value in (("PYTHONPATH", str(workdir / "evil")), ("LD_PRELOAD", "evil.so"), ("OMP_NUM_THREADS", 1)):
        launched = manifest["launch"] | {"environment": {name: value}}
        write_json(run_dir.manifest, manifest | {"launch": launched})
        refused(capsys, ["reproduce", str(run_dir.root)], f"`launch.environment` sets {name!r}")
    assert not (workdir / CANARY).exists()


def test_what_somebody_links_to_is_neither_written_nor_deleted(
    run_dir: RunDir, workdir: Path, capsys: pytest.CaptureFixture
):
    elsewhere = workdir / "elsewhere"
    elsewhere.mkdir()
    precious = elsewhere / "other.safetensors"
    precious.write_text("mine")
    (run_dir.root / ".merged.staging").symlink_to(elsewhere)
    assert main(["merge", "tiny.yaml"]) == 0
    assert [file.name for file in elsewhere.iterdir()] == [precious.name] and precious.read_text() == "mine"
    assert run_dir.merged.is_dir() and not run_dir.merged.is_symlink()
    shutil.rmtree(run_dir.merged)
    run_dir.merged.symlink_to(elsewhere / "new")
    refused(capsys, ["merge", "tiny.yaml"], "merged: is a link", EXIT_USER)
    assert run_dir.merged.is_symlink() and precious.read_text() == "mine"
    run_dir.merged.unlink()
    run_dir.lock.unlink()
    run_dir.lock.symlink_to(precious)
    refused(capsys, ["merge", "tiny.yaml"], ".lock: is no plain file (a link, a folder, a pipe)")
    assert precious.read_text() == "mine"


def test_an_adapter_whose_checksums_are_gone_or_made_anew_is_refused(run_dir: RunDir, capsys: pytest.CaptureFixture):
    weights, sums = run_dir.adapter / "adapter_model.safetensors", run_dir.adapter / "SHA256SUMS"
    tensors = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    lines = sums.read_text().splitlines(keepends=True)
    others = "".join(line for line in lines if weights.name not in line)
    anew = f"{others}{file_sha256(weights)}  {weights.name}\n"
    push = ["push", "hub.repo_id=me/x", "--dry_run"]
    for text, said in (
        (None, "SHA256SUMS: is gone"),
        ("", "SHA256SUMS: is not the list that was written"),
        (others, "SHA256SUMS: is not the list that was written"),
        (anew, "SHA256SUMS: is not the list that was written"),
        ("zz\n", "is no list of checksums"),
        (f"{'0' * 64}  ../../x\n", "is no list of checksums"),
    ):
        sums.unlink(missing_ok=True)
        if text is not None:
            sums.write_text(text)
        for words in (["merge"], ["generate"], push):
            refused(capsys, [words[0], "tiny.yaml", *words[1:]], said)
    sums.write_bytes(b"\xff\xfe")
    refused(capsys, [push[0], "tiny.yaml", *push[1:]], "is no list of checksums")


@pytest.mark.parametrize("ranks", [10**9, "x", -1, None])
def test_a_checkpoint_of_impossible_ranks_is_passed_over_at_once(
    ranks: Any, run_dir: RunDir, capsys: pytest.CaptureFixture
):
    shutil.rmtree(run_dir.adapter)
    newest = max(run_dir.checkpoints.glob("checkpoint-*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"world_size": ranks}))
    assert launch("tiny.yaml", []) == 0
    assert f"Skipping {newest}" in " ".join(capsys.readouterr().err.split())
    assert run_dir.adapter.is_dir()


def test_a_pipe_among_data_files_is_no_data(
    write_recipe: Callable[..., Path], tiny_data: dict[str, str], workdir: Path, capsys: pytest.CaptureFixture
):
    folder = workdir / "rows"
    folder.mkdir()
    shutil.copy(tiny_data["train"], folder / "a.jsonl")
    os.mkfifo(folder / "b.jsonl")
    (folder / "c.jsonl").mkdir()
    path = write_recipe(dataset={"data_files": str(folder), "eval_split": 0.2})
    assert main(["audit", str(path), "--json"]) == EXIT_DONE
    assert json.loads(capsys.readouterr().out)["rows"] == len((folder / "a.jsonl").read_text().splitlines())
