"""A merge from disk has the names, types and bits of PEFT's merge in memory, for everything that an adapter can be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lora_recipes.merge import stream
from lora_recipes.merge.checkpoint import INDEX
from lora_recipes.plan import CONFIGS
from tests.merge.toys import (
    EXPERTS,
    WHOLE,
    edit,
    make_adapter,
    make_base,
    names_in,
    recipe_on,
    require_changed,
    require_same,
    streamed,
    tensors_in,
)
from tests.toy import facts, make_toy

DTYPES = ("float32", "bfloat16", "float16")
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}


def gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64)).save_pretrained(folder)
    return folder


BASES: dict[str, Callable[[Path], Path]] = {
    "plain": lambda folder: make_base(folder),
    "tied": lambda folder: make_base(folder, dtype="float32", tie_word_embeddings=True),
    "sharded": lambda folder: make_base(folder, dtype="float16", shard="50KB", attention_bias=True, mlp_bias=True),
    "gemma": lambda folder: make_base(folder, "gemma3_text", tie_word_embeddings=True, head_dim=16),
    "experts": lambda folder: make_base(folder, "qwen3_moe", shard="20KB", **EXPERTS),
    "mixtral": lambda folder: make_base(folder, "mixtral", shard="60KB", num_local_experts=4, head_dim=16),
    "gpt-oss": lambda folder: make_base(folder, "gpt_oss", num_local_experts=4, head_dim=16),
    "gpt2": gpt2,
}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BLOCKED = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # base, what the adapter is
    "lora": ("plain", WHOLE),
    "tied": ("tied", WHOLE),
    "rslora": ("sharded", WHOLE | {"use_rslora": True}),
    "dora": ("sharded", WHOLE | {"use_dora": True}),
    "patterns": ("plain", WHOLE | {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}}),
    "bias all": ("sharded", WHOLE | {"bias": "all"}),
    "bias of lora layers": ("sharded", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "lora_bias": ("sharded", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True, "r": 4}),
    "head whole, tied": ("tied", WHOLE | {"modules_to_save": ["lm_head"]}),
    "embeddings whole, tied": ("tied", WHOLE | {"modules_to_save": ["embed_tokens"]}),
    "norms whole": ("plain", WHOLE | {"modules_to_save": ["norm", "lm_head"]}),
    "tokens, tied": ("tied", WHOLE | {"trainable_token_indices": [3, 200, 319]}),
    "tokens": ("plain", WHOLE | {"trainable_token_indices": [0, 63, 64, 127, 128, 319]}),
    "embeddings, tied": ("tied", {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "embeddings": ("plain", {"target_modules": ["embed_tokens", "lm_head"], "r": 4}),
    "embeddings, dora": ("plain", {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "use_dora": True}),
    "resized whole": ("tied", WHOLE | {"modules_to_save": ["embed_tokens", "lm_head"], "resize": 384}),
    "resized": ("plain", WHOLE | {"resize": 384}),
    "shrunk": ("plain", WHOLE | {"resize": 256}),
    "head tied by peft": ("tied", {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "ensure_weight_tying": True}),
    "tokens tied by peft": ("tied", WHOLE | {"trainable_token_indices": [3, 200], "ensure_weight_tying": True}),
    "whole, tied by peft": ("tied", WHOLE | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "embeddings and tokens": (
        "plain",
        {"target_modules": ["embed_tokens"], "trainable_token_indices": {"lm_head": [7]}},
    ),
    "bdlora": ("plain", {"target_modules": ["q_proj", "o_proj"], "r": 4, "use_bdlora": BLOCKED}),
    "kasa": ("plain", {"target_modules": ["q_proj", "v_proj"], "r": 4, "kasa_config": KasaConfig()}),
    "velora": ("plain", {"target_modules": ["q_proj"], "r": 4, "velora_config": VeloraConfig()}),
    "one layer": ("plain", WHOLE | {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "adapter of 16 bits": ("tied", WHOLE | {"dtype": "bfloat16"}),
    "gemma": ("gemma", WHOLE),
    "experts": ("experts", {"target_modules": ["q_proj", "v_proj"], "target_parameters": FUSED, "r": 4}),
    "experts only attention": ("experts", WHOLE | {"r": 4}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": FUSED, "r": 4}),
    "gpt-oss": ("gpt-oss", {"target_modules": ["q_proj"], "target_parameters": FUSED, "r": 4}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True}),
    "everything": (
        "sharded",
        WHOLE
        | {
            "use_dora": True,
            "use_rslora": True,
            "bias": "all",
            "rank_pattern": {"q_proj": 16},
            "alpha_pattern": {"v_proj": 3},
        }
        | {"modules_to_save": ["lm_head", "norm"], "trainable_token_indices": [0, 5]},
    ),
}


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A base by its name, made once."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = BASES[name](tmp_path_factory.mktemp("base"))
        return made[name]

    return of


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows at most, so that small matrices are cut as large ones are."""
    monkeypatch.setattr(stream, "BLOCK", 64)


