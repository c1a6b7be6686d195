"""Secrets planted wherever a run reads: none is found in what it writes or says. Tokens caches hold the data itself."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_recipes.errors import EXIT_REFUSED
from lora_recipes.redact import GONE, find_secret, redacted
from tests.conftest import ROOT

IN_ENVIRONMENT = "canary-in-env-7f3a91"
IN_COMMENT, IN_ROW = "hf_" + "c" * 34, "ghp_" + "d" * 36
IN_URL = "canarypassword"
STEPS = """
import sys
reached = []
sys.addaudithook(lambda event, _: reached.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
from lora_recipes import cli, train
recipe = sys.argv[1]
assert train.main([recipe, "training.save_strategy=steps", "training.save_steps=3", "hub.commit_message=" + sys.argv[2]]) == 0
for verb in ("generate", "status", "audit", "preview"):
    cli.main([verb, recipe] + (["--html"] if verb == "preview" else []))
    cli.main([verb, recipe, "--json"])
assert not reached, reached
"""


def environment(folder: Path) -> dict[str, str]:
    secrets = {"SERVICE_TOKEN": IN_ENVIRONMENT, "OTHERAPIKEY": f"{IN_ENVIRONMENT}-2", "HF_TOKEN": "hf_" + "e" * 34}
    inherited = {
        name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"
    }  # it could reach the hub
    return inherited | secrets | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}


@pytest.mark.promise("F19")
def test_a_run_writes_and_says_no_secret_and_connects_to_nobody(
    write_recipe: Callable[..., Path], tiny_data: dict[str, str], workdir: Path
):
    rows = {name: Path(file).read_text(encoding="utf-8").splitlines() for name, file in tiny_data.items()}
    for name in rows:
        row = json.loads(rows[name][0])
        row["messages"][-1]["content"] = f"The key is {IN_ROW}."
        rows[name][0] = json.dumps(row)
        bad = json.dumps({"messages": None, "x": IN_ROW})
        (workdir / f"{name}.jsonl").write_text("\n".join([*rows[name], bad]))
    files = {name: f"{name}.jsonl" for name in rows}
    recipe = write_recipe(dataset={"data_files": files, "bad_rows": "skip"})
    recipe.write_text(f"# {IN_COMMENT}\n" + recipe.read_text())
    command = [sys.executable, "-c", STEPS, str(recipe), IN_ENVIRONMENT]
    ended = subprocess.run(command, env=environment(workdir), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    told = {"stdout": ended.stdout.encode(), "stderr": ended.stderr.encode()}
    told |= {str(file): file.read_bytes() for file in (workdir / "outputs").rglob("*") if file.is_file()}
    assert {"manifest.json", "generations.jsonl", "rejected.jsonl"} <= {Path(name).name for name in told}
    for secret in (IN_ENVIRONMENT, IN_COMMENT, IN_ROW, "hf_" + "e" * 34):
        assert [name for name, content in told.items() if secret.encode() in content] == []


@pytest.mark.parametrize("verb", ["check", "train", "show", "new"])
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(
    write_recipe: Callable[..., Path], workdir: Path, verb: str, capfd: pytest.CaptureFixture[str]
):
    from lora_recipes import cli, train

    recipe = write_recipe(dataset={"path": f"git+https://me:{IN_URL}@host/repo.git"}, generation={"prompts": [IN_ROW]})
    words = ["copy"] if verb == "new" else []
    code = train.main([str(recipe)]) if verb == "train" else cli.main([verb, str(recipe), *words])
    assert code == EXIT_REFUSED
    said = "".join(capfd.readouterr())
    assert IN_URL not in said and IN_ROW not in said and "dataset.path" in said
    assert not (workdir / "outputs").exists() and not (workdir / "copy.yaml").exists()


SECRETS = [
    "hf_" + "a" * 34,
    "sk-proj-" + "a_B-" * 10,
    "AKIA" + "A1" * 8,
    "ghp_" + "a" * 36,
    "github_pat_" + "a" * 40,
    "glpat-" + "a" * 20,
    "xoxb-1234567890-abc",
    "AIza" + "a" * 35,
    "https://me:letmein@host/x",
    "postgres://me:letmein@host/x",
    "https://:token@host/x",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blb\n-----END OPENSSH PRIVATE KEY-----",
]
HONEST = [
    "hf_transfer and hf_hub_download",
    "sk-learn",
    "https://host/x?y=1",
    "https://me@host/x",
    "git@github.com:owner/repo.git",
    "https://{user}:{password}@host",
    "postgres://$USER:$PASSWORD@host",
    "https://host:8080/@me",
    "-----BEGIN PUBLIC KEY-----",
    "at 10:30@home",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_known_and_taken_out(text: str):
    assert find_secret(f"is {text} here")
    shown = redacted(json.dumps({"a": f"is {text} here"}))
    assert GONE in shown and json.loads(shown)["a"].endswith(" here")
    assert "letmein" not in shown and "b3Blb" not in shown


@pytest.mark.parametrize("text", HONEST)
def test_what_only_resembles_a_secret_is_left_alone(text: str):
    assert redacted(text) == text and find_secret(text) is None


def test_values_of_the_environment_are_taken_out_and_paths_are_not(monkeypatch: pytest.MonkeyPatch):
    values = {
        "MY_SECRET": 'a"quoted\\value',
        "SSH_KEY": "/home/me/.ssh/id",
        "SHORT_KEY": "abc",
        "NUMBER_KEY": "1234567890",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert redacted(json.dumps(values)) == json.dumps(values | {"MY_SECRET": GONE}, ensure_ascii=False)


@pytest.mark.parametrize("text", ["\x1b[2Jgone", "\x1b]0;title\x07", "a\u202eb", "\x9b31m", "a\rb"])
def test_what_a_terminal_would_obey_is_shown(text: str, capfd: pytest.CaptureFixture[str]):
    from lora_recipes import console

    console.say(text)
    console.error(text)
    console.table("t", [text], [[text]])
    console.facts(text, [(text, text)])
    console.emit_json({text: text})
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {text: text}
    said = captured.out + captured.err
    assert not set(said) & set("\x1b\x07\x9b\r\u202e")
