"""What a GGUF file says of a tokenizer: every token, its kind, merges or scores, end tokens, and the right splitter."""

import json
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from lora_recipes.export.architecture import NotBuiltIn
from lora_recipes.export.tokenizer import Vocabulary
from tests.export.models import SMALL, SPLITTERS, VOCAB, byte_level, lines, make_model, sentencepiece, write

CONFIG = LlamaConfig(**SMALL)
TEXTS = [*lines()[:20], "  two  spaces", "12345 pens, l'été 日本 🎉", "<|im_start|>user\nhi<|im_end|>", "a <tool> b"]


def vocabulary(tokenizer: Any, **generation: Any) -> Vocabulary:
    return Vocabulary.of(tokenizer, CONFIG, GenerationConfig(**generation))


def llama_cpp_spm(made: Vocabulary, text: str) -> list[int]:
    """SentencePiece's greedy rule by scores, as llama.cpp applies it: join the best neighbours until none join."""
    numbers = {token: number for number, token in enumerate(made.tokens)}
    pieces = list((" " if made.add_space_prefix else "").replace(" ", "▁") + text.replace(" ", "▁"))
    while True:
        joined = [
            (made.scores[numbers[left + right]], -at)
            for at, (left, right) in enumerate(pairwise(pieces))
            if left + right in numbers
        ]
        if not joined:
            break
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    ids = []
    for piece in pieces:
        known = [numbers[piece]] if piece in numbers else [numbers[f"<0x{byte:02X}>"] for byte in piece.encode()]
        ids += known
    return ids


@pytest.mark.parametrize("name", list(SPLITTERS))
def test_the_splitter_is_recognised_by_what_it_does(name: str):
    assert vocabulary(byte_level(SPLITTERS[name]())).pre == name


def test_whole_words_decide_between_two_names():
    tokenizer = byte_level(SPLITTERS["smaug-bpe"]())
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>")
    assert vocabulary(whole).pre == "llama-bpe"


@pytest.mark.parametrize(
    "pre",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split("x", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
    ],
    ids=["prefix space", "punctuation", "unknown expression"],
)
def test_a_splitter_that_is_not_recognised_is_never_called_another(pre: Any):
    with pytest.raises(NotBuiltIn, match="pre-tokenizer is none of gpt-2"):
        vocabulary(byte_level(pre))


def test_tokens_kinds_and_merges_are_the_tokenizers():
    tokenizer = byte_level(SPLITTERS["gpt-2"]())
    made = vocabulary(tokenizer)
    assert len(made.tokens) == len(made.types) == VOCAB
    assert made.tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    kinds = {token: kind.name for token, kind in zip(made.tokens, made.types, strict=True)}
    assert [kinds[token] for token in ("<|im_end|>", "<tool>", "Ġ", "[PAD511]")] == [
        "CONTROL",
        "USER_DEFINED",
        "NORMAL",
        "UNUSED",
    ]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert made.merges == [" ".join(pair) for pair in merges] and len(merges) > 100
    assert (made.add_bos, made.add_eos) == (False, False)


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "smaug-bpe"])  # transformers' reader does not know smollm
def test_transformers_reads_back_the_same_ids(tmp_path: Any, name: str):
    make_model(tmp_path / "model", "llama")
    tokenizer = byte_level(SPLITTERS[name]())
    path = write(tmp_path / "model", "f16", tokenizer)
    back = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert [back(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert back.chat_template == tokenizer.chat_template
    assert (back.eos_token, back.bos_token) == ("<|im_end|>", "<|im_start|>")


def test_all_end_tokens_of_the_model_end_an_answer():
    made = vocabulary(byte_level(SPLITTERS["gpt-2"]()), eos_token_id=[0, 2, 7, 8])
    assert made.special == {"bos": 1, "unk": 0, "pad": 0, "eos": 2, "eot": 0, "eom": 7}
    assert made.notes == ["4 end tokens, of which a GGUF file holds three: [2, 0, 7]"]


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_merge_as_the_listed_merges_do(prefix: bool):
    tokenizer = sentencepiece(prefix=prefix)
    made = vocabulary(tokenizer)
    assert (made.model, made.pre, made.add_space_prefix) == ("llama", "default", prefix)
    texts = [text for text in TEXTS if "<|" not in text]
    assert [llama_cpp_spm(made, text) for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    kinds = {token: kind.name for token, kind in zip(made.tokens, made.types, strict=True)}
    assert [kinds[token] for token in ("<unk>", "<s>", "<0x0A>")] == ["UNKNOWN", "CONTROL", "BYTE"]


def test_a_piece_that_its_merges_do_not_all_make_is_not_built_in():
    tokenizer = sentencepiece()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    dropped = state["model"]["merges"].pop(20)
    broken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>")
    with pytest.raises(NotBuiltIn, match=r"does not merge|not listed together"):
        vocabulary(broken)
    assert len(dropped) == 2


BOS_TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


@pytest.mark.parametrize(("template", "added"), [(None, True), (BOS_TEMPLATE, True), (BOS_TEMPLATE[15:], False)])
def test_bos_is_added_where_tokenizer_and_template_do(template: str | None, added: bool):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level(SPLITTERS["gpt-2"](), template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    made = vocabulary(tokenizer)
    assert made.add_bos is added
    assert bool(made.notes) is not added


def test_other_kinds_of_tokenizer_are_not_built_in():
    unigram = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    with pytest.raises(NotBuiltIn, match="Unigram"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="a"))
    lower = byte_level(SPLITTERS["gpt-2"]())
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(NotBuiltIn, match="Lowercase"):
        vocabulary(lower)
    with pytest.raises(NotBuiltIn, match="505 tokens and the model rows for 500"):
        Vocabulary.of(
            byte_level(SPLITTERS["gpt-2"]()), LlamaConfig(**(SMALL | {"vocab_size": 500})), GenerationConfig()
        )


def test_composed_unicode_is_said_to_differ():
    tokenizer = byte_level(SPLITTERS["qwen2"]())
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert "NFC" in vocabulary(tokenizer).notes[0]
