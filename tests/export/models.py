"""Tiny models of each architecture that is written as GGUF here, with weights large enough to be felt in the logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from lora_recipes.export.gguf import write_gguf
from tests.conftest import CHATML, ROOT

VOCAB = 512
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-wide-heads": {"model_type": "llama", "head_dim": 32, "rms_norm_eps": 1e-3},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 128},  # the only width that transformers' reader knows
}
SPLITTERS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: _by_expression("qwen2"),
    "smaug-bpe": lambda: _by_expression("smaug-bpe"),
}


def _by_expression(name: str) -> Any:
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def lines() -> list[str]:
    return (ROOT / "data" / "orders" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()


def byte_level(pre: Any, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on the demo rows, with one added token that is no control token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,  # the last rows of the embedding belong to no token
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(lines(), trainer)
    raw.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece(*, prefix: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: pieces, bytes for what has none, and every way to make a piece among its merges."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(lines(), trainers.BpeTrainer(vocab_size=200, show_progress=False))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learnt = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in learnt][: VOCAB - len(special) - 8]
    vocab = {token: number for number, token in enumerate([*special, *pieces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special[:3]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(
    folder: Path, name: str, *, dtype: str = "float32", shard: str = "50GB", **changes: Any
) -> PreTrainedModel:
    """Write a model of ARCHITECTURES with a byte-level tokenizer to `folder`."""
    values = SMALL | ARCHITECTURES[name] | changes
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in key else 0.0, std=0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    byte_level(SPLITTERS["gpt-2"]()).save_pretrained(folder)
    return model


def write(folder: Path, outtype: str, tokenizer: Any = None) -> Path:
    """The GGUF file of a model folder, in a folder of its own."""
    from transformers import AutoTokenizer, GenerationConfig

    path = folder.with_name(f"{folder.name}-gguf") / f"{outtype}.gguf"
    path.parent.mkdir(exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        expected = set(AutoModelForCausalLM.from_config(config).state_dict())
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    write_gguf(folder, path, outtype, config, tokenizer, GenerationConfig.from_pretrained(folder), expected, "tiny")
    return path
