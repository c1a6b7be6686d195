"""Steps on a CPU: pieces of a micro-batch and weights that are cast once change how fast a step is, never what it does."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MixtralConfig, MixtralForCausalLM

from lora_recipes.model.machine import choose
from lora_recipes.model.pieces import TOGETHER
from lora_recipes.model.precision import cast_frozen
from lora_recipes.plan import Estimate, config_of, target_for
from lora_recipes.plan.rehearsal import Rehearsal
from lora_recipes.plan.rehearsal import Step as Rehearsed
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import RunDir, read_json, read_jsonl
from lora_recipes.train import launch, trainer
from lora_recipes.train.memory import explained
from lora_recipes.train.trainer import RecipeTrainer
from tests.conftest import NF4
from tests.train.runs import make_trainer

Step = tuple[float, dict[str, torch.Tensor], dict[str, Any]]


def off_the_start(made: RecipeTrainer) -> RecipeTrainer:
    """LoRA starts with B = 0, where A has no gradient: move off that point."""
    torch.manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def one_step(made: RecipeTrainer) -> Step:
    """Loss, gradients and metrics of one micro-batch, always the same."""
    made.model.zero_grad()
    torch.manual_seed(0)
    batch = next(iter(made.get_train_dataloader()))
    loss = made.training_step(made.model_wrapped, dict(batch), torch.tensor(100))
    gradients = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    metrics = {name: list(values) for name, values in made._metrics["train"].items()}
    made._metrics["train"].clear()
    made._total_train_tokens = 0
    return loss.item(), gradients, metrics


def require_same(one: Step, other: Step) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-4, atol=1e-6)
    assert one[2]["num_tokens"] == other[2]["num_tokens"]
    assert one[2]["mean_token_accuracy"] == pytest.approx(other[2]["mean_token_accuracy"])


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_step_in_pieces_is_the_step_of_the_whole_micro_batch(
    write_recipe: Callable[..., Path],
    loss_type: str,
    packing: bool,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    keys = {"loss_type": loss_type, "packing": packing, "activation_checkpointing": checkpointing}
    monkeypatch.setitem(TOGETHER, torch.float32, 300)
    made = off_the_start(make_trainer(write_recipe(training=keys)))
    cut: list[list[dict[str, Any]]] = []
    real = trainer.pieces
    monkeypatch.setattr(trainer, "pieces", lambda *given, **named: cut.append(found := real(*given, **named)) or found)
    assert made.together == 300 and made.ends_at_head and made.fused
    ours = one_step(made)
    assert len(cut[0]) > 1  # there was something to cut
    assert any(piece["rows"].shared for piece in cut[0]) and any(len(piece["rows"].ends) > 1 for piece in cut[0])
    assert not any(piece["rows"]._floats for piece in cut[0])  # it is kept until the optimizer steps
    made.together = 0
    alone = one_step(made)
    assert len(cut[1]) > len(cut[0])
    require_same(ours, alone)
    monkeypatch.setattr(trainer, "pieces", lambda inputs, together: [inputs])
    made.ends_at_head, made.fused = False, {}
    require_same(ours, one_step(made))


def test_the_losses_of_a_run_are_those_of_the_plain_path(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """Step by step, with accumulation: TRL's own loss on padded micro-batches, and ours."""
    monkeypatch.setitem(TOGETHER, torch.float32, 300)
    keys = {"max_steps": 6, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    assert launch(str(write_recipe("pieces", training=keys)), []) == 0
    monkeypatch.setattr(RecipeTrainer, "suits_cpu_loss", lambda self: False)
    assert launch(str(write_recipe("plain", training=keys)), []) == 0
    ours, plain = (
        [row["loss"] for row in read_jsonl(RunDir.of(name).metrics) if "loss" in row] for name in ("pieces", "plain")
    )
    assert len(ours) == 6 and ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_learn_what_plain_ones_do(write_recipe: Callable[..., Path], backend: str):
    keys = {"max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1}
    compiled = keys | {"torch_compile": True, "torch_compile_backend": backend}
    assert launch(str(write_recipe("compiled", training=compiled)), []) == 0
    assert "each decoder layer" in read_json(RunDir.of("compiled").manifest)["chosen"]["torch_compile"]
    assert launch(str(write_recipe("plain", training=keys)), []) == 0
    ours, plain = (
        [row["loss"] for row in read_jsonl(RunDir.of(name).metrics) if "loss" in row] for name in ("compiled", "plain")
    )
    assert len(ours) == 4 and ours == pytest.approx(plain, rel=1e-5)
    adapters = [load_file(RunDir.of(name).adapter / "adapter_model.safetensors") for name in ("compiled", "plain")]
    assert adapters[0].keys() == adapters[1].keys()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_cast_once_give_the_numbers_of_autocast_to_the_bit(
    write_recipe: Callable[..., Path], tied: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer, "cast_frozen", lambda model: 0)
    path = write_recipe(training={"bf16": True, "use_cpu": True})

    def trained(*, cast: bool) -> list[torch.Tensor]:
        made = make_trainer(path)
        base = made.model.get_base_model()
        if tied:
            base.lm_head.weight = base.model.embed_tokens.weight
        before = sum(parameter.nbytes for parameter in base.parameters())
        saved = cast_frozen(made.model) if cast else 0
        assert saved == before - sum(parameter.nbytes for parameter in base.parameters())
        assert (base.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16) == cast
        assert (base.lm_head.weight.dtype == torch.bfloat16) == cast
        assert base.model.embed_tokens.weight.dtype == torch.float32
        made.train()
        return [parameter for parameter in made.model.parameters() if parameter.requires_grad]

    for once, anew in zip(trained(cast=True), trained(cast=False), strict=True):
        assert torch.equal(once, anew)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, None], ids=str)
