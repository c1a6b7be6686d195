"""Each training method does what it is named for: its first weights, its optimizer, its loss, and what it leaves."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from lora_recipes.cli import main
from lora_recipes.errors import RecipeError
from lora_recipes.generate import generate
from lora_recipes.model.build import load_base
from lora_recipes.model.initialise import INITIAL, begin
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import RunDir, read_json
from lora_recipes.status import status
from lora_recipes.train import launch
from tests.conftest import NF4, ROOT
from tests.train.runs import make_trainer

WHOLE = {"model": {"dtype": "float32"}}
FIRST_WEIGHTS: dict[str, dict[str, Any]] = {
    "pissa": {"lora": {"init_lora_weights": "pissa"}, **WHOLE},
    "pissa by iteration": {"lora": {"init_lora_weights": "pissa_niter_4"}, **WHOLE},
    "olora": {"lora": {"init_lora_weights": "olora"}, **WHOLE},
    "eva": {"lora": {"init_lora_weights": "eva", "eva_config": {"rho": 1.5}}, **WHOLE},
    "loftq": {"lora": {"init_lora_weights": "loftq"}, "quantization": NF4, **WHOLE},
}
# With what else an adapter may hold: lengths of columns, whole modules, rows of the embedding, ranks of their own.
TOGETHER: dict[str, dict[str, Any]] = {
    "pissa, dora": {"lora": {"init_lora_weights": "pissa", "use_dora": True}, **WHOLE},
    "pissa, tokens": {"lora": {"init_lora_weights": "pissa", "trainable_token_indices": [1, 2]}, **WHOLE},
    "pissa, a whole head": {"lora": {"init_lora_weights": "pissa", "modules_to_save": ["lm_head"]}, **WHOLE},
    "pissa, rslora": {"lora": {"init_lora_weights": "pissa", "use_rslora": True}, **WHOLE},
    "pissa, lorafa": {"lora": {"init_lora_weights": "pissa"}, "training": {"lorafa": True}, **WHOLE},
    "olora, ranks": {
        "lora": {"init_lora_weights": "olora", "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 4}},
        **WHOLE,
    },
    "eva, dora": {"lora": {"init_lora_weights": "eva", "eva_config": {"rho": 1.5}, "use_dora": True}, **WHOLE},
    "eva, quantized": {"lora": {"init_lora_weights": "eva"}, "quantization": NF4, **WHOLE},
    "loftq, dora": {"lora": {"init_lora_weights": "loftq", "use_dora": True}, "quantization": NF4, **WHOLE},
}
QUICK = "pissa, tokens"  # of them, in every run of the tests
COMBINED = [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in TOGETHER if name != QUICK)]


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(10, 40)[None]).logits


def original(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def layers(model: PeftModel) -> list[tuple[str, torch.nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("name", ["pissa", "olora", "eva", "pissa by iteration"])
def test_the_first_weights_leave_the_function_as_it_was(name: str, write_recipe: Callable[..., Path], tiny_model: Path):
    trainer = make_trainer(write_recipe(**FIRST_WEIGHTS[name]))
    torch.testing.assert_close(logits(trainer.model), logits(original(tiny_model)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_split_moves_part_of_each_weight_into_the_adapter(
    method: str, write_recipe: Callable[..., Path], tiny_model: Path
):
    trainer = make_trainer(write_recipe(**FIRST_WEIGHTS[method]))
    before = dict(original(tiny_model).named_modules())
    for name, layer in layers(trainer.model):
        weight = before[name.removeprefix("base_model.model.")].weight
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        moved = layer.scaling["default"] * second @ first
        torch.testing.assert_close(layer.base_layer.weight + moved, weight, rtol=1e-4, atol=1e-5)
        assert moved.norm() > 0.01 * weight.norm()
        if method == "pissa":  # the rank-r part that holds most of the weight (Eckart and Young 1936)
            values = torch.linalg.svdvals(weight)
            assert torch.linalg.svdvals(layer.base_layer.weight)[0] <= values[layer.r["default"]] * 1.01
        else:  # Q of QR: orthonormal columns
            side = second / second.norm(dim=0)
            torch.testing.assert_close(side.T @ side, torch.eye(side.shape[1]), atol=1e-4, rtol=1e-4)


def test_eva_starts_in_the_directions_that_the_rows_excite(write_recipe: Callable[..., Path]):
    trainer = make_trainer(write_recipe(**FIRST_WEIGHTS["eva"]))
    ranks = {name: layer.r["default"] for name, layer in layers(trainer.model)}
    assert sum(ranks.values()) == 4 * len(ranks) and len(set(ranks.values())) > 1 and max(ranks.values()) <= 6
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in ranks}
    hooks = [
        layer.register_forward_pre_hook(lambda module, given, name=name: inputs[name].append(given[0].flatten(0, 1)))
        for name, layer in layers(trainer.model)
    ]
    trainer.model.eval()
    for row in trainer.train_dataset:
        scored = torch.tensor(row["labels"]) != -100
        with torch.no_grad():
            trainer.model(torch.tensor(row["input_ids"])[None])
        for seen in inputs.values():
            seen[-1] = seen[-1][scored]
    for hook in hooks:
        hook.remove()
    for name, layer in layers(trainer.model):
        rows = torch.cat(inputs[name])
        rows = rows - rows.mean(dim=0)  # variance, as the method's name says
        first = layer.lora_A["default"].weight
        torch.testing.assert_close(first @ first.T, torch.eye(len(first)), atol=1e-3, rtol=1e-3)
        explained = (rows @ first.T).square().sum()
        best = torch.linalg.svdvals(rows)[: len(first)].square().sum()
        assert explained > 0.9 * best, name  # from a few batches, not from all rows
        assert not layer.lora_B["default"].weight.any()


def test_eva_needs_as_many_tokens_as_directions(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    path = write_recipe(
        lora={"init_lora_weights": "eva", "r": 64}, training={"per_device_train_batch_size": 1}, **WHOLE
    )
    assert launch(str(path), []) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{path}:" in said and "EVA needs at least r x rho = 128 tokens" in said


def test_loftq_starts_nearer_to_the_original_weights_than_the_quantized_ones_are(
    write_recipe: Callable[..., Path], tiny_model: Path
):
    from peft.utils.integrations import dequantize_module_weight

    trainer = make_trainer(write_recipe(**FIRST_WEIGHTS["loftq"]))
    before = dict(original(tiny_model).named_modules())
    for name, layer in layers(trainer.model):
        weight = before[name.removeprefix("base_model.model.")].weight
        opened = dequantize_module_weight(layer.base_layer)
        made_up = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        lost, left = (weight - opened).norm(), (weight - opened - made_up).norm()
        values = torch.linalg.svdvals(weight - opened)[layer.r["default"] :]
        assert left < 0.97 * lost
        torch.testing.assert_close(left, values.norm(), rtol=1e-3, atol=1e-5)  # no rank-r adapter could do better


@pytest.mark.parametrize("name", [*FIRST_WEIGHTS, *COMBINED])
def test_the_published_adapter_is_the_trained_function_on_the_untouched_base(
    name: str, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    path = write_recipe(**(FIRST_WEIGHTS | TOGETHER)[name])
    trained = []
    from lora_recipes.train import session

    publish = session.publish

    def spy(trainer: Any, *args: Any) -> None:
        trained.append(logits(trainer.model))
        publish(trainer, *args)

    monkeypatch.setattr(session, "publish", spy)
    assert launch(str(path), []) == 0
    recipe = load_recipe(path)
    base = load_base(recipe, locate(recipe), choose(recipe))
    untouched = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, RunDir.of("tiny").adapter))
    torch.testing.assert_close(loaded, trained[0], rtol=1e-4, atol=1e-4)
    assert (loaded - untouched).abs().max() > 0.01
    assert main(["merge", str(path)]) == 0


@pytest.mark.parametrize("name", ["pissa", "olora", "eva", "loftq", "lorafa", "loraplus", "dora", "full", *COMBINED])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(name: str, write_recipe: Callable[..., Path]):
    others: dict[str, dict[str, Any]] = {
        "lorafa": {"training": {"lorafa": True}},
        "loraplus": {"training": {"loraplus_lr_ratio": 4}},
        "dora": {"lora": {"use_dora": True}},
        "full": {"lora": None, **WHOLE},
    }
    keys = dict((FIRST_WEIGHTS | TOGETHER | others)[name])
    keys["training"] = keys.get("training", {}) | {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    keys["training"] |= {"lr_scheduler_type": "constant"}
    result = "merged/model.safetensors" if name == "full" else "adapter/adapter_model.safetensors"
    assert launch(str(write_recipe("whole", **keys)), []) == 0
    path = write_recipe("cut", **keys)
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("cut")
    shutil.rmtree((run_dir.root / result).parent)
    for step in (3, 4):
        shutil.rmtree(run_dir.checkpoints / f"checkpoint-{step}")
    assert launch(str(path), []) == 0
    one, other = (load_file(RunDir.of(which).root / result) for which in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_without_the_first_adapter_a_split_run_is_not_resumed(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    keys = FIRST_WEIGHTS["pissa"] | {"training": {"save_strategy": "steps", "save_steps": 1}}
    path = write_recipe(**keys)
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    shutil.rmtree(run_dir.adapter)
    shutil.rmtree(run_dir.checkpoints / INITIAL)
    assert launch(str(path), []) == 2
    assert "the adapter as it was made is gone" in capsys.readouterr().err


def test_a_split_of_16_bit_weights_is_refused(write_recipe: Callable[..., Path]):
    path = write_recipe(lora={"init_lora_weights": "pissa"}, model={"dtype": "bfloat16"})
    with pytest.raises(RecipeError, match=r"tiny.yaml:\d+: .* set model.dtype=float32"):
        make_trainer(path)


@pytest.mark.parametrize("name", ["pissa", "olora", "eva", "loftq", "lorafa"])
def test_what_needs_whole_matrices_is_refused_where_they_are_sharded_before_weights_are_loaded(
    name: str, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("lora_recipes.train.session.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    path = write_recipe(**FIRST_WEIGHTS.get(name, {"training": {"lorafa": True}}))
    assert launch(str(path), []) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{path}:" in said and "accelerate_configs/ddp.yaml" in said


@pytest.mark.parametrize(
    ("method", "r", "said"),
    [
        ("pissa", 33, "k_proj.* set lora.r=32"),  # it gives 32 features
        ("olora", 33, "k_proj.* set lora.r=32"),
        ("loftq", 33, "k_proj.* set lora.r=32"),
        ("eva", 65, "q_proj.* set lora.r=64"),  # it takes 64
    ],
)
def test_a_rank_that_a_matrix_does_not_have_is_refused(
    method: str, r: int, said: str, write_recipe: Callable[..., Path]
):
    keys = FIRST_WEIGHTS[method]
    with pytest.raises(RecipeError, match=rf"tiny.yaml:\d+: .*{said}"):
        make_trainer(write_recipe(**keys | {"lora": keys["lora"] | {"r": r}}))


@pytest.mark.parametrize("keys", [FIRST_WEIGHTS["pissa"], FIRST_WEIGHTS["eva"], {"training": {"lorafa": True}}])
def test_an_adapter_of_an_embedding_is_refused_where_a_method_would_leave_it_out(
    keys: dict[str, Any], write_recipe: Callable[..., Path]
):
    lora = keys.get("lora", {}) | {"target_modules": ["q_proj", "embed_tokens"]}
    with pytest.raises(RecipeError, match=r"tiny.yaml:\d+: .*embed_tokens, which is no linear layer"):
        make_trainer(write_recipe(**keys | {"lora": lora}))


def test_lora_plus_trains_b_faster_than_a(write_recipe: Callable[..., Path]):
    trainer = make_trainer(write_recipe(training={"loraplus_lr_ratio": 16, "learning_rate": 1e-3, "weight_decay": 0.1}))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    assert all(group["params"] for group in groups)  # of two empty ones FSDP 2 cannot load the state
    rates = {
        names[id(parameter)]: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]
    }
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert set(rates) == trained
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {(1e-3, 0.1)}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {(16e-3, 0.1)}


def test_lora_plus_has_a_rate_for_embeddings(write_recipe: Callable[..., Path]):
    keys = {"loraplus_lr_ratio": 16, "loraplus_lr_embedding": 3e-5}
    trainer = make_trainer(write_recipe(training=keys, lora={"target_modules": ["q_proj", "embed_tokens"]}))
    assert 3e-5 in {group["lr"] for group in trainer.create_optimizer().param_groups if group["params"]}


def test_lora_fa_trains_b_alone_with_the_recipes_settings(write_recipe: Callable[..., Path]):
    trainer = make_trainer(write_recipe(training={"lorafa": True, "adam_beta2": 0.9, "weight_decay": 0.01}))
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == "LoraFAOptimizer"
    (group,) = trainer.optimizer.param_groups
    assert group["betas"] == (0.9, 0.9) and group["weight_decay"] == 0.01
    for name, value in trainer.model.named_parameters():
        assert torch.equal(before[name], value) != ("lora_B" in name), name


def test_dora_trains_lengths_of_columns(write_recipe: Callable[..., Path]):
    trainer = make_trainer(write_recipe(lora={"use_dora": True}))
    lengths = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_magnitude_vector" in n}
    trainer.train()
    assert lengths and all(not torch.equal(lengths[n], p) for n, p in trainer.model.named_parameters() if n in lengths)


def test_rslora_scales_by_the_root_of_the_rank(write_recipe: Callable[..., Path]):
    trainer = make_trainer(write_recipe(lora={"use_rslora": True, "r": 16, "lora_alpha": 8}))
    assert {layer.scaling["default"] for _, layer in layers(trainer.model)} == {2.0}


def test_trained_tokens_move_and_other_rows_of_the_embedding_do_not(
    write_recipe: Callable[..., Path], tiny_model: Path
):
    path = write_recipe(lora={"trainable_token_indices": [1, 2]})
    assert launch(str(path), []) == 0
    assert main(["merge", str(path)]) == 0
    before = original(tiny_model).get_input_embeddings().weight
    merged = AutoModelForCausalLM.from_pretrained(RunDir.of("tiny").merged).get_input_embeddings().weight
    moved = (before != merged).any(dim=1).nonzero().flatten().tolist()
    assert moved == [1, 2]


def test_neftune_adds_noise_in_training_only(write_recipe: Callable[..., Path], tiny_model: Path):
    trainer = make_trainer(write_recipe(training={"neftune_noise_alpha": 5.0}))
    ids = torch.arange(10, 40)[None]
    seen = []
    begin_step = trainer.training_step

    def step(model: Any, *args: Any) -> Any:
        model.train()
        embed = model.get_input_embeddings()
        seen.append((embed(ids) - embed.weight[ids]).abs().max().item())
        return begin_step(model, *args)

    trainer.training_step = step
    trainer.train()
    bound = 5.0 / (30 * 64) ** 0.5  # alpha / sqrt(tokens x width)
    assert seen and all(0 < noise <= bound for noise in seen)
    trainer.model.eval()
    embed = trainer.model.get_input_embeddings()
    assert torch.equal(embed(ids), embed.weight[ids])


@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_the_loss_is_the_one_of_its_formula(kind: str, write_recipe: Callable[..., Path]):
    trainer = make_trainer(write_recipe(training={"loss_type": kind}))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    with torch.no_grad():
        scores = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    per_token = cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    wanted = per_token * (-per_token).exp() if kind == "dft" else per_token
    torch.testing.assert_close(loss, wanted.sum() / (labels != -100).sum(), rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_moves_every_weight_and_leaves_a_whole_model(
    write_recipe: Callable[..., Path], tiny_model: Path, capsys: pytest.CaptureFixture
):
    path = write_recipe(lora=None, merge=None, training={"bf16": False}, **WHOLE)
    assert launch(str(path), []) == 0
    assert f"make generate RECIPE={path}" in capsys.readouterr().err
    run_dir = RunDir.of("tiny")
    assert not run_dir.adapter.exists()
    before = dict(original(tiny_model).named_parameters())
    after = AutoModelForCausalLM.from_pretrained(run_dir.merged)
    assert all(not torch.equal(before[name], value) for name, value in after.named_parameters())
    assert after.config.use_cache and read_json(run_dir.parity)["passed"]
    answers = generate(load_recipe(path))
    assert set(answers["scores"]) == {"base", "merged"}
    found = status(load_recipe(path))
    assert found["gates"]["merge_parity"] is True and "merged_equals_adapter" not in found["gates"]
    assert main(["merge", str(path)]) == 2
    assert "nothing to merge" in capsys.readouterr().err
    assert launch(str(path), []) == 0  # 0 steps


def test_full_fine_tuning_of_16_bit_weights_says_what_it_loses(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    assert launch(str(write_recipe(lora=None, merge=None, model={"dtype": "bfloat16"})), []) == 0
    assert "model.dtype=float32 keeps it" in " ".join(capsys.readouterr().err.split())


def test_generate_of_an_untrained_full_run_says_how_to_train(write_recipe: Callable[..., Path], capsys: Any):
    path = write_recipe(lora=None, merge=None)
    assert main(["generate", str(path)]) == 2
    assert "no trained model yet" in capsys.readouterr().err


METHODS = sorted(path for path in (ROOT / "recipes").glob("smollm2-135m-*.yaml"))


def test_every_method_is_in_the_guide():
    guide = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert not [path.stem for path in METHODS if f"`{path.stem}`" not in guide]


def test_dora_on_loftq_starts_as_the_weight_that_loftq_makes(write_recipe: Callable[..., Path]):
    """Lengths that were measured before LoftQ would shrink or stretch every column of W_nf4 + s B A."""
    from peft.utils.integrations import dequantize_module_weight

    trainer = make_trainer(write_recipe(**TOGETHER["loftq, dora"]))
    for _, layer in layers(trainer.model):
        made = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        lengths = (dequantize_module_weight(layer.base_layer) + made).norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, lengths, rtol=1e-4, atol=1e-5)


def test_first_weights_are_given_once_by_begin(write_recipe: Callable[..., Path]):
    """A trainer that is built has them: nothing else in a run calls the initialisation again."""
    path = write_recipe(**FIRST_WEIGHTS["loftq"])
    recipe = load_recipe(path)
    trainer = make_trainer(path)
    before = [layer.lora_B["default"].weight.detach().clone() for _, layer in layers(trainer.model)]
    begin(trainer.model, recipe, choose(recipe), [])
    after = [layer.lora_B["default"].weight for _, layer in layers(trainer.model)]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(before, after, strict=True))
