"""A micro-batch in pieces: every token once, next to no padding, no piece larger than it may be."""

import pytest
import torch

from lora_recipes.model.compare import IGNORED
from lora_recipes.model.pieces import OVERHEAD, TOGETHER, largest_piece, pieces


def batch(*lengths: int) -> dict[str, torch.Tensor]:
    """Padded on the right as a collator does; each token tells its row and place."""
    wide = max(lengths)
    ids, labels, mask = (torch.full((len(lengths), wide), value) for value in (0, IGNORED, 0))
    for row, length in enumerate(lengths):
        ids[row, :length] = 1 + row * 10_000 + torch.arange(length)
        labels[row, length // 3 : length] = ids[row, length // 3 : length]
        mask[row, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def packed(*lengths: int) -> dict[str, torch.Tensor]:
    one = batch(*lengths)
    rows = [slice(0, length) for length in lengths]
    joined = {
        key: torch.cat([one[key][n, part] for n, part in enumerate(rows)])[None] for key in ("input_ids", "labels")
    }
    return joined | {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


def rows_of(cut: list[dict[str, torch.Tensor]]) -> list[tuple[list[int], list[int]]]:
    found = []
    for piece in cut:
        for ids, labels, mask in zip(piece["input_ids"], piece["labels"], piece["attention_mask"], strict=True):
            length = int(mask.sum())
            assert mask[:length].all() and (labels[length:] == IGNORED).all()
            found.append((ids[:length].tolist(), labels[:length].tolist()))
    return sorted(found)


LENGTHS = [(7,), (50, 50, 50, 50), (500, 20, 30, 25), (800, 790, 3), tuple(range(1, 130, 9)), (512, 256, 256, 1)]


@pytest.mark.parametrize("made", [batch, packed], ids=["padded", "packed"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_pieces_hold_every_row_once_and_are_never_larger_than_planned(made, lengths: tuple[int, ...]):
    cut = pieces(made(*lengths))
    whole = batch(*lengths)
    expected = [
        (whole["input_ids"][n, :length].tolist(), whole["labels"][n, :length].tolist())
        for n, length in enumerate(lengths)
        if length > 1  # one token has nothing to predict
    ]
    assert rows_of(cut) == sorted(expected)
    rows, length = largest_piece(len(lengths), max(lengths))
    assert max(piece["input_ids"].numel() for piece in cut) <= max(rows * length, TOGETHER)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_cut_costs_no_more_than_one_by_one_or_all_at_once(lengths: tuple[int, ...]):
    cut = pieces(batch(*lengths))
    cost = sum(piece["input_ids"].numel() + OVERHEAD for piece in cut)
    assert cost <= sum(length + OVERHEAD for length in lengths)
    if len(lengths) * max(lengths) <= TOGETHER:
        assert cost <= len(lengths) * max(lengths) + OVERHEAD


def test_padding_at_the_end_of_a_packed_row_is_not_computed():
    one = packed(30, 20)
    padded = {key: torch.cat([rows, torch.zeros((1, 14), dtype=torch.long)], dim=1) for key, rows in one.items()}
    assert rows_of(pieces(padded)) == rows_of(pieces(one))
    assert len(pieces(packed(1))) == 1


def test_rows_of_like_length_go_together_and_a_long_one_alone():
    assert [tuple(piece["input_ids"].shape) for piece in pieces(batch(20, 500, 30, 25))] == [(3, 30), (1, 500)]