def test_weights_stay_as_they_are_where_more_than_lora_is_trained(
    write_recipe: Callable[..., Path], lora: dict[str, Any] | None
):
    made = make_trainer(write_recipe(training={"bf16": True, "use_cpu": True}, lora=lora))
    assert cast_frozen(made.model) == 0
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon Platinum 8481C"}, True),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC 9654"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon Platinum 8481C"}, False),  # as a virtual machine without AMX
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC 7763"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_bf16_is_kept_on_a_cpu_that_is_fast_at_it(
    capabilities: dict[str, Any], fast: bool, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    choices = choose(load_recipe(write_recipe(training={"bf16": True}, quantization=NF4)))
    assert choices.training["bf16"] is fast
    assert (choices.quantization["bnb_4bit_compute_dtype"] == "float32") is not fast
    assert choose(load_recipe(write_recipe(training={"bf16": False}))).training["bf16"] is False


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_an_evaluation_in_pieces_is_the_evaluation_of_whole_micro_batches(
    write_recipe: Callable[..., Path], packing: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(TOGETHER, torch.float32, 300)
    made = off_the_start(make_trainer(write_recipe(training={"per_device_eval_batch_size": 5, "packing": packing})))
    cut: list[list[dict[str, Any]]] = []
    real = trainer.pieces
    monkeypatch.setattr(trainer, "pieces", lambda *given, **named: cut.append(found := real(*given, **named)) or found)
    ours = made.evaluate()
    assert max(map(len, cut)) > 1
    monkeypatch.setattr(RecipeTrainer, "suits_cpu_loss", lambda self: False)
    trls = made.evaluate()
    for name in ("eval_loss", "eval_mean_token_accuracy"):
        assert ours[name] == pytest.approx(trls[name], rel=1e-5)
    assert ours["eval_num_tokens"] == trls["eval_num_tokens"] == 0  # of training


@pytest.mark.parametrize(
    ("kind", "training", "own", "cut"),
    [
        ("llama", {}, True, True),
        ("llama", {"label_smoothing_factor": 0.1}, False, False),
        ("llama", {"neftune_noise_alpha": 5.0}, True, False),
        ("mixtral", {}, False, False),
        ("mixtral", {"router_aux_loss_coef": 0.0}, True, True),
    ],
)
def test_steps_are_cut_and_planned_alike_where_trl_adds_nothing_to_the_loss(
    write_recipe: Callable[..., Path],
    tiny_model: Path,
    workdir: Path,
    kind: str,
    training: dict[str, float],
    own: bool,
    cut: bool,
):
    name = str(tiny_model) if kind == "llama" else str(mixtral(tiny_model, workdir / "mixtral"))
    path = write_recipe(model={"pretrained_model_name_or_path": name}, training=training)
    made = make_trainer(path)
    assert made.suits_cpu_loss() is own is not (made.aux_loss_enabled or made.label_smoother is not None)
    assert made.cuts() is cut
    recipe = load_recipe(path)
    estimate = Estimate(recipe, config_of(recipe), target_for(recipe))
    assert estimate.cuts is cut and (estimate.step().loss == "positions") is own
    four, sixty = (estimate.memory(estimate.with_rows(rows)).parts["activations"] for rows in (4, 60))
    assert (sixty < 2 * four) is cut  # pieces are as large whatever the rows are


def mixtral(like: Path, folder: Path) -> Path:
    """A tiny mixture of experts with the tokenizer of another tiny model."""
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    MixtralForCausalLM(
        MixtralConfig(vocab_size=512, num_key_value_heads=1, num_local_experts=2, **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "keys",
    [
        {"lora": {"alora_invocation_tokens": [7, 8]}},  # it looks for the last invocation of a sequence
        {"training": {"torch_compile": True, "torch_compile_backend": "eager"}},
        {"training": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"selective": True}}},
    ],
    ids=["aLoRA", "compiled", "selective"],
)
def test_rows_are_computed_one_after_the_other_where_a_setting_needs_it(
    write_recipe: Callable[..., Path], keys: dict[str, Any]
):
    path = write_recipe(**keys)
    assert load_recipe(path).get("training.per_device_train_batch_size") > 1
    made = make_trainer(path)
    assert made.cuts() and not made.together
    step = Estimate(recipe := load_recipe(path), config_of(recipe), target_for(recipe)).step()
    assert (step.flat, step.rows, step.length) == (0, 1, recipe.get("training.max_length"))


def test_an_evaluation_that_runs_out_of_memory_is_told_as_any_batch(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe())
    for shape in ((4, 160), (1, 300)):
        told = str(explained(MemoryError("no room"), recipe, shape, 3))
        assert f"{shape[0]} row" in told and "Planned for this batch" in told


def test_room_for_scores_is_planned_once_however_many_layers_need_more_than_the_first():
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "head_dim": 8}
    peaks = []
    for layers in (4, 16):
        config = Gemma3TextConfig(
            num_key_value_heads=4, num_hidden_layers=layers, sliding_window=16, sliding_window_pattern=2, **sizes
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        peaks.append(Rehearsal(model).peak(Rehearsed(1, 1024, flat=1024)).step)
    room = 4 * 4 * sizes["num_attention_heads"] * 96 * 1024  # four blocks of scores
    assert peaks[0] > room and peaks[1] - peaks[0] < room
