"""Tokenizers made by code, with the control tokens that a chat template writes, as the models of its family have them."""

import re
from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TRL = Path(str(files("trl").joinpath("chat_templates")))
CONTROL = re.compile(
    r"<[|｜][^<>\s]*[|｜]?>|<[a-z_]+\|>|<(?:bos|eos|start_of_turn|end_of_turn|end_of_utterance|sop|image)>|</?s>|\[gMASK\]"
)
PLAIN = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")  # added tokens, but no control tokens
# Name of a template begins with → (bos, the tokens that end generation, the tokenizer's own first).
FAMILIES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "cohere": ("<BOS_TOKEN>", ("<|END_OF_TURN_TOKEN|>",)),
    "deepseek": ("<｜begin▁of▁sentence｜>", ("<｜end▁of▁sentence｜>",)),
    "diffusion_gemma": ("<bos>", ("<turn|>", "<eos>", "<|tool_response>")),
    "gemma4": ("<bos>", ("<turn|>", "<eos>", "<|tool_response>")),
    "gemma": ("<bos>", ("<end_of_turn>", "<eos>")),
    "glm4moe": (None, ("<|endoftext|>", "<|user|>", "<|observation|>")),
    "gptoss": ("<|startoftext|>", ("<|return|>", "<|endoftext|>", "<|call|>")),
    "idefics3": ("<|begin_of_text|>", ("<end_of_utterance>", "<|end_of_text|>")),
    "lfm2": ("<|startoftext|>", ("<|im_end|>",)),
    "llama3": ("<|begin_of_text|>", ("<|eot_id|>", "<|end_of_text|>")),
    "llava_next": ("<s>", ("</s>",)),
    "muse": ("<|begin_of_text|>", ("<|eot|>",)),
    "nemotron": (None, ("<|im_end|>", "<|endoftext|>")),
    "phi3": (None, ("<|endoftext|>", "<|end|>", "<|assistant|>")),
    "qwen": (None, ("<|im_end|>", "<|endoftext|>")),
    "smolvlm": ("<|im_start|>", ("<end_of_utterance>",)),
}
# How Llama 3 and Qwen cut a text into words: a run of line ends is one.
WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXT = [
    "What is 2 times 3? Two times three is six.\n\nIt is six.",
    "You are a helpful assistant.\n\nThe answer is not known.\n\n\n",
    "Two times three makes six: \n think, assistant, user, function, call, name, arguments, parameter",
]


def tokenizer_of(
    template: str | None, bos: str | None, ends: tuple[str, ...], *, adds_bos: bool = False, trims: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose control tokens are those in the template's text, and the given ones.

    Args:
        adds_bos: it puts the first token before every text.
        trims: the space before a word lies in no token's offsets, though in its token.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        TEXT * 4,
        trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    names = [*ends, *([bos] if bos else []), *CONTROL.findall(template or "")]
    raw.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(names)])
    plain = dict.fromkeys(PLAIN.findall(template or ""))
    raw.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    if adds_bos and bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    elif trims:
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token=ends[0], pad_token=ends[0], clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def trl_tokenizer(name: str) -> tuple[PreTrainedTokenizerFast, set[int]]:
    """The tokenizer for one of TRL's templates, and the tokens that end generation."""
    bos, ends = next(family for prefix, family in FAMILIES.items() if name.startswith(prefix))
    tokenizer = tokenizer_of((TRL / f"{name}.jinja").read_text(encoding="utf-8"), bos, ends)
    return tokenizer, {tokenizer.convert_tokens_to_ids(end) for end in ends}