@pytest.mark.promise("A7")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_merged_as_peft_merges_it(
    variant: str, base_of: Callable[[str], Path], tmp_path: Path, small_blocks: None
):
    named, lora = VARIANTS[variant]
    base = base_of(named)
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    for dtype in DTYPES:
        (tmp_path / dtype).mkdir()
        planned, _ = require_same(recipe_on(base, dtype=dtype), adapter, tmp_path / dtype)
        require_changed(base, tmp_path / dtype / "ours")
        assert not planned.layout.dropped


@pytest.mark.parametrize("rank", [256, 257], ids=["256: in blocks", "257: whole"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_large_ranks_and_odd_widths_are_merged_in_blocks_as_in_one_piece(
    rank: int, dora: bool, tmp_path: Path, small_blocks: None
):
    """1,000 and 333 are no multiple of anything that a matrix kernel likes."""
    base = make_base(tmp_path / "base", hidden_size=336, intermediate_size=1000, vocab_size=333, num_hidden_layers=1)
    lora = {"target_modules": "all-linear", "r": rank, "use_dora": dora}
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    for dtype in ("bfloat16", "float32"):
        (tmp_path / dtype).mkdir()
        require_same(recipe_on(base, dtype=dtype), adapter, tmp_path / dtype)


def test_mica_is_merged_with_one_rounding(base_of: Callable[[str], Path], tmp_path: Path):
    """PEFT rounds its change before it adds it; in float32, where nothing is rounded, both are the same."""
    lora = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": "mica"}
    adapter = make_adapter(base_of("plain"), tmp_path / "adapter", **lora)
    require_same(recipe_on(base_of("plain"), dtype="float32"), adapter, tmp_path)
    require_changed(base_of("plain"), tmp_path / "ours")


def test_blocks_are_what_is_merged_at_a_time(
    base_of: Callable[[str], Path], tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
):
    """The tests here would say little of blocks if nothing were cut."""
    rows: list[int] = []
    merge_rows = stream.merge_rows

    def watched(layer: Any, parameter: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
        rows.append(first)
        return merge_rows(layer, parameter, weight, first)

    monkeypatch.setattr(stream, "merge_rows", watched)
    adapter = make_adapter(base_of("tied"), tmp_path / "adapter", **VARIANTS["embeddings, tied"][1])
    streamed(recipe_on(base_of("tied")), adapter, tmp_path / "merged")
    assert {0, 64, 128, 192, 256} <= set(rows)


@pytest.mark.promise("A7")
@pytest.mark.parametrize(
    "section",
    [NF4, {"load_in_4bit": True}, {"load_in_8bit": True}, NF4 | {"llm_int8_skip_modules": ["v_proj", "lm_head"]}],
    ids=["nf4 twice", "fp4", "int8", "some layers not"],
)
def test_a_quantized_base_is_opened_as_bitsandbytes_opens_it(
    section: dict[str, Any], base_of: Callable[[str], Path], tmp_path: Path, small_blocks: None
):
    adapter = make_adapter(base_of("sharded"), tmp_path / "adapter", **WHOLE)
    for dtype in (*DTYPES, None):  # None: it stays in the type it was loaded in
        (tmp_path / str(dtype)).mkdir()
        wanted = {"dtype": dtype} if dtype else {}
        require_same(recipe_on(base_of("sharded"), section, **wanted), adapter, tmp_path / str(dtype))
    opened = tensors_in(tmp_path / "float16" / "ours")["model.layers.0.mlp.up_proj.weight"]
    adapted = make_adapter(base_of("sharded"), tmp_path / "adapter", **WHOLE)
    streamed(recipe_on(base_of("sharded"), dtype="float16"), adapted, tmp_path / "original")
    assert not torch.equal(opened, tensors_in(tmp_path / "original")["model.layers.0.mlp.up_proj.weight"])


def test_shards_are_the_bases_where_no_size_is_given(base_of: Callable[[str], Path], tmp_path: Path):
    base = base_of("sharded")
    adapter = make_adapter(base, tmp_path / "adapter", **WHOLE)
    streamed(recipe_on(base), adapter, tmp_path / "merged")
    for file in base.glob("*.safetensors"):
        assert set(names_in(file)) == set(names_in(tmp_path / "merged" / file.name))


@pytest.mark.parametrize("size", ["30KB", 100_000, "5GB"])
@pytest.mark.parametrize("named", ["plain", "sharded", "experts"])
def test_shards_keep_to_the_size_that_is_asked_for(
    named: str, size: str | int, base_of: Callable[[str], Path], tmp_path: Path
):
    base = base_of(named)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    planned, result = streamed(recipe_on(base, max_shard_size=size, dtype="float32"), adapter, tmp_path / "merged")
    files = sorted((tmp_path / "merged").glob("*"))
    limit = {"30KB": 30_000, "5GB": 5 * 10**9}.get(str(size), size)
    tensors = {file.name: load_file(file) for file in files if file.suffix == ".safetensors"}
    sizes = {name: [t.numel() * t.element_size() for t in held.values()] for name, held in tensors.items()}
    assert all(sum(held) <= limit or len(held) == 1 for held in sizes.values())
    assert result.checksums.keys() == tensors.keys()
    if size == "5GB":
        assert [file.name for file in files] == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "merged" / INDEX).read_text())
    assert len(tensors) > 1 and {file.name for file in files} == tensors.keys() | {INDEX}
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values())) == planned.layout.bytes
    assert index["weight_map"] == {name: title for title, held in tensors.items() for name in held}
    merged = AutoModelForCausalLM.from_config(planned.model.config)
    assert index["metadata"]["total_parameters"] == merged.num_parameters()


