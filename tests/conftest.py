"""Fixtures: a tiny Llama with its own tokenizer, and recipes on it, all made by code."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lora_recipes import process
from lora_recipes.model.folder import read_sums, write_sums
from lora_recipes.run_dir import SUMS, RunDir, file_sha256, read_json, write_json

process.prepare()
pytest.register_assert_rewrite(
    "tests.toy", "tests.data_room", "tests.recipe", "tests.security", "tests.train"
)  # helpers too
# Under pytest-xdist each worker keeps to a core of its own: torch would start a thread a core in every one of them.
if (WORKER := os.environ.get("PYTEST_XDIST_WORKER", "")).startswith("gw") and hasattr(os, "sched_setaffinity"):
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(WORKER[2:]) % len(CORES)]})

ROOT = Path(__file__).parent.parent
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama with random weights and a byte-level tokenizer trained on the demo data."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    lines = (ROOT / "data" / "orders" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    raw.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", bos_token="<|im_start|>", unk_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=2,
            bos_token_id=1,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """24 training rows and 6 held-out rows of the demo data."""
    folder = tmp_path_factory.mktemp("tiny_data")
    paths = {}
    for name, source, count in (("train", "train", 24), ("heldout", "heldout", 6)):
        lines = (ROOT / "data" / "orders" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        paths[name] = str(path)
    return paths


@pytest.fixture
def quick_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged model is reloaded in this process: a fresh one takes seconds to import what is imported here already."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("lora_recipes.merge.parity.fresh_process", lambda recipe: ThreadPoolExecutor(1))


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: `outputs/` of a test lands there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny_recipe(model: str, data: dict[str, str]) -> dict[str, Any]:
    """The sections of a recipe that trains three steps of LoRA on a tiny model."""
    return {
        "model": {"pretrained_model_name_or_path": model},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "dataset": {"path": "json", "data_files": data, "split": "train", "eval_split": "heldout"},
        "training": {
            "max_length": 160,
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "activation_checkpointing": False,
            "assistant_only_loss": True,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
        "generation": {"max_new_tokens": 8},
        "checks": {"min_stopped": 0},  # a model of random weights and 3 steps never stops
        "merge": {"dtype": "float32"},
    }


@pytest.fixture
def write_recipe(tiny_model: Path, tiny_data: dict[str, str], workdir: Path) -> Callable[..., Path]:
    """Writes a recipe on the tiny model; keyword arguments are merged into its sections, None drops a section."""

    def write(name: str = "tiny", **changes: dict[str, Any] | None) -> Path:
        sections = tiny_recipe(str(tiny_model), tiny_data)
        for section, keys in changes.items():
            if keys is None:
                sections.pop(section, None)
            else:
                sections[section] = sections.get(section, {}) | keys
        path = workdir / f"{name}.yaml"
        path.write_text(json.dumps(sections, indent=1, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
        return path

    return write


def publish_anew(folder: Path) -> None:
    """Write a published folder down as it is now, in every record that the run has of it: what is planted in it is the fault."""
    run_dir = RunDir(folder.parent)
    write_sums(folder)
    manifest, parity = read_json(run_dir.manifest), read_json(run_dir.parity)
    if (published := manifest.get("published", {})).get("folder") == folder.name:
        write_json(run_dir.manifest, manifest | {"published": published | {"files": read_sums(folder)}})
    if folder == run_dir.merged and parity:
        write_json(run_dir.parity, parity | {"merged_sha256": file_sha256(folder / SUMS)})


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
