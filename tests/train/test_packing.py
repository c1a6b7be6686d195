"""Packed documents do not see each other, without flash attention: the loss of one does not depend on its neighbour."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trl import SFTTrainer

from lora_recipes.data.masks import IGNORED
from lora_recipes.errors import RecipeError
from lora_recipes.recipe import load_recipe
from lora_recipes.train.session import _refuse_leaking_packing
from tests.conftest import ROOT
from tests.train.runs import make_trainer

DOCUMENTS = [list(range(3, 43)), list(range(60, 90)), list(range(100, 140))]


def packed(*documents: list[int]) -> dict[str, list[int]]:
    """A packed row as TRL's packing leaves it; every token carries loss."""
    ids = [token for document in documents for token in document]
    return {"input_ids": ids, "labels": list(ids), "seq_lengths": [len(document) for document in documents]}


def loss_of_last(
    trainer: SFTTrainer, row: dict[str, list[int]], length: int, *, ours: bool, apart: bool = True
) -> float:
    """Mean loss of the last document of a row, through the collator and the loss that training uses."""
    batch = trainer.data_collator([row])
    batch["labels"][:, :-length] = IGNORED
    if not apart:
        batch.pop("position_ids")
    compute = type(trainer).compute_loss if ours else SFTTrainer.compute_loss
    with torch.no_grad():
        return compute(trainer, trainer.model.eval(), batch).item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ours", [True, False], ids=["our loss", "TRL's loss"])
def test_the_loss_of_a_document_does_not_change_when_its_neighbour_does(
    write_recipe: Callable[..., Path], attention: str, ours: bool
):
    keys = {"model": {"attn_implementation": attention}, "training": {"packing": True}}
    trainer = make_trainer(write_recipe(**keys))
    first, other, last = DOCUMENTS
    size = len(last)
    alone = loss_of_last(trainer, packed(last), size, ours=ours)
    assert loss_of_last(trainer, packed(first, last), size, ours=ours) == pytest.approx(alone, abs=1e-5)
    assert loss_of_last(trainer, packed(other, first, last), size, ours=ours) == pytest.approx(alone, abs=1e-5)
    # The test can fail: without position ids the document sees its neighbour.
    assert loss_of_last(trainer, packed(first, last), size, ours=ours, apart=False) != pytest.approx(alone, abs=1e-3)


def test_packed_rows_hold_every_row_once_and_never_predict_across_a_border(write_recipe: Callable[..., Path]):
    trainer = make_trainer(write_recipe(training={"packing": True, "max_length": 256}))
    plain = make_trainer(write_recipe("plain"))
    rows = sorted(tuple(row["input_ids"]) for row in plain.train_dataset)
    cut = []
    for row in trainer.train_dataset:
        assert len(row["input_ids"]) <= 256
        start = 0
        for length in row["seq_lengths"]:
            cut.append(tuple(row["input_ids"][start : start + length]))
            start += length
    assert sorted(cut) == rows
    batch = trainer.data_collator([trainer.train_dataset[0]])
    borders = (batch["position_ids"][0] == 0).nonzero().flatten()
    assert len(borders) > 1 and (batch["labels"][0, borders] == IGNORED).all()


def test_length_grouped_batches_waste_less_than_mixed_ones(write_recipe: Callable[..., Path]):
    dataset = {"data_files": {"train": str(ROOT / "data" / "orders" / "heldout.jsonl")}, "eval_split": None}

    def padding(path: Path) -> int:
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in make_trainer(path).get_train_dataloader())

    grouped = padding(write_recipe("grouped", dataset=dataset, training={"train_sampling_strategy": "group_by_length"}))
    assert grouped < 0.7 * padding(write_recipe("mixed", dataset=dataset))


@pytest.mark.parametrize("model", ["lfm2", "falcon_h1", "qwen3_next"])
def test_packing_is_refused_for_models_with_a_running_state(write_recipe: Callable[..., Path], model: str):
    from transformers import AutoConfig

    config = AutoConfig.for_model(model)
    recipe = load_recipe(write_recipe(training={"packing": True}))
    with pytest.raises(RecipeError, match=r"tiny\.yaml:\d+: .* would leak into each other"):
        _refuse_leaking_packing(recipe, config)
    _refuse_leaking_packing(load_recipe(write_recipe()), config)


@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma3_text", "mistral", "phi3", "gpt_oss"])
def test_packing_is_allowed_for_models_with_attention_alone(write_recipe: Callable[..., Path], model: str):
    from transformers import AutoConfig

    _refuse_leaking_packing(load_recipe(write_recipe(training={"packing": True})), AutoConfig.for_model(model))
