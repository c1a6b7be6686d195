"""Bad recipes, base models and adapters: each ends with the right exit code and a message that names what is wrong."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_recipes.audit import audited
from lora_recipes.data.audit import require_sound
from lora_recipes.errors import EXIT_BUG, EXIT_REFUSED, EXIT_USER, LoraRecipesError
from lora_recipes.model.adapted import attach_adapter, check_adapter, require_change
from lora_recipes.model.adapters import combine
from lora_recipes.model.build import end_token_ids, load_base, load_tokenizer, meta_model, model_config, refusals_of
from lora_recipes.model.identity import base_of, require_base, write_provenance
from lora_recipes.model.machine import choose
from lora_recipes.model.sound import require_positions, require_vocabulary
from lora_recipes.model.source import locate
from lora_recipes.model.targets import find_targets
from lora_recipes.model.trial import tried_generation
from lora_recipes.model.weights import read_entries
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import RunDir
from lora_recipes.train.trainer import training_arguments
from tests.security.hostile import BOMB, KEY, OPEN, SAID, Maker, _index, _linked_shard, _pickles, _torn


@pytest.fixture
def maker(workdir: Path, tiny_model: Path, tiny_data: dict[str, str]) -> Maker:
    return Maker(workdir, tiny_model, tiny_data)


def outcome(run: Callable[[], Any]) -> tuple[int, str]:
    try:
        run()
    except LoraRecipesError as error:
        return error.exit_code, str(error)
    except Exception as error:
        return EXIT_BUG, repr(error)
    return 0, ""


def loaded(recipe: Path) -> Any:
    """As training does, up to the adapter."""
    read = load_recipe(recipe)
    source = locate(read)
    require_vocabulary(read, model_config(read, source), load_tokenizer(read, source))
    find_targets(read, model_config(read, source))
    return load_base(read, source, choose(read))


def text(written: str) -> Callable[[Maker], Any]:
    return lambda maker: load_recipe(maker.text("r", written))


def keys(**sections: dict[str, Any]) -> Callable[[Maker], Any]:
    return lambda maker: load_recipe(maker.recipe("r", **sections))


def named(name: str) -> Callable[[Maker], Any]:
    return lambda maker: load_recipe(maker.folder / f"{name}.yaml")


def model(make: Callable[[Maker, str], Path], **sections: dict[str, Any]) -> Callable[[Maker], Any]:
    return lambda maker: loaded(maker.recipe("r", make(maker, "m"), **sections))


def rows_of(longest: int, max_length: int = 2048) -> Callable[[Maker], Any]:
    """Rows of up to so many tokens, for a model of 512 positions."""

    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", training={"max_length": max_length}))
        require_positions(read, model_config(read, locate(read)), longest, read.get("training.max_length"))

    return run


def config(**values: Any) -> Callable[[Maker], Any]:
    return model(lambda maker, name: maker.model(name, values))


def adapter(rank: int = 4, **values: Any) -> Callable[[Maker], Any]:
    return lambda maker: check_adapter(maker.adapter("a", rank, **values))


def arguments(training: dict[str, Any]) -> Callable[[Maker], Any]:
    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", training=training))
        with refusals_of(read, "training"):
            training_arguments(choose(read).training, RunDir.of("r"))

    return run


def answering(**generation: Any) -> Callable[[Maker], Any]:
    """As `train`, `generate` and `chat` try the section before they load any weight."""

    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", generation=generation))
        source, before = locate(read), torch.get_rng_state()
        try:
            tried_generation(read, model_config(read, source), [2], load_tokenizer(read, source))
        finally:
            assert torch.equal(torch.get_rng_state(), before)

    return run


M = "model: {pretrained_model_name_or_path: x}\n"

SAMPLED = {"do_sample": True}
UNANSWERABLE: list[tuple[dict[str, Any], str]] = [
    ({"stop_strings": []}, "`generation.stop_strings` is '[]'"),
    ({"stop_strings": ""}, "`generation.stop_strings` is ''"),
    ({"stop_strings": [""]}, "none of them empty"),
    ({"stop_strings": [5]}, "`generation.stop_strings` is '[5]'"),
    ({"eos_token_id": ["x"]}, "must be an integer"),
    ({"eos_token_id": [None]}, "must be an integer"),
    ({"bad_words_ids": []}, "`bad_words_ids` has to be a non-empty list"),
    ({"bad_words_ids": [["x"]]}, "`bad_words_ids`"),
    ({"bad_words_ids": [[10**9]]}, "vocabulary size"),
    ({"sequence_bias": {}}, "`sequence_bias` has to be"),
    ({"suppress_tokens": ["x"]}, "`generation` is refused"),
    ({"cache_implementation": "nope"}, "Invalid `cache_implementation` (nope)"),
    ({"watermarking_config": {"x": 1}}, "WatermarkingConfig"),
    ({"early_stopping": "x"}, "`early_stopping` must be"),
    (SAMPLED | {"min_p": 2.0}, "`generation.min_p` must be at most 1"),
    (SAMPLED | {"top_h": 5.0}, "`generation.top_h` must be at most 1"),
    ({"forced_eos_token_id": 10**9}, "out of bounds"),
    ({"exponential_decay_length_penalty": 5}, "TypeError"),
    ({"exponential_decay_length_penalty": [1]}, "IndexError"),
    (SAMPLED | {"temperature": 1e-300}, "probability tensor"),
]
ANSWERABLE: list[dict[str, Any]] = [
    {},
    SAMPLED | {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05},
    SAMPLED | {"typical_p": 0.9, "top_h": 0.4},
    {"num_beams": 4, "early_stopping": True, "length_penalty": 0.8},
    {"stop_strings": ["\n\n", "Human:"], "max_time": 30.0},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 8},
    {"cache_implementation": "static"},
    {"guidance_scale": 1.5, "suppress_tokens": [5], "bad_words_ids": [[6, 7]], "eos_token_id": [2, 3]},
    {"renormalize_logits": True, "watermarking_config": {"greenlist_ratio": 0.25}},
]

RECIPES = [
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
    *(("R8", answering(**keys), EXIT_USER, said) for keys, said in UNANSWERABLE),
    *(("R8", answering(**keys), 0, "") for keys in ANSWERABLE),
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


def _shard_gone(maker: Maker, name: str) -> Path:
    return _index(maker, name, "gone.safetensors")


def _wrong_index(maker: Maker, name: str) -> Path:
    folder = _index(maker, name, "real.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.extra"] = "real.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _changed(change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Callable[[Maker, str], Path]:
    def make(maker: Maker, name: str) -> Path:
        folder = maker.model(name, config)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def _tokenizer(**changes: Any) -> Callable[[Maker, str], Path]:
    def make(maker: Maker, name: str) -> Path:
        folder = maker.model(name)
        values = json.loads((folder / "tokenizer_config.json").read_text())
        values = {key: value for key, value in (values | changes).items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
        if "chat_template" in changes:
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        return folder

    return make


def _vocabulary(change: Callable[[dict[str, Any]], Any]) -> Callable[[Maker, str], Path]:
    def make(maker: Maker, name: str) -> Path:
        file = maker.model(name) / "tokenizer.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))
        return file.parent

    return make


def _replacing(pattern: str, content: str, times: int) -> dict[str, Any]:
    one = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    return {"type": "Sequence", "normalizers": [one] * times}


METASPACE = {  # as Llama 2 has it
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
IN_4_BIT, IN_8_BIT = ({"quant_method": "bitsandbytes", f"load_in_{bits}bit": True} for bits in (4, 8))
SPLIT = {"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated", "invert": False}


def templated(template: str) -> Callable[[Maker], Any]:
    """Rows of a model with this chat template."""

    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", maker.model("m", chat_template__jinja=template)))
        require_sound(audited(read)[1])

    return run


def _on_disk(maker: Maker, name: str) -> Path:
    """A base that bitsandbytes has quantized, and saved."""
    folder = maker.model(name)
    AutoModelForCausalLM.from_pretrained(
        maker.tiny, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    ).save_pretrained(folder)
    return folder


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(torch.int8)


def _bare(tensors: dict[str, torch.Tensor]) -> None:
    """As a model without its head is saved."""
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def _dead_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if "layers.1." in name:
            tensor.zero_()


def _header(**changes: Any) -> Callable[[Maker, str], Path]:
    """Another entry of one weight in the header of the weight file, whose length is that of the true one."""

    def make(maker: Maker, name: str) -> Path:
        file = maker.model(name) / "model.safetensors"
        begin, entries = read_entries(file)
        values = file.read_bytes()[begin:]
        entries["model.norm.weight"] |= changes
        header = json.dumps(entries).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + values)
        return file.parent

    return make


def positions(most: Any) -> Callable[[Maker], Any]:
    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", maker.model("m", {"max_position_embeddings": most})))
        require_positions(read, model_config(read, locate(read)), 100, None)

    return run


def ends(generation: dict[str, Any]) -> Callable[[Maker], Any]:
    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", maker.model("m", generation_config__json=json.dumps(generation))))
        end_token_ids(read, locate(read), load_tokenizer(read, locate(read)))

    return run


MODELS = [
    ("M1", model(_pickles), EXIT_REFUSED, "--allow-pickle"),
    ("M2", model(_torn), EXIT_REFUSED, "bytes long, where its header says"),
    ("M2", model(_shard_gone), EXIT_REFUSED, "names gone.safetensors, which is not there"),
    ("M2", model(_wrong_index), EXIT_REFUSED, "model.layers.9.extra is not in real.safetensors"),
    ("M2", model(_header()), 0, ""),
    ("M2", model(_header(shape=[32])), EXIT_REFUSED, "model.safetensors: cannot be read"),
    ("M2", model(_header(shape=[-64])), EXIT_REFUSED, "model.norm.weight has the shape [-64]"),
    ("M2", model(_header(shape=[6.4])), EXIT_REFUSED, "model.norm.weight has the shape [6.4]"),
    ("M2", model(_header(dtype="F64")), EXIT_REFUSED, "where its shape and type (F64) would have it"),
    ("M2", model(_header(dtype="NOPE")), EXIT_REFUSED, "'NOPE'"),
    ("M2", model(_header(data_offsets=[0, 256])), EXIT_REFUSED, "model.safetensors: cannot be read"),
    ("M3", model(lambda maker, name: _index(maker, name, "../x.safetensors")), EXIT_REFUSED, "outside of this folder"),
    ("M3", model(_linked_shard), EXIT_REFUSED, "outside of this folder"),
    ("M4", config(auto_map={"AutoConfig": "evil.Evil"}), EXIT_REFUSED, "`auto_map` names 'evil.Evil'"),
    ("M4", config(_attn_implementation="evil/kernel"), EXIT_REFUSED, "`_attn_implementation: evil/kernel`"),
    ("M5", model(_tokenizer(eos_token=None)), EXIT_USER, "training.eos_token"),
    ("M6", model(lambda maker, name: maker.model(name), training={}), 0, ""),
    ("M6", config(vocab_size=300), EXIT_USER, "has 300 embeddings"),
    ("M7", model(_changed(lambda t: t["model.norm.weight"].fill_(float("nan")))), EXIT_REFUSED, "model.norm.weight"),
    ("M7", model(_changed(lambda t: t["model.norm.weight"].fill_(float("inf")))), EXIT_REFUSED, "model.norm.weight"),
    ("M2", config(vocab_size=600), EXIT_REFUSED, "other shapes than config.json says"),
    ("M2", config(num_hidden_layers=3), EXIT_REFUSED, "are in none of its files"),
    ("M2", config(num_hidden_layers=1), EXIT_REFUSED, "1 more layers than config.json says (model.layers.1)"),
    ("M2", model(_changed(_bare, num_hidden_layers=1)), EXIT_REFUSED, "1 more layers than config.json says (layers.1)"),
    ("M2", model(_changed(_bare)), 0, ""),
    ("M2", model(_changed(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))), 0, ""),
    ("M2", model(_changed(lambda t: t.update({"vision_tower.layers.9.fc.weight": torch.ones(8, 8)}))), 0, ""),
    ("M2", config(num_labels=10**9), EXIT_REFUSED, "`num_labels` is 1000000000, more than any model has"),
    ("M2", config(rms_norm_eps=math.inf), EXIT_REFUSED, "`rms_norm_eps` is inf, no finite number"),
    ("M2", config(rms_norm_eps={"__float__": "NaN"}), EXIT_REFUSED, "no finite number"),
    ("M2", config(time_step_limit=[0.0, math.inf]), 0, ""),
    ("M2", config(rope_theta=0), EXIT_REFUSED, "`rope_theta` is 0, and positions are turned by a number above 0"),
    ("M2", config(rope_theta="x"), EXIT_REFUSED, "`rope_theta` is x"),
    ("M2", config(rope_scaling={"type": "linear", "factor": -1}), EXIT_REFUSED, "`rope_scaling.factor` is -1"),
    ("M2", config(rope_parameters={"rope_type": "default", "factor": 1e308}), EXIT_REFUSED, "stretches its positions"),
    ("M2", config(hidden_size=-64), EXIT_REFUSED, "`hidden_size` is -64, and a size lies between 0 and 1,000,000"),
    ("M2", config(hidden_size=10**12), EXIT_REFUSED, "`hidden_size` is 1000000000000"),
    ("M2", config(attention_dropout=5), EXIT_REFUSED, "`attention_dropout` is 5, and a share lies between 0 and 1"),
    ("M2", config(return_dict=False), EXIT_REFUSED, "remove the entry"),
    ("M8", config(model_type="bert"), EXIT_USER, "bert is no causal language model of text alone"),
    ("M8", config(model_type="roberta"), EXIT_USER, "roberta is no causal language model"),
    ("M8", config(model_type="t5", architectures=["T5Model"]), EXIT_USER, "t5"),
    ("M8", config(model_type="whisper"), EXIT_USER, "Known to work: "),
    ("M8", config(model_type="llava"), EXIT_USER, "llava is no causal language model of text alone"),
    ("M8", config(model_type="qwen2_5_vl"), EXIT_USER, "qwen2_5_vl is no causal language model"),
    ("M8", config(model_type="gemma3"), EXIT_USER, "gemma3_text"),
    ("M8", config(model_type="mixtral"), EXIT_REFUSED, "mlp.experts"),  # experts can be trained; these are not there
    ("M8", config(model_type="clip", architectures=["CLIPModel"]), EXIT_USER, "no causal language model"),
    ("M8", config(model_type="nobody_knows"), EXIT_USER, "nobody_knows"),
    ("M8", config(hidden_size="64"), EXIT_USER, "hidden_size"),
    ("M8", config(num_attention_heads=0), EXIT_USER, "ZeroDivisionError"),
    ("M8", config(model_type=["llama"]), EXIT_USER, "`model` is refused"),
    ("M8", config(dtype="int8"), EXIT_USER, "no model can be made of it: ValueError: LlamaForCausalLM cannot be"),
    ("M8", config(dtype="complex64"), EXIT_USER, "no model can be made of it: ValueError"),
    ("M8", config(attn_implementation="nope"), EXIT_USER, '`attn_implementation="nope"` is not supported'),
    ("M8", config(quantization_config={"quant_method": "evil"}), EXIT_USER, "'evil', which transformers does not know"),
    (
        "M8",
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        EXIT_USER,
        "Loading a GPTQ quantized model",
    ),
    ("M8", model(_on_disk), 0, ""),
    ("M8", config(quantization_config=IN_4_BIT), EXIT_USER, "and they are not (model.layers.0."),
    ("M8", config(quantization_config=IN_8_BIT), EXIT_USER, "and they are not (model.layers.0."),
    ("M8", positions("x"), EXIT_USER, "max_position_embeddings"),
    ("M5", model(_tokenizer(eos_token=5)), EXIT_USER, "`model` is refused"),
    ("M5", model(_tokenizer(chat_template=5)), EXIT_USER, "chat template of this tokenizer is '5'"),
    (
        "M5",
        model(_tokenizer(chat_template=[{"name": "default", "template": 5}])),
        EXIT_USER,
        "chat template of this tok",
    ),
    ("M5", model(_tokenizer(model_max_length="x")), EXIT_USER, "`model_max_length` is 'x', no number"),
    ("M5", model(_vocabulary(lambda v: v["model"]["vocab"].update(zzz=-1))), EXIT_USER, "integer `-1`, expected u32"),
    ("M5", model(_vocabulary(lambda v: v["model"].update(merges=[["nope", "x"]]))), EXIT_USER, "Token `nope`"),
    ("M5", model(_vocabulary(lambda v: v["model"].update(type="Evil"))), EXIT_USER, "`model` is refused by"),
    ("M5", model(_vocabulary(lambda v: v.update(pre_tokenizer=SPLIT))), EXIT_USER, "Oniguruma error"),
    ("M5", model(_vocabulary(lambda v: v.update(normalizer=_replacing(".", "x" * 20, 6)))), EXIT_REFUSED, "64,000,000"),
    (
        "M5",
        model(_vocabulary(lambda v: v.update(pre_tokenizer=_replacing("", "x", 20)))),
        EXIT_REFUSED,
        "make a text up",
    ),
    ("M5", model(_vocabulary(lambda v: v.update(normalizer=METASPACE))), 0, ""),
    (
        "M5",
        templated("{% if %}"),
        EXIT_USER,
        "r.yaml:1: the chat template (the model's own) cannot be read, line 1: Expected",
    ),
    ("M5", templated("{{ 1/0 }}" + SAID + OPEN), EXIT_USER, "refuses the conversation: division by zero"),
    ("M5", templated("{% for i in range(10**12) %}{% endfor %}" + SAID), EXIT_USER, "refuses the conversation: "),
    ("M5", ends({"eos_token_id": "x"}), EXIT_USER, "`eos_token_id` holds 'x'"),
    ("M5", ends({"eos_token_id": [[2]]}), EXIT_USER, "`eos_token_id` holds '[2]'"),
    ("M7", model(_changed(_integers)), EXIT_REFUSED, "every matrix of"),
    ("M7", model(_changed(_dead_layer)), EXIT_REFUSED, "(model.layers.1)"),
    ("M9", model(lambda maker, name: maker.adapter(name)), EXIT_REFUSED, "is an adapter, not a model"),
]


def _other_base(maker: Maker) -> None:
    """The same shape, another weight."""
    own, other = (
        load_recipe(maker.recipe("a", maker.model("own"))),
        load_recipe(
            maker.recipe("b", _changed(lambda tensors: tensors["model.norm.weight"].fill_(2.0))(maker, "other"))
        ),
    )
    folder = maker.adapter("of-own")
    write_provenance(folder, base_of(own, locate(own)))
    assert require_base(folder, base_of(own, locate(own)), force=False) is None
    require_base(folder, base_of(other, locate(other)), force=False)


def _attached(change: Callable[[dict[str, torch.Tensor]], Any], **values: Any) -> Callable[[Maker], Any]:
    def run(maker: Maker) -> None:
        folder = maker.adapter("a", **values)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        attach_adapter(loaded(maker.recipe("r", maker.model("m"))), folder)

    return run


def _attaching(**values: Any) -> Callable[[Maker], Any]:
    return lambda maker: attach_adapter(loaded(maker.recipe("r", maker.model("m"))), maker.adapter("a", **values))


def combining(change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **values: Any) -> Callable[[Maker], Any]:
    """Another's adapter and one's own."""

    def run(maker: Maker) -> None:
        folder, read = maker.adapter("evil", **values), load_recipe(maker.recipe("r"))
        tensors = load_file(folder / "adapter_model.safetensors")
        if change is not None:
            change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        parts = {"evil": (folder, 0.5), "own": (maker.adapter("own", layers_to_transform=[0]), 0.5)}
        combine(meta_model(model_config(read, locate(read)), read), parts, "svd", maker.folder / "combined")

    return run


def _of(kind: torch.dtype) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({KEY.format("A"): torch.ones(4, 64).to(kind)})


def targeting(lora: dict[str, Any]) -> Callable[[Maker], Any]:
    def run(maker: Maker) -> None:
        read = load_recipe(maker.recipe("r", lora=lora))
        find_targets(read, model_config(read, locate(read)))

    return run


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.format("A").replace("q_proj", "x_proj")] = tensors.pop(KEY.format("A"))


def _untrained(maker: Maker) -> None:
    folder = maker.adapter("a")
    save_file(
        {KEY.format("A"): torch.ones(4, 64), KEY.format("B"): torch.zeros(64, 4)}, folder / "adapter_model.safetensors"
    )
    require_change(folder)


ADAPTERS = [
    ("A1", _other_base, EXIT_REFUSED, "--force"),
    ("A2", adapter(rank=8), EXIT_REFUSED, "rank 8, its config says r = 4"),
    (
        "A2",
        _attached(lambda t: t.update({KEY.format("A"): torch.ones(4, 63)})),
        EXIT_REFUSED,
        "not an adapter of this model",
    ),
    ("A3", _attached(lambda t: t.pop(KEY.format("B"))), EXIT_REFUSED, "keys are missing"),
    ("A3", _attached(_renamed), EXIT_REFUSED, "x_proj"),
    ("A4", adapter(peft_version="99.0", new=1), EXIT_USER, "upgrade PEFT"),
    ("A4", adapter(peft_type="EVIL"), EXIT_USER, "`peft_type` is 'EVIL'"),
    ("A4", adapter(unknown=1), EXIT_REFUSED, "is no field of peft.LoraConfig"),
    ("A5", lambda maker: loaded(maker.recipe("r", lora={"target_modules": ["nothing"]})), EXIT_USER, "q_proj"),
    ("A5", targeting({"target_modules": "((("}), EXIT_USER, "is no pattern"),
    ("A5", targeting({"target_modules": "(.+)+!"}), EXIT_USER, "takes more than"),
    ("A5", targeting({"rank_pattern": {"(.+)+!": 4}}), EXIT_USER, "takes more than"),
    ("A5", targeting({"trainable_token_indices": [10**11]}), EXIT_USER, "the model has embeddings of 0 to"),
    ("A4", adapter(peft_version="9" * 5000, new=1), EXIT_USER, "upgrade PEFT"),
    ("A4", adapter(task_type="EVIL"), EXIT_REFUSED, "`task_type` is 'EVIL'"),
    ("A4", adapter(task_type="SEQ_CLS"), EXIT_REFUSED, "recipes train CAUSAL_LM"),
    ("A4", adapter(layer_replication=[[0, math.nan]]), EXIT_REFUSED, "`layer_replication`"),
    ("A4", adapter(layer_replication=[[5, 0]]), EXIT_REFUSED, "`layer_replication`"),
    ("A4", adapter(modules_to_save=5), EXIT_REFUSED, "`modules_to_save` is 5"),
    ("A4", adapter(target_modules=5), EXIT_REFUSED, "`target_modules` is 5"),
    ("A4", adapter(exclude_modules=5), EXIT_REFUSED, "`exclude_modules` is 5"),
    ("A4", adapter(init_lora_weights="evil"), EXIT_REFUSED, "`init_lora_weights` is 'evil'"),
    ("A4", adapter(layers_to_transform="x"), EXIT_REFUSED, "`layers_to_transform` is 'x'"),
    ("A3", _attaching(modules_to_save=["lm_head"]), EXIT_REFUSED, "not an adapter of this model"),
    ("A2", _attaching(rank_pattern={"q_proj": 8}), EXIT_REFUSED, "size mismatch"),
    ("A4", _attaching(trainable_token_indices=[10**12]), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", _attaching(layers_pattern=["((("]), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", _attaching(arrow_config={"x": 1}), EXIT_REFUSED, "adapter"),
    ("A4", adapter(lora_alpha=10**400), EXIT_REFUSED, "`'lora_alpha'` is 1000"),
    ("A4", adapter(alpha_pattern=5), EXIT_REFUSED, "`alpha_pattern` is 5"),
    ("A4", adapter(rank_pattern=[4]), EXIT_REFUSED, "`rank_pattern` is [4]"),
    ("A4", adapter(rank_pattern={}, alpha_pattern=None), 0, ""),
    ("A2", _attached(_of(torch.int8)), EXIT_REFUSED, "is of type I8, and an adapter holds floats"),
    ("A2", _attached(_of(torch.bool)), EXIT_REFUSED, "is of type BOOL"),
    ("A2", _attached(_of(torch.complex64)), EXIT_REFUSED, "is of type C64"),
    ("A2", _attached(_of(torch.float8_e4m3fn)), EXIT_REFUSED, "is of type F8_E4M3"),
    ("A2", _attached(_of(torch.bfloat16), layers_to_transform=[0]), 0, ""),
    ("A2", _attached(_of(torch.float64), layers_to_transform=[0]), 0, ""),
    ("A2", combining(lambda t: t.update({KEY.format("A"): torch.ones(())})), EXIT_REFUSED, "the shape [], no matrix"),
    ("A2", combining(lambda t: t.update({KEY.format("B"): torch.ones(64, 5)})), EXIT_REFUSED, "not an adapter of"),
    ("A4", combining(layers_to_transform=[0]), 0, ""),
    ("A4", combining(target_modules=[]), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", combining(target_modules=""), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", combining(target_modules=[""]), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", combining(target_modules=["nope"]), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", combining(exclude_modules=".*"), EXIT_REFUSED, "not an adapter of this model"),
    ("A4", combining(rank_pattern=[]), EXIT_REFUSED, "`rank_pattern` is []"),
    ("A4", combining(init_lora_weights="loftq"), EXIT_REFUSED, "adapter"),
    ("A6", _attached(lambda t: t[KEY.format("A")].fill_(float("nan"))), EXIT_REFUSED, "NaN"),
    ("A6", _untrained, EXIT_REFUSED, "changes nothing"),
]


@pytest.mark.parametrize(
    ("row", "run", "code", "said"),
    [pytest.param(*case, id=f"{case[0]}-{number}") for number, case in enumerate(RECIPES + MODELS + ADAPTERS)],
)
def test_a_bad_input_ends_with_its_code_and_says_what_is_wrong(
    maker: Maker, row: str, run: Callable[[Maker], Any], code: int, said: str
):
    found, message = outcome(lambda: run(maker))
    assert (found, said in message) == (code, True), message


@pytest.mark.promise("R3")
def test_numbers_are_read_as_in_yaml_1_2(maker: Maker):
    """R3"""
    recipe = load_recipe(maker.text("r", maker.recipe("r").read_text().replace("0.01", "1e-4")))
    assert recipe.get("training.learning_rate") == 1e-4
