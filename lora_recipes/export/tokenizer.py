"""A tokenizer as llama.cpp reads it: tokens, kinds, merges or scores, the name of its word splitter, end tokens."""

import json
from dataclasses import dataclass, field
from typing import Any

import gguf
from tokenizers import models
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from lora_recipes.export.architecture import NotBuiltIn

SPACE = "▁"
UNMERGED = -1e6  # score of a token that no merge makes; below every other
# How words are split, and whether a word that is a token stays whole without its merges → llama.cpp's name for both.
# The expressions are those that transformers reads the same names with.
SPLITTERS = {
    (GGUF_PRE_TOKENIZER_SPLITS[name], whole): name
    for name, whole in (
        ("llama-bpe", True),
        ("smaug-bpe", False),
        ("qwen2", False),
        ("tekken", True),
        ("gpt-4o", False),
    )
}


@dataclass
class Vocabulary:
    """What goes into the file. `model` is llama.cpp's: gpt2 for byte-level BPE, llama for SentencePiece."""

    model: str
    pre: str
    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool | None = None
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    template: str | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, generation: GenerationConfig
    ) -> "Vocabulary":
        """Raises NotBuiltIn for a tokenizer that llama.cpp would read otherwise, as far as is known here."""
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        if state["model"]["type"] != "BPE":
            raise NotBuiltIn(f"a tokenizer of the kind {state['model']['type']}; BPE is built in")
        made = _sentencepiece(state) if state["model"]["byte_fallback"] else _byte_level(state)
        made._fill_rows(config.vocab_size)
        made._set_special(tokenizer, config, generation)
        return made

    def _fill_rows(self, rows: int) -> None:
        """The embedding may have more rows than there are tokens; never fewer."""
        if len(self.tokens) > rows:
            raise NotBuiltIn(f"the tokenizer has {len(self.tokens)} tokens and the model rows for {rows}")
        for number in range(len(self.tokens), rows):
            self.tokens.append(f"[PAD{number}]")
            self.types.append(gguf.TokenType.UNUSED)
            if self.scores:
                self.scores.append(UNMERGED)

    def _set_special(
        self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, generation: GenerationConfig
    ) -> None:
        declared = generation.eos_token_id
        ends = [tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])]
        ends = list(dict.fromkeys(end for end in ends if end is not None))
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
        named = {"bos": bos, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
        named |= dict(zip(("eos", "eot", "eom"), ends, strict=False))  # llama.cpp ends an answer at each of them
        self.special = {name: token for name, token in named.items() if token is not None}
        if len(ends) > 3:
            self.notes.append(f"{len(ends)} end tokens, of which a GGUF file holds three: {ends[:3]}")
        self.template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        before, after = _added_around(tokenizer)
        if before not in ([], [bos]) or after not in ([], [tokenizer.eos_token_id]):
            raise NotBuiltIn(f"a tokenizer that puts {before} before and {after} after every text")
        self.add_bos, self.add_eos = bool(before), bool(after)
        self._follow_template(tokenizer)

    def _follow_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """llama.cpp adds bos and the first space to chats as well, where transformers leaves them to the template."""
        if self.template is None:
            return
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        starts_with_bos = bool(tokenizer.bos_token) and chat.startswith(tokenizer.bos_token)
        if self.add_bos and not starts_with_bos:
            self.add_bos = False
            self.notes.append(
                "bos is not added, since the chat template does not write it; plain text gets none either"
            )
        if self.add_space_prefix is None:  # a space before the first word of a text, but not after a control token
            self.add_space_prefix = not starts_with_bos

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write every key that llama.cpp reads."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix is not False)
            writer.add_remove_extra_whitespaces(False)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that every text gets before and after it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def _tokens(state: dict[str, Any]) -> tuple[list[str], list[gguf.TokenType]]:
    """Every token by its id, and its kind: an added token is never split, and a special one is never text."""
    vocab = state["model"]["vocab"]
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    by_id = {number: token for token, number in vocab.items()} | {key: entry["content"] for key, entry in added.items()}
    tokens, types = [], []
    for number in range(max(by_id) + 1):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif number in added:
            types.append(gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    return tokens, types


def _byte_level(state: dict[str, Any]) -> Vocabulary:
    tokens, types = _tokens(state)
    merges = [f"{left} {right}" for left, right in _pairs(state)]
    made = Vocabulary("gpt2", _splitter(state), tokens, types, merges)
    if normalizer := state["normalizer"]:
        if normalizer["type"] != "NFC":
            raise NotBuiltIn(f"a tokenizer with the normalizer {normalizer['type']}, which llama.cpp does not know")
        made.notes.append(
            "the tokenizer composes Unicode (NFC), and llama.cpp does not: a text not in NFC gets other ids"
        )
    return made


def _splitter(state: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer, recognised by what it does; a wrong one splits otherwise, in silence."""
    pre = state["pre_tokenizer"] or {"type": "none"}
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _unrecognised(steps)
    if len(steps) == 1 and last["use_regex"]:
        return _without_whole_words("gpt-2", state)
    if len(steps) == 2 and last["use_regex"] and steps[0] == {"type": "Digits", "individual_digits": True}:
        return _without_whole_words("smollm", state)
    if len(steps) != 2 or last["use_regex"] or steps[0]["type"] != "Split":
        raise _unrecognised(steps)
    split = steps[0]
    known = (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True))
    expression, whole = split["pattern"].get("Regex"), bool(state["model"]["ignore_merges"])
    if known and (expression, whole) in SPLITTERS:
        return SPLITTERS[expression, whole]
    if known and (expression, not whole) in SPLITTERS and not _whole_words_matter(state):
        return SPLITTERS[expression, not whole]
    raise _unrecognised(steps)


def _without_whole_words(name: str, state: dict[str, Any]) -> str:
    if state["model"]["ignore_merges"] and _whole_words_matter(state):
        raise NotBuiltIn(f"the pre-tokenizer {name} with `ignore_merges`, which llama.cpp does not combine")
    return name


def _whole_words_matter(state: dict[str, Any]) -> bool:
    """Whether some token is not what its own merges make of its text."""
    special = {entry["content"] for entry in state["added_tokens"]}
    vocab = state["model"]["vocab"]
    pairs = _pairs(state)
    merged = models.BPE(vocab=vocab, merges=pairs)
    return any(len(merged.tokenize(token)) > 1 for token in vocab if token not in special)


def _pairs(state: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges, first one first; older files write a pair as one text."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in state["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _unrecognised(steps: list[dict[str, Any]]) -> NotBuiltIn:
    known = sorted({*SPLITTERS.values(), "gpt-2", "smollm"})
    told = json.dumps(steps, ensure_ascii=False)
    return NotBuiltIn(f"its pre-tokenizer is none of {', '.join(known)}: {told[:300]}")


def _sentencepiece(state: dict[str, Any]) -> Vocabulary:
    tokens, types = _tokens(state)
    unknown = state["model"]["unk_token"]
    for number, token in enumerate(tokens):
        if token == unknown:
            types[number] = gguf.TokenType.UNKNOWN
        elif types[number] == gguf.TokenType.NORMAL and _is_byte(token):
            types[number] = gguf.TokenType.BYTE
        elif types[number] == gguf.TokenType.USER_DEFINED:
            tokens[number] = token.replace(SPACE, " ")
    made = Vocabulary("llama", "default", tokens, types, add_space_prefix=_space_prefix(state))
    made.scores = _scores(state, tokens)
    return made


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _space_prefix(state: dict[str, Any]) -> bool | None:
    """Whether a space is put before a text: always, never, or (None) before its first word alone."""
    normalizer, pre = state["normalizer"], state["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if pre is None and steps == [{"type": "Prepend", "prepend": SPACE}, replaces]:
        return True
    if pre is None and steps == [replaces]:
        return False
    if not steps and pre and pre["type"] == "Metaspace" and pre["replacement"] == SPACE and not pre.get("split", True):
        return {"always": True, "never": False, "first": None}[pre["prepend_scheme"]]
    told = json.dumps([normalizer, pre], ensure_ascii=False)
    raise NotBuiltIn(f"a SentencePiece tokenizer whose spaces are handled in a way not known here: {told[:300]}")


def _scores(state: dict[str, Any], tokens: list[str]) -> list[float]:
    """llama.cpp merges the pair whose joined token scores highest, tokenizers the pair that is listed first.

    Both are the same where every way to make a token is listed, one token after the other; else NotBuiltIn.
    """
    vocab = state["model"]["vocab"]
    pairs = _pairs(state)
    rank: dict[str, int] = {}
    last = None
    for left, right in pairs:
        if left + right != last and left + right in rank:
            raise NotBuiltIn(f"a SentencePiece tokenizer whose merges of {left + right!r} are not listed together")
        last = left + right
        rank.setdefault(last, len(rank))
    listed = set(pairs)
    special = {entry["content"] for entry in state["added_tokens"]}
    for token in vocab:
        for cut in range(1, len(token)) if token not in special and not _is_byte(token) else ():
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab and (left, right) not in listed:
                raise NotBuiltIn(f"a SentencePiece tokenizer that does not merge {left!r} and {right!r} into {token!r}")
    return [-float(rank[token]) if token in rank else UNMERGED for token in tokens]
