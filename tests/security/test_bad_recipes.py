"""Bad recipes: each ends with the right exit code and a message that names what is wrong."""

from pathlib import Path
from typing import Any

import pytest

from lora_recipes.errors import EXIT_REFUSED, EXIT_USER
from lora_recipes.model.build import model_config, refusals_of
from lora_recipes.model.machine import choose
from lora_recipes.model.sound import require_positions
from lora_recipes.model.source import locate
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import RunDir
from lora_recipes.train.trainer import training_arguments
from tests.security.bad_inputs import Case, Run, loaded, parametrized, require_outcome
from tests.security.hostile import BOMB, Maker


def text(written: str) -> Run:
    return lambda maker: load_recipe(maker.text("r", written))


def keys(**sections: dict[str, Any]) -> Run:
    return lambda maker: load_recipe(maker.recipe("r", **sections))


def named(name: str) -> Run:
    return lambda maker: load_recipe(maker.folder / f"{name}.yaml")


def rows_of(longest: int, max_length: int = 2048) -> Run:
    """Rows of up to so many tokens, for a model of 512 positions."""

    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", training={"max_length": max_length}))
        require_positions(read, model_config(read, locate(read)), longest, read.get("training.max_length"))

    return run


def arguments(training: dict[str, Any]) -> Run:
    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", training=training))
        with refusals_of(read, "training"):
            training_arguments(choose(read).training, RunDir.of("r"))

    return run


