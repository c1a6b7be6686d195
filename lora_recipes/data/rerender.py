"""Whether another tokenizer, such as an exported one, makes the same tokens of the rows that were trained on."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lora_recipes.data.formats import BadRow, Conversation
from lora_recipes.data.load import LoadedData, used_rows
from lora_recipes.data.masks import Masker


@dataclass(frozen=True)
class Sample:
    """A training row and the tokens that were trained on, before anything was cut."""

    conversation: Conversation
    control_tokens: str
    input_ids: list[int]


def samples(data: LoadedData, count: int) -> list[Sample]:
    """The first `count` training rows of each source; rows that came as token ids have nothing to render."""
    found = []
    for rows in data.sources:
        part, control_tokens = rows.train, rows.masker.control_tokens
        conversations = list(used_rows(part, count))
        tokens = part.prepared.tokens
        for number, conversation in enumerate(conversations):
            if conversation.input_ids is not None:
                continue
            if tokens is not None:
                ids = tokens[int(part.indices[number])]["input_ids"]
            else:
                ids = _ids(rows.masker, conversation)
            found.append(Sample(conversation, control_tokens, list(ids or [])))
    return found


def differing(taken: list[Sample], tokenizer: PreTrainedTokenizerBase, end_ids: set[int]) -> list[Sample]:
    """Those of the samples that this tokenizer and its template make other tokens of, or refuse."""
    maskers = {kind: Masker(tokenizer, end_ids, kind) for kind in {sample.control_tokens for sample in taken}}
    return [sample for sample in taken if _ids(maskers[sample.control_tokens], sample.conversation) != sample.input_ids]


def _ids(masker: Masker, conversation: Conversation) -> list[int] | None:
    try:
        (tokens,) = masker.tokenize([masker.render(conversation)])
    except BadRow:
        return None
    return None if isinstance(tokens, BadRow) else [int(token) for token in tokens.input_ids]
