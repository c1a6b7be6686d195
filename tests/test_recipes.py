"""Every shipped recipe: loads, is short, says what it is, and describes a run whose parts exist."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from lora_recipes.cli import main
from lora_recipes.data.files import local_files, sources
from lora_recipes.model.build import meta_model
from lora_recipes.model.targets import find_targets
from lora_recipes.plan import config_of, facts_file, plan, target_of
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.recipe.nodes import parse_file
from tests.conftest import ROOT
from tests.data_room.chat_tokenizers import trl_tokenizer
from tests.toy import slow_if_like_another

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def _model(path: Path) -> str:
    return load_recipe(path).get("model.pretrained_model_name_or_path")


HUB_RECIPES = [path for path in RECIPES if not _model(path).startswith("package:")]
ADAPTERS = [path for path in RECIPES if load_recipe(path).get("lora")]
# Every linear layer but the head is adapted, and every expert. What stands here is not, and why.
LEFT_OUT = {
    "llama2-7b-qlora": {"k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},  # the tutorial's own choice: q and v
    "falcon-h1-0.5b-lora": {"out_proj"},  # PEFT refuses it: Mamba's kernel reads the weight past the adapter
    "falcon-h1-1.5b-lora": {"out_proj"},
}
# TRL keeps these models' own chat templates, by which the end token of a recipe can be tried.
TEMPLATES = {
    "CohereLabs/aya": "cohere",
    "CohereLabs/c4ai-command-r7b": "cohere2",
    "LiquidAI/LFM2": "lfm2",
    "Qwen/Qwen2.5": "qwen2_5",
    "Qwen/Qwen3": "qwen3",
    "deepseek-ai/DeepSeek-R1-Distill": "deepseek_r1_distill",
    "google/gemma-2": "gemma",
    "google/gemma-3": "gemma3",
    "meta-llama/Llama-3.1": "llama3_1",
    "meta-llama/Llama-3.2": "llama3_2",
    "meta-llama/Llama-3.3": "llama3_1",
    "microsoft/Phi-3-": "phi3",
    "microsoft/Phi-3.5": "phi3_5",
    "openai/gpt-oss": "gptoss",
}


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


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=slow_if_like_another(path, of_a_type=True)) for path in RECIPES]
)
def test_recipe_is_planned_offline(path: Path):
    found = plan(load_recipe(path), target_of("24GiB", None, None), advise=False)
    assert found["memory"]["expected"] > 0
    recipe = load_recipe(path)
    share = found["trainable"] / found["all"]
    if not recipe.get("lora"):
        assert share == 1
    else:
        assert 0 < share < (1 if recipe.get("lora.modules_to_save") else 0.4)  # rank 256 on the demo model is a third


def _adaptable(recipe: Recipe, config: PreTrainedConfig) -> Counter[str]:
    """How many linear layers of each name a model has beside its head, and how many of its experts' weights."""
    model = meta_model(config, recipe)
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear) and module is not head]
    names += [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and not isinstance(modules[name.rpartition(".")[0]], torch.nn.Conv1d)
    ]
    return Counter(name.rpartition(".")[2] for name in names)


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_recipe_adapts_all_there_is_to_adapt_in_every_layer(path: Path):
    recipe = load_recipe(path)
    config = config_of(recipe)
    found = find_targets(recipe, config)
    wanted = {
        name: count for name, count in _adaptable(recipe, config).items() if name not in LEFT_OUT.get(path.stem, ())
    }
    assert found.hits == wanted
    assert found.frozen_experts == 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_rows_are_no_longer_than_what_the_model_was_made_for(path: Path):
    recipe = load_recipe(path)
    assert 0 < recipe.get("training.max_length") <= config_of(recipe).max_position_embeddings


@pytest.mark.parametrize("path", HUB_RECIPES, ids=lambda path: path.stem)
def test_an_end_token_or_a_template_of_the_recipes_own_comes_with_its_reason(path: Path):
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith(("eos_token:", "chat_template_path:", "exclude_modules:", "target_modules:")):
            assert "  # " in line, line


@pytest.mark.parametrize(
    ("path", "template"),
    [
        (path, template)
        for path in HUB_RECIPES
        for named, template in TEMPLATES.items()
        if _model(path).startswith(named)
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_the_models_own_template_closes_an_answer_with_the_recipes_end_token(path: Path, template: str):
    recipe, (tokenizer, _) = load_recipe(path), trl_tokenizer(template)
    assert recipe.get("training.chat_template_path") is None
    tokenizer.eos_token = recipe.get("training.eos_token", tokenizer.eos_token)
    row = [{"role": "user", "content": "2 x 3?"}, {"role": "assistant", "content": "6"}]
    assert tokenizer.apply_chat_template(row, tokenize=False).rstrip().endswith(tokenizer.eos_token)


@pytest.mark.parametrize("path", HUB_RECIPES, ids=lambda path: path.stem)
def test_recipe_says_which_card_it_is_for_and_whether_its_weights_are_gated(path: Path):
    text = path.read_text(encoding="utf-8")
    assert re.search(r"\d+ GB", text.splitlines()[0])
    facts = json.loads(facts_file(_model(path)).read_text(encoding="utf-8"))
    assert ("hf auth login" in text) == facts["gated"]


def test_the_library_is_broad_and_its_recipes_are_short():
    families = {
        json.loads(facts_file(_model(path)).read_text(encoding="utf-8"))["config"]["model_type"] for path in HUB_RECIPES
    }
    assert len(HUB_RECIPES) >= 40 and len(families) >= 20
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in RECIPES]
    assert max(lines) <= 45
    assert sum(count <= 25 for count in lines) >= 0.8 * len(lines)


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


def test_the_contributors_example_is_what_is_shipped():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipe = ROOT / "recipes" / "gemma3-1b-lora.yaml"
    assert f"```yaml\n{recipe.read_text(encoding='utf-8')}```" in guide
    assert f"```json\n{facts_file(_model(recipe)).read_text(encoding='utf-8')}```" in guide