M = "model: {pretrained_model_name_or_path: x}\n"
RECIPES: list[Case] = [
    ("R1", keys(training={"learning_rat": 1}), EXIT_USER, "did you mean `learning_rate`"),
    ("R2", text(f"{M}training:\n  seed: 1\n  seed: 2\n"), EXIT_USER, "already set in line 3"),
    ("R4", keys(training={"seed": "012"}), EXIT_USER, "the text '012'"),
    ("R4", text(f"{M}training: {{bf16: no}}\n"), EXIT_USER, "write true or false"),
    ("R4", text(f"{M}training: {{seed: 12:30}}\n"), EXIT_USER, "'12:30'"),
    ("R5", text("model:\n\ta: 1\n"), EXIT_USER, "a tab stands here"),
    ("R5", text("model:\n  a: 1\n b: 2\n"), EXIT_USER, "^"),
    ("R5", text(""), EXIT_USER, "the recipe is empty"),
    ("R5", text("- a\n"), EXIT_USER, "a recipe must be a mapping"),
    ("R6", text("model: !!python/object/apply:os.system [x]\n"), EXIT_REFUSED, "tag"),
    ("R6", text(BOMB), EXIT_REFUSED, "alias"),
    ("R6", text("#" * 1_000_001), EXIT_REFUSED, "1,000,001 bytes"),
    ("R7", text(f"{M}training: {{learning_rate: .nan}}\n"), EXIT_USER, "a finite number"),
    ("R7", keys(training={"learning_rate": -1}), EXIT_USER, "learning_rate"),
    ("R7", keys(training={"per_device_train_batch_size": 0}), EXIT_USER, "at least 1"),
    ("R7", keys(lora={"r": 10**9}), EXIT_USER, "at most 1024"),
    ("R7", keys(training={"max_steps": 10**22}), EXIT_USER, "max_steps"),
    ("R7", keys(training={"dataloader_prefetch_factor": 0}), EXIT_USER, "dataloader_prefetch_factor"),
    ("R7", keys(merge={"max_shard_size": "foo"}), EXIT_USER, "max_shard_size"),
    ("R7", keys(merge={"max_shard_size": "-5GB"}), EXIT_USER, "max_shard_size"),
    ("R7", keys(merge={"max_shard_size": "1.5 GiB"}), EXIT_USER, "max_shard_size"),
    ("R7", keys(merge={"max_shard_size": "0GB"}), EXIT_USER, "max_shard_size"),
    ("R7", keys(merge={"max_shard_size": "1" + 400 * "0" + "GB"}), EXIT_USER, "max_shard_size"),
    *(("R7", keys(merge={"max_shard_size": size}), 0, "") for size in ("5GB", "1.5 GB", "500mb", 10**6)),
    ("R8", arguments({"lr_scheduler_kwargs": {"a": 1}}), EXIT_USER, "`training` is refused by trl.SFTConfig"),
    *(
        ("R8", keys(training={"metric_for_best_model": name}), EXIT_USER, "which no evaluation measures")
        for name in ("zzz", "tiny_loss", "train_loss", "entropy")
    ),
    *(
        ("R8", keys(training={"metric_for_best_model": name, "eval_strategy": "no"}), 0, "")
        for name in ("loss", "eval_mean_token_accuracy")
    ),
    ("R8", keys(training={"fp16": True, "bf16": True}), EXIT_USER, "fp16"),
    (
        "R8",
        lambda maker: load_recipe(maker.recipe("r", quantization={"load_in_4bit": True}), ["lora=null"]),
        EXIT_USER,
        "quantization",
    ),
    ("R8", rows_of(513), EXIT_USER, "a row has 513 tokens with this `training.max_length`, and `model` has 512 pos"),
    ("R8", rows_of(512), 0, ""),
    ("R8", rows_of(9000, max_length=512), 0, ""),
    ("R8", keys(training={"max_steps": 0}), EXIT_USER, "takes for no limit"),
    ("R9", keys(generation={"prompts": ["sk-" + "a" * 40]}), EXIT_REFUSED, "its value is not shown"),
    ("R9", keys(training={"hub_token": "anything"}), EXIT_REFUSED, "its value is not shown"),
    ("R10", named("a b"), EXIT_USER, "run folder"),
    ("R10", named("..x"), EXIT_USER, "run folder"),
    ("R10", named("~x"), EXIT_USER, "run folder"),
    ("R10", named("a" * 300), EXIT_USER, "run folder"),
    ("R10", named("a\0b"), EXIT_USER, "run folder"),
    ("R10", named("con"), EXIT_USER, "run folder"),
    ("R12", lambda maker: loaded(maker.recipe("r", Path("not/there/at/all"))), EXIT_USER, "no folder"),
    ("R12", keys(dataset={"data_files": {}}), EXIT_USER, "data_files"),
]
HUGE = 10**39  # more than any setting takes; a number of more digits is not read
BEYOND = [
    (keys(lora={"lora_alpha": HUGE}), "lora_alpha"),
    (keys(lora={"lora_alpha": int("9" * 400)}), "more than 40 digits"),
    (keys(lora={"lora_alpha": 10**7}), "at most 1000000"),
    (keys(lora={"rank_pattern": {"q_proj": 0}}), "at least 1"),
    (keys(lora={"rank_pattern": {"q_proj": 1025}}), "at most 1024"),
    (keys(lora={"rank_pattern": {"q_proj": 2.5}}), "an integer"),
    (keys(lora={"alpha_pattern": {"q_proj": 0}}), "more than 0"),
    (keys(lora={"alpha_pattern": {"q_proj": -1}}), "more than 0"),
    (keys(lora={"alpha_pattern": {"q_proj": 10**7}}), "at most 1000000"),
    (keys(lora={"layer_replication": [[0, -1]]}), "at least 0"),
    (keys(lora={"layer_replication": [[0, 1, 2]]}), "layer_replication"),
    (keys(lora={"layer_replication": [[0, HUGE]]}), "so large a number"),
    (keys(lora={"init_lora_weights": "pissa_niter_99999999999"}), "init_lora_weights"),
    (keys(dataset={"weight": 1e300}), "at most 1000000"),
    (keys(training={"warmup_steps": int("9" * 400)}), "more than 40 digits"),
    (keys(training={"warmup_steps": HUGE}), "so large a number"),
    (keys(training={"max_grad_norm": HUGE}), "so large a number"),
    (keys(training={"seed": 2**32}), "at most 4294967295"),
    (keys(training={"data_seed": 2**32}), "at most 4294967295"),
    (keys(training={"max_length": 10**18}), "at most 100000000"),
    (keys(training={"num_train_epochs": 1e308}), "at most 1000000"),
    (keys(training={"per_device_train_batch_size": 10**18}), "at most 1000000"),
    (keys(training={"gradient_accumulation_steps": 10**18}), "at most 1000000"),
    (keys(training={"pad_to_multiple_of": 0}), "at least 1"),
    (keys(training={"pad_to_multiple_of": "many"}), "pad_to_multiple_of"),
    (keys(training={"dataloader_num_workers": 10_000}), "at most 1024"),
    (keys(training={"dataset_num_proc": 10**6}), "at most 1024"),
    (keys(training={"dataloader_prefetch_factor": 10**9, "dataloader_num_workers": 1}), "at most 10000"),
    (keys(training={"neftune_noise_alpha": 1e300}), "at most 10000"),
    (keys(training={"weight_decay": 1e300}), "at most 10000"),
    (keys(training={"ddp_timeout": 10**18}), "at most 100000000"),
    (keys(training={"include_num_input_tokens_seen": "nope"}), "one of all, non_padding, no"),
    (keys(training={"eos_token": ""}), "must not be empty"),
    (keys(training={"chat_template_path": ""}), "must not be empty"),
    (keys(generation={"temperature": int("9" * 400)}), "more than 40 digits"),
    (keys(generation={"max_new_tokens": HUGE}), "max_new_tokens"),
    (keys(generation={"min_p": 1.5}), "at most 1"),
    (keys(generation={"eos_token_id": -1}), "at least 0"),
    (keys(generation={"eos_token_id": [2, -1]}), "at least 0"),
    (lambda maker: load_recipe(maker.recipe("r"), ["training.run_name=\udcff"]), "is not UTF-8 text"),
    (lambda maker: load_recipe(maker.recipe("r"), [f"training.{'d.' * 3000}e=1"]), "more than 40 deep"),
    (lambda maker: load_recipe(maker.text("r", f"extends: {'a/' * 3000}b\n{M}")), "a file that does not exist"),
]
RECIPES += [("R7", run, EXIT_USER, said) for run, said in BEYOND]
RECIPES += [
    ("R7", keys(**sections), 0, "")
    for sections in (
        {
            "lora": {
                "rank_pattern": {"q_proj": 8},
                "alpha_pattern": {"q_proj": 0.5},
                "layer_replication": [[0, 2], [1, 2]],
            }
        },
        {"lora": {"init_lora_weights": "pissa_niter_16"}},
        {
            "training": {
                "pad_to_multiple_of": "auto",
                "seed": 2**32 - 1,
                "save_total_limit": 10**9,
                "save_steps": 10**12,
            }
        },
        {"training": {"pad_to_multiple_of": None, "include_num_input_tokens_seen": True, "max_length": None}},
        {"training": {"include_num_input_tokens_seen": "non_padding", "eos_token": None, "chat_template_path": None}},
        {"generation": {"eos_token_id": [0, 2], "min_new_tokens": 1, "max_new_tokens": 4, "max_rows": None}},
        {"generation": {"max_new_tokens": 4, "do_sample": True, "min_p": 0.05, "typical_p": 1.0, "top_h": 0.4}},
        {"checks": {"prompts": [{"prompt": "a", "max_new_tokens": 4, "json": {"maximum": 2**64}}]}},
    )
]


@parametrized(RECIPES)
def test_a_bad_recipe_ends_with_its_code_and_says_what_is_wrong(maker: Maker, run: Run, code: int, said: str):
    require_outcome(lambda: run(maker), code, said)


@pytest.mark.promise("R3")
def test_numbers_are_read_as_in_yaml_1_2(maker: Maker):
    """R3"""
    recipe = load_recipe(maker.text("r", maker.recipe("r").read_text().replace("0.01", "1e-4")))
    assert recipe.get("training.learning_rate") == 1e-4
