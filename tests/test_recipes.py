"""Every shipped recipe: loads, is short, says what it is, and describes a run whose parts exist."""

import json
from pathlib import Path

import pytest

from lora_recipes.cli import main
from lora_recipes.data.files import local_files, sources
from lora_recipes.recipe import load_recipe
from lora_recipes.recipe.nodes import parse_file
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_sound(path: Path, capsys: pytest.CaptureFixture):
    assert main(["check", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "problems": []}
    for source in sources(load_recipe(path)):
        for split in (source.split, source.eval_split):
            assert split is None or local_files(source, str(split))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_what_it_is_and_its_own_command(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"accelerate launch run.py recipes/{path.name}" in text
    assert all(len(line) <= 130 for line in text.splitlines())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_restates_nothing_that_its_parents_already_say(path: Path):
    own = {key: node.plain() for key, node in parse_file(path, []).leaves() if key != "extends"}
    parent = path.parent / parse_file(path, []).value["extends"].plain()
    inherited = {key: node.plain() for key, node in _chain(parent)}
    assert not [key for key, value in own.items() if key in inherited and inherited[key] == value]


def _chain(path: Path):
    node = parse_file(path, [])
    if "extends" in node.value:
        yield from _chain(path.parent / node.value["extends"].plain())
    yield from node.leaves()


def test_no_recipe_shares_a_run_folder_with_another():
    names = [load_recipe(path).name for path in RECIPES]
    assert len(set(names)) == len(names)


def test_base_recipes_are_never_run_alone(capsys: pytest.CaptureFixture):
    for path in sorted((ROOT / "recipes" / "base").glob("*.yaml")):
        assert main(["check", str(path)]) == 2
        assert "`model.pretrained_model_name_or_path` is missing" in capsys.readouterr().err


def test_the_llama_recipe_has_the_tutorials_values():
    recipe = load_recipe(ROOT / "recipes" / "llama2-7b-qlora.yaml")
    assert recipe.get("model.pretrained_model_name_or_path") == "meta-llama/Llama-2-7b-chat-hf"
    expected = {
        "quantization.load_in_4bit": True,
        "quantization.bnb_4bit_quant_type": "nf4",
        "lora.r": 16,
        "lora.lora_alpha": 32,
        "lora.lora_dropout": 0.05,
        "lora.bias": "none",
        "lora.target_modules": ["q_proj", "v_proj"],
        "training.per_device_train_batch_size": 4,
        "training.gradient_accumulation_steps": 4,
        "training.learning_rate": 2e-4,
        "training.optim": "paged_adamw_32bit",
        "training.max_steps": 500,
        "training.save_steps": 100,
        "training.logging_steps": 10,
        "generation.max_new_tokens": 50,
    }
    assert {key: recipe.get(key) for key in expected} == expected