def test_experts_spread_over_the_bases_shards_are_gathered_and_spread_again(base_of: Callable[[str], Path]):
    """The base must be what this file takes it for: one layer's experts in several files."""
    index = json.loads((base_of("experts") / INDEX).read_text())["weight_map"]
    assert len({file for name, file in index.items() if ".layers.0.mlp.experts." in name}) > 1


def test_a_type_that_transformers_keeps_in_float32_stays_so(tmp_path: Path, base_of: Callable[[str], Path]):
    adapter = make_adapter(base_of("gpt-oss"), tmp_path / "adapter", target_modules=["q_proj"])
    require_same(recipe_on(base_of("gpt-oss"), dtype="float16"), adapter, tmp_path)
    assert tensors_in(tmp_path / "ours")["model.norm.weight"].dtype == torch.float32


@pytest.mark.promise("A7")
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"], ids=["same type", "another type"])
def test_a_checkpoint_that_holds_both_of_two_tied_tensors(equal: bool, dtype: str, tmp_path: Path):
    base = make_base(tmp_path / "base", dtype="float32", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].to(getattr(torch, dtype))
    save_file(
        tensors | {"lm_head.weight": head.clone() if equal else head * 2}, base / "model.safetensors", {"format": "pt"}
    )
    adapter = make_adapter(base, tmp_path / "adapter", **WHOLE)
    planned, _ = require_same(recipe_on(base, dtype="bfloat16"), adapter, tmp_path)
    # What is loaded is compared: in bfloat16 they are equal though one is float32 on disk.
    assert planned.model.config.tie_word_embeddings is equal
    assert planned.layout.dropped == (["lm_head.weight"] if equal else [])


