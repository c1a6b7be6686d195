"""Adapters on one base: a swap answers like a fresh load, a mixed batch like each alone, a combination like its sum."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from lora_recipes.errors import RefusedError, RunError
from lora_recipes.model.adapters import AdapterFile, combine, parse_named, parse_weighted
from lora_recipes.model.swapping import AdapterSet, answers_mixed, unlike

IDS = torch.arange(3, 40)[None]
CLOSE = {"rtol": 0, "atol": 2e-6}  # a matrix filled up with zeros is summed in another order
Make = Callable[..., Path]


def base_of(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    """Makes an adapter folder with random A and B; keywords are LoraConfig's."""

    def adapter(name: str, seed: int = 0, **changes: Any) -> Path:
        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | changes
        model = get_peft_model(base_of(tiny_model), LoraConfig(task_type="CAUSAL_LM", **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return adapter


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def fresh(tiny_model: Path, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(base_of(tiny_model), str(folder)).eval())


def delta(folder: Path, layer: str) -> torch.Tensor:
    """What the adapter in a folder adds to a layer, as PEFT computes it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    (first,) = [tensor for key, tensor in tensors.items() if f"{layer}.lora_A" in key]
    (second,) = [tensor for key, tensor in tensors.items() if f"{layer}.lora_B" in key]
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    return scaling * second @ first


LAYER = "layers.1.self_attn.v_proj"


# -- swapping -----------------------------------------------------------------------------------------------------------


def test_every_swap_answers_like_a_fresh_load(tiny_model: Path, make: Make):
    folders = {"same": make("a", 1), "larger": make("b", 2, r=16), "smaller": make("c", 3, r=2, lora_alpha=16)}
    expected = {name: fresh(tiny_model, folder) for name, folder in folders.items()}
    untouched = logits(base_of(tiny_model))
    adapters = AdapterSet(base_of(tiny_model), folders)
    torch.testing.assert_close(logits(adapters.model), expected["same"], rtol=0, atol=0)
    for name in ["larger", "smaller", "same", "smaller", "larger", "same"]:
        assert adapters.swap(name) == "hot swap"
        torch.testing.assert_close(logits(adapters.model), expected[name], **CLOSE)
        assert adapters.swap(None) == "base"
        assert torch.equal(logits(adapters.model), untouched)
        assert adapters.swap(name) == "set_adapter"
        torch.testing.assert_close(logits(adapters.model), expected[name], **CLOSE)
    assert len(adapters.slots) == 1
    distances = [(expected[one] - expected[two]).abs().max() for one, two in [("same", "larger"), ("same", "smaller")]]
    assert min(distances) > 0.1  # the positive control: a swap that did nothing would be seen


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
        ({"use_rslora": True}, "use_rslora"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 64}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["q_proj"]}, "target modules"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target modules"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_adapter_of_another_kind_is_loaded_beside_and_answers_like_a_fresh_load(
    tiny_model: Path, make: Make, changes: dict[str, Any], why: str
):
    folders = {"plain": make("a", 1), "other": make("b", 2, **changes)}
    expected = {name: fresh(tiny_model, folder) for name, folder in folders.items()}
    assert why in str(unlike(*map(AdapterFile.read, folders.values())))
    adapters = AdapterSet(base_of(tiny_model), folders)
    for name, how in [
        ("other", "loaded"),
        ("plain", "set_adapter"),
        ("other", "set_adapter"),
        ("plain", "set_adapter"),
    ]:
        assert adapters.swap(name) == how
        torch.testing.assert_close(logits(adapters.model), expected[name], **CLOSE)
    adapters.swap(None)
    torch.testing.assert_close(logits(adapters.model), logits(base_of(tiny_model)), rtol=0, atol=0)


def test_a_plain_adapter_is_hot_swapped_while_one_of_another_kind_is_active(tiny_model: Path, make: Make):
    folders = {"a": make("a", 1), "dora": make("d", 2, use_dora=True), "b": make("b", 3, r=8)}
    adapters = AdapterSet(base_of(tiny_model), folders)
    assert [adapters.swap(name) for name in ("dora", "b", "dora", "a")] == [
        "loaded",
        "hot swap",
        "set_adapter",
        "hot swap",
    ]
    torch.testing.assert_close(logits(adapters.model), fresh(tiny_model, folders["a"]), **CLOSE)


def test_two_rslora_adapters_are_hot_swapped(tiny_model: Path, make: Make):
    folders = {"a": make("a", 1, use_rslora=True), "b": make("b", 2, use_rslora=True, r=8)}
    adapters = AdapterSet(base_of(tiny_model), folders)
    assert adapters.swap("b") == "hot swap"
    torch.testing.assert_close(logits(adapters.model), fresh(tiny_model, folders["b"]), **CLOSE)


def test_pefts_hot_swap_loses_the_patterns_which_is_why_they_are_never_hot_swapped(tiny_model: Path, make: Make):
    one, two = (make(name, seed, alpha_pattern={"q_proj": 64}) for name, seed in [("a", 1), ("b", 2)])
    model = PeftModel.from_pretrained(base_of(tiny_model), str(one)).eval()
    hotswap_adapter(model, str(two), "default", torch_device="cpu")
    assert (logits(model) - fresh(tiny_model, two)).abs().max() > 1e-3
    assert "alpha_pattern" in str(unlike(AdapterFile.read(one), AdapterFile.read(two)))


def test_a_16_bit_adapter_is_swapped_in_as_exactly_as_it_is_loaded(tiny_model: Path, make: Make):
    folders = {"a": make("a", 1, r=2), "b": make("b", 2, r=8)}
    for folder in folders.values():  # as a QLoRA run writes them
        weights = folder / "adapter_model.safetensors"
        save_file({key: value.bfloat16() for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    adapters = AdapterSet(base_of(tiny_model), folders)
    for name in ["b", "a", "b"]:
        assert adapters.swap(name) == "hot swap"
        torch.testing.assert_close(logits(adapters.model), fresh(tiny_model, folders[name]), **CLOSE)


def test_an_adapter_of_another_model_is_refused_before_anything_is_loaded(tiny_model: Path, make: Make):
    wide = make("wide", 1)
    weights = wide / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    save_file(tensors | {key: torch.zeros(4, 65)}, weights, {"format": "pt"})
    with pytest.raises(RefusedError, match="is 64 wide"):
        AdapterSet(base_of(tiny_model), {"a": make("a"), "wide": wide})
    save_file(tensors | {key.replace("layers.0", "layers.7"): tensors[key].clone()}, weights, {"format": "pt"})
    with pytest.raises(RefusedError, match=r"no layer .*layers\.7"):
        AdapterSet(base_of(tiny_model), {"a": make("a"), "deep": wide})
    with pytest.raises(RefusedError, match="rank 4, its config says r = 8"):
        AdapterSet(base_of(tiny_model), {"a": make("a"), "c": _wrong_rank(make)})


def _wrong_rank(make: Make) -> Path:
    folder = make("wrong_rank")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    return folder


def test_a_broken_adapter_leaves_the_active_one_as_it_was(tiny_model: Path, make: Make):
    folders = {"a": make("a", 1), "b": make("b", 2)}
    adapters = AdapterSet(base_of(tiny_model), folders)
    weights = folders["b"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RefusedError, match="was cut off"):
        adapters.swap("b")
    assert adapters.active == "a"
    torch.testing.assert_close(logits(adapters.model), fresh(tiny_model, folders["a"]), rtol=0, atol=0)
    with pytest.raises(RunError, match="there are a, b"):
        adapters.swap("c")


def test_an_adapter_that_changes_the_base_stands_alone(tiny_model: Path, make: Make):
    pissa = make("pissa")
    config = json.loads((pissa / "adapter_config.json").read_text())
    (pissa / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(RefusedError, match="`init_lora_weights` changes the base"):
        AdapterSet(base_of(tiny_model), {"a": make("a"), "pissa": pissa})
    alone = AdapterSet(base_of(tiny_model), {"pissa": pissa})
    with pytest.raises(RunError, match="there is none without the adapter"):
        alone.swap(None)


def test_an_adapter_that_brings_another_embedding_stands_alone(tiny_model: Path, make: Make):
    folder = make("a", target_modules=["q_proj", "embed_tokens"])
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    (key,) = [key for key in tensors if "base_layer" in key]
    AdapterSet(base_of(tiny_model), {"a": folder, "b": make("b")})  # the positive control: the base's own is harmless
    save_file(tensors | {key: tensors[key] + 1}, weights, {"format": "pt"})
    with pytest.raises(RefusedError, match=r"embed_tokens\.weight` changes the base"):
        AdapterSet(base_of(tiny_model), {"a": folder, "b": make("b")})


def test_modules_to_save_are_mixed_only_among_their_own_kind(tiny_model: Path, make: Make):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = "<|endoftext|>"
    one, two = (make(name, seed, modules_to_save=["lm_head"]) for name, seed in [("one", 1), ("two", 2)])
    adapters = AdapterSet(base_of(tiny_model), {"one": one, "two": two, "plain": make("plain", 3)})
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=[2], pad_token_id=0)
    mixed = answers_mixed(adapters, tokenizer, [[5, 6]] * 3, ["two", "__base__", "one"], config)
    alone = [answers_mixed(adapters, tokenizer, [[5, 6]], [name], config)[0] for name in ("two", "__base__", "one")]
    assert mixed == alone and len(set(mixed)) == 3
    with pytest.raises(RunError, match="only where all save the same"):
        answers_mixed(adapters, tokenizer, [[5, 6]] * 2, ["one", "plain"], config)


# -- mixed batches ------------------------------------------------------------------------------------------------------


def test_a_mixed_batch_answers_like_each_adapter_alone(tiny_model: Path, make: Make):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = "<|endoftext|>"
    folders = {
        "a": make("a", 1),
        "b.2": make("b", 2, r=8),
        "rs": make("r", 3, use_rslora=True),
        "pattern": make("p", 4, rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 64}),
    }
    prompts = [tokenizer(text)["input_ids"] for text in ("two pens", "one", "a ruler, please", "three", "ink")]
    names = ["b.2", "__base__", "a", "rs", "pattern"]
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[2], pad_token_id=0)
    adapters = AdapterSet(base_of(tiny_model), folders)
    adapters.swap("b.2")
    mixed = answers_mixed(adapters, tokenizer, prompts, names, config)
    assert adapters.active == "b.2"
    torch.testing.assert_close(logits(adapters.model), fresh(tiny_model, folders["b.2"]), **CLOSE)
    alone = []
    for prompt, name in zip(prompts, names, strict=True):
        model = base_of(tiny_model)
        model = model if name == "__base__" else PeftModel.from_pretrained(model, str(folders[name])).eval()
        ids = torch.tensor([prompt])
        row = model.generate(input_ids=ids, attention_mask=ids * 0 + 1, generation_config=config)[0, len(prompt) :]
        row = row.tolist()
        alone.append(tokenizer.decode(row[: row.index(2) if 2 in row else None]).strip())
    assert mixed == alone
    assert len(set(mixed)) >= 3  # random weights answer much alike


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"trainable_token_indices": [5]}])
def test_what_peft_cannot_mix_is_refused_by_name(tiny_model: Path, make: Make, changes: dict[str, Any]):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    adapters = AdapterSet(base_of(tiny_model), {"a": make("a"), "b": make("b", **changes)})
    with pytest.raises(RunError, match=next(iter(changes))):
        answers_mixed(adapters, tokenizer, [[5]], ["b"], GenerationConfig())
    assert len(adapters.slots) == 1
    with pytest.raises(RunError, match="there are a, b"):
        answers_mixed(adapters, tokenizer, [[5]], ["c"], GenerationConfig())
    with pytest.raises(RunError, match="1 prompts and 2 names"):
        answers_mixed(adapters, tokenizer, [[5]], ["a", "a"], GenerationConfig())


# -- combining ----------------------------------------------------------------------------------------------------------


def meta_of(folder: Path) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_a_combination_without_the_base_holds_the_tensors_of_one_with_it(
    tiny_model: Path, make: Make, tmp_path: Path, method: str
):
    one, two = make("a", 1), make("b", 2, lora_alpha=2)
    combine(meta_of(tiny_model), {"a": (one, 0.7), "b": (two, -0.3)}, method, tmp_path / "out", seed=5)
    model = PeftModel.from_pretrained(base_of(tiny_model), str(one), adapter_name="a")
    model.load_adapter(str(two), adapter_name="b")
    torch.manual_seed(5)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "both", combination_type=method, density=0.5)
    model.set_adapter("both")
    torch.testing.assert_close(fresh(tiny_model, tmp_path / "out"), logits(model.eval()), rtol=0, atol=0)
    assert (logits(model) - fresh(tiny_model, one)).abs().max() > 1e-2


def test_svd_is_the_weighted_sum_of_what_the_adapters_add(tiny_model: Path, make: Make, tmp_path: Path):
    one, two = make("a", 1, r=4), make("b", 2, r=6, lora_alpha=3)
    report = combine(meta_of(tiny_model), {"a": (one, 0.7), "b": (two, -1.3)}, "svd", tmp_path / "out")
    assert report["rank"] == 10 and report["relative_error"] == 0
    wanted = 0.7 * delta(one, LAYER) - 1.3 * delta(two, LAYER)
    torch.testing.assert_close(delta(tmp_path / "out", LAYER), wanted, rtol=0, atol=1e-6)


def test_svd_of_a_lower_rank_is_the_best_approximation_and_pefts(tiny_model: Path, make: Make, tmp_path: Path):
    one, two = make("a", 1, r=4), make("b", 2, r=6)
    report = combine(meta_of(tiny_model), {"a": (one, 0.7), "b": (two, 0.3)}, "svd", tmp_path / "out", rank=3)
    wanted = 0.7 * delta(one, LAYER) + 0.3 * delta(two, LAYER)
    rotated, values, turned = torch.linalg.svd(wanted.double())
    best = (rotated[:, :3] * values[:3] @ turned[:3]).float()
    torch.testing.assert_close(delta(tmp_path / "out", LAYER), best, rtol=0, atol=1e-5)
    assert 0 < report["relative_error"] < 1
    model = PeftModel.from_pretrained(base_of(tiny_model), str(one), adapter_name="a")
    model.load_adapter(str(two), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="svd", svd_rank=3)
    model.set_adapter("both")
    torch.testing.assert_close(fresh(tiny_model, tmp_path / "out"), logits(model.eval()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["linear", "svd"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 64}},
        {"target_modules": r".*\.(q_proj|up_proj)"},
    ],
    ids=["plain", "rslora", "patterns", "regex"],
)
def test_one_adapter_with_weight_one_is_itself(
    tiny_model: Path, make: Make, tmp_path: Path, method: str, changes: dict[str, Any]
):
    one = make("a", 1, **changes)
    combine(meta_of(tiny_model), {"a": (one, 1.0)}, method, tmp_path / "out")
    torch.testing.assert_close(fresh(tiny_model, tmp_path / "out"), fresh(tiny_model, one), rtol=0, atol=1e-5)


def test_pefts_combination_of_rslora_is_too_strong_and_ours_is_the_sum(tiny_model: Path, make: Make, tmp_path: Path):
    one, two = (make(name, seed, use_rslora=True) for name, seed in [("a", 1), ("b", 2)])
    combine(meta_of(tiny_model), {"a": (one, 0.5), "b": (two, 0.5)}, "svd", tmp_path / "out")
    wanted = 0.5 * delta(one, LAYER) + 0.5 * delta(two, LAYER)
    torch.testing.assert_close(delta(tmp_path / "out", LAYER), wanted, rtol=0, atol=1e-6)
    model = PeftModel.from_pretrained(base_of(tiny_model), str(one), adapter_name="a")
    model.load_adapter(str(two), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", combination_type="cat")
    theirs = model.get_submodule(f"base_model.model.model.{LAYER}").get_delta_weight("both")
    torch.testing.assert_close(theirs, wanted * 8**0.5, rtol=0, atol=1e-5)


def test_a_combined_folder_is_a_plain_adapter_with_the_same_bytes_each_time(
    tiny_model: Path, make: Make, tmp_path: Path
):
    parts = {"a": (make("a", 1), 0.5), "b": (make("b", 2), 0.5)}
    for number in (1, 2):
        torch.manual_seed(number)
        before = torch.random.get_rng_state()
        combine(meta_of(tiny_model), parts, "dare_ties", tmp_path / f"out{number}")
        assert torch.equal(before, torch.random.get_rng_state())
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / f"out{n}").iterdir()} for n in (1, 2))
    assert one == two and set(one) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(one["adapter_config.json"])
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in (tmp_path / "out1").iterdir())


@pytest.mark.parametrize(
    ("changes", "method", "error", "message"),
    [
        ({"r": 8}, "linear", RunError, "other ranks.*--method svd"),
        ({"r": 8}, "ties", RunError, "other ranks.*--method svd"),
        ({"target_modules": ["q_proj"]}, "svd", RunError, "other target modules"),
        ({"modules_to_save": ["lm_head"]}, "svd", RefusedError, "modules_to_save"),
        ({"use_dora": True}, "svd", RefusedError, "use_dora"),
        ({"lora_bias": True}, "svd", RefusedError, "lora_bias"),
        ({"bias": "all"}, "svd", RefusedError, "bias"),
        ({"trainable_token_indices": [5]}, "svd", RefusedError, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "svd", RefusedError, "whole weights .*embed_tokens"),
        ({}, "mean", RunError, "methods: linear, ties, dare_ties, svd"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_combined_is_refused_by_name_and_nothing_is_written(
    tiny_model: Path, make: Make, tmp_path: Path, changes: dict, method: str, error: type[Exception], message: str
):
    parts = {"a": (make("a", 1), 0.5), "b": (make("b", 2, **changes), 0.5)}
    with pytest.raises(error, match=message):
        combine(meta_of(tiny_model), parts, method, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_are_refused_by_name(tiny_model: Path, make: Make, tmp_path: Path):
    folder = make("a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": ["mlp.experts.down_proj"]}))
    with pytest.raises(RefusedError, match="target_parameters"):
        combine(meta_of(tiny_model), {"a": (folder, 1.0)}, "svd", tmp_path / "out")


def test_a_combination_never_replaces_one_of_its_parts(tiny_model: Path, make: Make):
    folder = make("a")
    with pytest.raises(RunError, match="would be replaced"):
        combine(meta_of(tiny_model), {"a": (folder, 1.0)}, "svd", folder)
    with pytest.raises(RunError, match="density"):
        combine(meta_of(tiny_model), {"a": (folder, 1.0)}, "ties", folder.parent / "out", density=0)


# -- words --------------------------------------------------------------------------------------------------------------


def test_words_name_runs_or_folders(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    make("outputs/polite/adapter")
    make("a=b")
    run = Path("outputs/polite/adapter")
    assert parse_weighted(["polite=0.7", "a=b=-1e-1"]) == {"polite": (run, 0.7), "a=b": (Path("a=b"), -0.1)}
    assert parse_named(["p=polite", "q.2=a=b"]) == {"p": run, "q.2": Path("a=b")}
    assert parse_weighted([]) == {} and parse_named([]) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "NAME=WEIGHT"),
        (["=1"], "NAME=WEIGHT"),
        (["a=nan"], "finite"),
        (["a=inf"], "finite"),
        (["a=much"], "finite"),
        (["a=1", "a=2"], "twice"),
        (["a=1", "./a=2"], "twice"),
        (["b=1"], "no adapter folder"),
    ],
)
def test_wrong_weights_are_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    make("a")
    with pytest.raises(RunError, match=message):
        parse_weighted(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "NAME=PATH"),
        (["a="], "NAME=PATH"),
        (["a b=a"], "NAME=PATH"),
        (["base=a"], "means no adapter"),
        (["__base__=a"], "means no adapter"),
        (["x=a", "x=a"], "already"),
        (["x=b"], "no adapter folder"),
    ],
)
def test_wrong_names_are_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    make("a")
    with pytest.raises(RunError, match=message):
        parse_named(words)
