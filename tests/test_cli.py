"""The command line: exit codes, one message, one JSON object, and nothing heavy imported without need."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_recipes import process
from lora_recipes.cli import VERBS, main
from lora_recipes.run_dir import Locked, RunDir, write_json, write_jsonl

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate"]
# Heavy in themselves, or what the heavy ones bring along. The answer to `check` is a question of milliseconds.
HEAVY += ["numpy", "pandas", "pyarrow", "scipy", "sklearn", "tokenizers", "safetensors", "huggingface_hub"]
HEAVY += ["pydantic", "jinja2", "httpx", "requests"]
RECIPE = """\
model:
  pretrained_model_name_or_path: org/tiny
lora:
  target_modules: all-linear
dataset:
  path: json
  data_files: rows.jsonl
training:
  learning_rate: 2e-4
"""
SECRET = "hf_" + "abcdefghijklmnopqrstuvwxyzABCD"


@pytest.fixture
def recipe(workdir: Path) -> str:
    path = workdir / "tiny.yaml"
    path.write_text(RECIPE)
    return str(path)


def call(*words: str) -> int:
    """The exit code of a command run in this process; argparse ends with SystemExit."""
    try:
        return main(list(words))
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def call_json(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the one JSON object that is all of stdout."""
    exit_code = call(*words, "--json")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    value = json.loads(out)
    assert isinstance(value, dict)
    return exit_code, value


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, in the working folder of the test."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, check=False)