def test_a_checkpoint_that_holds_only_the_tied_copy(tmp_path: Path):
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", **WHOLE)
    require_same(recipe_on(base, dtype="float32"), adapter, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_checkpoint_without_the_prefix_of_a_causal_model(kind: str, tmp_path: Path):
    """Saved by the class without a head: `layers.0…` where the model says `model.layers.0…`."""
    base = make_base(tmp_path / "base", kind, tie_word_embeddings=True, head_dim=16)
    adapter = make_adapter(base, tmp_path / "adapter", **WHOLE)
    AutoModelForCausalLM.from_pretrained(base).model.save_pretrained(tmp_path / "headless")
    assert "embed_tokens.weight" in names_in(tmp_path / "headless" / "model.safetensors")
    require_same(recipe_on(tmp_path / "headless", dtype="float32"), adapter, tmp_path)


def test_shards_of_such_a_checkpoint_are_cut_as_it_is(tmp_path: Path):
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", **WHOLE)
    AutoModelForCausalLM.from_pretrained(base).model.save_pretrained(tmp_path / "headless", max_shard_size="50KB")
    require_same(recipe_on(tmp_path / "headless"), adapter, tmp_path)
    for file in (tmp_path / "headless").glob("*.safetensors"):
        assert {f"model.{name}" for name in names_in(file)} == set(names_in(tmp_path / "ours" / file.name))


def test_what_is_no_part_of_the_model_is_dropped_and_named(tmp_path: Path):
    base = make_base(tmp_path / "base", dtype="float32")
    tensors = load_file(base / "model.safetensors")
    odd = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "model.layers.7.mlp.up_proj.weight": torch.rand(4, 4),  # that predicts tokens further ahead
        "vision.patch": torch.zeros(2, dtype=torch.uint8),
        "scalar": torch.tensor(3.0),
    }
    save_file(tensors | odd, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    adapter = make_adapter(base, tmp_path / "adapter", **WHOLE)
    planned, _ = require_same(recipe_on(base), adapter, tmp_path)
    assert set(planned.layout.dropped) == set(odd)


FAMILIES = sorted(
    {
        json.loads(file.read_text())["config"]["model_type"]: file.stem.replace("--", "/", 1)
        for file in CONFIGS.glob("*.json")
    }.items()
)
TARGETS: dict[str, dict[str, Any]] = {  # what "all-linear" is not allowed, or does not reach
    "falcon_h1": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj"]},
    "gpt_oss": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": FUSED},
    "deepseek_v2": {
        "target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        "target_parameters": [
            "experts.gate_up_proj",
            "experts.down_proj",
            "gate_proj.weight",
            "up_proj.weight",
            "down_proj.weight",
        ],
    },
}


@pytest.mark.parametrize("kind, named", FAMILIES, ids=[kind for kind, _ in FAMILIES])
def test_every_family_that_has_a_recipe(kind: str, named: str, tiny_model: Path, tmp_path: Path):
    base = make_toy(facts(named, tiny_model), AutoTokenizer.from_pretrained(tiny_model), None, tmp_path / "base")
    for file in base.glob("*.safetensors"):
        edit(file, lambda name, tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
    adapter = make_adapter(base, tmp_path / "adapter", **TARGETS.get(kind, {"target_modules": "all-linear"}), r=4)
    planned, _ = require_same(recipe_on(base, dtype="bfloat16"), adapter, tmp_path)
    assert not planned.layout.dropped
    require_changed(base, tmp_path / "ours")
