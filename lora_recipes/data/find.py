"""Which row of which file some tokens are, for what stops in the middle of a training."""

from collections.abc import Sequence

import numpy

from lora_recipes.data.load import LoadedData


def place_of(data: LoadedData, input_ids: Sequence[int]) -> str | None:
    """`file:line` of a training row with these tokens, cut as it is trained; None where none has them: a stream keeps no
    tokens, and some ways of packing cut rows in two."""
    wanted = list(input_ids)
    for rows in data.sources:
        part = rows.train
        if part.prepared.tokens is None:
            continue
        lengths = part.stat("length")
        trained = lengths if data.limit is None else numpy.minimum(lengths, data.limit)
        for index in part.indices[trained == len(wanted)]:
            if part.prepared.tokens[int(index)]["input_ids"][: data.limit] == wanted:
                return part.prepared.place(int(index))
    return None