def test_check_says_ok(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", recipe) == 0
    assert capsys.readouterr() == ("", f"{recipe}: ok\n")


def test_check_says_ok_in_json(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_json(capsys, "check", recipe) == (0, {"ok": True, "problems": []})


def test_check_says_every_problem_once_and_no_traceback(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", recipe, "lora.r=0", "training.learning_rat=1") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: command line (lora.r=0): `lora.r` must be at least 1, found 0\n")
    assert err.count("learning_rat`") == 1
    assert len(err.splitlines()) == 2
    assert "Traceback" not in err


def test_check_says_every_problem_in_json(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(recipe).write_text(f"{RECIPE}  max_seq_length: 8\n  seed: one\n")
    exit_code, found = call_json(capsys, "check", recipe)
    assert exit_code == 2
    assert found == {
        "ok": False,
        "problems": [
            {
                "file": recipe,
                "line": 10,
                "column": 3,
                "key": "training.max_seq_length",
                "message": "is not a field of trl.SFTConfig",
                "hint": "write training.max_length",
            },
            {
                "file": recipe,
                "line": 11,
                "column": 9,
                "key": "training.seed",
                "message": "must be an integer, found the text 'one'",
                "hint": "",
            },
        ],
    }


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_refusal_has_its_own_exit_code(recipe: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", recipe, f"training.hub_token={SECRET}", *flags) == 4
    assert SECRET not in "".join(capsys.readouterr())


def test_options_may_stand_between_overrides(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", "--json", recipe, "lora.r=4", "--debug", "lora.lora_alpha=8") == 0
    shown = json.loads(capsys.readouterr().out)["recipe"]
    assert shown["lora"] == {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}


def test_debug_shows_the_traceback(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", recipe, "lora.r=0", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["check", "show", "status", "generate", "merge", "train"])
def test_a_verb_without_a_recipe_says_how_to_name_one(
    verb: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code, found = call_json(capsys, verb)
    assert exit_code == 2
    assert found["error"]["exit_code"] == 2
    assert f"lora-recipes {verb} recipes/NAME.yaml" in found["error"]["message"]


@pytest.mark.parametrize("verb", ["show", "status", "generate", "merge", "train"])
def test_a_missing_recipe_is_one_message(verb: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, found = call_json(capsys, verb, "tinny.yaml")
    assert exit_code == 2
    assert found == {
        "error": {"message": "tinny.yaml: no such file; did you mean tiny.yaml?", "exit_code": 2},
    }


def test_check_of_a_missing_recipe_is_a_problem(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, found = call_json(capsys, "check", "tinny.yaml")
    assert exit_code == 2
    assert found["ok"] is False
    assert [(problem["file"], problem["message"]) for problem in found["problems"]] == [("tinny.yaml", "no such file")]


def test_show_in_json_has_values_and_origins(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("child.yaml").write_text("extends: tiny.yaml\nlora:\n  rank_pattern: {q_proj: 4}\n")
    exit_code, found = call_json(capsys, "show", "child.yaml", "training.seed=3")
    assert exit_code == 0
    assert found == {
        "recipe": {
            "model": {"pretrained_model_name_or_path": "org/tiny"},
            "lora": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 4}},
            "dataset": {"path": "json", "data_files": "rows.jsonl"},
            "training": {"learning_rate": 0.0002, "seed": 3},
        },
        "origins": {
            "model.pretrained_model_name_or_path": "tiny.yaml:2",
            "lora.target_modules": "tiny.yaml:4",
            "lora.rank_pattern.q_proj": "child.yaml:3",
            "dataset.path": "tiny.yaml:6",
            "dataset.data_files": "tiny.yaml:7",
            "training.learning_rate": "tiny.yaml:9",
            "training.seed": "command line (training.seed=3)",
        },
    }


def test_show_prints_yaml_on_stdout(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", recipe) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("model:\n  pretrained_model_name_or_path: org/tiny")
    Path("shown.yaml").write_text(out)
    assert call("check", "shown.yaml") == 0


def test_new_writes_a_recipe_and_says_where(recipe: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, found = call_json(capsys, "new", recipe, "mine", "lora.r=8")
    assert (exit_code, found) == (0, {"recipe": str(workdir / "mine.yaml")})
    assert call("check", found["recipe"]) == 0


def test_new_tells_people_what_to_do_next(recipe: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("new", recipe, "mine") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"lora-recipes check {workdir / 'mine.yaml'}" in err


def test_new_never_writes_over_a_file(recipe: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "mine.yaml").write_text("mine")
    assert call("new", recipe, "mine") == 2
    assert "mine.yaml exists and is left as it is" in capsys.readouterr().err
    assert (workdir / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize("words", [[], ["RECIPE"], ["RECIPE", "lora.r=8"]])
def test_new_needs_a_source_and_a_name(words: list[str], recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("new", *(recipe if word == "RECIPE" else word for word in words)) == 2
    assert "`new` needs a source and a name" in capsys.readouterr().err


def test_status_before_anything_has_run(recipe: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, found = call_json(capsys, "status", recipe)
    assert exit_code == 0
    assert found["state"] == "not started"
    assert found["verdict"] == "do not ship"
    assert set(found["gates"].values()) == {None}
    assert found["next"] == [f"accelerate launch run.py {recipe}"]
    for key in ("step", "max_steps", "exit_code", "reason", "last_good_checkpoint"):
        assert found[key] is None
    assert not (workdir / "outputs").exists()


def test_status_of_a_run_that_was_killed_is_cut_off_and_of_one_that_runs_is_running(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = RunDir.of("tiny")
    lock = Locked(run_dir.lock)
    lock.acquire(wait=False)
    write_json(run_dir.status, {"state": "running", "step": 2, "max_steps": 3, "last_good_checkpoint": "checkpoint-2"})
    assert call_json(capsys, "status", recipe)[1]["state"] == "running"
    lock.release()
    found = call_json(capsys, "status", recipe)[1]
    assert (found["state"], found["step"], found["last_good_checkpoint"]) == ("cut off", 2, "checkpoint-2")
    assert found["next"] == [f"accelerate launch run.py {recipe}"]


def test_status_for_people_goes_to_stderr(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("status", recipe) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "not started" in err
    assert f"accelerate launch run.py {recipe}" in err


ADAPTER = {  # which all evidence must be of
    "adapter_sha256": hashlib.sha256(b"weights").hexdigest(),
    "merged_sha256": hashlib.sha256(b"sums").hexdigest(),
}


def finished_run(
    merged_text: str = "4", fault: str | None = None, proof: str = "behaviour", **changed: dict[str, Any]
) -> None:
    """The run folder of a recipe that was trained, merged, evaluated and asked one question."""
    run_dir = RunDir.of("tiny")
    for folder in (run_dir.adapter, run_dir.merged):
        folder.mkdir(parents=True)
    (run_dir.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (run_dir.merged / "SHA256SUMS").write_bytes(b"sums")
    write_json(run_dir.status, {"state": "complete", "step": 3, "max_steps": 3, "exit_code": 0})
    write_json(run_dir.parity, {"passed": True, "proof": proof} | ADAPTER | changed.get("parity", {}))
    evaluation = {"improved": True, "forgetting": {"passed": True}} | ADAPTER | changed.get("evaluation", {})
    write_json(run_dir.evaluation, evaluation)
    given: dict[str, Any] = {who: {"text": "4", "stopped": "eos"} for who in ("adapter", "merged")}
    given["merged"]["text"] = merged_text
    if fault:
        given["adapter"] |= {"stopped": "length", "fault": fault}
    row = {"prompt": "2 + 2", "expected": "4", **ADAPTER, **given}
    write_jsonl(run_dir.generations, [row | changed.get("row", {})])


GATES = ["trained", "improved", "not_forgotten", "answers", "merge_parity", "merged_answers"]


def test_status_of_a_run_that_holds_every_gate(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    finished_run()
    _, found = call_json(capsys, "status", recipe)
    assert (found["state"], found["step"], found["max_steps"], found["exit_code"]) == ("complete", 3, 3, 0)
    assert found["gates"] == dict.fromkeys(GATES, True)
    assert found["verdict"] == "ship"
    assert found["scores"]["adapter"]["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"merged_text": "5"}, "merged_answers"),
        ({"fault": "length"}, "answers"),
        ({"parity": {"passed": False}}, "merge_parity"),
        ({"evaluation": {"improved": False}}, "improved"),
        ({"evaluation": {"forgetting": {"passed": False}}}, "not_forgotten"),
    ],
)
def test_one_failed_gate_fails_the_verdict(
    change: dict[str, Any], gate: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(**change)
    _, found = call_json(capsys, "status", recipe)
    assert [name for name, held in found["gates"].items() if held is False] == [gate]
    assert found["verdict"] == "do not ship"


OTHER, MERGED = {"adapter_sha256": "0" * 64}, {"merged_sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "gates"),
    [
        ({"evaluation": OTHER}, ["improved", "not_forgotten"]),
        ({"parity": OTHER}, ["merge_parity"]),
        ({"row": OTHER}, ["answers", "merged_answers"]),
        ({"parity": MERGED}, ["merge_parity"]),
        ({"row": MERGED}, ["answers", "merged_answers"]),
        ({"proof": "weights"}, ["merge_parity"]),
        ({"evaluation": {"improved": None}}, ["improved"]),
    ],
    ids=[
        "evaluation of another adapter",
        "merge of another adapter",
        "answers of another adapter",
        "proof of another merge",
        "answers of another merge",
        "weights only",
        "nothing held out",
    ],
)
def test_what_was_not_measured_of_this_adapter_is_not_shipped(
    change: dict[str, Any], gates: list[str], recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(**change)
    _, found = call_json(capsys, "status", recipe)
    assert [name for name, held in found["gates"].items() if held is None] == gates
    assert found["verdict"] == "do not ship"


@pytest.mark.parametrize("flags", [[], ["--json"]])
@pytest.mark.parametrize("verb", ["merge", "generate", "evaluate"])
def test_before_training_there_is_nothing_to_merge_or_ask(
    verb: str, flags: list[str], recipe: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(verb, recipe, *flags) == 2
    out, err = capsys.readouterr()
    message = json.loads(out)["error"]["message"] if flags else err
    assert f"train it first: accelerate launch run.py {recipe}" in message
    assert "Traceback" not in err
    assert not (workdir / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chekc", "RECIPE"], "invalid choice: 'chekc'"),
        (["check", "RECIPE", "--jso"], "unrecognized arguments: --jso"),
        (["train", "RECIPE", "--res"], "unrecognized arguments: --res"),
        (["train", "RECIPE", "--resum"], "unrecognized arguments: --resum"),
        (["check", "RECIPE", "--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
    ],
)
def test_an_unknown_word_is_refused(
    words: list[str], said: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*(recipe if word == "RECIPE" else word for word in words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    out = capsys.readouterr().out
    for verb, function in VERBS.items():
        assert f"  {verb} " in out
        assert function.__doc__ is not None
        assert function.__doc__ in out


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 2
    assert "usage: lora-recipes" in capsys.readouterr().out


def test_the_module_is_the_command(recipe: str) -> None:
    ended = python("-m", "lora_recipes", "check", recipe, "lora.r=0", "--json")
    assert ended.returncode == 2
    assert ended.stderr == ""
    assert json.loads(ended.stdout)["problems"][0]["key"] == "lora.r"


LAUNCHED = ["-m", "accelerate.commands.launch", "--quiet"]


@pytest.mark.parametrize(
    ("gpu", "default", "named", "words"),
    [
        (False, False, None, ["-m"]),
        (True, False, None, [*LAUNCHED, "--module"]),
        (False, True, None, [*LAUNCHED, "--module"]),
        (False, False, "ddp.yaml", [*LAUNCHED, "--config_file", "ddp.yaml", "--module"]),
    ],
    ids=["nothing to launch", "a GPU", "a config in the cache", "a config that was named"],
)
def test_a_launcher_starts_what_has_something_to_launch(
    gpu: bool,
    default: bool,
    named: str | None,
    words: list[str],
    recipe: str,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "GPU_DEVICES", (str(workdir / "gpu"),))
    monkeypatch.setenv("HF_HOME", str(workdir / "home"))
    (workdir / "home" / "accelerate").mkdir(parents=True)
    for wanted, file in ((gpu, "gpu"), (default, "home/accelerate/default_config.yaml")):
        if wanted:
            (workdir / file).touch()
    started: list[list[str]] = []

    def run(command: list[str], _: dict[str, str]) -> tuple[int, None]:
        started.append(command)
        return 0, None

    monkeypatch.setattr(process, "run_to_the_end", run)
    assert call("train", recipe, "--fresh", *(["--config_file", named] if named else [])) == 0
    assert started == [[sys.executable, *words, "lora_recipes.train", recipe, "--fresh"]]


PROBE = """
import json, sys
from lora_recipes.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit:
        pass
print("\\n" + json.dumps([name for name in json.loads(sys.argv[2]) if name in sys.modules]))
"""


def heavy_imports(program: str, commands: list[list[str]], names: list[str] = HEAVY) -> list[str]:
    ended = python("-c", program, json.dumps(commands), json.dumps(names))
    assert ended.returncode == 0, ended.stderr
    found: list[str] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_what_needs_no_model_imports_no_library_of_models(recipe: str, workdir: Path) -> None:
    commands = [
        ["--help"],
        ["check", recipe],
        ["check", recipe, "lora.r=0"],
        ["check", recipe, "--json"],
        ["show", recipe],
        ["show", recipe, "--json"],
        ["new", recipe, "mine"],
        ["status", recipe],
        ["status", recipe, "--json"],
    ]
    assert heavy_imports(PROBE, commands) == []
    assert (workdir / "mine.yaml").is_file()


def test_an_answer_in_one_line_draws_nothing_and_opens_no_connection(recipe: str) -> None:
    commands = [["--help"], ["check", recipe], ["show", recipe], ["new", recipe, "mine"]]
    assert heavy_imports(PROBE, commands, ["rich", "asyncio", "ssl", "multiprocessing", "subprocess"]) == []


def test_a_wrong_recipe_is_refused_before_a_library_of_models_is_imported(recipe: str) -> None:
    verbs = [verb for verb in VERBS if verb != "new"]
    assert heavy_imports(PROBE, [[verb, recipe, "lora.r=0"] for verb in verbs]) == []


def test_a_library_of_models_would_be_seen(recipe: str) -> None:
    assert "torch" in heavy_imports(f"import torch\n{PROBE}", [["check", recipe]])
