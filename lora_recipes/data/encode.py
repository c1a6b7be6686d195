"""Texts become token ids, and each token is known by the character it begins at."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy
from transformers import PreTrainedTokenizerBase

WHITE_SPACE = 64  # characters that may lie in no token's offsets, where a tokenizer trims them


class Tokens(Protocol):
    """A tokenized text."""

    ids: list[int]

    def token_at(self, character: int) -> int:
        """The first token that begins at or after a character."""

    def straddles(self, character: int) -> bool:
        """Whether a token begins before a character and goes on after it."""


class Encoder:
    """Encodes many texts at once, without added tokens.

    Byte-level tokenizers (GPT-2's kind, which most models have) cut a text into pieces whose bytes are those of the text, so
    the widths of the tokens say where each begins, and the slower encoding with offsets is not needed. Where the widths do
    not add up to the text, or a normalizer changes it, that row is encoded once more with offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.widths = _widths(tokenizer)
        # Unicode's normal forms leave ASCII as it is, so that most texts need not be normalized to be compared.
        self.ascii_is_kept = type(self.backend.normalizer).__name__ in ("NFC", "NFD", "NFKC", "NFKD", "NoneType")

    def encode(self, texts: list[str]) -> list[Tokens]:
        """The tokens of each text; control tokens in it are control tokens."""
        if not texts:
            return []
        with self._set_up(literal=False):
            if self.widths is None:
                return [Offsets(found) for found in self.backend.encode_batch(texts, add_special_tokens=False)]
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            return [self._measured(text, found.ids) for text, found in zip(texts, encodings, strict=True)]

    def encode_pieces(self, pieces: list[tuple[str, int, bool]]) -> "Pieces":
        """The tokens of a text that is cut into (piece, character it begins at, whether it is plain text throughout)."""
        tokens = Pieces()
        for text, at, literal in pieces:
            with self._set_up(literal=literal):
                found = self.backend.encode(text, add_special_tokens=False)
            # A literal stands for one mark of the text: all of its tokens begin where the mark does.
            tokens.add(found.ids, [0 if literal else start for start, _ in found.offsets], at)
        return tokens

    @contextmanager
    def _set_up(self, *, literal: bool) -> Iterator[None]:
        """Control tokens read as such or not; and no post-processor, since GPT-2's and Llama 3's take spaces out of the
        offsets of the tokens that hold them."""
        kept, self.backend.post_processor = self.backend.post_processor, None
        self.backend.encode_special_tokens = literal
        try:
            yield
        finally:
            self.backend.post_processor, self.backend.encode_special_tokens = kept, False

    def _measured(self, text: str, ids: list[int]) -> Tokens:
        starts = numpy.zeros(len(ids) + 1, numpy.int64)
        numpy.cumsum(self.widths[ids], out=starts[1:])
        if self._is_kept(text) and starts[-1] == (
            len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        ):
            return Widths(ids, starts, text)
        return Offsets(self.backend.encode(text, add_special_tokens=False))

    def _is_kept(self, text: str) -> bool:
        """Whether the normalizer leaves a text as it is."""
        if self.backend.normalizer is None or (self.ascii_is_kept and text.isascii()):
            return True
        return self.backend.normalizer.normalize_str(text) == text


class Widths:
    """Tokens that begin at known bytes."""

    def __init__(self, ids: list[int], starts: Any, text: str) -> None:
        self.ids, self.starts, self.text, self.ascii = ids, starts, text, text.isascii()

    def _byte(self, character: int) -> int:
        return character if self.ascii else len(self.text[:character].encode("utf-8", "surrogatepass"))

    def token_at(self, character: int) -> int:
        return int(self.starts.searchsorted(self._byte(character)))

    def straddles(self, character: int) -> bool:
        byte = self._byte(character)
        return bool(self.starts[self.starts.searchsorted(byte)] != byte) if byte <= self.starts[-1] else False


class Offsets:
    """Tokens with the offsets that the tokenizer itself gives."""

    def __init__(self, encoding: Any) -> None:
        self.encoding, self.ids = encoding, encoding.ids

    def token_at(self, character: int) -> int:
        for place in range(character, character + WHITE_SPACE):
            token = self.encoding.char_to_token(place)
            if token is not None:
                start = self.encoding.token_to_chars(token)[0]
                return token if start >= character else token + 1
        return len(self.ids)

    def straddles(self, character: int) -> bool:
        token = self.encoding.char_to_token(character)
        return token is not None and self.encoding.token_to_chars(token)[0] < character


class Pieces:
    """Tokens of a text that was cut and tokenized piece by piece."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.starts: list[int] = []

    def add(self, ids: list[int], starts: list[int], at: int) -> None:
        """A piece that begins at character `at`; `starts` are relative to it."""
        self.ids += ids
        self.starts += [at + start for start in starts]

    def token_at(self, character: int) -> int:
        return int(numpy.searchsorted(self.starts, character))

    def straddles(self, character: int) -> bool:
        return False


def _widths(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Bytes of the text that each token stands for, by id; None for a tokenizer that is not byte-level."""
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    widths = numpy.zeros(max(vocabulary.values()) + 1, numpy.int64)
    for token, number in vocabulary.items():
        # A byte-level token is written with one character a byte; an added token stands for itself.
        widths[number] = len(token.encode()) if number in added else len(token)
    probe = "Two words, 3 numbers 456:\n  ünïcode 你好\n"
    ids = tokenizer.backend_tokenizer.encode(probe, add_special_tokens=False).ids
    return widths if widths[ids].sum() == len(probe.encode()) else None
